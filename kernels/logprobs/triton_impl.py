"""Triton kernels of the logits: a program holds one tile of a row in registers and reads it once.

How a row is cut into tiles depends on V alone, and the tiles' statistics are combined in a fixed order. So a result is
the same bits whatever rows surround it, and a few rows of a large vocabulary still keep every processor busy.

A logit costs its own bytes forward, and its own twice backward (read and written); the statistics of a tile are 12
bytes. All loads are of 16 bytes per thread where V allows. float64 is left to the reference.
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
FORWARD_TILE_BYTES, BACKWARD_TILE = 16384, 4096


def unsupported(op: str, *tensors: Tensor, **options) -> str | None:
    if not INTERPRETED and not all(x.is_cuda for x in tensors):
        return "tensors are not on a CUDA device (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
    if any(x.dtype == torch.float64 for x in tensors):
        return "float64 runs on the reference only"
    return None


def tiling(vocab_size: int, largest: int) -> dict[str, int]:
    """The launch options that follow from V: entries of a tile, tiles of a row, warps (16 or 32 entries a thread)."""
    block = min(triton.next_power_of_2(vocab_size), largest)
    return {"BLOCK": block, "TILES": triton.cdiv(vocab_size, block), "num_warps": max(1, min(8, block // 512))}


def softmax_scales(temperature: float, softcap: float | None, logit_scale: float) -> tuple[float, float]:
    """Return (inner, outer): the softmax is taken of x * outer, or with a softcap of outer * tanh(x * inner)."""
    if softcap is None:
        return 1.0, logit_scale / temperature
    return logit_scale / softcap, softcap / temperature


def empty_results(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logprobs and entropy in float32, logsumexp in float64, (N,) each."""
    dtypes = (torch.float32, torch.float32, torch.float64)
    return tuple(torch.empty(len(logits), dtype=dtype, device=logits.device) for dtype in dtypes)


@triton.jit
def tanh(x):
    """Hyperbolic tangent: by exp, and by its series where that would cancel. The interpreter has no libdevice."""
    e = tl.exp(-2.0 * tl.abs(x))
    big = (1.0 - e) / (1.0 + e)
    s = x * x
    small = 1.0 + s * (-0.33333334 + s * (0.13333334 + s * (-0.053968254 + s * (0.021869488 - s * 0.008863236))))
    return tl.where(tl.abs(x) < 0.3, x * small, tl.where(x < 0, -big, big))


@triton.jit
def squash(x, inner, HAS_SOFTCAP: tl.constexpr):
    """The softmax is taken of this times ``outer``; only fused with a subtraction is the product not rounded."""
    x = x.to(tl.float32)
    if HAS_SOFTCAP:
        x = tanh(x * inner)
    return x


@triton.jit
def slope(u, inner, outer, HAS_SOFTCAP: tl.constexpr):
    """d (u * outer) / d x for u = squash(x)."""
    if HAS_SOFTCAP:
        outer = outer * inner * (1.0 - u * u)
    return outer


@triton.jit
def tile_statistics(x, column, vocab_size, inner, outer, HAS_SOFTCAP: tl.constexpr):
    """Of the softmax's argument z: its maximum, the sum of e = exp(z - maximum), and the sum of e (z - maximum)."""
    u = squash(x, inner, HAS_SOFTCAP)
    # a softcap makes something finite of the -inf that was loaded behind the end
    inside = column < vocab_size
    peak = tl.max(tl.where(inside, u * outer, float("-inf")), 0)
    # a tile of -inf alone: any finite offset keeps exp(-inf) at 0 instead of NaN
    offset = tl.where(peak == float("-inf"), 0.0, peak)
    d = tl.where(inside, tl.fma(u, outer, -offset), float("-inf"))
    e = tl.exp(d)
    return peak, tl.sum(e, 0), tl.sum(tl.where(e == 0.0, 0.0, e * d), 0)


