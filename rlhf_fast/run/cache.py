"""Numbers that are dear to compute, kept on disk between runs under a hash of all that they depend on."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """``RLHF_FAST_CACHE``, else ``rlhf_fast`` in the user's cache folder."""
    if given := os.environ.get("RLHF_FAST_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rlhf_fast"


def read_numbers(path: Path, key: str, shape: tuple[int, ...]) -> Tensor | None:
    """What :func:`write_numbers` left at ``path``, float32; None when it is not there, and when it cannot be trusted: damaged,
    of another shape, or kept for another ``key``. A warning then says why."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            about, numbers = file.metadata() or {}, file.get_tensor("numbers")
    except (SafetensorError, OSError) as error:
        return _distrust(path, f"it cannot be read ({error})")
    if about.get("key") != key:
        return _distrust(path, "it was kept for other data, another model or other settings")
    if numbers.shape != shape or about.get("sha256") != _sha256(numbers):
        return _distrust(path, "its numbers are not those that were written")
    return numbers


def write_numbers(path: Path, key: str, numbers: Tensor) -> None:
    """Keep float32 ``numbers`` at ``path``. A disk that refuses costs the next run its time, not this one its life."""
    content = save({"numbers": numbers.contiguous()}, {"key": key, "sha256": _sha256(numbers)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # under another name first: whoever reads meanwhile finds all of it or nothing
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem}-", delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("%s: not kept for the next run (%s)", path, error)


def _distrust(path: Path, why: str) -> None:
    logger.warning("%s: %s; computing anew", path, why)


def _sha256(numbers: Tensor) -> str:
    return hashlib.sha256(numbers.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
