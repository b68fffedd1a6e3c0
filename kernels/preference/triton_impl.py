"""Triton kernel of the preference losses: losses, rewards and slopes of a pair in one pass."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels.kl.triton_impl import log_sigmoid, sigmoid
from rlhf_fast.kernels.logprobs.triton_impl import OPTIONS, unsupported

__all__ = ["dpo_loss", "unsupported"]

# a batch holds a few hundred pairs: small blocks spread them over the processors
BLOCK, WARPS = 128, 1


@triton.jit
def margin_loss(w, l, beta, smoothing, log_kept, log_flipped, KIND: tl.constexpr):
    """The kinds that see d = beta * (w - l) alone: the loss and its slope in w, minus that in l."""
    d = beta * (w - l)
    win, lose, on_win, on_lose = sigmoid(d), sigmoid(-d), log_sigmoid(d), log_sigmoid(-d)
    loss = -(1.0 - smoothing) * on_win - smoothing * on_lose
    slope = beta * (smoothing * win - (1.0 - smoothing) * lose)
    if KIND == "robust":
        inverse = 1.0 / (1.0 - 2.0 * smoothing)
        loss = inverse * (smoothing * on_lose - (1.0 - smoothing) * on_win)
        slope = -beta * inverse * ((1.0 - smoothing) * lose + smoothing * win)
    elif KIND == "ipo":
        error = w - l - 0.5 / beta
        loss = error * error
        slope = 2.0 * error
    elif KIND == "hinge":
        # written so that a NaN stays one
        loss = tl.where(d >= 1.0, 0.0, 1.0 - d)
        slope = tl.where(d < 1.0, -beta, 0.0)
    elif KIND == "exo_pair":
        # the terms from the logarithms' own slopes cancel: win * lose - lose * win
        loss = win * (on_win - log_kept) + lose * (on_lose - log_flipped)
        slope = beta * win * lose * ((on_win - log_kept) - (on_lose - log_flipped))
    return loss, slope, -slope


@triton.jit
def absolute_loss(w, l, beta, KIND: tl.constexpr):
    """The kinds that also see where chosen and rejected stand by themselves: the loss, its slopes in w and l."""
    chosen, rejected = beta * w, beta * l
    if KIND == "nca_pair":
        loss = -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)
        of_w = beta * (0.5 * sigmoid(chosen) - sigmoid(-chosen))
        of_l = 0.5 * beta * sigmoid(rejected)
    elif KIND == "sppo_hard":
        above, below = w - 0.5 / beta, l + 0.5 / beta
        loss = above * above + below * below
        of_w = 2.0 * above
        of_l = 2.0 * below
    elif KIND == "apo_zero":
        loss = sigmoid(-chosen) + sigmoid(rejected)
        of_w = -beta * sigmoid(-chosen) * sigmoid(chosen)
        of_l = beta * sigmoid(rejected) * sigmoid(-rejected)
    else:
        tl.static_assert(KIND == "apo_down")
        d = beta * (w - l)
        loss = sigmoid(chosen) + sigmoid(-d)
        of_l = beta * sigmoid(-d) * sigmoid(d)
        of_w = beta * sigmoid(chosen) * sigmoid(-chosen) - of_l
    return loss, of_w, of_l


@triton.jit
def dpo_kernel(
    chosen_ptr,
    rejected_ptr,
    ref_chosen_ptr,
    ref_rejected_ptr,
    losses_ptr,
    chosen_rewards_ptr,
    rejected_rewards_ptr,
    slopes_ptr,
    num_pairs,
    beta,
    smoothing,
    log_kept,
    log_flipped,
    KIND: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_pairs
    w = tl.load(chosen_ptr + at, mask=inside, other=0.0) - tl.load(ref_chosen_ptr + at, mask=inside, other=0.0)
    l = tl.load(rejected_ptr + at, mask=inside, other=0.0) - tl.load(ref_rejected_ptr + at, mask=inside, other=0.0)
    if KIND == "nca_pair" or KIND == "sppo_hard" or KIND == "apo_zero" or KIND == "apo_down":
        loss, of_w, of_l = absolute_loss(w, l, beta, KIND)
    else:
        loss, of_w, of_l = margin_loss(w, l, beta, smoothing, log_kept, log_flipped, KIND)
    tl.store(losses_ptr + at, loss, mask=inside)
    tl.store(chosen_rewards_ptr + at, beta * w, mask=inside)
    tl.store(rejected_rewards_ptr + at, beta * l, mask=inside)
    if HAS_SLOPES:
        tl.store(slopes_ptr + at, of_w, mask=inside)
        tl.store(slopes_ptr + num_pairs + at, of_l, mask=inside)


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    kind: str,
    label_smoothing: float,
    need_slopes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_pairs = chosen.numel()
    results = tuple(torch.empty_like(chosen) for _ in range(3))
    slopes = chosen.new_empty((2, *chosen.shape) if need_slopes else (0,))
    if num_pairs:
        dpo_kernel[(triton.cdiv(num_pairs, BLOCK),)](
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            *results,
            slopes,
            num_pairs,
            beta,
            label_smoothing,
            math.log1p(-label_smoothing),
            math.log(label_smoothing) if label_smoothing else 0.0,
            KIND=kind,
            HAS_SLOPES=need_slopes,
            BLOCK=BLOCK,
            num_warps=WARPS,
            **OPTIONS,
        )
    return *results, slopes
