"""The losses of policy and critic in PPO, GRPO and their relatives."""

from __future__ import annotations

from torch import Tensor

from rlhf_fast.kernels.kl import ESTIMATORS
from rlhf_fast.kernels.segments import aggregate as aggregate_tokens
from rlhf_fast.kernels.segments import check_tokens

from . import reference
from .reference import KINDS, LEVELS

__all__ = ["KINDS", "LEVELS", "policy_loss", "value_loss"]


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    kind: str = "clip",
    clip_low: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    level: str = "token",
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    rollout_logprobs: Tensor | None = None,
    is_clip: float | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    aggregate: str = "token",
    denominator: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Policy-gradient loss: PPO (arXiv:1707.06347, eq. 7), GRPO, DAPO, Dr. GRPO, GSPO, CISPO, REINFORCE.

    .. math:: \ell_t = -\min(\rho_t A_t,\ \mathrm{clip}(\rho_t, 1 - \epsilon_l, 1 + \epsilon_h) A_t)
              + \beta\,\mathrm{KL}_t, \qquad \rho_t = \pi(t) / \pi_{old}(t)

    Masked positions are never read. A batch without a single token gives 0, with a gradient of zeros.

    Args:
        logprobs: of each token under the policy. (B, T), or packed (N,) with ``cu_seqlens``, float.
        old_logprobs: the same at the start of the update; None means now: the ratio is 1, its gradient is not 0.
        advantages: (B,), one per sequence, or one per token. Packed advantages of length N count as per token.
        mask: True on the tokens to train. bool.
        kind: ``"clip"``; ``"cispo"``: -stop_gradient(min(ratio, clip_high)) * A * logprob, clip_high absolute
            (arXiv:2506.13585, eq. 4); ``"reinforce"``: -A * logprob.
        clip_low, clip_high: the ratio stays in [1 - clip_low, 1 + clip_high]; clip_high defaults to clip_low.
        dual_clip: for A < 0, loss <= -dual_clip * A (arXiv:1912.09729; TRL's delta); > 1, "clip" only.
        level: of the ratio: ``"token"``; ``"sequence"``: exp(mean log-ratio) of the sequence (GSPO, arXiv:2507.18071);
            ``"sequence_token"``: that value with each token's own gradient (GSPO-token).
        ref_logprobs, kl_coef, kl_estimator: kl_coef * KL(policy || reference) is added to each token's loss.
        rollout_logprobs, is_clip: log-probabilities as the rollout engine reported them; with ``is_clip`` each token's
            loss is multiplied by min(exp(old - rollout), is_clip), before the KL; without, they are only measured.
        entropy, entropy_coef: of each token's distribution; entropy_coef * entropy is subtracted.
        aggregate: ``"token"``: mean over tokens (DAPO); ``"sequence"``: mean over sequences of their means, empty ones
            skipped (GRPO); ``"constant"``: sum over a constant (Dr. GRPO: B * longest completion allowed).
        denominator: what the sum is divided by instead of the local count: pass the whole window's, and the losses of
            its micro-batches add up.
        cu_seqlens: (B + 1,) int32 boundaries of packed sequences.
    Returns:
        the loss, a float32 scalar, and detached device scalars, means over this call's unmasked tokens: ``clip_low``,
        ``clip_high``, ``clip_region`` (shares clipped), ``approx_kl`` (ratio - 1 - log ratio, against old),
        ``ratio_mean``, ``ratio_max``; ``kl`` with a reference; ``entropy`` when given; with rollout_logprobs
        ``is_ratio_mean``, ``is_ratio_max`` (before truncation) and ``rollout_gap`` (mean |old - rollout|).
    Raises:
        ValueError: shapes differ, a name is unknown, or options contradict each other.
    """
    tokens = {
        "logprobs": logprobs,
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "rollout_logprobs": rollout_logprobs,
        "entropy": entropy,
    }
    check_tokens(mask, cu_seqlens, **tokens)
    _check_options(kind, clip_high, dual_clip, level, cu_seqlens, mask)
    _check_terms(ref_logprobs, kl_coef, kl_estimator, rollout_logprobs, is_clip, entropy, entropy_coef)
    advantages = reference.token_advantages(advantages, mask, cu_seqlens)
    clips = (clip_low, clip_low if clip_high is None else clip_high, dual_clip)
    loss, metrics = reference.policy_token_loss(
        tokens, advantages, mask, kind, clips, level, kl_coef, kl_estimator, is_clip, entropy_coef, cu_seqlens
    )
    return aggregate_tokens(loss, mask, aggregate, denominator, cu_seqlens), metrics


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
    aggregate: str = "token",
    denominator: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Clipped squared error of the critic (Schulman et al. 2017; as in OpenAI's PPO2).

    .. math:: \ell_t = \tfrac12 \max\big((V_t - R_t)^2, (\mathrm{clip}(V_t, V^{old}_t \pm c) - R_t)^2\big)

    Args:
        values: the critic's estimates. (B, T) or (N,) float.
        old_values: its estimates at the start of the update; may be None without ``clip``.
        returns: targets, advantages + old values, before whitening.
        mask: True on the tokens to train. bool.
        clip: how far a value may move from the old one; None: plain squared error.
        aggregate, denominator, cu_seqlens: as in :func:`policy_loss`.
    Returns:
        the loss, a float32 scalar, and detached device scalars over this call's unmasked tokens: ``clip_fraction``,
        ``value_mean``, ``return_mean``.
    Raises:
        ValueError: shapes differ, or ``clip`` is given without ``old_values``.
    """
    check_tokens(mask, cu_seqlens, values=values, old_values=old_values, returns=returns)
    if clip is not None and old_values is None:
        raise ValueError("clip needs old_values; pass them, or clip=None for the plain squared error")
    loss, metrics = reference.value_token_loss(values, old_values, returns, mask, clip)
    return aggregate_tokens(loss, mask, aggregate, denominator, cu_seqlens), metrics


def _check_options(kind, clip_high, dual_clip, level, cu_seqlens, mask) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}; known: {', '.join(LEVELS)}")
    if kind == "cispo" and clip_high is None:
        raise ValueError("kind='cispo' needs clip_high, the absolute upper bound of the ratio (its authors use 5)")
    if dual_clip is not None and (kind != "clip" or dual_clip <= 1):
        raise ValueError(f"dual_clip must exceed 1 and applies to kind='clip'; got {dual_clip} with kind={kind!r}")
    if kind == "reinforce" and level != "token":
        raise ValueError(f"kind='reinforce' has no ratio, so level={level!r} would have no effect")
    if level != "token" and cu_seqlens is None and mask.dim() != 2:
        raise ValueError(f"level={level!r} needs (B, T) tokens, or packed ones with cu_seqlens")


def _check_terms(ref_logprobs, kl_coef, kl_estimator, rollout_logprobs, is_clip, entropy, entropy_coef) -> None:
    if kl_estimator not in ESTIMATORS:
        raise ValueError(f"unknown KL estimator {kl_estimator!r}; known: {', '.join(ESTIMATORS)}")
    if kl_coef and ref_logprobs is None:
        raise ValueError("kl_coef needs ref_logprobs")
    if kl_coef and kl_estimator == "k1":
        raise ValueError("kl_estimator='k1' has a gradient of mean zero as a loss; use k3, k3+ or k2")
    if is_clip is not None and rollout_logprobs is None:
        raise ValueError("is_clip needs rollout_logprobs")
    if entropy_coef and entropy is None:
        raise ValueError("entropy_coef needs entropy")
