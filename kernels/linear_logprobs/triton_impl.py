"""Triton row kernel of the fused head: a row's statistics, then its gradient while the L2 still has the logits."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels.logprobs.triton_impl import (
    OPTIONS,
    block_size,
    empty_results,
    num_warps,
    row_statistics,
    transform,
    transform_slope,
    unsupported,
)

__all__ = ["head_rows", "unsupported"]


@triton.jit
def head_rows_kernel(
    logits_ptr,
    labels_ptr,
    logprobs_ptr,
    entropy_ptr,
    lse_ptr,
    out_ptr,
    vocab_size,
    stride,
    out_stride,
    inverse_temperature,
    softcap,
    logit_scale,
    ignore_index,
    HAS_SOFTCAP: tl.constexpr,
    HAS_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    logits_row = logits_ptr + row * stride
    logprob, entropy, peak, log_total = row_statistics(
        logits_row, label, vocab_size, logit_scale, inverse_temperature, softcap, ignore_index, HAS_SOFTCAP, BLOCK
    )
    tl.store(logprobs_ptr + row, logprob)
    tl.store(entropy_ptr + row, entropy)
    tl.store(lse_ptr + row, peak.to(tl.float64) + log_total.to(tl.float64))
    if HAS_OUT:
        # out may be logits itself: the label's logit above was the last read of another block
        tl.debug_barrier()
        bad = (label < 0) | (label >= vocab_size)
        for start in range(0, vocab_size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(logits_row + column, mask=column < vocab_size, other=0.0).to(tl.float32) * logit_scale
            p = tl.exp((transform(x, inverse_temperature, softcap, HAS_SOFTCAP) - peak) - log_total)
            # 1 - p of the label in float32, rounded once at the store
            d_z = tl.where(column == label, 1.0, 0.0) - p
            d_x = d_z * (logit_scale * transform_slope(x, inverse_temperature, softcap, HAS_SOFTCAP))
            d_x = tl.where(bad, float("nan"), d_x)
            d_x = tl.where(label == ignore_index, 0.0, d_x)
            out = out_ptr + row * out_stride + column
            tl.store(out, d_x.to(out_ptr.dtype.element_ty), mask=column < vocab_size)


def head_rows(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    logit_scale: float,
    out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, vocab_size = logits.shape
    results = empty_results(logits)
    block = block_size(vocab_size)
    if num_rows:
        head_rows_kernel[(num_rows,)](
            logits,
            labels,
            *results,
            logits if out is None else out,
            vocab_size,
            logits.stride(0),
            0 if out is None else out.stride(0),
            1.0 / temperature,
            softcap or 1.0,
            logit_scale,
            ignore_index,
            HAS_SOFTCAP=softcap is not None,
            HAS_OUT=out is not None,
            BLOCK=block,
            num_warps=num_warps(block),
            **OPTIONS,
        )
    return results
