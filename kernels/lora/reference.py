"""The activation of a gated MLP and its derivative, in plain PyTorch; its value in the bits of transformers' modules."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.kernels.segments import promote


def unsupported(op: str, *tensors: Tensor, **options) -> str | None:
    return None


def _silu_and_slope(z: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.sigmoid(z)
    return z * p, (1.0 - p).mul_(z).add_(1.0).mul_(p)


def _gelu_tanh_and_slope(z: Tensor) -> tuple[Tensor, Tensor]:
    c = math.sqrt(2.0 / math.pi)
    t = torch.tanh(c * (z + 0.044715 * z**3))
    return 0.5 * z * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * c * (1.0 + 3 * 0.044715 * z * z)


# name -> the function as models call it, and its value and slope
ACTIVATIONS = {
    "silu": (F.silu, _silu_and_slope),
    "gelu_tanh": (lambda z: F.gelu(z, approximate="tanh"), _gelu_tanh_and_slope),
}


def gated_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return act(gate) * up."""
    return ACTIVATIONS[activation][0](gate).mul_(up)


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return d gate and d up, and write act(gate) * up, which the weights behind it need, over ``grad``."""
    value, slope = ACTIVATIONS[activation][1](promote(gate))
    # in place, as each of these is as large as the widest tensor of the model
    d_up = value.mul_(promote(grad)).to(up.dtype)
    d_gate = slope.mul_(promote(grad)).mul_(promote(up)).to(gate.dtype)
    del value, slope
    grad.copy_(gated_forward(gate, up, activation))
    return d_gate, d_up
