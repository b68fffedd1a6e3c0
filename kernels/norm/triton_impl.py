"""Triton kernels of RMSNorm: a program holds whole rows in registers, reads each number once and writes it once.

Forward moves 2 numbers an element, backward 3: both are bound by memory. The rows of a program and the order of its sums
depend on the width alone, so a row's bits do not depend on its neighbours. The weight's gradient is summed by a fixed
number of programs, each over its own rows in order, and then over programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels.logprobs import triton_impl as logprobs
from rlhf_fast.kernels.logprobs.triton_impl import OPTIONS

__all__ = ["rms_norm_backward", "rms_norm_forward", "unsupported"]

WIDEST = 16384  # a row of more would spill
SMALL_TILE = 2048  # narrow rows (a head's 64 or 128 entries) share a program until they fill this
WEIGHT_PROGRAMS = 256  # that share the rows when the weight is trained


def unsupported(op: str, *tensors: Tensor, **options) -> str | None:
    if tensors[0].shape[-1] > WIDEST:
        return f"rows are wider than {WIDEST}"
    return logprobs.unsupported(op, *tensors)


def tiling(width: int) -> dict[str, int]:
    """The launch options that follow from a row's width: 16 entries a thread up to 8 warps, more beyond."""
    block = triton.next_power_of_2(width)
    rows = max(1, SMALL_TILE // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(1, min(8, rows * block // 512))}


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
    d_weight_ptr,
    num_rows,
    width,
    offset,
    ROUND_FIRST: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per ROWS rows, or a fixed number of programs that take turns when they sum the weight's gradient."""
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32) + offset
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row = first.to(tl.int64) + tl.arange(0, ROWS)
        rstd = tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)[:, None]
        grad = load_rows(grad_ptr, row, column, num_rows, width, ROWS)
        unit = load_rows(x_ptr, row, column, num_rows, width, ROWS) * rstd
        scaled = grad * weight[None, :]
        mean = tl.sum(scaled * unit, 1) / width
        store_rows(d_x_ptr, rstd * (scaled - unit * mean[:, None]), row, column, num_rows, width, ROWS)
        if HAS_WEIGHT:
            if ROUND_FIRST:
                unit = unit.to(x_ptr.dtype.element_ty).to(tl.float32)
            total += grad * unit
    if HAS_WEIGHT:
        tl.store(d_weight_ptr + tl.program_id(0) * width + column, tl.sum(total, 0), mask=column < width)


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
    programs = triton.cdiv(num_rows, sizes["ROWS"])
    if need_weight:
        programs = min(programs, WEIGHT_PROGRAMS)
    partials = torch.empty((programs if need_weight else 0, width), dtype=torch.float32, device=x.device)
    if num_rows:
        arguments = (grad, x, weight, rstd, d_x, partials, num_rows, width, offset)
        flags = {"ROUND_FIRST": round_first, "HAS_WEIGHT": need_weight}
        norm_backward_kernel[(programs,)](*arguments, **flags, **sizes, **OPTIONS)
    return d_x, partials.sum(0).to(weight.dtype) if need_weight else weight.new_empty(0)
