"""Lines that a kill cannot take, and what a disk refuses, as one sentence: what, where, why, and what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_fast.errors import UserError

REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, the quota is used up",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "give an output_dir that can be written to",
    errno.EACCES: "give an output_dir that can be written to",
    errno.EPERM: "give an output_dir that can be written to",
    errno.EIO: "the disk is failing: look into it, or give another output_dir",
}


@contextmanager
def disk_faults(what: str, where: Path | str) -> Iterator[None]:
    """Turn what a disk refuses within the block into a UserError that names ``what`` was written and ``where``.

    Everything that a run keeps is written under another name first, so earlier checkpoints are whole whatever happens here.
    """
    try:
        yield
    except OSError as error:
        remedy = REMEDIES.get(error.errno, "look into it, or give another output_dir")
        raise UserError(_sentence(what, where, str(error.strerror or error), remedy)) from error
    except Exception as error:
        # safetensors reports a full disk as its own exception
        if type(error).__name__ != "SafetensorError":
            raise
        raise UserError(_sentence(what, where, str(error), "free some space, or give another output_dir")) from error


def append_line(descriptor: int, data: bytes) -> None:
    """Put a line at the end of a file; it is on the disk on return. A kill tears at most this one.

    Args:
        descriptor: of the file, opened to append (``O_APPEND``) and to read.
        data: the line, with its newline.
    """
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        data = b"\n" + data  # a line that a kill tore stays a line of its own
    while data:
        data = data[os.write(descriptor, data) :]
    os.fsync(descriptor)


def _sentence(what: str, where: Path | str, why: str, remedy: str) -> str:
    return (
        f"{what} could not be written to {where}: {why}; {remedy}. Earlier checkpoints are whole: go on with --resume"
    )
