"""Checkpoints of random weights, a file at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def write_shards(groups: Iterable[dict[str, Tensor]], folder: Path) -> tuple[int, int]:
    """One safetensors file for each group of tensors, and their index. Returns bytes of weights and number of files."""
    from safetensors.torch import save_file

    index: dict[str, str] = {}
    total = files = 0
    for files, group in enumerate(groups, start=1):
        file = f"model-{files:05d}.safetensors"
        save_file(group, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(group, file))
        total += sum(x.nbytes for x in group.values())
    about = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(about))
    return total, files
