"""Estimators of the KL divergence between policy and reference, per token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_fast.kernels.dispatch import choose, kernel
from rlhf_fast.kernels.registry import register
from rlhf_fast.kernels.segments import check_devices, promote

from .reference import ESTIMATORS

__all__ = ["ESTIMATORS", "kl_penalty"]


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    r"""Estimate KL(policy || reference) from one sampled token each (Schulman 2020, "Approximating KL divergence").

    With :math:`d = \log\pi_{ref} - \log\pi`: k1 = :math:`-d`, k2 = :math:`d^2 / 2`, k3 = :math:`e^d - d - 1`,
    abs = :math:`|d|`, and k3+ has k3's value with k2's gradient, which unlike k3's is that of the KL on average.

    Args:
        logprobs: log-probability of each token under the policy. Any shape, float.
        ref_logprobs: the same under the reference; broadcasts against ``logprobs``.
        estimator: a name of ``ESTIMATORS``. As a loss, k1 has a gradient of mean zero: use it in rewards only.
    Returns:
        the estimate, elementwise, float32 (float64 for float64), differentiable in both arguments.
    Raises:
        ValueError: the estimator is unknown.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown KL estimator {estimator!r}; known: {', '.join(ESTIMATORS)}")
    check_devices(logprobs, ref_logprobs=ref_logprobs)
    backend = choose("kl", "kl_penalty", logprobs, ref_logprobs)
    if backend == "reference":
        return ESTIMATORS[estimator](promote(ref_logprobs) - promote(logprobs))
    logprobs, ref_logprobs = torch.broadcast_tensors(logprobs.float(), ref_logprobs.float())
    return _KlPenalty.apply(logprobs, ref_logprobs, estimator, backend)


class _KlPenalty(torch.autograd.Function):
    """The slope is made with the value, in one launch; going back is one multiplication."""

    @staticmethod
    def forward(ctx, logprobs, ref_logprobs, estimator, backend):
        ctx.needs = ctx.needs_input_grad[:2]
        value, slope = _kl_penalty(logprobs.contiguous(), ref_logprobs.contiguous(), estimator, backend, any(ctx.needs))
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        of_logprobs = grad * slope
        return of_logprobs if ctx.needs[0] else None, -of_logprobs if ctx.needs[1] else None, None, None


def _fake_kl_penalty(logprobs, ref_logprobs, estimator, backend, need_slope):
    return torch.empty_like(logprobs), logprobs.new_empty(logprobs.shape if need_slope else (0,))


@register(
    "kl_penalty(Tensor logprobs, Tensor ref_logprobs, str estimator, str backend, bool need_slope) -> (Tensor, Tensor)",
    _fake_kl_penalty,
)
def _kl_penalty(logprobs, ref_logprobs, estimator, backend, need_slope):
    return kernel("kl", backend).kl_penalty(logprobs, ref_logprobs, estimator, need_slope)
