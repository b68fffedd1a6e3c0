"""Losses that fit a reward model to comparisons: pairs, and rankings of several responses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_fast.kernels.dispatch import choose, kernel
from rlhf_fast.kernels.registry import register
from rlhf_fast.kernels.segments import check_devices, promote

from . import reference

__all__ = ["pairwise_reward_loss", "ranked_reward_loss"]


def pairwise_reward_loss(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None, center: float = 0.0
) -> Tensor:
    r"""Bradley-Terry loss of each pair (Ouyang et al. 2022, arXiv:2203.02155, eq. 1).

    .. math:: \ell = -\log\sigma(r_w - r_l - m) + c\,(r_w + r_l)^2

    Args:
        chosen: reward of the preferred response. (B,) float.
        rejected: reward of the other one. (B,) float.
        margin: how much better the preferred one is, in units of reward (Llama 2, arXiv:2307.09288, eq. 2). (B,).
        center: weight c of the pull of rewards to mean zero (Eisenstein et al. 2023, arXiv:2312.09244).
    Returns:
        losses, (B,) float32.
    Raises:
        ValueError: the shapes differ.
    """
    if chosen.shape != rejected.shape or (margin is not None and margin.shape != chosen.shape):
        shapes = [tuple(x.shape) for x in (chosen, rejected, margin) if x is not None]
        raise ValueError(f"chosen, rejected and margin must share one shape, got {shapes}")
    check_devices(chosen, rejected=rejected, margin=margin)
    backend = choose("reward", "pairwise_reward_loss", *(x for x in (chosen, rejected, margin) if x is not None))
    if backend == "reference" or (margin is not None and margin.requires_grad):
        margin = None if margin is None else promote(margin)
        return reference.pairwise_reward_loss(promote(chosen), promote(rejected), margin, center)
    margin = None if margin is None else margin.float()
    return _PairwiseRewardLoss.apply(chosen.float(), rejected.float(), margin, float(center), backend)


def ranked_reward_loss(scores: Tensor, mask: Tensor) -> Tensor:
    r"""Plackett-Luce loss of rankings of up to K responses, best first (Plackett 1975; Luce 1959).

    .. math:: \ell = \sum_{k=1}^{K-1} \Big( \log\sum_{j \ge k} e^{s_j} - s_k \Big)

    Masked places are skipped wherever they stand, so rankings of different length share a batch. Two responses give
    the Bradley-Terry loss; fewer give 0.

    Args:
        scores: reward of each response, best first. (B, K) float.
        mask: True where there is a response. (B, K) bool.
    Returns:
        losses, (B,) float32.
    Raises:
        ValueError: the shapes differ, or the mask is not bool.
    """
    if scores.dim() != 2 or scores.shape != mask.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"scores and mask must be (B, K) float and (B, K) bool, got {tuple(scores.shape)} {scores.dtype} and "
            f"{tuple(mask.shape)} {mask.dtype}"
        )
    return reference.ranked_reward_loss(promote(scores), mask)


class _PairwiseRewardLoss(torch.autograd.Function):
    """The slopes are made with the losses, in one launch; going back is one multiplication."""

    @staticmethod
    def forward(ctx, chosen, rejected, margin, center, backend):
        ctx.needs = ctx.needs_input_grad[:2]
        tensors = (None if x is None else x.contiguous() for x in (chosen, rejected, margin))
        losses, slopes = _pairwise_reward_loss(*tensors, center, backend, any(ctx.needs))
        ctx.save_for_backward(slopes)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (slopes,) = ctx.saved_tensors
        grads = (grad * slopes).unbind()
        return *(g if need else None for g, need in zip(grads, ctx.needs)), None, None, None


def _fake_pairwise_reward_loss(chosen, rejected, margin, center, backend, need_slopes):
    return torch.empty_like(chosen), chosen.new_empty((2, *chosen.shape) if need_slopes else (0,))


@register(
    "pairwise_reward_loss(Tensor chosen, Tensor rejected, Tensor? margin, float center, str backend, "
    "bool need_slopes) -> (Tensor, Tensor)",
    _fake_pairwise_reward_loss,
)
def _pairwise_reward_loss(chosen, rejected, margin, center, backend, need_slopes):
    return kernel("reward", backend).pairwise_reward_loss(chosen, rejected, margin, center, need_slopes)