@triton.jit
def store_statistics(partials_ptr, tile, num_tiles, peak, total, moment):
    partial = partials_ptr + tile.to(tl.int64)
    tl.store(partial, peak)
    tl.store(partial + num_tiles, total)
    tl.store(partial + 2 * num_tiles.to(tl.int64), moment)


@triton.jit
def combined_statistics(partials_ptr, row, num_tiles, TILES: tl.constexpr, LANES: tl.constexpr):
    """The statistics of a row from those of its tiles, summed in an order that only TILES decides."""
    lane = tl.arange(0, LANES)
    partial = partials_ptr + row * TILES + lane
    # past the L1 cache, which does not see what other processors write
    peaks = tl.load(partial, mask=lane < TILES, other=float("-inf"), cache_modifier=".cg")
    totals = tl.load(partial + num_tiles, mask=lane < TILES, other=0.0, cache_modifier=".cg")
    moments = tl.load(partial + 2 * num_tiles.to(tl.int64), mask=lane < TILES, other=0.0, cache_modifier=".cg")
    peak = tl.max(peaks, 0)
    shift = peaks - tl.where(peak == float("-inf"), 0.0, peak)
    decay = tl.exp(shift)
    moments = decay * (moments + tl.where(decay == 0.0, 0.0, shift) * totals)
    return peak, tl.sum(decay * totals, 0), tl.sum(moments, 0)


@triton.jit
def squashed_label(row_ptr, label, vocab_size, inner, HAS_SOFTCAP: tl.constexpr):
    """``squash`` of the label's logit; of some entry of the row if the label is outside it."""
    inside = (label >= 0) & (label < vocab_size)
    return squash(tl.load(row_ptr + tl.where(inside, label, 0)), inner, HAS_SOFTCAP)


@triton.jit
def store_results(
    logprobs_ptr, entropy_ptr, lse_ptr, row, label, vocab_size, ignore_index, u_label, outer, peak, total, moment
):
    log_total = tl.log(total)
    # not minus their sum: at logits near 100 its rounding is 1% of p - 1 for a token with p = 0.9996
    logprob = tl.fma(u_label, outer, -peak) - log_total
    logprob = tl.where((label >= 0) & (label < vocab_size), logprob, float("nan"))
    entropy = log_total - moment / total
    keep = label != ignore_index
    tl.store(logprobs_ptr + row, tl.where(keep, logprob, 0.0))
    tl.store(entropy_ptr + row, tl.where(keep, entropy, 0.0))
    tl.store(lse_ptr + row, peak.to(tl.float64) + log_total.to(tl.float64))


