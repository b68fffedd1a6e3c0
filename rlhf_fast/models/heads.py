"""Scalar heads: a value or a score from a hidden state. They live outside PEFT, in fp32, and are always saved."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ScalarHead(nn.Module):
    """A linear map to one number per hidden state, computed in fp32 whatever the body's dtype.

    Args:
        hidden_size: D, the body's width.
        std: standard deviation of the initial weights. Small, so that an untrained critic predicts about 0 and
            an untrained reward model ranks by chance.
    """

    def __init__(self, hidden_size: int, std: float | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros((), dtype=torch.float32))
        nn.init.normal_(self.weight, std=std if std is not None else 1.0 / (hidden_size + 1))

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (...), float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ self.weight + self.bias
