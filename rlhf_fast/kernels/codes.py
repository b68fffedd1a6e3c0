"""The enums of csrc/ops.h, by the names that Python uses: what the compiled kernels of every family are called with."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ESTIMATOR_CODES = {"k1": 0, "k2": 1, "k3": 2, "k3+": 3, "abs": 4}
KIND_CODES = {"clip": 0, "cispo": 1, "reinforce": 2}
LEVEL_CODES = {"token": 0, "sequence": 1, "sequence_token": 2}
AGGREGATE_CODES = {"token": 0, "sequence": 1, "constant": 2}


def matrix_arguments(x: Tensor) -> tuple[int, int, int, int, int]:
    """The address, dtype code, rows, columns and row stride that stand for a matrix."""
    return x.data_ptr(), DTYPE_CODES[x.dtype], x.shape[0], x.shape[1], x.stride(0)


def address(x: Tensor | None) -> int:
    """The address that stands for a tensor, 0 for none."""
    return 0 if x is None else x.data_ptr()
