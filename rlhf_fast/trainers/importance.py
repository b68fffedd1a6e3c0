"""Truncated importance sampling: responses were sampled by an engine whose probabilities are not quite the trainer's.

Another implementation, another precision or weights that are a step old make a policy gradient biased. Weighing each token's
(or response's) advantage by trainer over engine undoes it; bounds keep a few large weights from drowning the rest
(Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"). Losses are proportional to
advantages, so the weights are factors of them; the KL term has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_fast.data.batch import Experience

# name -> (one ratio for the whole response, a ratio beyond the bounds drops what it weighs)
MODES = {
    "token_truncate": (False, False),
    "token_mask": (False, True),
    "sequence_truncate": (True, False),
    "sequence_mask": (True, True),
}


def importance_weights(old: Tensor, rollout: Tensor, mode: str, low: float = 0.0, high: float | None = None) -> Tensor:
    """Weights of one response's tokens.

    Args:
        old, rollout: log-probabilities by trainer and engine, 0 outside the response. (T,) float. A rollout's NaN is a
            token that the engine could not score: its ratio is 1.
        mode: a name of ``MODES``; the ratio of a response is the product of its tokens'.
        low, high: bounds of the ratio; beyond them it is cut, or is 0.
    Returns:
        (T,) float, 1 where the two agree.
    """
    whole, drop = MODES[mode]
    difference = (old - rollout).nan_to_num(0.0)
    ratio = (difference.sum().expand_as(difference) if whole else difference).exp()
    if drop:
        return ratio.masked_fill((ratio < low) | (ratio > (torch.inf if high is None else high)), 0.0)
    return ratio.clamp(low, high)


def weigh(
    experiences: Sequence[Experience], mode: str, low: float = 0.0, high: float | None = None
) -> tuple[dict[str, Tensor], int]:
    """Multiply the advantages of ``experiences`` by their weights.

    Returns:
        how far engine and trainer are apart, under TRL's names, and the response tokens that this was measured on.
    """
    weights, differences = [], []
    for e in experiences:
        weight = importance_weights(e.old_logprobs, e.rollout_logprobs, mode, low, high)
        e.advantages = e.advantages * weight
        mask = torch.tensor(e.example.response_mask, device=weight.device)
        weights.append(weight[mask])
        differences.append((e.old_logprobs - e.rollout_logprobs)[mask].abs())
    weight, difference = torch.cat(weights), torch.cat(differences).nan_to_num(0.0)
    if not len(weight):
        return {}, 0
    figures = {
        "sampling/sampling_logp_difference/mean": difference.mean(),
        "sampling/sampling_logp_difference/max": difference.max(),
        "sampling/importance_sampling_ratio/mean": weight.mean(),
        "sampling/importance_sampling_ratio/max": weight.max(),
    }
    return figures, len(weight)
