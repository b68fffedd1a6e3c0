"""Triton kernels of RMSNorm: a program holds whole rows in registers, reads each number once and writes it once.

Forward moves 2 numbers an element, backward 3: both are bound by memory. The rows of a program and the order of its sums
depend on the width alone, so a row's bits do not depend on its neighbours. The gradient of a trained weight is a launch
of its own, column by column, as whole rows and their running sums do not fit into registers together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels.logprobs import triton_impl as logprobs
from rlhf_fast.kernels.logprobs.triton_impl import OPTIONS

__all__ = ["rms_norm_backward", "rms_norm_forward", "unsupported"]

WIDEST, WIDEST_ODD = 8192, 2048  # more would leave room for less than two programs per processor
SMALL_TILE = 2048  # narrow rows (a head's 64 or 128 entries) share a program until they fill this
# a trained weight: the tile that a program sums at a time, and how many programs share the rows
WEIGHT_TILE = {"ROWS": 32, "BLOCK": 64, "num_warps": 4}
SLABS = 64


def unsupported(op: str, *tensors: Tensor, **options) -> str | None:
    width = tensors[0].shape[-1]
    if width > (WIDEST_ODD if width % 16 else WIDEST):
        return f"rows are wider than {WIDEST} (or than {WIDEST_ODD} and no multiple of 16)"
    return logprobs.unsupported(op, *tensors)


def tiling(width: int) -> dict[str, int]:
    """The launch options that follow from a row's width: 16 entries a thread."""
    block = triton.next_power_of_2(width)
    rows = max(1, SMALL_TILE // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": rows * block // 512}


@triton.jit
def load_rows(ptr, row, column, num_rows, width, ROWS: tl.constexpr):
    """(ROWS, BLOCK) entries in float32, 0 outside."""
    inside = column[None, :] < width
    if ROWS > 1:
        inside = inside & (row[:, None] < num_rows)
    x = tl.load(ptr + row[:, None] * width + column[None, :], mask=inside, other=0.0)
    return x.to(tl.float32)


@triton.jit
def store_rows(ptr, x, row, column, num_rows, width, ROWS: tl.constexpr):
    inside = column[None, :] < width
    if ROWS > 1:
        inside = inside & (row[:, None] < num_rows)
    tl.store(ptr + row[:, None] * width + column[None, :], x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def norm_forward_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    rstd_ptr,
    num_rows,
    width,
    eps,
    offset,
    ROUND_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    x = load_rows(x_ptr, row, column, num_rows, width, ROWS)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / width + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < num_rows)
    unit = x * rstd[:, None]
    if ROUND_FIRST:
        unit = unit.to(x_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32) + offset
    store_rows(out_ptr, unit * weight[None, :], row, column, num_rows, width, ROWS)


@triton.jit
def norm_backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    d_x_ptr,
    num_rows,
    width,
    offset,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    rstd = tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)[:, None]
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32) + offset
    scaled = load_rows(grad_ptr, row, column, num_rows, width, ROWS) * weight[None, :]
    unit = load_rows(x_ptr, row, column, num_rows, width, ROWS) * rstd
    mean = tl.sum(scaled * unit, 1) / width
    store_rows(d_x_ptr, rstd * (scaled - unit * mean[:, None]), row, column, num_rows, width, ROWS)


@triton.jit
def norm_weight_kernel(
    grad_ptr,
    x_ptr,
    rstd_ptr,
    partials_ptr,
    num_rows,
    width,
    ROUND_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Programs (slab, block of columns); a slab takes every so manieth group of rows, in order."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row = tl.cast(first, tl.int64) + tl.arange(0, ROWS)
        rstd = tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)[:, None]
        unit = load_rows(x_ptr, row, column, num_rows, width, ROWS) * rstd
        if ROUND_FIRST:
            unit = unit.to(x_ptr.dtype.element_ty).to(tl.float32)
        total += load_rows(grad_ptr, row, column, num_rows, width, ROWS) * unit
    tl.store(partials_ptr + tl.program_id(0) * width + column, tl.sum(total, 0), mask=column < width)


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool) -> tuple[Tensor, Tensor]:
    num_rows, width = x.shape
    dtype = torch.promote_types(x.dtype, weight.dtype) if round_first else x.dtype
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    sizes = tiling(width)
    if num_rows:
        grid = (triton.cdiv(num_rows, sizes["ROWS"]),)
        arguments = (x, weight, out, rstd, num_rows, width, eps, offset)
        norm_forward_kernel[grid](*arguments, ROUND_FIRST=round_first, **sizes, **OPTIONS)
    return out, rstd


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, round_first: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    num_rows, width = x.shape
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sizes = tiling(width)
    if num_rows:
        grid = (triton.cdiv(num_rows, sizes["ROWS"]),)
        norm_backward_kernel[grid](grad, x, weight, rstd, d_x, num_rows, width, offset, **sizes, **OPTIONS)
    if not need_weight:
        return d_x, weight.new_empty(0)
    slabs = min(SLABS, triton.cdiv(num_rows, WEIGHT_TILE["ROWS"]))
    partials = torch.empty((slabs, width), dtype=torch.float32, device=x.device)
    if slabs:
        grid = (slabs, triton.cdiv(width, WEIGHT_TILE["BLOCK"]))
        arguments = (grad, x, rstd, partials, num_rows, width)
        norm_weight_kernel[grid](*arguments, ROUND_FIRST=round_first, **WEIGHT_TILE, **OPTIONS)
    return d_x, partials.sum(0).to(weight.dtype)
