"""The definitions, in plain PyTorch: what the tests trust and what runs when no kernel applies."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.kernels.segments import promote, segment_ids, select, sequence_sum, to_tokens


def unsupported(op: str, *tensors: Tensor, **options) -> str | None:
    return None


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """One step per token, all sequences at once."""
    advantages = torch.zeros_like(rewards)
    advantage = rewards.new_zeros(len(rewards))
    next_value = advantage if bootstrap is None else bootstrap
    for t in reversed(range(rewards.shape[1])):
        keep = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(keep, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(keep, values[:, t], next_value)
        advantages[:, t] = torch.where(keep, advantage, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def gae_packed(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """The same recursion A_t = a_t A_{t+1} + b_t, by log-doubling: the padded width would have to be read back."""
    rewards, values = select(rewards, mask), select(values, mask)
    sequence = segment_ids(cu_seqlens, len(rewards))
    token = torch.arange(len(rewards), device=rewards.device)
    # the next unmasked token, in whatever sequence; len(rewards) if there is none
    following = torch.where(mask, token, len(rewards)).flip(0).cummin(0).values.flip(0) if len(token) else token
    following = torch.cat([following[1:], following.new_full((1,), len(rewards))])[: len(token)]
    at = following.clamp(max=max(len(rewards) - 1, 0))
    continues = (following < len(rewards)) & (sequence[at] == sequence)
    end = values.new_zeros(()) if bootstrap is None else bootstrap[sequence]
    next_value = torch.where(continues, values[at], end)
    # a masked token hands its successor's advantage on, a sequence's last token takes nothing over
    last = token + 1 == cu_seqlens[1:][sequence]
    a = torch.where(mask, gamma * lam, torch.ones_like(rewards)).masked_fill(last, 0.0)
    b = torch.where(mask, rewards + gamma * next_value - values, 0.0)
    step = 1
    while step < len(rewards):
        b = torch.cat([b[:-step] + a[:-step] * b[step:], b[-step:]])
        a = torch.cat([a[:-step] * a[step:], a[-step:]])
        step *= 2
    return torch.where(mask, b, 0.0), torch.where(mask, b + values, 0.0)


def shaped_rewards(
    scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float, clip: float | None, cu_seqlens: Tensor | None
) -> Tensor:
    scores = promote(scores)
    if clip is not None:
        scores = scores.clamp(-clip, clip)
    last = _last_unmasked(mask, cu_seqlens)
    return torch.where(mask, -kl_coef * kl, 0.0) + torch.where(last, to_tokens(scores, mask, cu_seqlens), 0.0)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool, eps: float) -> Tensor:
    x = select(x, mask)
    count = mask.sum().clamp(min=1)
    mean = x.sum() / count
    centred = torch.where(mask, x - mean, 0.0)
    whitened = centred * torch.rsqrt(centred.square().sum() / count + eps)
    return whitened if shift_mean else torch.where(mask, whitened + mean, 0.0)


def group_advantages(rewards: Tensor, group_ids: Tensor, scale: str, baseline: str) -> Tensor:
    # in float64, as equal float32 rewards whose mean rounds would otherwise differ from it and be blown up by 1e4
    r = rewards.double()
    scored = ~r.isnan()
    r = torch.where(scored, r, 0.0)
    group = _dense(group_ids)

    def total(x: Tensor) -> Tensor:
        """The sum of each response's group, for each response."""
        return torch.zeros_like(x).index_add(0, group, x)[group]

    n = total(scored.double())
    comparable = scored & (n > 1)
    centred = torch.where(comparable, r - total(r) / n.clamp(min=1), 0.0)
    advantages = centred
    if baseline == "leave_one_out":
        advantages = centred * n / (n - 1).clamp(min=1)
    if scale == "group":
        advantages = advantages / ((total(centred.square()) / (n - 1).clamp(min=1)).sqrt() + 1e-4)
    elif scale == "batch":
        count = scored.sum()
        spread = torch.where(scored, r - r.sum() / count.clamp(min=1), 0.0).square().sum()
        advantages = advantages / ((spread / (count - 1).clamp(min=1)).sqrt() + 1e-4)
    return advantages.to(promote(rewards).dtype)


def _last_unmasked(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """True at the last unmasked token of each sequence."""
    if cu_seqlens is None:
        return mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    # unmasked tokens up to and including this one, counted over all sequences, against the count at the sequence's end
    so_far = mask.cumsum(0)
    totals = sequence_sum(mask.long(), cu_seqlens).cumsum(0)
    return mask & (so_far == to_tokens(totals, mask, cu_seqlens))


def _dense(ids: Tensor) -> Tensor:
    """Renumber arbitrary integers 0, 1, ... by sorting; torch.unique would read the number of groups back."""
    if not len(ids):
        return ids.long()
    ordered, order = ids.sort()
    numbers = torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).to(ordered.dtype)]).cumsum(0).long()
    return torch.empty_like(numbers).scatter_(0, order, numbers)
