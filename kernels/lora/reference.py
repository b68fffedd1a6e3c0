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
    return z * p, p * (1.0 + z * (1.0 - p))


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
    return ACTIVATIONS[activation][0](gate) * up


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return d gate and d up, and write act(gate) * up, which the weights behind it need, over ``grad``."""
    value, slope = ACTIVATIONS[activation][1](promote(gate))
    d_gate = (promote(grad) * promote(up) * slope).to(gate.dtype)
    d_up = (promote(grad) * value).to(up.dtype)
    grad.copy_(gated_forward(gate, up, activation))
    return d_gate, d_up
