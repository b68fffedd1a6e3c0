"""Triton kernel of the pairwise reward loss: loss and slopes of a pair in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels.kl.triton_impl import log_sigmoid, sigmoid
from rlhf_fast.kernels.logprobs.triton_impl import OPTIONS, unsupported

__all__ = ["pairwise_reward_loss", "unsupported"]

BLOCK, WARPS = 128, 1


@triton.jit
def pairwise_kernel(
    chosen_ptr,
    rejected_ptr,
    margin_ptr,
    losses_ptr,
    slopes_ptr,
    num_pairs,
    center,
    HAS_MARGIN: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_pairs
    chosen = tl.load(chosen_ptr + at, mask=inside, other=0.0)
    rejected = tl.load(rejected_ptr + at, mask=inside, other=0.0)
    d = chosen - rejected
    if HAS_MARGIN:
        d -= tl.load(margin_ptr + at, mask=inside, other=0.0)
    # selected, as an infinite reward times a center of 0 would be NaN
    both = tl.where(center == 0.0, 0.0, chosen + rejected)
    tl.store(losses_ptr + at, center * both * both - log_sigmoid(d), mask=inside)
    if HAS_SLOPES:
        lose, pull = sigmoid(-d), 2.0 * center * both
        tl.store(slopes_ptr + at, pull - lose, mask=inside)
        tl.store(slopes_ptr + num_pairs + at, pull + lose, mask=inside)


def pairwise_reward_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, center: float, need_slopes: bool
) -> tuple[Tensor, Tensor]:
    num_pairs = chosen.numel()
    losses = torch.empty_like(chosen)
    slopes = chosen.new_empty((2, *chosen.shape) if need_slopes else (0,))
    if num_pairs:
        pairwise_kernel[(triton.cdiv(num_pairs, BLOCK),)](
            chosen,
            rejected,
            chosen if margin is None else margin,
            losses,
            slopes,
            num_pairs,
            center,
            HAS_MARGIN=margin is not None,
            HAS_SLOPES=need_slopes,
            BLOCK=BLOCK,
            num_warps=WARPS,
            **OPTIONS,
        )
    return losses, slopes
