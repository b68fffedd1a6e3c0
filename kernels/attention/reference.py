"""The definition, in plain PyTorch: all scores, a mask, a softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.kernels.segments import promote


def unsupported(op: str, *tensors: Tensor, **options) -> str | None:
    return None


def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float, window: int, longest: int
) -> Tensor:
    """Arguments as in the public function, ``window`` and ``longest`` at most S; returns (B, H, dv)."""
    batch, heads, width = query.shape
    keys, values = (x[:batch, :, :longest] for x in (keys, values))
    column, end = torch.arange(longest, device=query.device), lengths.long()[:, None]
    seen = ((column < end) & (column >= end - window))[:, None, None]  # (B, 1, 1, L)
    grouped = promote(query).view(batch, keys.shape[1], heads // keys.shape[1], width)
    scores = (grouped @ promote(keys).transpose(2, 3)).mul(scale).masked_fill(~seen, float("-inf"))
    # a sequence without keys has no softmax
    weights = torch.where(seen, scores.softmax(-1), 0.0)
    # selected, not multiplied: what nobody sees may be NaN
    shown = torch.where(seen.transpose(2, 3), promote(values), 0.0)
    return (weights @ shown).view(batch, heads, values.shape[3]).to(query.dtype)
