"""Triton kernel of the KL estimators, and what the kernels of the other losses share: formulas, spans, arrival.

The formulas are those of csrc/losses.h. The interpreter has no libdevice, so what cancels near 0 is a series here.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels.logprobs.triton_impl import OPTIONS, boundaries, unsupported

__all__ = ["kl_penalty", "unsupported"]

BLOCK, WARPS = 1024, 4


@triton.jit
def expm1_and_k3(x):
    """e^x - 1 and e^x - 1 - x, with all their digits near 0."""
    p = 2.5052108e-8  # 1 / 11!
    p = p * x + 2.7557319e-7
    p = p * x + 2.7557319e-6
    p = p * x + 2.4801587e-5
    p = p * x + 1.9841270e-4
    p = p * x + 1.3888889e-3
    p = p * x + 8.3333333e-3
    p = p * x + 4.1666667e-2
    p = p * x + 1.6666667e-1
    p = p * x + 0.5
    near, far = p * x * x, tl.exp(x) - 1.0
    small = tl.abs(x) < 1.0
    return tl.where(small, x + near, far), tl.where(small, near, far - x)


@triton.jit
def log1p_of_share(e):
    """log(1 + e) for e in [0, 1], as 2 atanh(e / (2 + e))."""
    s = e / (2.0 + e)
    t = s * s
    p = 0.058823529  # 1 / 17
    p = p * t + 0.066666667
    p = p * t + 0.076923077
    p = p * t + 0.090909091
    p = p * t + 0.11111111
    p = p * t + 0.14285714
    p = p * t + 0.2
    p = p * t + 0.33333333
    return 2.0 * (s + s * t * p)


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def log_sigmoid(x):
    return tl.where(x < 0.0, x, 0.0) - log1p_of_share(tl.exp(-tl.abs(x)))


@triton.jit
def kl_estimate(d, ESTIMATOR: tl.constexpr):
    """The estimate as a function of d = ref_logprob - logprob, and its slope in logprob."""
    value = -d
    slope = tl.full(d.shape, 1.0, tl.float32)
    if ESTIMATOR == "k2":
        value = 0.5 * d * d
        slope = -d
    elif ESTIMATOR == "k3":
        expm1, value = expm1_and_k3(d)
        slope = -expm1
    elif ESTIMATOR == "k3+":
        expm1, value = expm1_and_k3(d)
        slope = -d
    elif ESTIMATOR == "abs":
        value = tl.abs(d)
        slope = tl.where(d > 0.0, -1.0, tl.where(d < 0.0, 1.0, 0.0))
    return value, slope


@triton.jit
def span(cu_seqlens_ptr, num_tokens, width, LAYOUT: tl.constexpr, BLOCK: tl.constexpr):
    """First token and number of tokens of this program: a sequence, padded or packed, or a block of a flat tensor."""
    if LAYOUT == "flat":
        first = tl.program_id(0).to(tl.int64) * BLOCK
        length = tl.minimum(num_tokens - first, BLOCK).to(tl.int32)
    else:
        first, length = boundaries(cu_seqlens_ptr, width, LAYOUT == "packed")
    return first, length


@triton.jit
def arrives_last(arrived_ptr):
    """Whether every other program of the launch has stored its partial results; leaves the counter at 0.

    Who comes last is chance. What it computes is not: it reads everybody's partials, its own too, in order.
    """
    # all threads' stores first, then the count that publishes them; what follows reads past the L1 cache
    tl.debug_barrier()
    last = tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1
    if last:
        tl.store(arrived_ptr, 0)
    return last


def arrival_counter(device: torch.device) -> Tensor:
    """A zero that :func:`arrives_last` counts in, shared by all launches on the device's default stream.

    Those run one after the other and each leaves it at 0, which saves a launch to clear it. On any other stream two
    launches may overlap, and only there are graphs captured, whose replays may overlap with anything: each launch gets
    a zero of its own, cleared inside the graph.
    """
    if device.type == "cuda" and torch.cuda.current_stream(device).cuda_stream == 0:
        return _counter_of_default_stream(device)
    return torch.zeros(1, dtype=torch.int32, device=device)


@cache
def _counter_of_default_stream(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


@triton.jit
def kl_kernel(
    logprobs_ptr,
    ref_logprobs_ptr,
    value_ptr,
    slope_ptr,
    num_tokens,
    ESTIMATOR: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_tokens
    d = tl.load(ref_logprobs_ptr + at, mask=inside, other=0.0) - tl.load(logprobs_ptr + at, mask=inside, other=0.0)
    value, slope = kl_estimate(d, ESTIMATOR)
    tl.store(value_ptr + at, value, mask=inside)
    if HAS_SLOPE:
        tl.store(slope_ptr + at, slope, mask=inside)


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str, need_slope: bool) -> tuple[Tensor, Tensor]:
    value = torch.empty_like(logprobs)
    slope = logprobs.new_empty(logprobs.shape if need_slope else (0,))
    if logprobs.numel():
        kl_kernel[(triton.cdiv(logprobs.numel(), BLOCK),)](
            logprobs,
            ref_logprobs,
            value,
            slope,
            logprobs.numel(),
            ESTIMATOR=estimator,
            HAS_SLOPE=need_slope,
            BLOCK=BLOCK,
            num_warps=WARPS,
            **OPTIONS,
        )
    return value, slope
