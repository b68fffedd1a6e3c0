"""What Linux says of this process's memory."""

from __future__ import annotations

from pathlib import Path


def memory() -> dict[str, int]:
    """Bytes by the kernel's names: VmRSS resident, VmHWM its peak, RssAnon allocated, RssFile mapped from files.

    Raises:
        OSError: this is no Linux.
    """
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: 1024 * int(words[1]) for words in lines if words[-1] == "kB"}


def forget_peak() -> None:
    """Let VmHWM begin again at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
