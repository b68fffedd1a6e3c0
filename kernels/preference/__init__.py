"""Direct preference optimisation: losses of a chosen and a rejected response, one row per pair."""

from __future__ import annotations

from torch import Tensor

from rlhf_fast.kernels.segments import promote

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
    w = promote(chosen) - promote(ref_chosen)
    l = promote(rejected) - promote(ref_rejected)
    return KINDS[kind](w, l, beta, label_smoothing), (beta * w).detach(), (beta * l).detach()
