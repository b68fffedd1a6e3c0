"""A running guest, seen from outside: frames in, bounded lines out, a deadline for everything, and a kill that works."""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_fast.rewards.sandbox import wire

GUEST = Path(__file__).with_name("guest.py").read_text(encoding="utf-8")
EMPTY = {"PATH": "/usr/local/bin:/usr/bin:/bin"}  # an environment without secrets
START_S = 20.0  # to start an interpreter; longer means that the sandbox or the machine is broken, not the candidate


class SandboxFault(RuntimeError):
    """The sandbox did not do its part, so nothing is known about the candidate."""


class Failed(Exception):
    """The guest did not do its part: died, ran out of time, or said too much. The message says which."""


@dataclass(frozen=True)
class Limits:
    """What one run may use."""

    timeout: float = 5.0  # seconds of wall clock, and about as many of CPU
    memory_mb: int = 512  # address space of the process
    scratch_mb: int = 16  # of files in its /tmp, which are memory too
    output_kb: int = 256  # of what it says


class Guest:
    """A process in a sandbox with one job, ready to run it when the constructor returns.

    Args:
        command: argv that ends in an interpreter; what runs is appended.
        job: role, source and what the role needs, see ``guest.py``.
        pass_fds: file descriptors that the command needs.
        environment: of the command.
        on_close: called after the process was killed.
    Raises:
        SandboxFault: it did not become ready.
    """

    def __init__(
        self,
        command: Sequence[str],
        job: dict[str, Any],
        limits: Limits,
        *,
        pass_fds: Sequence[int] = (),
        environment: Mapping[str, str] = EMPTY,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._pending = b""  # input that the guest has not taken yet
        self._read = b""
        self._left = limits.output_kb * 1024
        self._on_close = on_close
        self._process = subprocess.Popen(
            [*command, "-I", "-S", "-c", GUEST],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd="/",
            pass_fds=pass_fds,
            bufsize=0,
        )
        os.set_blocking(self._process.stdin.fileno(), False)
        megabyte = 1 << 20
        self.send(
            {
                **job,
                "cpu_s": int(limits.timeout) + 1,
                "memory": limits.memory_mb * megabyte,
                "scratch": limits.scratch_mb * megabyte,
            }
        )
        try:
            if self.line(time.monotonic() + START_S) != b"ready":
                raise Failed("it spoke before it was ready")
        except Failed as failure:
            raise SandboxFault(f"a sandbox did not start ({failure}){self._complaint()}") from None

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, value: Any) -> None:
        """Queue a frame; it travels while an answer is awaited."""
        self._pending += wire.frame(value)

    def send_input(self, data: bytes) -> None:
        """Queue what a program reads from its standard input, then its end."""
        self._pending += data
        self._ends = True

    _ends = False  # whether the input ends after what is pending

    def line(self, deadline: float) -> bytes:
        """The next line, without its end.

        Raises:
            Failed: no whole line by ``deadline`` (of ``time.monotonic``), or too long a one, or the process ended.
        """
        while b"\n" not in self._read:
            if not self._pump(deadline):
                raise Failed("ended without an answer")
        line, _, self._read = self._read.partition(b"\n")
        return line

    def output(self, deadline: float) -> bytes:
        """Everything until the guest ends, which it must do with status 0.

        Raises:
            Failed: out of time, too much output, or another status.
        """
        while self._pump(deadline):
            pass
        try:
            status = self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise Failed("out of time") from None
        if status:
            raise Failed(f"ended with status {status}")
        return self._read

    def close(self) -> None:
        """Kill what still runs. bwrap takes its child along, as all of a pid namespace dies with its first process."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            pipe.close()
        self._process.wait()
        self._on_close()

    def _pump(self, deadline: float) -> bool:
        """Move what can be moved of input and output, waiting for some; False when the guest closed its output."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if not self._pending and self._ends and not stdin.closed:
            stdin.close()
        remaining = deadline - time.monotonic()
        poll = select.poll()  # not select, which knows no descriptor above 1023
        poll.register(stdout, select.POLLIN)
        if self._pending:
            poll.register(stdin, select.POLLOUT)
        ready = {fd for fd, _ in poll.poll(remaining * 1000)} if remaining > 0 else set()
        if not ready:
            raise Failed("out of time")
        if self._pending and stdin.fileno() in ready:
            try:
                self._pending = self._pending[os.write(stdin.fileno(), self._pending[:65536]) :]
            except BrokenPipeError:  # it does not want its input; what it says decides
                self._pending = b""
        if stdout.fileno() in ready:
            data = os.read(stdout.fileno(), 65536)
            self._left -= len(data)
            if self._left < 0:
                raise Failed("too much output")
            self._read += data
            return bool(data)
        return True

    def _complaint(self) -> str:
        """What the command wrote to its standard error, after a start that failed."""
        self._process.kill()
        text = self._process.stderr.read(4096).decode(errors="replace")
        self.close()
        return f": {' '.join(text.split())}" if text.strip() else ""
