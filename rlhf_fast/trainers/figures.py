"""What losses and their data are logged as, under the names that TRL made standard."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.losses.preference import Pairs


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """The share of the returns' variance that a critic's values account for; 1 is all of it."""
    return 1 - (returns - values).var(unbiased=False) / (returns.var(unbiased=False) + 1e-8)


def shaped_rewards_figures(scores: Tensor, rewards: Tensor, kl: Tensor, count: int) -> dict[str, Tensor]:
    """Of a batch of PPO's responses, per response.

    Args:
        scores: (B,), 0 where there is none.
        rewards: per token, of scores less the price of the KL. (N,)
        kl: of policy to reference, per token. (N,)
        count: responses that have a score.
    """
    return {
        "objective/scores": scores.sum() / count,
        "objective/kl": kl.sum() / count,
        "objective/non_score_reward": (rewards.sum() - scores.sum()) / count,
        "objective/rlhf_reward": rewards.sum() / count,
    }


# what the metrics of the policy losses are logged as: PPO's, of kernels.policy_loss, and GRPO's, of losses.policy.group_policy_loss
PPO_POLICY = {
    "policy/approxkl_avg": "approx_kl",
    "policy/clipfrac_avg": "clip_region",
    "val/ratio": "ratio_mean",
    "kl": "kl",
}
GRPO_POLICY = {
    "clip_ratio/low_mean": "clip_low",
    "clip_ratio/high_mean": "clip_high",
    "clip_ratio/region_mean": "clip_region",
    "kl": "kl",
}


def policy_figures(metrics: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Those of ``metrics`` that there are, under the ``names`` of an algorithm."""
    return {name: metrics[key] for name, key in names.items() if key in metrics}


@torch.no_grad()
def implicit_rewards(pairs: Pairs, beta: float) -> tuple[Tensor, Tensor]:
    """What a policy says that chosen and rejected responses are worth, (B,) each: ``beta`` times its log-ratio to the
    reference, or, without one, its mean log-probability per token."""
    chosen, rejected = pairs.per_token() if pairs.ref_chosen is None else (pairs.w, pairs.l)
    return beta * chosen.detach(), beta * rejected.detach()


def preference_figures(pairs: Pairs, beta: float) -> dict[str, Tensor]:
    """Of a micro-batch of pairs."""
    chosen, rejected = implicit_rewards(pairs, beta)
    return {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (chosen > rejected).float().mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "logps/chosen": pairs.chosen.detach().mean(),
        "logps/rejected": pairs.rejected.detach().mean(),
    }
