"""The Triton kernel of decoding: split keys (Dao et al. 2023, "Flash-Decoding"), each read once for all its query heads.

A program takes a fixed share of the keys of one sequence and key head. How keys are shared out depends on their places
alone, and shares are combined in order, so a sequence's bits do not depend on what is decoded beside it. Programs past a
sequence's length, or before its window, end at once: the grid is that of the longest, which the host knows, and the work
that of the lengths, which it need not know. What bounds it is reading the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels.logprobs import triton_impl as logprobs
from rlhf_fast.kernels.logprobs.triton_impl import INTERPRETED, LOG2_E, OPTIONS

__all__ = ["decode_attention", "unsupported"]

WIDEST = 256  # numbers of a head: more would not fit into registers beside the queries
LEAST = 16  # of every side of a matrix product on tensor cores; as many of the heads on a key head share a program
SHARE = 512  # keys of a program


def unsupported(op: str, *tensors: Tensor, **options) -> str | None:
    if any(x.shape[-1] > WIDEST for x in tensors):
        return f"heads are wider than {WIDEST}"
    return logprobs.unsupported(op, *tensors)


def tiling(width: int, value_width: int, item_size: int) -> dict[str, int]:
    """The launch options that follow from the widths of a head and the bytes of a number."""
    columns, value_columns = (max(LEAST, triton.next_power_of_2(n)) for n in (width, value_width))
    # a block of keys and one of values are on their way while another is worked on: 32 KB each at most in 16 bit. Tensor cores do
    # not multiply float32 exactly; without them more than 16 KB would spill registers
    block = 16384 // max(columns, value_columns) // (4 if item_size == 4 else 1)
    block = max(LEAST, min(128, block))
    sizes = {"QUERIES": LEAST, "COLUMNS": columns, "VALUE_COLUMNS": value_columns, "BLOCK": block}
    # a third stage would take more shared memory than a processor of the 3090, 4090 or 5090 has
    return {**sizes, "SHARE": SHARE, "num_warps": 4, "num_stages": 2}


@triton.jit
def product(a, b, WIDEN: tl.constexpr):
    """A matrix product with float32 sums; of float32, without rounding its factors."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def decode_kernel(
    query_ptr,
    keys_ptr,
    values_ptr,
    lengths_ptr,
    out_ptr,
    partials_ptr,
    statistics_ptr,
    key_row,
    key_head,
    key_place,
    value_row,
    value_head,
    value_place,
    scale_log2,
    window,
    longest,
    heads,
    group,
    width,
    value_width,
    SPLIT: tl.constexpr,
    WIDEN: tl.constexpr,
    QUERIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARE: tl.constexpr,
):
    """Programs (sequence, key head and some of its query heads, share of the keys); with one share the result, else what
    :func:`combine_kernel` needs."""
    sequence, share = tl.program_id(0), tl.program_id(2)
    parts = tl.cdiv(group, QUERIES)
    head = tl.program_id(1) // parts
    # what is longer than the host said has no programs
    length = tl.minimum(tl.load(lengths_ptr + sequence).to(tl.int32), longest)
    first = tl.maximum(length - window, 0)
    begin, end = share * SHARE, tl.minimum(share * SHARE + SHARE, length)
    query = tl.program_id(1) % parts * QUERIES + tl.arange(0, QUERIES)
    column, value_column = tl.arange(0, COLUMNS), tl.arange(0, VALUE_COLUMNS)
    mine, inside, value_inside = query < group, column < width, value_column < value_width
    written = mine[:, None] & value_inside[None, :]
    row = (sequence * heads + head * group + query).to(tl.int64)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    result = tl.zeros([QUERIES, VALUE_COLUMNS], tl.float32)
    if (end > begin) & (end > first):
        q = tl.load(query_ptr + row[:, None] * width + column[None, :], mask=mine[:, None] & inside[None, :], other=0.0)
        k_ptr = keys_ptr + sequence.to(tl.int64) * key_row + head.to(tl.int64) * key_head
        v_ptr = values_ptr + sequence.to(tl.int64) * value_row + head.to(tl.int64) * value_head
        # whole blocks before the window are left out
        start = begin + tl.maximum(first - begin, 0) // BLOCK * BLOCK
        for at in range(start, end, BLOCK):
            place = at + tl.arange(0, BLOCK)
            seen = (place >= first) & (place < end)
            far = place.to(tl.int64)[:, None]
            k_seen, v_seen = seen[:, None] & inside[None, :], seen[:, None] & value_inside[None, :]
            k = tl.load(k_ptr + far * key_place + column[None, :], mask=k_seen, other=0.0)
            scores = product(q, tl.trans(k), WIDEN) * scale_log2
            scores = tl.where(seen[None, :], scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            # a block may show nothing, before the window: -inf - -inf would be NaN
            anchor = tl.where(higher == float("-inf"), 0.0, higher)
            faded = tl.exp2(top - anchor)
            weights = tl.exp2(scores - anchor[:, None])
            v = tl.load(v_ptr + far * value_place + value_column[None, :], mask=v_seen, other=0.0)
            total = total * faded + tl.sum(weights, 1)
            result = result * faded[:, None] + product(weights.to(v.dtype), v, WIDEN)
            top = higher
    if SPLIT:
        slot = row * tl.num_programs(2) + share
        if (end > begin) & (end > first):
            tl.store(partials_ptr + slot[:, None] * VALUE_COLUMNS + value_column[None, :], result, mask=written)
            tl.store(statistics_ptr + 2 * slot, top, mask=mine)
            tl.store(statistics_ptr + 2 * slot + 1, total, mask=mine)
    else:
        result = result / tl.where(total > 0.0, total, 1.0)[:, None]
        at = out_ptr + row[:, None] * value_width + value_column[None, :]
        tl.store(at, result.to(out_ptr.dtype.element_ty), mask=written)


@triton.jit
def combine_kernel(
    partials_ptr,
    statistics_ptr,
    lengths_ptr,
    out_ptr,
    window,
    longest,
    shares,
    value_width,
    VALUE_COLUMNS: tl.constexpr,
    SHARE: tl.constexpr,
):
    """Programs (sequence, head): the shares that hold keys, in their order."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    length = tl.minimum(tl.load(lengths_ptr + sequence).to(tl.int32), longest)
    row = (sequence * tl.num_programs(1) + head).to(tl.int64)
    column = tl.arange(0, VALUE_COLUMNS)
    inside = column < value_width
    top, total = float("-inf"), 0.0
    result = tl.zeros([VALUE_COLUMNS], tl.float32)
    for share in range(tl.maximum(length - window, 0) // SHARE, (length + SHARE - 1) // SHARE):
        slot = row * shares + share
        other = tl.load(statistics_ptr + 2 * slot)
        higher = tl.maximum(top, other)
        faded, weight = tl.exp2(top - higher), tl.exp2(other - higher)
        total = total * faded + tl.load(statistics_ptr + 2 * slot + 1) * weight
        result = result * faded + tl.load(partials_ptr + slot * VALUE_COLUMNS + column, mask=inside, other=0.0) * weight
        top = higher
    result = result / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + row * value_width + column, result.to(out_ptr.dtype.element_ty), mask=inside)


def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float, window: int, longest: int
) -> Tensor:
    batch, heads, width = query.shape
    key_heads, value_width = keys.shape[1], values.shape[3]
    out = query.new_empty(batch, heads, value_width)
    if not out.numel():
        return out
    sizes = tiling(width, value_width, query.element_size())
    shares = max(1, triton.cdiv(longest, SHARE))
    split = shares > 1
    # with one share nobody reads these
    partials = torch.empty((batch, heads, shares, sizes["VALUE_COLUMNS"]) if split else 1, device=query.device)
    statistics = torch.empty((batch, heads, shares, 2) if split else 1, device=query.device)
    # the interpreter multiplies bfloat16 as if its bits were integers
    kind = {"SPLIT": split, "WIDEN": INTERPRETED}
    strides = (*keys.stride()[:3], *values.stride()[:3])
    numbers = (scale * LOG2_E, window, longest, heads, heads // key_heads, width, value_width)
    parts = triton.cdiv(heads // key_heads, sizes["QUERIES"])
    decode_kernel[batch, key_heads * parts, shares](
        query, keys, values, lengths, out, partials, statistics, *strides, *numbers, **kind, **sizes, **OPTIONS
    )
    if split:
        # one warp moves a head of 128 numbers in one go
        options = {"VALUE_COLUMNS": sizes["VALUE_COLUMNS"], "SHARE": SHARE, "num_warps": 1}
        numbers = (window, longest, shares, value_width)
        combine_kernel[batch, heads](partials, statistics, lengths, out, *numbers, **options, **OPTIONS)
    return out
