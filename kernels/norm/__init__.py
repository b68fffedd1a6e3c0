"""RMSNorm that keeps its input in its own type, and whose result can be made again instead of being kept."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_fast.kernels.dispatch import implementation
from rlhf_fast.kernels.registry import register
from rlhf_fast.kernels.segments import check_devices, promote

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, round_first: bool = True) -> Tensor:
    r"""Root mean square layer normalization (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4), row by row.

    .. math:: y = (c + w) \odot \frac{x}{\sqrt{\tfrac1D \sum_i x_i^2 + \epsilon}}

    in float32, with transformers' two orders of rounding: Llama, Qwen and Mistral round the quotient to x's type and
    then multiply (``round_first=True``); Gemma multiplies first, by 1 + w (``offset=1.0, round_first=False``).
    Keeps x as it is and one number a row; plain PyTorch keeps a float32 copy of x.

    Args:
        x: (..., D) float.
        weight: w, (D,) float, trained or not.
        eps: added to the mean square.
        offset: the c above.
        round_first: round the quotient to x's type before the multiplication.
    Returns:
        (..., D); of the type that multiplying gives with ``round_first`` (float32 for a float32 weight), else of x's.
    Raises:
        ValueError: the shapes differ.
    """
    if weight.dim() != 1 or x.dim() < 1 or x.shape[-1] != len(weight) or not len(weight):
        raise ValueError(f"x must be (..., D) and weight (D,), got {tuple(x.shape)} and {tuple(weight.shape)}")
    check_devices(x, weight=weight)
    options = float(eps), float(offset), bool(round_first)
    if not torch.is_grad_enabled():
        return _forward(_rows(x), weight, *options)[0].view(x.shape)
    out = _RMSNorm.apply(x, weight, *options)
    if not torch.compiler.is_compiling():
        # a note to whoever would keep the result for its own backward pass: what it is made from is kept anyway
        out._made_by = MadeBy(out._version, x.detach(), weight.detach(), options)
    return out


class MadeBy(NamedTuple):
    """What a result of :func:`rms_norm` is made from."""

    version: int  # of the result then: written over since, it is something else
    x: Tensor
    weight: Tensor
    options: tuple[float, float, bool]

    @staticmethod
    def of(tensor: Tensor) -> MadeBy | None:
        """How to make ``tensor`` again, if that is known and still true."""
        note = None if torch.compiler.is_compiling() else getattr(tensor, "_made_by", None)
        return note if note is not None and note.version == tensor._version else None


def again(x: Tensor, weight: Tensor, options: tuple[float, float, bool]) -> Tensor:
    """What :func:`rms_norm` made of the same arguments, bit for bit, without a gradient."""
    return _forward(_rows(x), weight, *options)[0].view(x.shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset, round_first):
        out, rstd = _forward(_rows(x), weight, eps, offset, round_first)
        ctx.save_for_backward(x, weight, rstd)
        ctx.options = offset, round_first
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, rstd = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad[:2]
        d_x, d_weight = _backward(_rows(grad), _rows(x), weight, rstd, *ctx.options, need_weight)
        return d_x.view(x.shape) if need_x else None, d_weight if need_weight else None, None, None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _fake_forward(x, weight, eps, offset, round_first):
    dtype = torch.promote_types(x.dtype, weight.dtype) if round_first else x.dtype
    return torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[0], dtype=promote(x[:0]).dtype)


@register(
    "rms_norm_forward(Tensor x, Tensor weight, float eps, float offset, bool round_first) -> (Tensor, Tensor)",
    _fake_forward,
)
def _forward(x, weight, eps, offset, round_first):
    chosen = implementation("norm", "rms_norm_forward", x, weight)
    return chosen.rms_norm_forward(x, weight, eps, offset, round_first)


def _fake_backward(grad, x, weight, rstd, offset, round_first, need_weight):
    return torch.empty_like(x), torch.empty_like(weight) if need_weight else weight.new_empty(0)


@register(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, float offset, bool round_first, "
    "bool need_weight) -> (Tensor, Tensor)",
    _fake_backward,
)
def _backward(grad, x, weight, rstd, offset, round_first, need_weight):
    chosen = implementation("norm", "rms_norm_backward", x, grad, weight)
    return chosen.rms_norm_backward(grad, x, weight, rstd, offset, round_first, need_weight)
