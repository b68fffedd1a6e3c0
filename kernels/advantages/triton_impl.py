"""Triton scan for generalized advantage estimation: one program per sequence walks its blocks from the end.

With the state (A, V) of the next unmasked token, each token is an affine map: an unmasked one takes
A <- gamma lam A + gamma V + (r - v) and V <- v, a masked one changes nothing. Maps compose associatively, so a block is
one ``tl.associative_scan`` of five numbers, and skipping masked tokens needs no second pass.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OPTIONS = {} if INTERPRETED else {"enable_fp_fusion": True}


def unsupported(op: str, *tensors: Tensor, **options) -> str | None:
    if not INTERPRETED and not all(x.is_cuda for x in tensors):
        return "tensors are not on a CUDA device (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
    if any(x.dtype == torch.float64 for x in tensors):
        return "float64 runs on the reference only"
    return None


@triton.jit
def compose(a1, c1, b1, d1, e1, a2, c2, b2, d2, e2):
    """First the later token's map 1, then the earlier one's map 2: A -> a A + c V + b, V -> d V + e."""
    return a2 * a1, a2 * c1 + c2 * d1, a2 * b1 + c2 * e1 + b2, d2 * d1, d2 * e1 + e2


@triton.jit
def gae_kernel(
    rewards_ptr,
    values_ptr,
    mask_ptr,
    bootstrap_ptr,
    cu_seqlens_ptr,
    advantages_ptr,
    returns_ptr,
    width,
    gamma,
    lam,
    HAS_BOOTSTRAP: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    if PACKED:
        first = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        length = (tl.load(cu_seqlens_ptr + sequence + 1) - first).to(tl.int32)
    else:
        first = sequence.to(tl.int64) * width
        length = width
    advantage = 0.0
    value = 0.0
    if HAS_BOOTSTRAP:
        value = tl.load(bootstrap_ptr + sequence)
    lane = tl.arange(0, BLOCK)
    blocks = tl.cdiv(length, BLOCK)
    for i in range(blocks):
        token = (blocks - 1 - i) * BLOCK + lane
        at = first + token
        keep = tl.load(mask_ptr + at, mask=token < length, other=0) != 0
        # the mask guards the loads too: a masked entry is never read
        v = tl.load(values_ptr + at, mask=keep, other=0.0)
        r = tl.load(rewards_ptr + at, mask=keep, other=0.0)
        a = tl.where(keep, gamma * lam, 1.0)
        c = tl.where(keep, gamma, 0.0)
        d = tl.where(keep, 0.0, 1.0)
        a, c, b, d, e = tl.associative_scan((a, c, r - v, d, v), 0, compose, reverse=True)
        out = a * advantage + c * value + b
        tl.store(advantages_ptr + at, tl.where(keep, out, 0.0), mask=token < length)
        tl.store(returns_ptr + at, tl.where(keep, out + v, 0.0), mask=token < length)
        # lane 0 is the earliest token: its state enters the block before
        advantage = tl.sum(tl.where(lane == 0, out, 0.0), 0)
        value = tl.sum(tl.where(lane == 0, d * value + e, 0.0), 0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    num_sequences, width = rewards.shape
    return _launch(rewards, values, mask, bootstrap, None, gamma, lam, num_sequences, width)


def gae_packed(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    num_sequences = len(cu_seqlens) - 1
    # the longest sequence would have to be read back; the mean length chooses the block
    width = triton.cdiv(len(rewards), max(num_sequences, 1))
    return _launch(rewards, values, mask, bootstrap, cu_seqlens, gamma, lam, num_sequences, width)


def _launch(rewards, values, mask, bootstrap, cu_seqlens, gamma, lam, num_sequences, width):
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    block = max(32, min(triton.next_power_of_2(max(width, 1)), 1024))
    if rewards.numel():
        gae_kernel[(num_sequences,)](
            rewards,
            values,
            mask.view(torch.uint8),
            rewards if bootstrap is None else bootstrap,
            rewards if cu_seqlens is None else cu_seqlens,
            advantages,
            returns,
            width,
            gamma,
            lam,
            HAS_BOOTSTRAP=bootstrap is not None,
            PACKED=cu_seqlens is not None,
            BLOCK=block,
            num_warps=max(1, min(4, block // 256)),
            **OPTIONS,
        )
    return advantages, returns
