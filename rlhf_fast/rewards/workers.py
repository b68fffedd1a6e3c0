"""Processes that answer questions one at a time, each by a deadline; one that hangs or dies is replaced."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from rlhf_fast.rewards.faults import Fault

START_S = 120.0  # to import what a worker needs, on a busy machine
TRIES = 2  # of an item whose worker was stopped, swapped out or starved, which says nothing about the item


class WorkerFault(RuntimeError):
    """A worker did not answer; the message says why."""


class Stalled(WorkerFault):
    """A worker did not answer, and had hardly any processor time to do so."""


class Worker:
    """A Python process that runs ``script``: it says ``ready``, then answers each line of JSON with one.

    It gets the deadline with each item and ends itself soon after it, so that none is left hanging without its parent.

    Args:
        quiet: keep what it prints to stderr, for a message when it cannot start; it must print little then.
    """

    def __init__(self, script: Path, quiet: bool = True) -> None:
        # not multiprocessing: forking beside CUDA and threads is unsafe, and spawning would import the user's main module
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if quiet else None,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the run, which finishes its step
        )
        os.set_blocking(self._process.stdin.fileno(), False)  # a process that is stopped reads nothing
        self._read = b""
        try:
            if self._line(START_S) != b"ready":
                raise WorkerFault("spoke before it was ready")
        except (WorkerFault, TimeoutError) as fault:
            self.close()
            stderr = self._process.stderr
            complaint = stderr.read().decode(errors="replace").strip().rpartition("\n")[2] if stderr else "see above"
            raise WorkerFault(f"could not start a worker ({fault}): {complaint}") from None

    def ask(self, item: Any, timeout: float) -> Any:
        """The answer to ``item``.

        Raises:
            WorkerFault: none by then; close the worker.
            Stalled: and it has worked for less than half of that time.
        """
        began, deadline = self._worked(), time.monotonic() + timeout
        rest = memoryview(json.dumps([timeout, item]).encode() + b"\n")
        try:
            while rest:  # a pipe takes what it has room for
                self._await(self._process.stdin, select.POLLOUT, deadline, timeout)
                rest = rest[self._process.stdin.write(rest) or 0 :]
            return json.loads(self._line(timeout))
        except TimeoutError as late:
            kind = Stalled if self._worked() - began < timeout / 2 else WorkerFault
            raise kind(str(late)) from None
        except OSError:
            raise WorkerFault("died") from None
        except ValueError:  # something else wrote to where answers go
            raise WorkerFault("gave an answer that cannot be read") from None

    def close(self) -> None:
        """Kill the process, and those that it has started."""
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()

    def _worked(self) -> float:
        """Seconds of processor time that the process has had."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # no /proc here: nobody can tell, and no answer is the item's fault
            return math.inf
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _line(self, timeout: float) -> bytes:
        deadline, stdout = time.monotonic() + timeout, self._process.stdout
        while b"\n" not in self._read:
            self._await(stdout, select.POLLIN, deadline, timeout)
            if not (data := os.read(stdout.fileno(), 65536)):
                raise WorkerFault("died")
            self._read += data
        line, _, self._read = self._read.partition(b"\n")
        return line

    @staticmethod
    def _await(pipe: IO[bytes], event: int, deadline: float, timeout: float) -> None:
        """Until ``pipe`` is ready for ``event``."""
        poll = select.poll()
        poll.register(pipe, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError(f"gave no answer in {timeout:g} s")


class WorkerPool:
    """Up to ``size`` workers, started when they are first needed.

    Args:
        script: what each runs.
        size: how many; None: one per core.
        timeout: seconds for one item.
    """

    def __init__(self, script: Path, size: int | None, timeout: float) -> None:
        size = size or len(os.sched_getaffinity(0))
        self._script, self._timeout = script, timeout
        self._threads = ThreadPoolExecutor(size, script.stem)
        self._places: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()  # idle workers; None: one not started
        for _ in range(size):
            self._places.put(None)

    def map(self, items: Iterable[Any]) -> list[Any]:
        """The answer to each item, in order; a ``Fault`` where there was none."""
        return list(self._threads.map(self._ask, items))

    def _ask(self, item: Any) -> Any:
        worker = self._places.get()
        try:
            for tries in range(TRIES):
                try:
                    worker = worker or Worker(self._script)
                    return worker.ask(item, self._timeout)
                except WorkerFault as fault:
                    if worker:
                        worker.close()
                    worker = None
                    if tries + 1 == TRIES or not isinstance(fault, Stalled):
                        return Fault(str(fault))
        finally:
            self._places.put(worker)
