"""What people compare: prompts with their responses, each under an identity that neither file nor order changes."""

from __future__ import annotations

import random
import threading
import unicodedata
from collections.abc import Iterable
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.feedback.candidates import Candidates
from rlhf_fast.rewards.ledger import key_of
from rlhf_fast.rewards.verifiers import text_of

LONGEST_NAME = 64


def item_id(candidates: Candidates) -> str:
    """A hash of prompt and responses: the order of ``candidates.responses`` follows from them, so indices keep meaning."""
    return key_of([candidates.prompt, list(candidates.responses)])[:20]


class Items:
    """The candidates in the order in which they are shown; more may come while people work. Safe across threads."""

    def __init__(self, candidates: Iterable[Candidates] = ()) -> None:
        self._lock = threading.Lock()
        self._rows: list[tuple[str, Candidates]] = []
        self._places: dict[str, int] = {}
        self.expected = 0  # items in the end, where more are being written
        self.fault: str | None = None  # why no more will come after all
        self.extend(candidates)

    def extend(self, candidates: Iterable[Candidates]) -> None:
        """Add what is not there yet."""
        with self._lock:
            for c in candidates:
                identity = item_id(c)
                if identity not in self._places:
                    self._places[identity] = len(self._rows)
                    self._rows.append((identity, c))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> tuple[str, Candidates]:
        return self._rows[place]

    def place(self, identity: str) -> int | None:
        """Where an item stands, or None for one that is not here."""
        return self._places.get(identity)


def shown_order(identity: str, annotator: str, count: int) -> list[int]:
    """The responses in the order in which this annotator sees them: each sees another, and the same one every time."""
    order = list(range(count))
    random.Random(key_of([identity, annotator])).shuffle(order)
    return order


def turns(prompt: Any) -> list[dict[str, str]]:
    """A prompt for the page: who says what. A plain string is said by nobody."""
    if isinstance(prompt, str):
        return [{"role": "", "text": prompt}]
    return [{"role": message["role"], "text": text_of([message])} for message in prompt]


def annotator_name(name: Any) -> str:
    """A name as it is kept: one line, composed, without space around it.

    Raises:
        UserError: no string, empty, too long, or with characters that cannot be seen.
    """
    if not isinstance(name, str):
        raise UserError(f"the annotator must be a name, got {type(name).__name__}")
    name = unicodedata.normalize("NFC", name).strip()
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise UserError(f"an annotator's name has 1 to {LONGEST_NAME} visible characters")
    return name
