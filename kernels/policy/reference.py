"""The definitions, in plain PyTorch and vectorised: padded and packed tokens take the same path."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.kernels.kl import kl_penalty
from rlhf_fast.kernels.segments import masked_mean, select, sequence_sum, to_tokens

LEVELS = ("token", "sequence", "sequence_token")

# exp(80) is a finite float32: beyond it a clipped token's gradient would be 0 * inf
_MAX_LOG_RATIO = 80.0


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


def token_advantages(advantages: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Bring (B,) or per-token advantages to the mask's shape, 0 where masked."""
    if advantages.shape != mask.shape:
        rows = mask.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        if advantages.dim() != 1 or len(advantages) != rows:
            raise ValueError(
                f"advantages must be one per sequence ({rows},) or one per token {tuple(mask.shape)}, "
                f"got {tuple(advantages.shape)}"
            )
        advantages = to_tokens(advantages, mask, cu_seqlens)
    return select(advantages, mask)


def policy_token_loss(
    tokens: dict[str, Tensor | None],
    advantages: Tensor,
    mask: Tensor,
    kind: str,
    clips: tuple[float, float, float | None],
    level: str,
    kl_coef: float,
    kl_estimator: str,
    is_clip: float | None,
    entropy_coef: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each token, 0 where masked, and the metrics."""
    logprobs, old, ref, rollout, entropy = (None if x is None else select(x, mask) for x in tokens.values())
    old = logprobs.detach() if old is None else old
    log_ratio = logprobs - old
    ratio = _ratio(log_ratio, mask, level, cu_seqlens)
    loss, low, high = KINDS[kind](logprobs, ratio, advantages, *clips)
    metrics = _ratio_metrics(log_ratio.detach(), ratio.detach(), low, high, mask)
    if rollout is not None:
        is_ratio = (old - rollout).detach().clamp(max=_MAX_LOG_RATIO).exp()
        metrics |= _rollout_metrics(is_ratio, old.detach(), rollout, mask)
        if is_clip is not None:
            loss = loss * is_ratio.clamp(max=is_clip)
    if ref is not None:
        kl = kl_penalty(logprobs, ref, kl_estimator)
        metrics["kl"] = masked_mean(kl.detach(), mask)
        if kl_coef:
            loss = loss + kl_coef * kl
    if entropy is not None:
        metrics["entropy"] = masked_mean(entropy.detach(), mask)
        if entropy_coef:
            loss = loss - entropy_coef * entropy
    return torch.where(mask, loss, 0.0), metrics


def value_token_loss(
    values: Tensor, old_values: Tensor | None, returns: Tensor, mask: Tensor, clip: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each token, 0 where masked, and the metrics."""
    values, returns = select(values, mask), select(returns, mask)
    error = (values - returns).square()
    clipped_share = values.new_zeros(())
    if clip is not None:
        old = select(old_values, mask)
        # as a clamp of the difference: min and max of old +- clip would round twice
        clipped = (old + (values - old).clamp(-clip, clip) - returns).square()
        clipped_share = masked_mean((clipped > error).float(), mask)
        error = torch.maximum(error, clipped)
    metrics = {
        "clip_fraction": clipped_share,
        "value_mean": masked_mean(values.detach(), mask),
        "return_mean": masked_mean(returns.detach(), mask),
    }
    return torch.where(mask, 0.5 * error, 0.0), metrics


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
    return log_ratio.clamp(max=_MAX_LOG_RATIO).exp()


def _ratio_metrics(log_ratio: Tensor, ratio: Tensor, low: Tensor, high: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {
        "clip_low": masked_mean(low.float(), mask),
        "clip_high": masked_mean(high.float(), mask),
        "clip_region": masked_mean((low | high).float(), mask),
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
