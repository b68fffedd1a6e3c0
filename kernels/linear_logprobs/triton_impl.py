"""Triton row kernels of the fused head: statistics and gradient of float32 logits that are read from memory once.

A row of up to 4096 entries stays in registers. A longer one is cut into tiles of 16 KiB, and each program first takes
the statistics of one tile, then the gradient of the tile ``lag`` programs before it, whose row is complete by then. Per
logit that is 4 bytes from memory, 4 from the L2 cache and 2 to memory for a 16-bit gradient, against 4 + 4 + 2 from and
to memory when a program does one row after the other: as many rows as run at once (528 of 128,256 logits on 132 SMs:
270 MB) do not fit the cache, ``lag`` tiles (9 MB) do. Without a gradient it is the forward kernel of the logits, 4 bytes.

The tiling depends on V alone and sums have a fixed order: the same bits whatever rows surround a row, and whatever the
lag. A program waits for programs with smaller numbers only, which the GPU starts first (single-pass scans such as CUB's
decoupled look-back rest on the same order), so one of them can always go on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels.logprobs.triton_impl import (
    FORWARD_TILE_BYTES,
    OPTIONS,
    combined_statistics,
    empty_results,
    slope,
    softmax_scales,
    squash,
    squashed_label,
    store_results,
    store_statistics,
    tile_statistics,
    tiling,
    token_logprobs_forward,
    unsupported,
)

__all__ = ["head_rows", "unsupported"]

# as the forward kernel cuts float32: log-probabilities with and without a gradient differ at most by the order in which
# a thread adds, as it holds 8 entries in a row where it writes 16-bit gradients and 4 where it only reads
TILE = FORWARD_TILE_BYTES // 4


@triton.jit
def gradient(x, column, label, vocab_size, peak, log_total, inner, outer, ignore_index, HAS_SOFTCAP: tl.constexpr):
    """d logprob of the label / d x. Its 1 - p is formed in float32 and rounded once, at the store."""
    u = squash(x, inner, HAS_SOFTCAP)
    p = tl.exp(tl.fma(u, outer, -peak) - log_total)
    d_x = (tl.where(column == label, 1.0, 0.0) - p) * slope(u, inner, outer, HAS_SOFTCAP)
    d_x = tl.where((label >= 0) & (label < vocab_size), d_x, float("nan"))
    return tl.where(label == ignore_index, 0.0, d_x)


@triton.jit
def short_rows_kernel(
    logits_ptr,
    labels_ptr,
    logprobs_ptr,
    entropy_ptr,
    lse_ptr,
    out_ptr,
    vocab_size,
    stride,
    out_stride,
    inner,
    outer,
    ignore_index,
    HAS_SOFTCAP: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row, which it holds in registers. ``out`` may be ``logits``."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    column = tl.arange(0, BLOCK)
    label = tl.load(labels_ptr + row)
    mask = column < tl.where(label == ignore_index, 0, vocab_size)
    x = tl.load(row_ptr + column, mask=mask, other=float("-inf"), eviction_policy="evict_first")
    u_label = squashed_label(row_ptr, label, vocab_size, inner, HAS_SOFTCAP)
    # the gradient may overwrite the label's logit that another thread has yet to read
    tl.debug_barrier()
    peak, total, moment = tile_statistics(x, column, vocab_size, inner, outer, HAS_SOFTCAP)
    outputs = logprobs_ptr, entropy_ptr, lse_ptr, row, label, vocab_size, ignore_index
    store_results(*outputs, u_label, outer, peak, total, moment)
    log_total = tl.log(total)
    d_x = gradient(x, column, label, vocab_size, peak, log_total, inner, outer, ignore_index, HAS_SOFTCAP)
    out = out_ptr + row * out_stride + column
    tl.store(out, d_x.to(out_ptr.dtype.element_ty), mask=column < vocab_size, eviction_policy="evict_first")


@triton.jit
def long_rows_kernel(
    logits_ptr,
    labels_ptr,
    logprobs_ptr,
    entropy_ptr,
    lse_ptr,
    out_ptr,
    partials_ptr,
    u_labels_ptr,
    arrived_ptr,
    num_tiles,
    lag,
    vocab_size,
    stride,
    out_stride,
    inner,
    outer,
    ignore_index,
    HAS_SOFTCAP: tl.constexpr,
    TILES: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The statistics of tile ``program_id``, the gradient of the tile ``lag`` before. ``out`` may be ``logits``."""
    new = tl.program_id(0)
    old = tl.maximum(new - lag, 0)
    has_old = new >= lag
    lane = tl.arange(0, BLOCK)
    # both tiles are on their way while this program waits for the old one's row; it alone writes the old tile
    old_row = (old // TILES).to(tl.int64)
    old_column = (old % TILES) * BLOCK + lane
    old_mask = old_column < tl.where(has_old, vocab_size, 0)
    old_label = tl.load(labels_ptr + old_row)
    read = old_column < tl.where(has_old & (old_label != ignore_index), vocab_size, 0)
    old_x = tl.load(logits_ptr + old_row * stride + old_column, mask=read, other=0.0, eviction_policy="evict_first")
    row = (new // TILES).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    column = (new % TILES) * BLOCK + lane
    label = tl.load(labels_ptr + row, mask=new < num_tiles, other=ignore_index)
    mask = column < tl.where(label == ignore_index, 0, vocab_size)
    x = tl.load(row_ptr + column, mask=mask, other=float("-inf"), eviction_policy="evict_last")
    while tl.atomic_add(arrived_ptr + old_row, 0, sem="acquire", scope="gpu") < tl.where(has_old, TILES, 0):
        pass
    tl.debug_barrier()
    old_peak, old_total, old_moment = combined_statistics(partials_ptr, old_row, num_tiles, TILES, LANES)
    if new < num_tiles:
        peak, total, moment = tile_statistics(x, column, vocab_size, inner, outer, HAS_SOFTCAP)
        store_statistics(partials_ptr, new, num_tiles, peak, total, moment)
        if new % TILES == 0:
            tl.store(u_labels_ptr + row, squashed_label(row_ptr, label, vocab_size, inner, HAS_SOFTCAP))
        tl.debug_barrier()
        tl.atomic_add(arrived_ptr + row, 1, sem="release", scope="gpu")
    if new >= lag and old % TILES == 0:
        u_label = tl.load(u_labels_ptr + old_row, cache_modifier=".cg")
        outputs = logprobs_ptr, entropy_ptr, lse_ptr, old_row, old_label, vocab_size, ignore_index
        store_results(*outputs, u_label, outer, old_peak, old_total, old_moment)
    log_total = tl.log(old_total)
    statistics = old_label, vocab_size, old_peak, log_total, inner, outer, ignore_index
    d_x = gradient(old_x, old_column, *statistics, HAS_SOFTCAP)
    out = out_ptr + old_row * out_stride + old_column
    tl.store(out, d_x.to(out_ptr.dtype.element_ty), mask=old_mask, eviction_policy="evict_first")


def lag_of(tiles: int, device: torch.device) -> int:
    """Programs between a tile's two visits: the whole row, and all that run at once, so that none has to wait."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return tiles + 4 * processors


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
    if out is None or not num_rows:
        return token_logprobs_forward(logits, labels, temperature, softcap, ignore_index, logit_scale)
    results = empty_results(logits)
    rest = (
        vocab_size,
        logits.stride(0),
        out.stride(0),
        *softmax_scales(temperature, softcap, logit_scale),
        ignore_index,
    )
    flags = {"HAS_SOFTCAP": softcap is not None, **OPTIONS}
    sizes = tiling(vocab_size, TILE)
    tiles = sizes["TILES"]
    if tiles == 1:
        short_rows_kernel[(num_rows,)](logits, labels, *results, out, *rest, **sizes, **flags)
        return results
    num_tiles, lag = num_rows * tiles, lag_of(tiles, logits.device)
    partials = torch.empty((3, num_tiles), dtype=torch.float32, device=logits.device)
    u_labels = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    arrived = torch.zeros(num_rows, dtype=torch.int32, device=logits.device)
    long_rows_kernel[(num_tiles + lag,)](
        logits,
        labels,
        *results,
        out,
        partials,
        u_labels,
        arrived,
        num_tiles,
        lag,
        *rest,
        LANES=triton.next_power_of_2(tiles),
        **sizes,
        **flags,
    )
    return results
