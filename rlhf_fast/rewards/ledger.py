"""Answers that were waited and paid for, in a file: a call whose answer is in it is never made again."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.run.disk import append_line

IN_MEMORY = 100_000  # answers kept without a file: an online judge of a long run sees millions


class Ledger:
    """Key -> answer, both JSON. With a path, every answer is on the disk before anybody sees it.

    One line an answer, appended in one write: a kill tears at most the last line, which is passed over when the file is read
    again (``torn`` counts such lines). Processes may share a file; each knows what was there when it started.

    Args:
        path: of the file, made when the first answer comes; None keeps answers in memory.
    Raises:
        UserError: the file holds something else.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.torn = 0
        self._answers: dict[str, Any] = {}
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> Any | None:
        """The answer under ``key``, or None."""
        return self._answers.get(key)

    def put(self, key: str, answer: Any) -> None:
        """Keep an answer; returns when it is on the disk."""
        self._answers[key] = answer
        if self.path is None:
            if len(self._answers) > IN_MEMORY:
                del self._answers[next(iter(self._answers))]  # the oldest
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": key, "answer": answer}, ensure_ascii=False) + "\n"
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            append_line(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def _read(self, path: Path) -> None:
        # not splitlines: a reply may hold other line separators, U+2028 for one, as they are
        for text in filter(str.strip, path.read_text(encoding="utf-8", errors="replace").split("\n")):
            try:
                row = json.loads(text)
                self._answers[row["key"]] = row["answer"]
            except (ValueError, KeyError, TypeError):
                self.torn += 1
        if self.torn and not self._answers:
            raise UserError(f"{path} holds no answers of earlier calls; give another file for them, or delete it")


def key_of(call: Any) -> str:
    """A hash of all that an answer depends on. ``call`` is JSON; the order of its keys does not matter."""
    text = json.dumps(call, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
