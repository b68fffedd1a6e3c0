"""Triton row kernels of the fused head: statistics and gradient of float32 logits that are read from memory once.

A row of up to 8192 entries stays in registers. A longer one is cut into tiles of 32 KiB, and each program first takes
the statistics of one tile, then the gradient of the tile ``lag`` programs before it, whose row is complete by then. Per
logit that is 4 bytes from memory, 4 from the L2 cache and 2 to memory for a 16-bit gradient, against 4 + 4 + 2 from and
to memory when a program does one row after the other: as many rows as run at once (528 of 128,256 logits on 132 SMs:
270 MB) do not fit the cache, ``lag`` tiles (18 MB) do. Without a gradient it is the forward kernel of the logits, 4 bytes.

The tiling depends on V alone and sums have a fixed order: the same bits whatever rows surround a row, and whatever the
lag. A program draws its number when it starts, publishes its statistics before it waits, and waits for smaller numbers
only: those programs are running and never wait before they publish, in whatever order the GPU starts blocks. Should a
wait never end all the same, it is given up and the row is NaN, where a hang would show nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels.logprobs.triton_impl import (
    _LN_2,
    OPTIONS,
    combined_statistics,
    distance,
    empty_results,
    load_tile,
    softmax_scales,
    squash,
    squashed_label,
    store_results,
    store_statistics,
    store_tile,
    tile_statistics,
    tiling,
    token_logprobs_forward,
    unsupported,
)

__all__ = ["head_rows", "unsupported"]

# looks at a counter before a program gives up: seconds, where a row takes microseconds
POLLS = 1 << 22


@triton.jit
def store_gradient(
    row_ptr,
    x,
    first,
    label,
    u_label,
    vocab_size,
    top,
    total,
    inner,
    outer,
    ignore_index,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write d logprob of the label / d x of a tile. The label's 1 - p is formed in float32 and rounded once."""
    lane = tl.arange(0, BLOCK)
    if label == ignore_index:
        store_tile(row_ptr, first, vocab_size, tl.zeros([BLOCK], tl.float32), BLOCK)
    else:
        slope = outer * _LN_2
        if HAS_SOFTCAP:
            slope *= inner
        slope = tl.where((label >= 0) & (label < vocab_size), slope, float("nan"))
        at_label = slope * ((total - tl.exp2(distance(u_label, top, outer))) / total)
        u = squash(x, inner, HAS_SOFTCAP)
        d_x = tl.exp2(distance(u, top, outer)) * (-slope / total)
        d_x = tl.where(lane == (label - first).to(tl.int32), at_label, d_x)
        if HAS_SOFTCAP:
            d_x *= 1.0 - u * u
        store_tile(row_ptr, first, vocab_size, d_x, BLOCK)


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
    label = tl.load(labels_ptr + row)
    x = load_tile(row_ptr, 0, tl.where(label == ignore_index, 0, vocab_size), "evict_first", BLOCK)
    u_label = squashed_label(row_ptr, label, vocab_size, inner, HAS_SOFTCAP)
    # the gradient may overwrite the label's logit that another thread has yet to read
    tl.debug_barrier()
    top, total, moment = tile_statistics(x, tl.arange(0, BLOCK), vocab_size, inner, outer, HAS_SOFTCAP)
    outputs = logprobs_ptr, entropy_ptr, lse_ptr, row, label, vocab_size, ignore_index
    store_results(*outputs, u_label, outer, top, total, moment)
    statistics = label, u_label, vocab_size, top, total, inner, outer, ignore_index
    store_gradient(out_ptr + row * out_stride, x, 0, *statistics, HAS_SOFTCAP, BLOCK)


@triton.jit
def wait_for(arrived_ptr, count, POLLS: tl.constexpr):
    """Whether the counter has reached ``count``; False after so many looks that it never will."""
    arrived = tl.atomic_add(arrived_ptr, 0, sem="acquire", scope="gpu")
    polls = 0
    while (arrived < count) & (polls < POLLS):
        arrived = tl.atomic_add(arrived_ptr, 0, sem="acquire", scope="gpu")
        polls += 1
    tl.debug_barrier()
    return arrived >= count


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
    counters_ptr,
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
    POLLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The statistics of one tile, then the gradient of the tile ``lag`` before. ``out`` may be ``logits``."""
    new = tl.atomic_add(counters_ptr, 1, sem="relaxed", scope="gpu")
    arrived_ptr = counters_ptr + 1
    old = tl.maximum(new - lag, 0)
    old_row = (old // TILES).to(tl.int64)
    old_first = (old % TILES) * BLOCK
    old_label = tl.load(labels_ptr + old_row)
    if new < num_tiles:
        row = (new // TILES).to(tl.int64)
        row_ptr = logits_ptr + row * stride
        first = (new % TILES) * BLOCK
        label = tl.load(labels_ptr + row)
        x = load_tile(row_ptr, first, tl.where(label == ignore_index, 0, vocab_size), "evict_last", BLOCK)
        column = first + tl.arange(0, BLOCK)
        statistics = tile_statistics(x, column, vocab_size, inner, outer, HAS_SOFTCAP)
        store_statistics(partials_ptr, new, num_tiles, *statistics)
        if first == 0:
            tl.store(u_labels_ptr + row, squashed_label(row_ptr, label, vocab_size, inner, HAS_SOFTCAP))
        tl.debug_barrier()
        tl.atomic_add(arrived_ptr + row, 1, sem="release", scope="gpu")
    if new >= lag:
        old_end = tl.where(old_label == ignore_index, 0, vocab_size)
        # on its way while this program waits for the rest of the row; nobody else writes it
        old_x = load_tile(logits_ptr + old_row * stride, old_first, old_end, "evict_first", BLOCK)
        complete = wait_for(arrived_ptr + old_row, TILES, POLLS)
        top, total, moment = combined_statistics(partials_ptr, old_row, num_tiles, outer, TILES, LANES)
        total = tl.where(complete, total, float("nan"))
        u_label = tl.load(u_labels_ptr + old_row, cache_modifier=".cg")
        if old_first == 0:
            outputs = logprobs_ptr, entropy_ptr, lse_ptr, old_row, old_label, vocab_size, ignore_index
            store_results(*outputs, u_label, outer, top, total, moment)
        rest = old_label, u_label, vocab_size, top, total, inner, outer, ignore_index
        store_gradient(out_ptr + old_row * out_stride, old_x, old_first, *rest, HAS_SOFTCAP, BLOCK)


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
    sizes = tiling(vocab_size, softcap)
    tiles = sizes["TILES"]
    if tiles == 1:
        short_rows_kernel[(num_rows,)](logits, labels, *results, out, *rest, **sizes, **OPTIONS)
        return results
    num_tiles, lag = num_rows * tiles, lag_of(tiles, logits.device)
    partials = torch.empty((3, num_tiles), dtype=torch.float32, device=logits.device)
    u_labels = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    # how many programs have started, and how many tiles have arrived of each row
    counters = torch.zeros(num_rows + 1, dtype=torch.int32, device=logits.device)
    long_rows_kernel[(num_tiles + lag,)](
        logits,
        labels,
        *results,
        out,
        partials,
        u_labels,
        counters,
        num_tiles,
        lag,
        *rest,
        LANES=triton.next_power_of_2(tiles),
        POLLS=POLLS,
        **sizes,
        **OPTIONS,
    )
    return results
