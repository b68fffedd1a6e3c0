"""Rewards and advantages: KL-shaped rewards, generalized advantage estimation, whitening, group baselines."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.kernels.dispatch import choose, implementation, kernel
from rlhf_fast.kernels.kl import ESTIMATORS
from rlhf_fast.kernels.registry import register
from rlhf_fast.kernels.segments import check_devices, check_tokens, promote, select

from . import reference

WHITEN_EPS = 1e-8

__all__ = ["gae", "group_advantages", "kl_shaped_gae", "shaped_rewards", "whiten"]


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    *,
    bootstrap: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

    .. math:: A_t = \delta_t + \gamma\lambda A_{t+1}, \qquad \delta_t = r_t + \gamma V_{t+1} - V_t

    Masked positions are skipped, not zeroed: t + 1 is the next unmasked token, so tool output inside a response, and
    padding on either side, change nothing.

    Args:
        rewards: per-token reward, KL penalty included. (B, T), or packed (N,) with ``cu_seqlens``, float.
        values: the critic's estimate of the state before each token. Same shape.
        mask: True on response tokens. Same shape, bool.
        gamma: discount factor, in [0, 1].
        lam: trade-off between bias (0) and variance (1).
        bootstrap: (B,) value of the state after the last token, for responses cut off before their end; None is 0.
        cu_seqlens: (B + 1,) int32 boundaries of packed sequences.
    Returns:
        advantages and returns (advantages + values), same shape, float32 (float64 for float64), 0 where masked. Not
        whitened, and without gradient.
    Raises:
        ValueError: the shapes differ.
    """
    check_tokens(mask, cu_seqlens, rewards=rewards, values=values)
    if cu_seqlens is None and mask.dim() != 2:
        raise ValueError(f"without cu_seqlens rewards must be (B, T), got {tuple(rewards.shape)}")
    _check_bootstrap(bootstrap, mask, cu_seqlens)
    work = torch.promote_types(promote(rewards).dtype, promote(values).dtype)
    rewards, values, bootstrap = (
        None if x is None else x.detach().to(work).contiguous() for x in (rewards, values, bootstrap)
    )
    mask = mask.contiguous()
    if cu_seqlens is None:
        return _gae(rewards, values, mask, bootstrap, gamma, lam)
    return _gae_packed(rewards, values, mask, bootstrap, cu_seqlens.to(torch.int32).contiguous(), gamma, lam)


