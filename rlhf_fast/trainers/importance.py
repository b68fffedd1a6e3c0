"""How far an engine's probabilities are from the trainer's, and truncated importance sampling to make up for it.

Another implementation, another precision or weights that are a step old make a policy gradient biased. Weighing each token's
(or response's) advantage by trainer over engine undoes it; bounds keep a few large weights from drowning the rest
(Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"). Losses are proportional to
advantages, so the weights are factors of them; the KL term has none.

The distance is measured in every run, whoever samples: an engine in this process has the trainer's weights, but not its kernels.
Nothing here waits for the device.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_fast.data.batch import Experience

logger = logging.getLogger(__name__)
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


def distance(mine: Tensor, rollout: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """How far engine and trainer are apart on what was sampled, under TRL's names: device scalars, in nats per token.

    Args:
        mine, rollout: log-probabilities by trainer and engine, of any one shape. A rollout's NaN does not count.
        mask: True on response tokens.
    """
    apart = (mine.detach() - rollout).abs()
    mask = mask & ~apart.isnan()
    apart = apart.where(mask, 0.0)
    return {
        "sampling/sampling_logp_difference/mean": apart.sum() / mask.sum().clamp(min=1),
        "sampling/sampling_logp_difference/max": apart.max(),
    }


def distance_of(experiences: Sequence[Experience]) -> tuple[dict[str, Tensor], int]:
    """:func:`distance` of all ``experiences``, and their response tokens; nothing where there are none."""
    old, rollout = (torch.cat([getattr(e, name) for e in experiences]) for name in ("old_logprobs", "rollout_logprobs"))
    mask, count = _response_tokens(experiences, old.device)
    return (distance(old, rollout, mask), count) if count else ({}, 0)


def alarm(figures: dict[str, float], most: float, step: int, engine: str) -> None:
    """Warn where a log line's :func:`distance` is above ``most`` nats per token."""
    gap = figures.get("sampling/sampling_logp_difference/mean", 0.0)
    if gap > most:
        logger.warning(
            "step %d: the log-probabilities of what %s sampled differ from the policy's by %.3g nats per token (alarm at "
            "vllm_logprob_tolerance, %g): it samples from another policy than the one that is trained",
            *(step, engine, gap, most),
        )


def weigh(
    experiences: Sequence[Experience], mode: str, low: float = 0.0, high: float | None = None
) -> tuple[dict[str, Tensor], int]:
    """Multiply the advantages of ``experiences`` by their weights.

    Returns:
        mean and largest weight of a response token, under TRL's names, and how many tokens there are.
    """
    weights = [importance_weights(e.old_logprobs, e.rollout_logprobs, mode, low, high) for e in experiences]
    for e, weight in zip(experiences, weights):
        e.advantages = e.advantages * weight
    mask, count = _response_tokens(experiences, weights[0].device)
    if not count:
        return {}, 0
    weight = torch.cat(weights).where(mask, 0.0)
    figures = {
        "sampling/importance_sampling_ratio/mean": weight.sum() / count,
        "sampling/importance_sampling_ratio/max": weight.max(),
    }
    return figures, count


def _response_tokens(experiences: Sequence[Experience], device: torch.device) -> tuple[Tensor, int]:
    """(N,) bool, True on the response tokens of all ``experiences`` behind one another, and how many these are."""
    flags = [flag for e in experiences for flag in e.example.response_mask]
    return torch.tensor(flags, dtype=torch.bool, device=device), sum(flags)
