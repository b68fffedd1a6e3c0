"""The estimators as functions of d = ref_logprobs - logprobs. One row here is a new estimator."""

from __future__ import annotations

import torch
from torch import Tensor


def _k3(d: Tensor) -> Tensor:
    # exp(d) - 1 cancels for nearly equal policies, expm1 does not
    return torch.expm1(d) - d


def _k3_plus(d: Tensor) -> Tensor:
    k2 = d.square() / 2
    return _k3(d).detach() + (k2 - k2.detach())


ESTIMATORS = {
    "k1": torch.neg,
    "k2": lambda d: d.square() / 2,
    "k3": _k3,
    "k3+": _k3_plus,
    "abs": torch.abs,
}
