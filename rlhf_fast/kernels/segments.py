"""What padded (B, T) and packed (N,) tensors have in common: masks, sums per sequence, and means over tokens.

Packed tensors hold their sequences end to end: sequence i is ``[cu_seqlens[i], cu_seqlens[i + 1])``.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

AGGREGATES = ("token", "sequence", "constant")


def promote(x: Tensor) -> Tensor:
    """Return ``x`` in float32, the working precision of every operation; float64 stays (for gradcheck)."""
    return x if x.dtype == torch.float64 else x.float()


def select(x: Tensor, mask: Tensor) -> Tensor:
    """Return ``x`` promoted, with 0 where ``mask`` is off. A masked NaN reaches neither the value nor the gradient."""
    return torch.where(mask, promote(x), 0.0)


def check_tokens(mask: Tensor, cu_seqlens: Tensor | None, **tensors: Tensor | None) -> None:
    """Raise ValueError unless every tensor has the mask's shape and device: (B, T), or (N,) with ``cu_seqlens``."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}; write `mask.bool()`")
    for name, x in tensors.items():
        if x is not None and x.shape != mask.shape:
            raise ValueError(f"{name} must have the mask's shape {tuple(mask.shape)}, got {tuple(x.shape)}")
    check_devices(mask, cu_seqlens=cu_seqlens, **tensors)
    if cu_seqlens is None:
        return
    if mask.dim() != 1 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        raise ValueError(
            f"with cu_seqlens (B + 1,) per-token tensors are packed (N,); got cu_seqlens "
            f"{tuple(cu_seqlens.shape)} and tokens {tuple(mask.shape)}"
        )
    # reading the boundaries is cheap on the CPU, a stall on a GPU and impossible in a compiled graph
    if not torch.compiler.is_compiling() and (cu_seqlens.device.type == "cpu" or debugging()):
        check_boundaries(cu_seqlens, len(mask))


def check_boundaries(cu_seqlens: Tensor, num_tokens: int) -> None:
    """Raise ValueError, naming the first wrong entry, unless they rise (or stay) from 0 to the number of tokens."""
    ends = cu_seqlens.tolist()
    wrong = [i for i in range(1, len(ends)) if not ends[i - 1] <= ends[i] <= num_tokens]
    wrong = ([0] if ends[0] != 0 else []) + wrong + ([len(ends) - 1] if ends[-1] != num_tokens else [])
    if wrong:
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens, {num_tokens}; entry {wrong[0]} is {ends[wrong[0]]}"
        )


def debugging() -> bool:
    """Whether checks may wait for the GPU."""
    return os.environ.get("RLHF_FAST_DEBUG") == "1"


def check_devices(like: Tensor, **tensors: Tensor | None) -> None:
    """Raise ValueError unless every tensor is where ``like`` is: native kernels are given addresses."""
    for name, x in tensors.items():
        if x is not None and x.device != like.device:
            raise ValueError(f"{name} is on {x.device}, the other tensors are on {like.device}; move it there")


def segment_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Return the sequence of each packed token, (N,) long. Reads nothing back; sequences may be empty."""
    tokens = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(tokens, cu_seqlens[1:].contiguous(), right=True)


def sequence_sum(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Sum (B, T) or packed (N,) tokens over each sequence, (B,); differentiable."""
    if cu_seqlens is None:
        return x.sum(-1)
    return x.new_zeros(len(cu_seqlens) - 1).index_add(0, segment_ids(cu_seqlens, len(x)), x)


def to_tokens(x: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Repeat one value per sequence, (B,), over its tokens; the result has (or broadcasts to) the mask's shape."""
    return x.unsqueeze(-1) if cu_seqlens is None else x[segment_ids(cu_seqlens, len(mask))]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of the unmasked entries as a scalar, 0 if there are none."""
    return select(x, mask).sum() / mask.sum().clamp(min=1)


def aggregate(
    x: Tensor, mask: Tensor, how: str, denominator: Tensor | float | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Reduce a per-token loss to sum / denominator.

    Args:
        x: loss of each token, 0 where masked. (B, T) or (N,).
        how: ``"token"`` sums tokens, over their number; ``"sequence"`` sums each sequence's mean, over the number of
            sequences that have tokens; ``"constant"`` sums tokens over a constant, B * T if none is given.
        denominator: replaces the local count, so that the micro-batches of a window add up.
    """
    if how == "sequence":
        # one sequence per row: a lone (N,) without cu_seqlens is one sequence
        counts = sequence_sum(mask.to(x.dtype), cu_seqlens)
        total = (sequence_sum(x, cu_seqlens) / counts.clamp(min=1)).sum()
        local = (counts > 0).sum().clamp(min=1)
    elif how == "token":
        total, local = x.sum(), mask.sum().clamp(min=1)
    elif how == "constant":
        if denominator is None and cu_seqlens is not None:
            raise ValueError("aggregate='constant' needs a denominator for packed tokens, e.g. B * max_length")
        total, local = x.sum(), max(mask.numel(), 1)
    else:
        raise ValueError(f"unknown aggregate {how!r}; known: {', '.join(AGGREGATES)}")
    return total / (local if denominator is None else denominator)
