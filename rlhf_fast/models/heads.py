"""Scalar heads: a value or a score from a hidden state. They live outside PEFT, in fp32, and are always saved."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ScalarHead(nn.Module):
    """A linear map to one number per hidden state, or to one per head of an ensemble, in fp32 whatever the body's dtype.

    Args:
        hidden_size: D, the body's width.
        std: standard deviation of the initial weights. Small, so that an untrained critic predicts about 0 and
            an untrained reward model ranks by chance.
        count: K, heads. Their mean is the score, their spread says how sure it is.
    """

    def __init__(self, hidden_size: int, std: float | None = None, count: int = 1):
        super().__init__()
        each = () if count == 1 else (count,)
        self.count = count
        self.weight = nn.Parameter(torch.empty(*each, hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(
            torch.zeros(count, dtype=torch.float32)
        )  # never without a dimension, which cannot be sharded
        nn.init.normal_(self.weight, std=std if std is not None else 1.0 / (hidden_size + 1))

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (...), float32: the mean over the heads."""
        scores = self.each(hidden)
        return scores[..., 0] if self.count == 1 else scores.mean(-1)

    def each(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., K), float32: what every head says."""
        with torch.autocast(hidden.device.type, enabled=False):
            scores = hidden.float() @ (self.weight if self.count == 1 else self.weight.T)
            return (scores[..., None] if self.count == 1 else scores) + self.bias
