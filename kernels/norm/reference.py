"""The definition, in plain PyTorch, in the order of operations of transformers' modules: the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.kernels.segments import promote


def unsupported(op: str, *tensors: Tensor, **options) -> str | None:
    return None


def _scale(weight: Tensor, offset: float) -> Tensor:
    return weight if offset == 0.0 else offset + weight


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool) -> tuple[Tensor, Tensor]:
    """Return the normed rows (N, D) and 1 / root mean square of each, (N,) in working precision."""
    wide = promote(x)
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    unit = wide * rstd
    if round_first:
        return _scale(weight, offset) * unit.to(x.dtype), rstd[:, 0]
    return (unit * _scale(promote(weight), offset)).to(x.dtype), rstd[:, 0]


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, round_first: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Return d x (N, D), and d weight (D,), empty unless it is needed."""
    grad, unit = promote(grad), promote(x) * rstd[:, None]
    scaled = grad * _scale(promote(weight), offset)
    d_x = rstd[:, None] * (scaled - unit * (scaled * unit).mean(-1, keepdim=True))
    if not need_weight:
        return d_x.to(x.dtype), weight.new_empty(0)
    seen = promote(unit.to(x.dtype)) if round_first else unit
    return d_x.to(x.dtype), (grad * seen).sum(0).to(weight.dtype)
