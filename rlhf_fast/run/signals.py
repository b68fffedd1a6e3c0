"""SIGTERM and SIGINT as a request: finish the step, save, leave."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


class Abandoned(KeyboardInterrupt):
    """Ends what a signal lets go of; whatever lets Ctrl-C pass lets this pass."""


class StopSignals:
    """While entered, the first SIGTERM or Ctrl-C only sets ``requested``; a second Ctrl-C interrupts at once.

    .. code-block:: python

        with StopSignals() as stop:
            for batch in batches:
                step(batch)
                if stop.requested:
                    save()
                    break

    Handlers can only be set in the main thread; elsewhere this does nothing. On exit the earlier handlers return.
    """

    def __init__(self) -> None:
        self.name: str | None = None  # "SIGTERM" or "SIGINT" once one came
        self._abandons = False
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.name is not None

    def unless_requested(self, work: Callable[[], Result]) -> Result | None:
        """What ``work`` returns; None when a signal came before its end, which ends it wherever it is."""
        try:
            self._abandons = True
            try:
                return None if self.requested else work()
            finally:
                self._abandons = False
        except Abandoned:
            return None

    def __enter__(self) -> StopSignals:  # noqa: PYI034 (typing.Self needs Python 3.11)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        first, self.name = not self.requested, signal.Signals(number).name
        # a handler may run in the middle of any write, so it may not log or print
        os.write(2, f"\n{self.name}: finishing this step, then saving (Ctrl-C again stops at once)\n".encode())
        if self._abandons and first:
            raise Abandoned
