"""Estimators of the KL divergence between policy and reference, per token."""

from __future__ import annotations

from torch import Tensor

from rlhf_fast.kernels.segments import promote

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
    return ESTIMATORS[estimator](promote(ref_logprobs) - promote(logprobs))
