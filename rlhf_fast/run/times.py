"""Where the seconds of a run went."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping


class Times:
    """Seconds by what they were spent on. Those of a block within another are the inner one's alone: all of them add up."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._within = [0.0]  # of each open block, the outermost first: seconds that blocks inside it have taken

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the block's seconds under ``name``."""
        began = time.perf_counter()
        self._within.append(0.0)
        try:
            yield
        finally:
            whole = time.perf_counter() - began
            self._seconds[name] += whole - self._within.pop()
            self._within[-1] += whole

    def add(self, seconds: Mapping[str, float]) -> None:
        """Take in what somebody else has measured, within the block that is open."""
        for name, value in seconds.items():
            self._seconds[name] += value
            self._within[-1] += value

    def read(self) -> dict[str, float]:
        """Seconds by name since the last read."""
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds
