"""Triton kernels of the logits: a program holds one tile of a row in registers and reads it once.

How a row is cut into tiles depends on V alone, and the tiles' statistics are combined in a fixed order. So a result is
the same bits whatever rows surround it, and a few rows of a large vocabulary still keep every processor busy.

A logit costs its own bytes forward, and its own twice backward (read and written); the statistics of a tile are 12
bytes. All loads but those of a last, partial tile are of 16 bytes per thread where rows begin at multiples of that. What
a tile costs beside its bytes is instructions, so exponentials have base 2. float64 is left to the reference.
"""

from __future__ import annotations

import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# fused multiply-adds, said explicitly as the default differs between Triton releases
OPTIONS = {} if INTERPRETED else {"enable_fp_fusion": True}
TILE, CAPPED_TILE = 8192, 4096
LOG2_E = math.log2(math.e)
_LOG2_E, _LN_2 = tl.constexpr(LOG2_E), tl.constexpr(math.log(2))


def unsupported(op: str, *tensors: Tensor, **options) -> str | None:
    if not INTERPRETED and not all(x.is_cuda for x in tensors):
        return "tensors are not on a CUDA device (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
    if any(x.dtype == torch.float64 for x in tensors):
        return "float64 runs on the reference only"
    return None


def tiling(vocab_size: int, softcap: float | None) -> dict[str, int]:
    """The launch options that follow from V: entries of a tile, tiles of a row, warps (16 or 32 entries a thread).

    The same with and without a gradient, for any dtype. What a tile does once costs a thread as much as a dozen
    entries, so tiles are as large as registers allow.
    """
    block = min(triton.next_power_of_2(vocab_size), TILE if softcap is None else CAPPED_TILE)
    return {
        "BLOCK": block,
        "TILES": triton.cdiv(vocab_size, block),
        "num_warps": max(1, min(8, block // 512)),
        "HAS_SOFTCAP": softcap is not None,
    }


def softmax_scales(temperature: float, softcap: float | None, logit_scale: float) -> tuple[float, float]:
    """Return (inner, outer) > 0: the softmax has base 2 and is taken of x * outer, or of outer * tanh(x * inner).

    2^x is one instruction where e^x is six, and folded into this scale the base costs nothing.
    """
    if softcap is None:
        return 1.0, logit_scale / temperature * LOG2_E
    return logit_scale / softcap, softcap / temperature * LOG2_E


def empty_results(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logprobs and entropy in float32, logsumexp in float64, (N,) each."""
    dtypes = (torch.float32, torch.float32, torch.float64)
    return tuple(torch.empty(len(logits), dtype=dtype, device=logits.device) for dtype in dtypes)


@triton.jit
def tanh(x):
    """Hyperbolic tangent: by exp, and by its series where that would cancel. The interpreter has no libdevice."""
    e = tl.exp2(tl.abs(x) * (-2.0 * _LOG2_E))
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
def load_tile(row_ptr, first, end, EVICTION: tl.constexpr, BLOCK: tl.constexpr):
    """Entries ``first + lane`` of a row, -inf from ``end`` on. A full tile is read without a mask: in vectors of 16
    bytes whatever V, as long as rows begin at multiples of that."""
    at = row_ptr + first + tl.arange(0, BLOCK)
    if first + BLOCK <= end:
        x = tl.load(at, eviction_policy=EVICTION)
    else:
        inside = first + tl.arange(0, BLOCK) < end
        x = tl.load(at, mask=inside, other=float("-inf"), eviction_policy=EVICTION)
    return x


@triton.jit
def store_tile(row_ptr, first, end, x, BLOCK: tl.constexpr):
    at = row_ptr + first + tl.arange(0, BLOCK)
    if first + BLOCK <= end:
        tl.store(at, x.to(row_ptr.dtype.element_ty), eviction_policy="evict_first")
    else:
        inside = first + tl.arange(0, BLOCK) < end
        tl.store(at, x.to(row_ptr.dtype.element_ty), mask=inside, eviction_policy="evict_first")


@triton.jit
def distance(u, top, outer):
    """How far the softmax's argument is below its maximum, in base 2: <= 0, and 0 for whatever equals ``top``.

    Subtracted first, as the product of 100 and a factor loses the digits that a token with p = 0.9996 needs, and that
    of the lowest finite number, which masks words, overflows.
    """
    # of a tile of -inf alone: any finite maximum keeps 2^-inf at 0 instead of NaN
    return (u - tl.where(top == float("-inf"), 0.0, top)) * outer


@triton.jit
def tile_statistics(x, column, vocab_size, inner, outer, HAS_SOFTCAP: tl.constexpr):
    """The maximum of u = squash(x), the sum of e = 2^d over its distances d to that, and the sum of e d."""
    u = squash(x, inner, HAS_SOFTCAP)
    if HAS_SOFTCAP:
        # the cap makes something finite of the -inf behind the end
        u = tl.where(column < vocab_size, u, float("-inf"))
    top = tl.max(u, 0)
    d = distance(u, top, outer)
    e = tl.exp2(d)
    # below 2^-126 e is 0 and d, which may be -inf, must not matter
    return top, tl.sum(e, 0), tl.sum(e * tl.maximum(d, -126.0), 0)


@triton.jit
def store_statistics(partials_ptr, tile, num_tiles, top, total, moment):
    partial = partials_ptr + tile.to(tl.int64)
    tl.store(partial, top)
    tl.store(partial + num_tiles, total)
    tl.store(partial + 2 * num_tiles.to(tl.int64), moment)


@triton.jit
def combined_statistics(partials_ptr, row, num_tiles, outer, TILES: tl.constexpr, LANES: tl.constexpr):
    """The statistics of a row from those of its tiles, summed in an order that only TILES decides."""
    lane = tl.arange(0, LANES)
    partial = partials_ptr + row * TILES + lane
    # past the L1 cache, which does not see what other processors write
    tops = tl.load(partial, mask=lane < TILES, other=float("-inf"), cache_modifier=".cg")
    totals = tl.load(partial + num_tiles, mask=lane < TILES, other=0.0, cache_modifier=".cg")
    moments = tl.load(partial + 2 * num_tiles.to(tl.int64), mask=lane < TILES, other=0.0, cache_modifier=".cg")
    top = tl.max(tops, 0)
    shift = distance(tops, top, outer)
    decay = tl.exp2(shift)
    moments = decay * (moments + tl.maximum(shift, -126.0) * totals)
    return top, tl.sum(decay * totals, 0), tl.sum(moments, 0)


@triton.jit
def squashed_label(row_ptr, label, vocab_size, inner, HAS_SOFTCAP: tl.constexpr):
    """``squash`` of the label's logit; of some entry of the row if the label is outside it."""
    inside = (label >= 0) & (label < vocab_size)
    return squash(tl.load(row_ptr + tl.where(inside, label, 0)), inner, HAS_SOFTCAP)


@triton.jit
def store_results(
    logprobs_ptr, entropy_ptr, lse_ptr, row, label, vocab_size, ignore_index, u_label, outer, top, total, moment
):
    log_total = tl.log2(total)
    logprob = _LN_2 * (distance(u_label, top, outer) - log_total)
    logprob = tl.where((label >= 0) & (label < vocab_size), logprob, float("nan"))
    entropy = _LN_2 * (log_total - moment / total)
    keep = label != ignore_index
    tl.store(logprobs_ptr + row, tl.where(keep, logprob, 0.0))
    tl.store(entropy_ptr + row, tl.where(keep, entropy, 0.0))
    # outer as a float32 tensor, which the interpreter's arguments are not
    peak = top.to(tl.float64) * (tl.zeros_like(top) + outer).to(tl.float64)
    tl.store(lse_ptr + row, tl.full((), _LN_2, tl.float64) * (peak + log_total.to(tl.float64)))


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
    first = (tile % TILES) * BLOCK
    label = tl.load(labels_ptr + row)
    x = load_tile(row_ptr, first, tl.where(label == ignore_index, 0, vocab_size), "evict_first", BLOCK)
    statistics = tile_statistics(x, first + tl.arange(0, BLOCK), vocab_size, inner, outer, HAS_SOFTCAP)
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
    statistics = combined_statistics(partials_ptr, row, tl.num_programs(0) * TILES, outer, TILES, LANES)
    outputs = logprobs_ptr, entropy_ptr, lse_ptr, row, label, vocab_size, ignore_index
    store_results(*outputs, u_label, outer, *statistics)


@triton.jit
def normaliser(lse, entropy, outer):
    """(shift, rest): log2 p = (u - shift) * outer - rest. Two parts, as one float32 cannot hold the log-sum-exp closely
    enough for p near 1 at logits near 100."""
    outer = tl.zeros_like(entropy) + outer
    exact = outer.to(tl.float64)
    inverse = (1.0 / outer).to(tl.float64)
    # one step of Newton's from float32's digits to float64's, which spares a division
    inverse = inverse * (2.0 - exact * inverse)
    log2_sum = lse * tl.full((), _LOG2_E, tl.float64)
    shift = (log2_sum * inverse).to(tl.float32)
    rest = (log2_sum - shift.to(tl.float64) * exact).to(tl.float32)
    # the rounding of lse alone, which no probability can show: a word without a rival is certain
    rest = tl.where(tl.abs(rest) < 1e-9, 0.0, rest)
    # logits so large that log(sum) was lost in their rounding (a row masked with the lowest finite number) are so far
    # apart that only equal ones count: their entropy is the log of how many there are
    return shift, tl.where(tl.abs(shift * outer) > 1e9, entropy * _LOG2_E, rest)


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
    """One program per tile, which may be overwritten: nobody else reads it.

    d logprob / d z_j = [j = label] - p_j and d entropy / d z_j = -p_j (log p_j + entropy), so an entry other than the
    label's is p_j (constant + steepness log2 p_j) with two numbers that the row has in common.
    """
    tile = tl.program_id(0)
    row = (tile // TILES).to(tl.int64)
    first = (tile % TILES) * BLOCK
    lane = tl.arange(0, BLOCK)
    out_row_ptr = out_ptr + row * out_stride
    label = tl.load(labels_ptr + row)
    at_label = tl.load(grad_logprobs_ptr + row)
    grad_entropy = 0.0
    if HAS_ENTROPY:
        grad_entropy = tl.load(grad_entropy_ptr + row)
    if (label == ignore_index) | ((at_label == 0.0) & (grad_entropy == 0.0)):
        store_tile(out_row_ptr, first, vocab_size, tl.zeros([BLOCK], tl.float32), BLOCK)
    else:
        x = load_tile(logits_ptr + row * stride, first, vocab_size, "evict_first", BLOCK)
        entropy = tl.load(entropy_ptr + row)
        shift, rest = normaliser(tl.load(lse_ptr + row), entropy, outer)
        slope = outer * _LN_2
        if HAS_SOFTCAP:
            slope *= inner
        at_label = tl.where((label >= 0) & (label < vocab_size), at_label * slope, float("nan"))
        constant = -at_label - slope * grad_entropy * entropy
        u = squash(x, inner, HAS_SOFTCAP)
        log2_p = tl.fma(u - shift, outer, -rest)
        p = tl.exp2(log2_p)
        if HAS_ENTROPY:
            # below 2^-126 p is 0 and log p, which may be -inf, must not matter
            d_x = p * tl.fma(tl.maximum(log2_p, -126.0), -slope * grad_entropy * _LN_2, constant)
        else:
            d_x = p * constant
        d_x = tl.where(lane == (label - first).to(tl.int32), d_x + at_label, d_x)
        if HAS_SOFTCAP:
            d_x *= 1.0 - u * u
        store_tile(out_row_ptr, first, vocab_size, d_x, BLOCK)


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
    sizes = tiling(vocab_size, softcap)
    tiles = sizes["TILES"]
    partials = torch.empty((3, num_rows if tiles > 1 else 0, tiles), dtype=torch.float32, device=logits.device)
    scales = softmax_scales(temperature, softcap, logit_scale)
    arguments = (logits, labels, *results, partials, vocab_size, logits.stride(0), *scales, ignore_index)
    if num_rows:
        forward_kernel[(num_rows * tiles,)](*arguments, **sizes, **OPTIONS)
    if num_rows and tiles > 1:
        lanes = triton.next_power_of_2(tiles)
        # a lane for each partial, so that sums have one order whatever the number of warps
        sizes = {"TILES": tiles, "LANES": lanes, "num_warps": max(1, lanes // 32), "HAS_SOFTCAP": softcap is not None}
        combine_kernel[(num_rows,)](*arguments, **sizes, **OPTIONS)
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
    sizes = tiling(vocab_size, softcap)
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
            HAS_ENTROPY=grad_entropy is not None,
            **sizes,
            **OPTIONS,
        )


# tokens of a sequence that a program of sequence_logprobs reads at a time
SEQUENCE_BLOCK = 1024


@triton.jit
def boundaries(cu_seqlens_ptr, width, PACKED: tl.constexpr):
    """First token and number of tokens of this program's sequence: a row of ``width``, or part of ``width`` packed ones.

    Whatever the boundaries say, nothing outside the tensor is reached: on a GPU nobody has checked them.
    """
    sequence = tl.program_id(0)
    if PACKED:
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0), width)
        end = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1), width)
        first, length = begin.to(tl.int64), tl.maximum(end - begin, 0)
    else:
        first, length = sequence.to(tl.int64) * width, width
    return first, length


@triton.jit
def clear_unclaimed(out_ptr, cu_seqlens_ptr, width, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """Write zeros to the packed tokens before the first sequence and behind the last, as no sequence writes those."""
    if PACKED:
        lane = tl.arange(0, BLOCK)
        if tl.program_id(0) == 0:
            stop = tl.minimum(tl.load(cu_seqlens_ptr), width)
            for start in range(0, stop, BLOCK):
                tl.store(out_ptr + start + lane, tl.zeros([BLOCK], tl.float32), mask=start + lane < stop)
        if tl.program_id(0) == tl.num_programs(0) - 1:
            begin = tl.maximum(tl.load(cu_seqlens_ptr + tl.num_programs(0)), 0)
            for start in range(begin, width, BLOCK):
                tl.store(out_ptr + start + lane, tl.zeros([BLOCK], tl.float32), mask=start + lane < width)


@triton.jit
def load_kept(x_ptr, at, inside, keep):
    """Values of the tokens that count, 0 for the others, which may hold anything.

    They are loaded all the same: a load that had to wait for the mask would cost its latency twice, and 16-byte loads
    their neighbours.
    """
    return tl.where(keep, tl.load(x_ptr + at, mask=inside, other=0.0), 0.0)


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
        inside = start + lane < length
        keep = tl.load(mask_ptr + at, mask=inside, other=0) != 0
        total += load_kept(logprobs_ptr, at, inside, keep)
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
    clear_unclaimed(out_ptr, cu_seqlens_ptr, width, PACKED, BLOCK)


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
    """Launch options of a program per sequence: how many tokens a row or everything packed has, and the block."""
    packed = cu_seqlens is not None
    # the longest packed sequence would have to be read back; the mean length chooses the block
    length = triton.cdiv(mask.numel(), max(len(cu_seqlens) - 1, 1)) if packed else mask.shape[1]
    block = min(max(triton.next_power_of_2(max(length, 1)), 128), SEQUENCE_BLOCK)
    return {"width": mask.shape[-1], "PACKED": packed, "BLOCK": block, "num_warps": max(1, block // 256)}
