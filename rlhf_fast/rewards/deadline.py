"""A deadline for a reward function in this process. It shares memory with the run, so that nothing can kill it alone.

Past its deadline a function is interrupted, as Ctrl-C would; the run then ends with an error that lets the trainer save. One that
does not come out (it swallows the interruption, or waits in a library) is ended with the whole process, by a thread that saves
first. The clock is a small process beside this one: a library that holds Python's lock lets no thread run, and what ends such a
function is that process.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rlhf_fast.errors import RolloutError

Result = TypeVar("Result")

TIMEOUT = (
    1800.0  # seconds for one call, unless the function has a `timeout`; longer than a killable one's, which costs less
)
COMES_OUT = 2.0  # seconds that an interrupted function has to return or to raise
ANSWERS = 2.0  # further seconds for the thread to say that it runs
SAVES = 900.0  # seconds for saving, from then on
SIGNAL = getattr(signal, "SIGRTMIN", signal.SIGUSR2)  # one that nothing else is likely to use
GUARD = Path(__file__).with_name("deadline_guard.py")
ADVICE = "give it as module:function, to run it in a process that can be killed, or a longer .timeout (seconds)"

_rescues: list[Callable[[], str]] = []
_active: list[_Watch] = []


class Overdue(BaseException):
    """What interrupts a function. No Exception: those are caught by whoever means to go on."""


@contextlib.contextmanager
def rescue(save: Callable[[], str]) -> Iterator[None]:
    """Inside, a process that is ended for a function that does not come out calls ``save`` first, in a thread of its own.

    ``save`` returns what to add to the message.
    """
    _rescues.append(save)
    try:
        yield
    finally:
        _rescues.remove(save)


def call(work: Callable[[], Result], name: str, seconds: float) -> Result:
    """What ``work`` returns or raises, within ``seconds``. Only the main thread can be interrupted; in others it may take longer.

    Args:
        name: of the reward function, in messages.
    Raises:
        RolloutError: it was interrupted at its deadline.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    watch = _Watch(name, seconds)
    try:
        return watch.over(work)
    except Overdue:
        watch.end()
        if not watch.late:  # a call around this one is
            raise
        raise RolloutError(f"{watch.told}; {ADVICE}") from None


class _Watch:
    """One call that is watched."""

    def __init__(self, name: str, seconds: float) -> None:
        self.deadline, self.ended, self._done = time.monotonic() + seconds, False, threading.Event()
        self.told = f"reward '{name}', which runs in this process, gave no answer in {seconds:g} s"

    @property
    def late(self) -> bool:
        return time.monotonic() >= self.deadline

    def over(self, work: Callable[[], Result]) -> Result:
        # the handler stays: the signal may still come when the call is over, and without one ends the process
        signal.signal(SIGNAL, _interrupt)
        lost = "nothing can interrupt it: the process is ended; go on with --resume, from the last checkpoint"
        left = self.deadline - time.monotonic()
        _guard().arm(left, COMES_OUT + ANSWERS, f"error: {self.told}, and {lost}; {ADVICE}")
        _active.append(self)
        threading.Thread(target=self._wait, args=(left + COMES_OUT,), daemon=True).start()
        try:
            return work()
        finally:
            self.end()

    def end(self) -> None:
        """The call is over; may be said twice."""
        self.ended = True  # nothing interrupts what follows
        self._done.set()
        if self in _active:
            _active.remove(self)
            _guard().disarm()

    def _wait(self, seconds: float) -> None:
        """The thread's part."""
        if self._done.wait(seconds):
            return
        _guard().arm(SAVES, 0.0, f"error: {self.told}, does not come out, and saving takes long: the process is ended")
        saved = "".join(save() for save in _rescues[-1:])
        os.write(
            2, f"error: {self.told} and does not come out when interrupted: it is ended{saved}; {ADVICE}\n".encode()
        )
        os._exit(2)


def _interrupt(number: int, frame: Any) -> None:
    if any(watch.late and not watch.ended for watch in _active):
        raise Overdue


class _Guard:
    """The process beside this one, see ``deadline_guard.py``. It ends with this one."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(GUARD)], stdin=subprocess.PIPE, bufsize=0, start_new_session=True
        )

    def arm(self, seconds: float, grace: float, said: str) -> None:
        """Signal this process after ``seconds``, and end it ``grace`` seconds later with these words on stderr."""
        self._tell(f"{seconds} {grace} {int(SIGNAL)} {' '.join(said.split())}\n")

    def disarm(self) -> None:
        self._tell("\n")

    def _tell(self, line: str) -> None:
        with contextlib.suppress(OSError):  # somebody has killed it
            self._process.stdin.write(line.encode())


@functools.cache
def _guard_of(process: int) -> _Guard:
    return _Guard()


def _guard() -> _Guard:
    """One for each process: a fork has none."""
    return _guard_of(os.getpid())
