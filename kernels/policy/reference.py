"""The definitions, in plain PyTorch and vectorised: padded and packed tokens take the same path."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.kernels.kl import kl_penalty
from rlhf_fast.kernels.segments import aggregate, masked_mean, select, sequence_sum, to_tokens

from .terms import PolicyOptions, PolicyTokens, ValueTokens

LEVELS = ("token", "sequence", "sequence_token")

# exp(80) is a finite float32: beyond it a clipped token's gradient would be 0 * inf
MAX_LOG_RATIO = 80.0


def _clip(logprobs, ratio, advantages, low, high, dual):
    unclipped = ratio * advantages
    loss = -torch.minimum(unclipped, ratio.clamp(1 - low, 1 + high) * advantages)
    if dual is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual * advantages), loss)
    return loss, (ratio < 1 - low) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)


def _cispo(logprobs, ratio, advantages, low, high, dual):
    never = torch.zeros_like(ratio, dtype=torch.bool)
    return -ratio.clamp(max=high).detach() * advantages * logprobs, never, (ratio > high) & (advantages > 0)


def _reinforce(logprobs, ratio, advantages, low, high, dual):
    never = torch.zeros_like(ratio, dtype=torch.bool)
    return -advantages * logprobs, never, never


# one row is a new kind: (logprobs, ratio, advantages, low, high, dual) -> loss, clipped below, clipped above
KINDS = {"clip": _clip, "cispo": _cispo, "reinforce": _reinforce}


def policy_loss(
    tokens: PolicyTokens, options: PolicyOptions, denominator: Tensor | float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, differentiable in logprobs and entropy, and the metrics."""
    mask, cu_seqlens, o = tokens.mask, tokens.cu_seqlens, options
    advantages = _token_advantages(tokens.advantages, mask, cu_seqlens)
    per_token = (tokens.logprobs, tokens.old_logprobs, tokens.ref_logprobs, tokens.rollout_logprobs, tokens.entropy)
    logprobs, old, ref, rollout, entropy = (None if x is None else select(x, mask) for x in per_token)
    old = logprobs.detach() if old is None else old
    log_ratio = logprobs - old
    ratio = _ratio(log_ratio, mask, o.level, cu_seqlens)
    loss, low, high = KINDS[o.kind](logprobs, ratio, advantages, o.clip_low, o.clip_high, o.dual_clip)
    metrics = _ratio_metrics(log_ratio.detach(), ratio.detach(), low, high, mask)
    if rollout is not None:
        is_ratio = (old - rollout).detach().clamp(max=MAX_LOG_RATIO).exp()
        metrics |= _rollout_metrics(is_ratio, old.detach(), rollout, mask)
        if o.is_clip is not None:
            loss = loss * is_ratio.clamp(max=o.is_clip)
    if ref is not None:
        kl = kl_penalty(logprobs, ref, o.kl_estimator)
        metrics["kl"] = masked_mean(kl.detach(), mask)
        if o.kl_coef:
            loss = loss + o.kl_coef * kl
    if entropy is not None:
        metrics["entropy"] = masked_mean(entropy.detach(), mask)
        if o.entropy_coef:
            loss = loss - o.entropy_coef * entropy
    loss = torch.where(mask, loss, 0.0)
    return aggregate(loss, mask, o.aggregate, denominator, cu_seqlens), metrics


def value_loss(
    tokens: ValueTokens, clip: float | None, how: str, denominator: Tensor | float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, differentiable in values, and the metrics."""
    mask = tokens.mask
    values, returns = select(tokens.values, mask), select(tokens.returns, mask)
    error = (values - returns).square()
    clipped_share = values.new_zeros(())
    if clip is not None:
        old = select(tokens.old_values, mask)
        # as a clamp of the difference: min and max of old +- clip would round twice
        clipped = (old + (values - old).clamp(-clip, clip) - returns).square()
        # inside the bounds the two differ by rounding alone
        outside = (values - old).abs() > clip
        clipped_share = masked_mean((outside & (clipped > error)).to(values.dtype), mask)
        error = torch.maximum(error, clipped)
    metrics = {
        "clip_fraction": clipped_share,
        "value_mean": masked_mean(values.detach(), mask),
        "return_mean": masked_mean(returns.detach(), mask),
    }
    loss = torch.where(mask, 0.5 * error, 0.0)
    return aggregate(loss, mask, how, denominator, tokens.cu_seqlens), metrics


def _token_advantages(advantages: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Bring (B,) or per-token advantages to the mask's shape, 0 where masked, without gradient."""
    if advantages.shape != mask.shape:
        advantages = to_tokens(advantages, mask, cu_seqlens)
    return select(advantages.detach(), mask)


def _ratio(log_ratio: Tensor, mask: Tensor, level: str, cu_seqlens: Tensor | None) -> Tensor:
    """Importance ratio of each token at the given level."""
    if level != "token":
        counts = sequence_sum(mask.to(log_ratio.dtype), cu_seqlens).clamp(min=1)
        mean = sequence_sum(log_ratio, cu_seqlens) / counts
        if level == "sequence_token":
            # straight-through: the sequence's value, each token's own gradient
            log_ratio = to_tokens(mean.detach(), mask, cu_seqlens) + (log_ratio - log_ratio.detach())
        else:
            log_ratio = to_tokens(mean, mask, cu_seqlens).expand_as(log_ratio)
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def _ratio_metrics(log_ratio: Tensor, ratio: Tensor, low: Tensor, high: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {
        "clip_low": masked_mean(low.to(ratio.dtype), mask),
        "clip_high": masked_mean(high.to(ratio.dtype), mask),
        "clip_region": masked_mean((low | high).to(ratio.dtype), mask),
        "approx_kl": masked_mean(kl_penalty(-log_ratio, torch.zeros_like(log_ratio), "k3"), mask),
        "ratio_mean": masked_mean(ratio, mask),
        "ratio_max": _masked_max(ratio, mask),
    }


def _rollout_metrics(is_ratio: Tensor, old: Tensor, rollout: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {
        "is_ratio_mean": masked_mean(is_ratio, mask),
        "is_ratio_max": _masked_max(is_ratio, mask),
        "rollout_gap": masked_mean((old - rollout).abs(), mask),
    }


def _masked_max(x: Tensor, mask: Tensor) -> Tensor:
    """Largest unmasked entry of a positive tensor, 0 if there is none."""
    return torch.where(mask, x, 0.0).amax() if x.numel() else x.new_zeros(())
