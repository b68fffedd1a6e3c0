"""Direct preference optimisation: losses of a chosen and a rejected response, one row per pair."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_fast.kernels.dispatch import choose, kernel
from rlhf_fast.kernels.registry import register
from rlhf_fast.kernels.segments import check_devices, promote

from .reference import KINDS, SMOOTHED

__all__ = ["KINDS", "dpo_loss"]


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Preference loss of each pair (Rafailov et al. 2023, arXiv:2305.18290, eq. 7, and its relatives).

    .. math:: \ell = -\log\sigma(\beta d), \qquad d = (\log\pi_w - \log\pi^{ref}_w) - (\log\pi_l - \log\pi^{ref}_l)

    Args:
        chosen: summed log-probability of the preferred response under the policy, (B,) float; averaged over its
            tokens for ``ipo``, as in TRL.
        rejected, ref_chosen, ref_rejected: likewise.
        beta: strength of the pull towards the reference, > 0.
        kind: a name of ``KINDS``.
        label_smoothing: assumed share of flipped labels, in [0, 0.5); ``sigmoid`` (conservative DPO), ``robust`` and
            ``exo_pair`` (which needs it > 0) only.
    Returns:
        losses (B,), and the implicit rewards beta * (log pi - log pi_ref) of chosen and rejected, (B,) each, detached.
    Raises:
        ValueError: the kind is unknown, or an option is out of range or would have no effect.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")
    if beta <= 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    if label_smoothing and kind not in SMOOTHED:
        raise ValueError(f"label_smoothing has no effect with kind={kind!r}; it applies to {', '.join(SMOOTHED)}")
    if kind == "exo_pair" and label_smoothing == 0.0:
        raise ValueError("kind='exo_pair' needs label_smoothing > 0 (its authors use 1e-3)")
    if not chosen.shape == rejected.shape == ref_chosen.shape == ref_rejected.shape:
        shapes = [tuple(x.shape) for x in (chosen, rejected, ref_chosen, ref_rejected)]
        raise ValueError(f"chosen, rejected, ref_chosen and ref_rejected must share one shape, got {shapes}")
    check_devices(chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    tensors = (chosen, rejected, ref_chosen, ref_rejected)
    backend = choose("preference", "dpo_loss", *tensors)
    if backend == "reference":
        chosen, rejected, ref_chosen, ref_rejected = map(promote, tensors)
        w, l = chosen - ref_chosen, rejected - ref_rejected
        return KINDS[kind](w, l, beta, label_smoothing), (beta * w).detach(), (beta * l).detach()
    return _DpoLoss.apply(*(x.float() for x in tensors), float(beta), kind, float(label_smoothing), backend)


class _DpoLoss(torch.autograd.Function):
    """The slopes are made with the losses, in one launch; going back is one multiplication."""

    @staticmethod
    def forward(ctx, chosen, rejected, ref_chosen, ref_rejected, *options):
        ctx.needs = ctx.needs_input_grad[:4]
        tensors = (x.contiguous() for x in (chosen, rejected, ref_chosen, ref_rejected))
        losses, chosen_rewards, rejected_rewards, slopes = _dpo_loss(*tensors, *options, any(ctx.needs))
        ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(chosen_rewards, rejected_rewards)
        # or autograd makes zeros for the rewards' gradients: four more launches than the one of backward
        ctx.set_materialize_grads(False)
        return losses, chosen_rewards, rejected_rewards

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 8
        (slopes,) = ctx.saved_tensors
        of_chosen, of_rejected = (grad * slopes).unbind()
        # the loss sees the reference only through the differences
        grads = [lambda: of_chosen, lambda: of_rejected, lambda: -of_chosen, lambda: -of_rejected]
        return *(make() if need else None for make, need in zip(grads, ctx.needs)), *(None,) * 4


def _fake_dpo_loss(chosen, *rest):
    need_slopes = rest[-1]
    slopes = chosen.new_empty((2, *chosen.shape) if need_slopes else (0,))
    return torch.empty_like(chosen), torch.empty_like(chosen), torch.empty_like(chosen), slopes


@register(
    "dpo_loss(Tensor chosen, Tensor rejected, Tensor ref_chosen, Tensor ref_rejected, float beta, str kind, "
    "float label_smoothing, str backend, bool need_slopes) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_dpo_loss,
)
def _dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, kind, label_smoothing, backend, need_slopes):
    tensors = (chosen, rejected, ref_chosen, ref_rejected)
    return kernel("preference", backend).dpo_loss(*tensors, beta, kind, label_smoothing, need_slopes)
