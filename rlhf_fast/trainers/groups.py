"""Groups of responses to one prompt: which of them teach something, and how much better than its group each response is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_fast.kernels import group_advantages

BASELINES = ("mean", "leave_one_out")
SCALES = ("group", "batch", "whiten", "none")
ALIKE = 1e-6  # rewards whose standard deviation is smaller are all the same


def group_deviations(rewards: Tensor, group_size: int) -> Tensor:
    """Standard deviation (Bessel's) of each group's scored rewards, 0 with fewer than two. (B,) -> (B / group_size,)."""
    groups = rewards.view(-1, group_size)
    scored = (~groups.isnan()).sum(1)
    squares = (groups - groups.nanmean(1, keepdim=True)).square().nansum(1)
    return (squares / (scored - 1).clamp(min=1)).sqrt()


def group_metrics(rewards: Tensor, group_size: int) -> dict[str, Tensor]:
    """reward, reward_std within groups, and the share of groups that teach nothing: no two different rewards.

    Args:
        rewards: (B,), NaN where there is none. On the CPU.
    """
    std = group_deviations(rewards, group_size)
    scored = (~rewards.isnan()).view(-1, group_size).any(1)
    metrics = {"frac_reward_zero_std": (std < ALIKE).float().mean()}
    if scored.any():
        metrics |= {"reward": rewards.nanmean(), "reward_std": std[scored].mean()}
    return metrics


def relative_advantages(
    rewards: Sequence[float], tokens: Sequence[float], group_size: int, *, baseline: str, scale: str
) -> list[float]:
    """How much better each response is than its group; 0 where it was not scored or has nothing to compare with.

    Args:
        rewards: of all ranks' responses, those to one prompt adjacent; NaN where there is none.
        tokens: that each response trains.
        baseline: a name of ``BASELINES``: the mean of the group, or of the others in it (RLOO, arXiv:2402.14740).
        scale: ``"group"``, ``"batch"``: over the standard deviation of the group's rewards, of all; ``"none"``; ``"whiten"``:
            mean 0 and variance 1 over all tokens of the batch (REINFORCE++ baseline, arXiv:2501.03262).
    """
    r = torch.tensor(rewards, dtype=torch.float32)
    if scale != "whiten":
        return group_advantages(r, group_size, scale=scale, baseline=baseline).tolist()
    advantages = group_advantages(r, group_size, scale="none", baseline=baseline).double()
    weights = torch.tensor(tokens, dtype=torch.float64).masked_fill(r.isnan(), 0.0)
    weights = weights / weights.sum().clamp(min=1.0)
    centred = (advantages - (weights * advantages).sum()).masked_fill(r.isnan(), 0.0)
    return (centred * torch.rsqrt((weights * centred.square()).sum() + 1e-8)).tolist()
