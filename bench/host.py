"""What Linux says of memory, this process's and the machine's."""

from __future__ import annotations

from pathlib import Path


def memory() -> dict[str, int]:
    """Bytes by the kernel's names: VmRSS resident, VmHWM its peak, RssAnon allocated, RssFile mapped from files.

    Raises:
        OSError: this is no Linux.
    """
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: 1024 * int(words[1]) for words in lines if words[-1] == "kB"}


def free() -> int:
    """Bytes that the machine can still give."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def forget_peak() -> None:
    """Let VmHWM begin again at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
