"""The clock of a reward function that shares the run's process. Run as a program, see ``deadline.py``.

A line ``SECONDS GRACE SIGNAL MESSAGE`` arms it: the signal goes out after SECONDS, and GRACE seconds later it ends the process. An
empty line disarms it; it leaves when its input ends.
"""

from __future__ import annotations

import os
import select
import signal
import time


def main() -> None:
    parent, rest, steps = os.getppid(), b"", []
    while True:
        wait = max(0.0, steps[0][0] - time.monotonic()) if steps else None
        if not select.select([0], [], [], wait)[0]:
            _, number, message = steps.pop(0)
            if os.getppid() == parent:
                os.write(2, message)
                os.kill(parent, number)
            continue
        data = os.read(0, 65536)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            steps = _steps(line)


def _steps(line: bytes) -> list[tuple[float, int, bytes]]:
    """When to send which signal, and what to say before it."""
    if not line:
        return []
    seconds, grace, number, message = line.split(b" ", 3)
    first = time.monotonic() + float(seconds)
    return [(first, int(number), b""), (first + float(grace), signal.SIGKILL, b"\n" + message + b"\n")]


if __name__ == "__main__":
    main()