def shaped_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    estimator: str = "k1",
    clip: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Per-token reward of PPO: -kl_coef * KL, plus the score at the last response token (arXiv:2203.02155, eq. 2).

    Args:
        scores: one per sequence. (B,) float. A sequence without response tokens has nowhere to put it.
        logprobs, ref_logprobs: of each token under policy and reference. (B, T), or (N,) with ``cu_seqlens``, float.
        mask: True on response tokens. Same shape, bool.
        kl_coef: weight of the KL penalty.
        estimator: as in :func:`kl_penalty`.
        clip: scores are clipped to [-clip, clip] first; the KL never is.
        cu_seqlens: (B + 1,) int32 boundaries of packed sequences.
    Returns:
        rewards of the tokens' shape, float32 (float64 for float64), 0 where masked.
    Raises:
        ValueError: the shapes differ, or the estimator is unknown.
    """
    check_tokens(mask, cu_seqlens, logprobs=logprobs, ref_logprobs=ref_logprobs)
    _check_scores(scores, mask, cu_seqlens, estimator)
    tensors = (scores, logprobs, ref_logprobs)
    backend = choose("advantages", "shaped_rewards", *tensors)
    if backend == "reference" or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        kl = _kl(logprobs, ref_logprobs, mask, estimator)
        return reference.shaped_rewards(scores, kl, mask, kl_coef, clip, cu_seqlens)
    options = (float(kl_coef), estimator, clip)
    return _shaped_rewards(*_one_layout(*tensors, mask, cu_seqlens=cu_seqlens), *options, backend).view(mask.shape)


def kl_shaped_gae(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = True,
    estimator: str = "k1",
    clip: float | None = None,
    bootstrap: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From scores to advantages in one call: :func:`shaped_rewards`, :func:`gae`, :func:`whiten`.

    Args:
        whiten: bring the advantages to mean 0 and variance 1; returns are taken before that.
        scores, logprobs, ref_logprobs, mask, kl_coef, estimator, clip: as in :func:`shaped_rewards`.
        values, gamma, lam, bootstrap, cu_seqlens: as in :func:`gae`.
    Returns:
        advantages, returns, rewards and KL (the estimate, unweighted), each of the tokens' shape, float32, 0 where
        masked, without gradient.
    Raises:
        ValueError: the shapes differ, or the estimator is unknown.
    """
    check_tokens(mask, cu_seqlens, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values)
    _check_scores(scores, mask, cu_seqlens, estimator)
    _check_bootstrap(bootstrap, mask, cu_seqlens)
    tensors = (scores, logprobs, ref_logprobs, values)
    backend = choose("advantages", "kl_shaped_gae", *tensors)
    if backend != "reference":
        layout = _one_layout(*tensors, mask, bootstrap, cu_seqlens=cu_seqlens)
        options = (float(kl_coef), estimator, clip, float(gamma), float(lam), whiten)
        return tuple(x.view(mask.shape) for x in _kl_shaped_gae(*layout, *options, backend))
    with torch.no_grad():
        kl = _kl(logprobs, ref_logprobs, mask, estimator)
        rewards = reference.shaped_rewards(scores, kl, mask, kl_coef, clip, cu_seqlens)
        advantages, returns = gae(rewards, values, mask, gamma, lam, bootstrap=bootstrap, cu_seqlens=cu_seqlens)
        if whiten:
            advantages = reference.whiten(advantages, mask, True, WHITEN_EPS)
    return advantages, returns, rewards, kl


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Bring the unmasked entries to variance 1 and mean 0 (or keep the mean), all sequences together.

    Args:
        x: (B, T) or (N,) float.
        mask: True on the entries that count. Same shape, bool.
        shift_mean: subtract the mean; False keeps it.
        eps: added to the variance (population, not Bessel's) under the root.
    Returns:
        same shape, float32 (float64 for float64), 0 where masked.
    Raises:
        ValueError: the shapes differ.
    """
    check_tokens(mask, None, x=x)
    backend = choose("advantages", "whiten", x)
    if backend == "reference" or (torch.is_grad_enabled() and x.requires_grad):
        return reference.whiten(x, mask, shift_mean, eps)
    return _whiten(x.detach().float().contiguous(), mask.contiguous(), shift_mean, float(eps), backend)


def group_advantages(
    rewards: Tensor,
    group_size: int | None = None,
    *,
    group_ids: Tensor | None = None,
    scale: str = "group",
    baseline: str = "mean",
) -> Tensor:
    """Reward relative to the other responses to the same prompt (GRPO, arXiv:2402.03300, sec. 4.1.2).

    A NaN reward means not scored: it is left out of the baseline, and its advantage is 0. A group with fewer than two
    scored responses has nothing to compare and gets 0.

    Args:
        rewards: one per response. (B,) float.
        group_size: responses per prompt, those of one prompt adjacent. Either this or ``group_ids``.
        group_ids: (B,) integers; equal ones form a group, in any order.
        scale: ``"group"`` divides by the group's standard deviation (Bessel's) + 1e-4, ``"batch"`` by that of all
            scored rewards, ``"none"`` by nothing (Dr. GRPO, arXiv:2503.20783).
        baseline: ``"mean"`` of the group, or ``"leave_one_out"`` of the others (RLOO, arXiv:2402.14740).
    Returns:
        advantages (B,) float32 (float64 for float64).
    Raises:
        ValueError: the groups are missing, given twice or do not fit, or a name is unknown.
    """
    if (group_size is None) == (group_ids is None):
        raise ValueError("give the groups by either group_size or group_ids")
    if rewards.dim() != 1:
        raise ValueError(f"rewards must be one per response (B,), got {tuple(rewards.shape)}")
    if group_size is not None and (group_size < 1 or len(rewards) % group_size):
        raise ValueError(f"{len(rewards)} rewards do not divide into groups of {group_size}")
    if group_ids is not None and group_ids.shape != rewards.shape:
        raise ValueError(f"group_ids must be {tuple(rewards.shape)} like rewards, got {tuple(group_ids.shape)}")
    check_devices(rewards, group_ids=group_ids)
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"unknown scale {scale!r}; known: group, batch, none")
    if baseline not in ("mean", "leave_one_out"):
        raise ValueError(f"unknown baseline {baseline!r}; known: mean, leave_one_out")
    backend = choose("advantages", "group_advantages", rewards)
    if backend != "reference" and not (torch.is_grad_enabled() and rewards.requires_grad):
        ids = None if group_ids is None else group_ids.long().contiguous()
        return _group_advantages(rewards.detach().float().contiguous(), ids, group_size or 0, scale, baseline, backend)
    if group_ids is None:
        group_ids = torch.arange(len(rewards), device=rewards.device) // group_size
    return reference.group_advantages(rewards, group_ids, scale, baseline)


def _kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: str) -> Tensor:
    """The estimate of each token, 0 where masked, in plain PyTorch."""
    return ESTIMATORS[estimator](select(ref_logprobs, mask) - select(logprobs, mask))


def _check_scores(scores: Tensor, mask: Tensor, cu_seqlens: Tensor | None, estimator: str) -> None:
    rows = mask.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if scores.shape != (rows,):
        raise ValueError(f"scores must be one per sequence ({rows},), got {tuple(scores.shape)}")
    if cu_seqlens is None and mask.dim() != 2:
        raise ValueError(f"without cu_seqlens tokens must be (B, T), got {tuple(mask.shape)}")
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown KL estimator {estimator!r}; known: {', '.join(ESTIMATORS)}")
    check_devices(mask, scores=scores)


def _check_bootstrap(bootstrap: Tensor | None, mask: Tensor, cu_seqlens: Tensor | None) -> None:
    rows = len(mask) if cu_seqlens is None else len(cu_seqlens) - 1
    if bootstrap is not None and bootstrap.shape != (rows,):
        raise ValueError(f"bootstrap must be one value per sequence ({rows},), got {tuple(bootstrap.shape)}")
    check_devices(mask, bootstrap=bootstrap)


def _one_layout(*tensors: Tensor | None, cu_seqlens: Tensor | None) -> list[Tensor | None]:
    """What the kernels take: contiguous, without gradient, floats in float32, masks in bool, boundaries in int32."""
    brought = [None if x is None else x.detach() for x in tensors]
    brought = [x if x is None or x.dtype == torch.bool else x.float() for x in brought]
    brought.append(None if cu_seqlens is None else cu_seqlens.to(torch.int32))
    return [None if x is None else x.contiguous() for x in brought]


def _fake_gae(rewards, values, mask, *_):
    return torch.empty_like(rewards), torch.empty_like(rewards)


@register(
    "gae(Tensor rewards, Tensor values, Tensor mask, Tensor? bootstrap, float gamma, float lam) -> (Tensor, Tensor)",
    _fake_gae,
)
def _gae(rewards, values, mask, bootstrap, gamma, lam):
    chosen = implementation("advantages", "gae", rewards, values, mask)
    return chosen.gae(rewards, values, mask, bootstrap, gamma, lam)


@register(
    "gae_packed(Tensor rewards, Tensor values, Tensor mask, Tensor? bootstrap, Tensor cu_seqlens, float gamma, "
    "float lam) -> (Tensor, Tensor)",
    _fake_gae,
)
def _gae_packed(rewards, values, mask, bootstrap, cu_seqlens, gamma, lam):
    chosen = implementation("advantages", "gae_packed", rewards, values, mask)
    return chosen.gae_packed(rewards, values, mask, bootstrap, cu_seqlens, gamma, lam)


_TOKENS = "Tensor scores, Tensor logprobs, Tensor ref_logprobs"


@register(
    f"shaped_rewards({_TOKENS}, Tensor mask, Tensor? cu_seqlens, float kl_coef, str estimator, float? clip, "
    "str backend) -> Tensor",
    lambda scores, logprobs, *_: torch.empty_like(logprobs),
)
def _shaped_rewards(*arguments):
    *arguments, backend = arguments
    return kernel("advantages", backend).shaped_rewards(*arguments)


@register(
    f"kl_shaped_gae({_TOKENS}, Tensor values, Tensor mask, Tensor? bootstrap, Tensor? cu_seqlens, float kl_coef, "
    "str estimator, float? clip, float gamma, float lam, bool whiten, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    lambda scores, logprobs, *_: tuple(torch.empty_like(logprobs) for _ in range(4)),
)
def _kl_shaped_gae(*arguments):
    *arguments, backend = arguments
    return kernel("advantages", backend).kl_shaped_gae(*arguments, WHITEN_EPS)


@register(
    "whiten(Tensor x, Tensor mask, bool shift_mean, float eps, str backend) -> Tensor",
    lambda x, *_: torch.empty_like(x),
)
def _whiten(x, mask, shift_mean, eps, backend):
    return kernel("advantages", backend).whiten(x, mask, shift_mean, eps)


@register(
    "group_advantages(Tensor rewards, Tensor? group_ids, int group_size, str scale, str baseline, str backend) -> "
    "Tensor",
    lambda rewards, *_: torch.empty_like(rewards),
)
def _group_advantages(rewards, group_ids, group_size, scale, baseline, backend):
    return kernel("advantages", backend).group_advantages(rewards, group_ids, group_size, scale, baseline)
