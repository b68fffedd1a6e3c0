"""What an AI judge is shown and what its verdict is worth: rubrics, orders of presentation, and the vote over them.

Judges prefer what stands first, or last (Zheng et al. 2023, arXiv:2306.05685). Every comparison is therefore shown in an order
and its reverse, and counts only where both say the same; otherwise it is a tie.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.rewards.verifiers import text_of

RUBRICS = Path(__file__).with_name("rubrics")
SHIPPED = ("compare", "score", "principle")
LABELS = string.ascii_uppercase
BEST = 10  # the highest grade; the lowest is 1
_PLACE = re.compile(r"\{([A-Za-z_]\w*)\}")
_VERDICT = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)


class Rubric:
    """A template of what the judge is asked.

    ``{prompt}`` is the conversation, ``{responses}`` the responses, each between tags that name it; any other ``{name}`` is
    the row's column of that name. The judge has to end with its verdict in double square brackets (see the built-in ones).

    Args:
        source: ``compare``, ``score``, ``principle`` (which shows ``{principle}``), or a text file.
    Raises:
        UserError: no such file, or a template without ``{prompt}`` or ``{responses}``.
    """

    def __init__(self, source: str | Path) -> None:
        path = RUBRICS / f"{source}.txt" if str(source) in SHIPPED else Path(source)
        try:
            self.text = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"rubric: {source} cannot be read ({error}); give {', '.join(SHIPPED)} or a text file"
            ) from None
        places = dict.fromkeys(_PLACE.findall(self.text))
        for name in ("prompt", "responses"):
            if name not in places:
                raise UserError(f"rubric {source}: has no {{{name}}}, where the {name} should stand")
        self.columns = [name for name in places if name not in ("prompt", "responses")]
        self.name = f"{path.stem}-{hashlib.sha256(self.text.encode()).hexdigest()[:8]}"

    def ask(self, prompt: Any, responses: Sequence[Any], columns: Mapping[str, Any]) -> list[dict[str, str]]:
        """The conversation with the judge about ``responses``, in the order given.

        Raises:
            UserError: a column that the rubric shows is missing.
        """
        if missing := [name for name in self.columns if columns.get(name) is None]:
            raise UserError(f"rubric {self.name}: shows {{{missing[0]}}}, but the row has no column '{missing[0]}'")
        parts = {name: str(columns[name]) for name in self.columns}
        parts["prompt"] = _closed(conversation_text(prompt))
        labels = [f"response {label}" if len(responses) > 1 else "response" for label in LABELS]
        shown = zip(labels, (_closed(text_of(r)) for r in responses))
        parts["responses"] = "\n\n".join(f"<{label}>\n{text}\n</{label}>" for label, text in shown)
        # in one pass: a response that holds {prompt} stays as it is
        return [{"role": "user", "content": _PLACE.sub(lambda place: parts[place[1]], self.text)}]


def conversation_text(prompt: Any) -> str:
    """A prompt for reading: a string as it is, messages each under the name of its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{m['role'].capitalize()}: {text_of([m])}" for m in prompt)


def _closed(text: str) -> str:
    """A text that cannot close the tags around it."""
    return re.sub(r"</(?=\s*(?:response|conversation))", "< /", text, flags=re.IGNORECASE)


# ------------------------------------------------------------------------------------------------------- verdicts


def parse_ranking(text: str, count: int) -> list[int] | None:
    """The rank of each of ``count`` responses, 0 = best, equal for ties, in the last ``[[...]]``; None if there is none.

    ``[[B > A = C]]`` gives [1, 0, 1]. Of two, the better one alone or the word tie (or C) will do.
    """
    found = _VERDICT.findall(text)
    if not found:
        return None
    verdict = re.sub(r"\bRESPONSE\b|[\s*]", "", found[-1].upper())
    if count == 2 and verdict in ("A", "B", "C", "TIE"):
        return {"A": [0, 1], "B": [1, 0]}.get(verdict, [0, 0])
    levels = [level.split("=") for level in verdict.split(">")]
    if sorted(itertools.chain(*levels)) != list(LABELS[:count]):
        return None
    return [next(i for i, level in enumerate(levels) if label in level) for label in LABELS[:count]]


def parse_score(text: str) -> float | None:
    """The grade in the last ``[[...]]``, brought from 1..10 to 0..1; None without one, or outside."""
    found = _VERDICT.findall(text)
    match = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*(?:/\s*{BEST})?\s*", found[-1]) if found else None
    grade = float(match[1]) if match else 0.0
    return (grade - 1) / (BEST - 1) if 1 <= grade <= BEST else None


# ----------------------------------------------------------------------------------------------------------- votes


def presentations(count: int, together: int, swap: bool) -> list[tuple[int, ...]]:
    """The orders in which ``count`` responses are shown: subsets of ``together``, each followed by its reverse if ``swap``."""
    subsets = itertools.combinations(range(count), min(together, count))
    return [order for subset in subsets for order in ((subset, subset[::-1]) if swap else (subset,))]


@dataclass
class Standing:
    """What the verdicts on K responses come to.

    ``preferred[i, j]`` with i < j: 1 when i is better in every order, -1 when j is, 0 for a tie, said or because the orders
    disagree; None where a verdict is missing.
    """

    count: int  # K
    preferred: dict[tuple[int, int], int | None]
    disagreed: int = 0  # pairs that one order decides otherwise than another
    first_won: int = 0  # pairs in single verdicts in which the response shown first is better
    last_won: int = 0

    @functools.cached_property
    def points(self) -> list[float | None]:
        """The share of the others that each response beats, ties half (Copeland); None for one without any verdict."""
        points: list[list[float]] = [[] for _ in range(self.count)]
        for (i, j), sign in self.preferred.items():
            if sign is not None:
                points[i].append((1 + sign) / 2)
                points[j].append((1 - sign) / 2)
        return [sum(p) / len(p) if p else None for p in points]

    @property
    def complete(self) -> bool:
        """Whether every pair has its verdicts."""
        return None not in self.preferred.values()

    def ranking(self) -> list[int]:
        """Indices best first, of equally good ones the first only: a strict order, as ranked data needs it."""
        best: dict[float, int] = {}
        for i, points in enumerate(self.points):
            if points is not None:
                best.setdefault(points, i)
        return [best[points] for points in sorted(best, reverse=True)]


def vote(count: int, verdicts: Sequence[tuple[tuple[int, ...], list[int] | None]]) -> Standing:
    """Put the verdicts on ``count`` responses together.

    Args:
        verdicts: the order shown, and the rank of each in that order (None: no verdict).
    """
    standing = Standing(count, dict.fromkeys(itertools.combinations(range(count), 2)))
    signs: dict[tuple[int, int], list[int | None]] = {pair: [] for pair in standing.preferred}
    for order, ranks in verdicts:
        for a, b in itertools.combinations(range(len(order)), 2):
            i, j = order[a], order[b]
            sign = None if ranks is None else (ranks[b] > ranks[a]) - (ranks[b] < ranks[a])
            standing.first_won += sign == 1
            standing.last_won += sign == -1
            signs[min(i, j), max(i, j)].append(sign if sign is None or i < j else -sign)
    for pair, said in signs.items():
        if said and None not in said:
            agree = len(set(said)) == 1
            standing.preferred[pair] = said[0] if agree else 0
            standing.disagreed += not agree
    return standing
