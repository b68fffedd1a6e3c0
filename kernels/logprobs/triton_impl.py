"""Triton kernels: one program per row forward, one per block of a row backward.

A row is read once forward, in blocks, with a running maximum. float64 is left to the reference.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# fused multiply-adds, said explicitly as the default differs between Triton releases
OPTIONS = {} if INTERPRETED else {"enable_fp_fusion": True}


def unsupported(op: str, *tensors: Tensor, **options) -> str | None:
    if not INTERPRETED and not all(x.is_cuda for x in tensors):
        return "tensors are not on a CUDA device (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
    if any(x.dtype == torch.float64 for x in tensors):
        return "float64 runs on the reference only"
    return None


def block_size(vocab_size: int) -> int:
    """Entries of a row that a program holds at a time; small rows fit one block."""
    return min(triton.next_power_of_2(vocab_size), 4096)


def empty_results(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logprobs and entropy in float32, logsumexp in float64, (N,) each."""
    dtypes = (torch.float32, torch.float32, torch.float64)
    return tuple(torch.empty(len(logits), dtype=dtype, device=logits.device) for dtype in dtypes)


def num_warps(block: int) -> int:
    """16 bf16 entries per thread and block, two 16-byte loads."""
    return max(1, min(8, block // 512))


@triton.jit
def tanh(x):
    """Hyperbolic tangent: by exp, and by its series where that would cancel. The interpreter has no libdevice."""
    e = tl.exp(-2.0 * tl.abs(x))
    big = (1.0 - e) / (1.0 + e)
    s = x * x
    small = 1.0 + s * (-0.33333334 + s * (0.13333334 + s * (-0.053968254 + s * (0.021869488 - s * 0.008863236))))
    return tl.where(tl.abs(x) < 0.3, x * small, tl.where(x < 0, -big, big))


@triton.jit
def transform(x, inverse_temperature, softcap, HAS_SOFTCAP: tl.constexpr):
    """What the softmax is taken of."""
    if HAS_SOFTCAP:
        x = softcap * tanh(x / softcap)
    return x * inverse_temperature


@triton.jit
def transform_slope(x, inverse_temperature, softcap, HAS_SOFTCAP: tl.constexpr):
    """d transform / d x."""
    slope = inverse_temperature
    if HAS_SOFTCAP:
        t = tanh(x / softcap)
        slope = inverse_temperature * (1.0 - t * t)
    return slope


@triton.jit
def row_statistics(
    row_ptr,
    label,
    vocab_size,
    factor,
    inverse_temperature,
    softcap,
    ignore_index,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return logprob of ``label``, entropy, maximum and log(sum(exp(z - maximum))) of one row, in a single pass."""
    peak = float("-inf")
    total = 0.0  # sum of exp(z - peak)
    moment = 0.0  # sum of exp(z - peak) * (z - peak), for the entropy
    for start in range(0, vocab_size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + column, mask=column < vocab_size, other=float("-inf")).to(tl.float32) * factor
        z = transform(x, inverse_temperature, softcap, HAS_SOFTCAP)
        z = tl.where(column < vocab_size, z, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(z, 0))
        # all -inf so far: any finite offset keeps exp(-inf) at 0 instead of NaN
        offset = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shift = peak - offset
        decay = tl.exp(shift)
        d = z - offset
        e = tl.exp(d)
        moment = decay * (moment + tl.where(decay == 0.0, 0.0, shift) * total) + tl.sum(
            tl.where(e == 0.0, 0.0, e * d), 0
        )
        total = decay * total + tl.sum(e, 0)
        peak = new_peak
    log_total = tl.log(total)
    entropy = log_total - moment / total
    inside = (label >= 0) & (label < vocab_size)
    x = tl.load(row_ptr + tl.where(inside, label, 0)).to(tl.float32) * factor
    # not minus their sum: at logits near 100 its rounding is 1% of p - 1 for a token with p = 0.9996
    z = (transform(x, inverse_temperature, softcap, HAS_SOFTCAP) - peak) - log_total
    logprob = tl.where(inside, z, float("nan"))
    keep = label != ignore_index
    return tl.where(keep, logprob, 0.0), tl.where(keep, entropy, 0.0), peak, log_total


@triton.jit
def forward_kernel(
    logits_ptr,
    labels_ptr,
    logprobs_ptr,
    entropy_ptr,
    lse_ptr,
    vocab_size,
    stride,
    inverse_temperature,
    softcap,
    ignore_index,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    logprob, entropy, peak, log_total = row_statistics(
        logits_ptr + row * stride,
        label,
        vocab_size,
        1.0,
        inverse_temperature,
        softcap,
        ignore_index,
        HAS_SOFTCAP,
        BLOCK,
    )
    tl.store(logprobs_ptr + row, logprob)
    tl.store(entropy_ptr + row, entropy)
    tl.store(lse_ptr + row, peak.to(tl.float64) + log_total.to(tl.float64))


@triton.jit
def backward_kernel(
    logits_ptr,
    labels_ptr,
    lse_ptr,
    entropy_ptr,
    grad_logprobs_ptr,
    grad_entropy_ptr,
    out_ptr,
    vocab_size,
    stride,
    out_stride,
    inverse_temperature,
    softcap,
    ignore_index,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(vocab_size, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels_ptr + row)
    grad = tl.load(grad_logprobs_ptr + row)
    grad = tl.where((label >= 0) & (label < vocab_size), grad, float("nan"))
    x = tl.load(logits_ptr + row * stride + column, mask=column < vocab_size, other=0.0).to(tl.float32)
    # the float64 lse in two float32 parts: only the row's scalar pays for float64
    lse = tl.load(lse_ptr + row)
    high = lse.to(tl.float32)
    low = (lse - high.to(tl.float64)).to(tl.float32)
    log_p = (transform(x, inverse_temperature, softcap, HAS_SOFTCAP) - high) - low
    p = tl.exp(log_p)
    d_z = grad * (tl.where(column == label, 1.0, 0.0) - p)
    if HAS_ENTROPY:
        # p log p is 0 at p = 0, where log p may be -inf
        surprise = tl.where(p == 0.0, 0.0, p * (log_p + tl.load(entropy_ptr + row)))
        d_z -= tl.load(grad_entropy_ptr + row) * surprise
    d_x = d_z * transform_slope(x, inverse_temperature, softcap, HAS_SOFTCAP)
    d_x = tl.where(label == ignore_index, 0.0, d_x)
    tl.store(out_ptr + row * out_stride + column, d_x.to(out_ptr.dtype.element_ty), mask=column < vocab_size)


def token_logprobs_forward(
    logits: Tensor, labels: Tensor, temperature: float, softcap: float | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, vocab_size = logits.shape
    results = empty_results(logits)
    block = block_size(vocab_size)
    if num_rows:
        forward_kernel[(num_rows,)](
            logits,
            labels,
            *results,
            vocab_size,
            logits.stride(0),
            1.0 / temperature,
            softcap or 1.0,
            ignore_index,
            HAS_SOFTCAP=softcap is not None,
            BLOCK=block,
            num_warps=num_warps(block),
            **OPTIONS,
        )
    return results


def token_logprobs_backward(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    out: Tensor,
) -> None:
    num_rows, vocab_size = logits.shape
    block = block_size(vocab_size)
    if num_rows:
        backward_kernel[(num_rows * triton.cdiv(vocab_size, block),)](
            logits,
            labels,
            lse,
            entropy,
            grad_logprobs,
            grad_logprobs if grad_entropy is None else grad_entropy,
            out,
            vocab_size,
            logits.stride(0),
            out.stride(0),
            1.0 / temperature,
            softcap or 1.0,
            ignore_index,
            HAS_SOFTCAP=softcap is not None,
            HAS_ENTROPY=grad_entropy is not None,
            BLOCK=block,
            num_warps=num_warps(block),
            **OPTIONS,
        )
