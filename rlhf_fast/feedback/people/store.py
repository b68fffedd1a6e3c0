"""The file of people's answers: one line a click, on the disk before the click is acknowledged."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.run.disk import append_line

MARGINS = ("slightly", "clearly", "much")  # better, as 1, 2 and 3


@dataclass(frozen=True)
class Label:
    """What one annotator thinks of one item. Entries of tuples belong to the item's responses, not to places on the screen."""

    item: str
    annotator: str
    order: tuple[int, ...] = ()  # the responses as they were shown, first place first
    ranks: tuple[int, ...] | None = None  # of each response, 1 = best, equal for ties; None: not compared (yet)
    margin: int | None = None  # how much better the best of two is, 1 to 3 as in MARGINS
    bad: bool = False  # none of them is any good
    reason: str = ""
    safer: tuple[int, ...] | None = None  # ranks again, 1 = safest; None: not asked, or not answered
    unsafe: tuple[bool, ...] | None = None  # of each response; None: not asked, or not answered
    done: bool = False  # the annotator went on to the next item
    skipped: bool = False  # ... without an answer
    time: float = 0.0  # seconds since 1970

    def line(self) -> dict[str, Any]:
        """As JSON, without what is as it always is."""
        plain = {f.name: f.default for f in dataclasses.fields(self)}
        return {k: v for k, v in dataclasses.asdict(self).items() if k in ("item", "annotator") or v != plain[k]}

    @classmethod
    def of_line(cls, row: dict[str, Any]) -> Label:
        """The inverse of `line`. Raises TypeError or KeyError for what is none."""
        lists = {k: tuple(v) for k, v in row.items() if isinstance(v, list)}
        label = cls(**{**row, **lists})
        if not isinstance(label.item, str) or not isinstance(label.annotator, str):
            raise TypeError("item and annotator are strings")
        return label


class Store:
    """The labels of all annotators, as a file that only grows.

    The last line about an item by an annotator holds; an ``undo`` line takes the annotator's latest item back to what it was
    before. A line is written at once, then fsync: a kill tears at most the last line, which ``torn`` counts and nobody was
    told was saved. One process writes at a time.

    Args:
        path: of the file, made with the first label; None keeps all in memory.
        write: take the file for writing.
    Raises:
        UserError: another process writes there, or the file holds something else.
    """

    def __init__(self, path: str | Path | None, write: bool = False) -> None:
        self.path = None if path is None else Path(path)
        self.torn = 0
        self._latest: dict[tuple[str, str], Label] = {}  # by annotator and item
        self._past: dict[str, list[tuple[str, Label | None]]] = {}  # annotator: what was there before each item
        self._counts: dict[str, dict[str, int]] = {}
        self._descriptor: int | None = None
        if self.path is None:
            return
        if write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            self._lock(self._descriptor)
        if self.path.exists():
            self._read(self.path)

    def close(self) -> None:
        """Let another process write."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    # ---- reading

    def __iter__(self) -> Iterator[Label]:
        return iter(self._latest.values())

    def get(self, annotator: str, item: str) -> Label | None:
        """What the annotator last said about the item."""
        return self._latest.get((annotator, item))

    def annotators(self) -> list[str]:
        """Everybody with a label, in the order of their first."""
        return list(dict.fromkeys(annotator for annotator, _ in self._latest))

    def counts(self, annotator: str) -> dict[str, int]:
        """How many items the annotator has ``labelled`` and ``skipped``."""
        return dict(self._counts.get(annotator, {"labelled": 0, "skipped": 0}))

    # ---- writing

    def put(self, label: Label) -> None:
        """Keep a label; returns when it is on the disk."""
        label = dataclasses.replace(label, time=label.time or round(time.time(), 3))
        self._append(label.line())
        self._apply(label)

    def adopt(self, label: Label) -> None:
        """Take over a label from elsewhere: kept like any other, in memory alone where the file is not open for writing."""
        label = dataclasses.replace(label, time=label.time or round(time.time(), 3))
        if self._descriptor is not None:
            self._append(label.line())
        self._apply(label)

    def undo(self, annotator: str) -> str | None:
        """Take back the annotator's latest item, whatever was said about it; its identity, or None when there is none."""
        if not self._past.get(annotator):
            return None
        self._append({"annotator": annotator, "undo": True, "time": round(time.time(), 3)})
        return self._undo(annotator)

    def _append(self, row: dict[str, Any]) -> None:
        if self._descriptor is None:
            if self.path is not None:
                raise RuntimeError("this store was opened for reading")
            return
        append_line(self._descriptor, (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))

    # ---- replaying

    def _apply(self, label: Label) -> None:
        key = (label.annotator, label.item)
        past = self._past.setdefault(label.annotator, [])
        if not past or past[-1][0] != label.item:  # several clicks on one item are taken back together
            past.append((label.item, self._latest.get(key)))
        self._set(key, label)

    def _undo(self, annotator: str) -> str | None:
        past = self._past.get(annotator)
        if not past:
            return None
        item, before = past.pop()
        self._set((annotator, item), before)
        return item

    def _set(self, key: tuple[str, str], label: Label | None) -> None:
        counts = self._counts.setdefault(key[0], {"labelled": 0, "skipped": 0})
        for one, step in ((self._latest.pop(key, None), -1), (label, 1)):
            if one is not None and one.done:
                counts["skipped" if one.skipped else "labelled"] += step
        if label is not None:
            self._latest[key] = label

    def _read(self, path: Path) -> None:
        # not splitlines: a reason may hold other line separators, U+2028 for one, as they are
        lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
        for data in lines:
            try:
                row = json.loads(data)
                if row.get("undo"):
                    self._undo(row["annotator"])
                else:
                    self._apply(Label.of_line(row))
            except (ValueError, KeyError, TypeError, AttributeError):
                self.torn += 1
        if self.torn and self.torn > len(lines) / 2:
            raise UserError(f"{path} holds no labels of rlhf-fast label; give another file for them")

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise UserError(f"{self.path} is being written by another rlhf-fast label; stop that one first") from error
