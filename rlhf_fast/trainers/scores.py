"""What responses are worth: scores on one scale, penalties, and whitening over all processes of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from rlhf_fast.data.batch import Experience
from rlhf_fast.kernels import whiten
from rlhf_fast.run.distribution import Ranks


def punish_overlong(experiences: Sequence[Experience], limit: int, cache: int) -> None:
    """Take from each reward 0 up to ``limit - cache`` tokens, then linearly up to 1 at ``limit``.

    DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13). ``cache`` 0 takes nothing.
    """
    for e in experiences:
        over = sum(e.example.response_mask) - (limit - cache)
        if cache and over > 0:
            e.reward -= min(over / cache, 1.0)


def punish_unfinished(experiences: Sequence[Experience], penalty: float | None) -> None:
    """Take ``penalty`` from the reward of each response that never ended."""
    for e in experiences:
        if penalty is not None and not e.finished:
            e.reward -= penalty


def leave_out_unscored(experiences: Sequence[Experience]) -> None:
    """No token of a response counts that nobody could score: it teaches nothing."""
    for e in experiences:
        if math.isnan(e.reward):
            e.reward, e.example.response_mask = 0.0, [False] * len(e.example)


def kl_of(experience: Experience) -> float:
    """KL(policy || reference) of a response in nats, estimated (k1) from its own tokens."""
    return float((experience.old_logprobs - experience.ref_logprobs).sum())


def kl_factor(kl: float, responses: float, target: float, horizon: float) -> float:
    """What to multiply the KL coefficient by, so that the mean KL nears ``target`` (arXiv:1909.08593, eq. 8).

    Args:
        kl: nats, summed over ``responses``.
        horizon: responses over which the adaptation acts.
    """
    if not responses:
        return 1.0
    error = kl / responses / target - 1
    return 1 + min(max(error, -0.2), 0.2) * responses / horizon


class Scores:
    """Scores brought to one scale: normalised by what was seen so far on all ranks, multiplied, cut.

    Args:
        normalize: subtract the running mean, divide by the running standard deviation.
        scale: factor.
        clip: largest magnitude; None is no limit.
    """

    def __init__(self, normalize: bool, scale: float, clip: float | None, ranks: Ranks) -> None:
        self.normalize, self.scale, self.clip, self.ranks = normalize, scale, clip, ranks
        self.count, self.mean, self.squares = 0.0, 0.0, 0.0

    def settle(self, experiences: Sequence[Experience]) -> None:
        """Change the rewards of a batch; NaN stays. Collective."""
        if self.normalize:
            self._update([e.reward for e in experiences if not math.isnan(e.reward)])
        limit = math.inf if self.clip is None else self.clip
        for e in experiences:
            reward = (e.reward - self.mean) / self.std if self.normalize else e.reward
            # max and min would lose a NaN
            e.reward = reward if math.isnan(reward) else min(max(reward * self.scale, -limit), limit)

    def _update(self, scores: Sequence[float]) -> None:
        """Combine mean and squares with those of ``scores`` on all ranks (Chan et al. 1979)."""
        count, total = self.ranks.sum(len(scores), sum(scores))
        if not count:
            return
        mean = total / count
        (squares,) = self.ranks.sum(sum((s - mean) ** 2 for s in scores))
        shift, both = mean - self.mean, self.count + count
        self.squares += squares + shift**2 * self.count * count / both
        self.mean += shift * count / both
        self.count = both

    @property
    def std(self) -> float:
        """Bessel's; 1 while all scores were alike."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 and self.squares > 0 else 1.0

    def state(self) -> dict[str, float]:
        """What :meth:`load_state` needs to go on from here."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state(self, state: dict[str, float]) -> None:
        """Go on where ``state`` was taken."""
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]


def whiten_over_ranks(x: Tensor, mask: Tensor, ranks: Ranks, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """:func:`rlhf_fast.kernels.whiten` with mean and variance of all ranks' entries. Collective."""
    if len(ranks) == 1:
        return whiten(x, mask, shift_mean=shift_mean, eps=eps)
    chosen = x[mask].double()
    count, total = ranks.sum(len(chosen), float(chosen.sum()))
    mean = total / max(count, 1.0)
    (squares,) = ranks.sum(float((chosen - mean).square().sum()))
    whitened = (x - mean) / math.sqrt(squares / max(count, 1.0) + eps) + (0.0 if shift_mean else mean)
    return whitened.masked_fill(~mask, 0.0)