@triton.jit
def forward_kernel(
    logits_ptr,
    labels_ptr,
    logprobs_ptr,
    entropy_ptr,
    lse_ptr,
    partials_ptr,
    vocab_size,
    stride,
    inner,
    outer,
    ignore_index,
    HAS_SOFTCAP: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per tile; a row of one tile is finished here, others by ``combine_kernel``."""
    tile = tl.program_id(0)
    row = (tile // TILES).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    column = (tile % TILES) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels_ptr + row)
    mask = column < tl.where(label == ignore_index, 0, vocab_size)
    x = tl.load(row_ptr + column, mask=mask, other=float("-inf"), eviction_policy="evict_first")
    statistics = tile_statistics(x, column, vocab_size, inner, outer, HAS_SOFTCAP)
    if TILES == 1:
        u_label = squashed_label(row_ptr, label, vocab_size, inner, HAS_SOFTCAP)
        outputs = logprobs_ptr, entropy_ptr, lse_ptr, row, label, vocab_size, ignore_index
        store_results(*outputs, u_label, outer, *statistics)
    else:
        store_statistics(partials_ptr, tile, tl.num_programs(0), *statistics)


@triton.jit
def combine_kernel(
    logits_ptr,
    labels_ptr,
    logprobs_ptr,
    entropy_ptr,
    lse_ptr,
    partials_ptr,
    vocab_size,
    stride,
    inner,
    outer,
    ignore_index,
    HAS_SOFTCAP: tl.constexpr,
    TILES: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    u_label = squashed_label(logits_ptr + row * stride, label, vocab_size, inner, HAS_SOFTCAP)
    statistics = combined_statistics(partials_ptr, row, tl.num_programs(0) * TILES, TILES, LANES)
    outputs = logprobs_ptr, entropy_ptr, lse_ptr, row, label, vocab_size, ignore_index
    store_results(*outputs, u_label, outer, *statistics)


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
    inner,
    outer,
    ignore_index,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per tile, which may be overwritten: nobody else reads it."""
    tile = tl.program_id(0)
    row = (tile // TILES).to(tl.int64)
    column = (tile % TILES) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels_ptr + row)
    grad = tl.load(grad_logprobs_ptr + row)
    nothing = grad == 0.0
    if HAS_ENTROPY:
        nothing = nothing & (tl.load(grad_entropy_ptr + row) == 0.0)
    nothing = nothing | (label == ignore_index)
    mask = column < tl.where(nothing, 0, vocab_size)
    x = tl.load(logits_ptr + row * stride + column, mask=mask, other=0.0, eviction_policy="evict_first")
    grad = tl.where((label >= 0) & (label < vocab_size), grad, float("nan"))
    # the float64 lse in two float32 parts: only the row's scalar pays for float64
    lse = tl.load(lse_ptr + row)
    high = lse.to(tl.float32)
    low = (lse - high.to(tl.float64)).to(tl.float32)
    # logits so large that log(sum) was lost in their rounding (a row masked with the lowest finite number) are so far
    # apart that only equal ones count: their entropy is the log of how many there are
    low = tl.where(tl.abs(high) > 1e9, tl.load(entropy_ptr + row), low)
    u = squash(x, inner, HAS_SOFTCAP)
    log_p = tl.fma(u, outer, -high) - low
    p = tl.exp(log_p)
    d_z = grad * (tl.where(column == label, 1.0, 0.0) - p)
    if HAS_ENTROPY:
        # p log p is 0 at p = 0, where log p may be -inf
        surprise = tl.where(p == 0.0, 0.0, p * (log_p + tl.load(entropy_ptr + row)))
        d_z -= tl.load(grad_entropy_ptr + row) * surprise
    d_x = tl.where(nothing, 0.0, d_z * slope(u, inner, outer, HAS_SOFTCAP))
    out = out_ptr + row * out_stride + column
    tl.store(out, d_x.to(out_ptr.dtype.element_ty), mask=column < vocab_size, eviction_policy="evict_first")


def token_logprobs_forward(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, vocab_size = logits.shape
    results = empty_results(logits)
    sizes = tiling(vocab_size, FORWARD_TILE_BYTES // logits.element_size())
    tiles = sizes["TILES"]
    partials = torch.empty((3, num_rows if tiles > 1 else 0, tiles), dtype=torch.float32, device=logits.device)
    scales = softmax_scales(temperature, softcap, logit_scale)
    arguments = (logits, labels, *results, partials, vocab_size, logits.stride(0), *scales, ignore_index)
    flags = {"HAS_SOFTCAP": softcap is not None, **OPTIONS}
    if num_rows:
        forward_kernel[(num_rows * tiles,)](*arguments, **sizes, **flags)
    if num_rows and tiles > 1:
        lanes = triton.next_power_of_2(tiles)
        # a lane for each partial, so that sums have one order whatever the number of warps
        combine_kernel[(num_rows,)](*arguments, TILES=tiles, LANES=lanes, num_warps=max(1, lanes // 32), **flags)
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
    logit_scale: float = 1.0,
) -> None:
    num_rows, vocab_size = logits.shape
    sizes = tiling(vocab_size, BACKWARD_TILE)
    if num_rows:
        backward_kernel[(num_rows * sizes["TILES"],)](
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
            *softmax_scales(temperature, softcap, logit_scale),
            ignore_index,
            HAS_SOFTCAP=softcap is not None,
            HAS_ENTROPY=grad_entropy is not None,
            **sizes,
            **OPTIONS,
        )


# tokens of a sequence that a program of sequence_logprobs reads at a time
SEQUENCE_BLOCK = 1024


@triton.jit
def boundaries(cu_seqlens_ptr, width, PACKED: tl.constexpr):
    """First token and number of tokens of this program's sequence."""
    sequence = tl.program_id(0)
    if PACKED:
        first = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        length = (tl.load(cu_seqlens_ptr + sequence + 1) - first).to(tl.int32)
    else:
        first = sequence.to(tl.int64) * width
        length = width
    return first, length


@triton.jit
def sequence_sum_kernel(
    logprobs_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    sums_ptr,
    counts_ptr,
    width,
    AVERAGE: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per sequence."""
    first, length = boundaries(cu_seqlens_ptr, width, PACKED)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    count = total
    for start in range(0, length, BLOCK):
        at = first + start + lane
        keep = tl.load(mask_ptr + at, mask=start + lane < length, other=0) != 0
        # the mask guards the load too: a masked entry is never read
        total += tl.load(logprobs_ptr + at, mask=keep, other=0.0)
        count += keep.to(tl.float32)
    result = tl.sum(total, 0)
    tokens = tl.sum(count, 0)
    if AVERAGE:
        result /= tl.maximum(tokens, 1.0)
    tl.store(sums_ptr + tl.program_id(0), result)
    tl.store(counts_ptr + tl.program_id(0), tokens)


@triton.jit
def sequence_spread_kernel(
    grad_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    counts_ptr,
    out_ptr,
    width,
    AVERAGE: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per sequence, which gives its gradient to every token that counts."""
    first, length = boundaries(cu_seqlens_ptr, width, PACKED)
    lane = tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + tl.program_id(0))
    if AVERAGE:
        grad /= tl.maximum(tl.load(counts_ptr + tl.program_id(0)), 1.0)
    for start in range(0, length, BLOCK):
        at = first + start + lane
        keep = tl.load(mask_ptr + at, mask=start + lane < length, other=0) != 0
        tl.store(out_ptr + at, tl.where(keep, grad, 0.0), mask=start + lane < length)


def sequence_logprobs(
    logprobs: Tensor, mask: Tensor, cu_seqlens: Tensor | None, average: bool
) -> tuple[Tensor, Tensor]:
    sequences = len(mask) if cu_seqlens is None else len(cu_seqlens) - 1
    sums, counts = logprobs.new_empty(sequences), logprobs.new_empty(sequences)
    if sequences:
        ends = mask if cu_seqlens is None else cu_seqlens
        arguments = (logprobs, mask.view(torch.uint8), ends, sums, counts)
        sequence_sum_kernel[(sequences,)](*arguments, **_walk(mask, cu_seqlens), AVERAGE=average, **OPTIONS)
    return sums, counts


def sequence_logprobs_backward(
    grad: Tensor, mask: Tensor, cu_seqlens: Tensor | None, counts: Tensor, average: bool
) -> Tensor:
    out = grad.new_empty(mask.shape)
    if mask.numel():
        ends = mask if cu_seqlens is None else cu_seqlens
        arguments = (grad, mask.view(torch.uint8), ends, counts, out)
        sequence_spread_kernel[(len(grad),)](*arguments, **_walk(mask, cu_seqlens), AVERAGE=average, **OPTIONS)
    return out


def _walk(mask: Tensor, cu_seqlens: Tensor | None) -> dict[str, int]:
    """Launch options of a program per sequence: the width of a row, 0 if packed, and the block it walks in."""
    packed = cu_seqlens is not None
    # the longest packed sequence would have to be read back; the mean length chooses the block
    length = triton.cdiv(mask.numel(), max(len(cu_seqlens) - 1, 1)) if packed else mask.shape[1]
    block = min(max(triton.next_power_of_2(max(length, 1)), 128), SEQUENCE_BLOCK)
    width = 0 if packed else mask.shape[1]
    return {"width": width, "PACKED": packed, "BLOCK": block, "num_warps": max(1, block // 256)}
