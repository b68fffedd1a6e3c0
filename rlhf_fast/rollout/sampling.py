"""How the in-process engines choose a token: random streams, filters, penalties, exact log-probabilities.

Settings are applied in the order of transformers' processors: repetition penalty, temperature, top-k, top-p, min-p. Each
sample has a stream of random numbers of its own, keyed by (seed, index of the sample), and takes one number per token, so
that what it draws does not depend on the batch it is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_fast.rollout.engine import Request

SEEDS = 2**63  # as many seeds there are: those that vLLM takes; any other number counts modulo this
COLUMNS = ("temperature", "top_p", "min_p", "repetition_penalty", "top_k")


@dataclass
class Settings:
    """How to sample each of R rows, and which steps some row needs at all."""

    values: Tensor  # (R, 5) float32, the fields of a request in the order of COLUMNS; vocabularies are exact below 2^24
    greedy: bool  # every row is
    some_greedy: bool
    tempered: bool  # some row has a temperature that is not 1
    filtered: bool  # some row's filters or penalty change the distribution
    penalised: bool  # some row has a repetition penalty

    @classmethod
    def of(cls, requests: Sequence[Request], values: Tensor) -> Settings:
        """Those of ``requests``, whose ``settings_row`` the ``values`` are."""
        temperatures = {r.temperature for r in requests}
        return cls(
            values=values,
            greedy=temperatures == {0},
            some_greedy=0 in temperatures,
            tempered=bool(temperatures - {0, 1}),
            filtered=any(r.filtered for r in requests),
            penalised=any(r.repetition_penalty != 1 for r in requests),
        )

    def rows(self, index: Tensor) -> Settings:
        """The settings of some rows."""
        return Settings(self.values[index], *(getattr(self, name) for name in list(vars(self))[1:]))

    def __getattr__(self, name: str) -> Tensor:
        if name not in COLUMNS:
            raise AttributeError(name)
        return self.values[:, COLUMNS.index(name), None]


def settings_row(request: Request) -> list[float]:
    """A row of ``Settings.values``."""
    return [float(getattr(request, name)) for name in COLUMNS]


class Drawn(NamedTuple):
    """One token for each of R rows."""

    token: Tensor  # (R,) long
    logprob: Tensor  # (R,) float32, full-vocabulary log-softmax at the temperature; of a greedy row at 1
    filtered_logprob: Tensor | None  # (R,) float64, under the distribution that was sampled from; None without filters


def sample(logits: Tensor, settings: Settings, uniforms: Tensor, seen: Tensor | None = None) -> Drawn:
    """Draw a token for each row. Runs on the device of ``logits`` without waiting for it.

    Args:
        logits: (R, V), any floating dtype; computed with in float32.
        uniforms: (R,) float64 in [0, 1), one random number per row.
        seen: (R, V) bool, tokens of prompt and response; needed when some row is penalised.
    """
    logits = logits.float()
    divisor = settings.temperature
    if settings.some_greedy:
        divisor = torch.where(divisor == 0, 1.0, divisor)
    logprobs = (logits / divisor if settings.tempered else logits).log_softmax(-1)
    if not settings.filtered:
        # of the logits: two that differ in their last bit may have the same log-probability
        token = logits.argmax(-1) if settings.some_greedy else None
        if not settings.greedy:
            drawn = invert_cdf(logprobs.exp(), uniforms)
            token = drawn if token is None else torch.where(settings.temperature[:, 0] == 0, token, drawn)
        return Drawn(token, logprobs.gather(1, token[:, None]).squeeze(1), None)

    weights = logprobs
    if settings.penalised:
        weights = (penalise(logits, seen, settings.repetition_penalty) / divisor).log_softmax(-1)
    kept, order = keep_top(weights.exp(), settings.top_k[:, 0], settings.top_p[:, 0], settings.min_p[:, 0])
    # drawn in the vocabulary's order, as without filters: what a row draws must not depend on its neighbours' settings
    kept = torch.zeros_like(kept).scatter(1, order, kept)
    token = invert_cdf(kept, uniforms)[:, None]
    if settings.some_greedy:
        token = torch.where(settings.temperature == 0, order[:, :1], token)
    share = kept.gather(1, token).double() / kept.sum(-1, keepdim=True, dtype=torch.float64)
    return Drawn(token.squeeze(1), logprobs.gather(1, token).squeeze(1), share.log().squeeze(1))


def invert_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Sample one index per row in proportion to ``weights`` (R, V), given ``uniforms`` (R,) float64 in [0, 1).

    One random number per sample, where ``torch.multinomial`` draws V; float64 sums, because float32 ones would lose
    every token less likely than 6e-8. An index of weight 0 is never returned.
    """
    cdf = running_sums(weights)
    found = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)
    return found.squeeze(1).clamp_(max=weights.shape[1] - 1)


def running_sums(weights: Tensor) -> Tensor:
    """(R, V) float64, the sum of each row's probabilities up to each.

    In torch's deterministic mode of probabilities rounded to multiples of 2^-52, which is no coarser than a random number is: their
    sums are exact, and so the same in any order. Of floats torch has no order on a GPU that is fixed, and refuses.
    """
    if torch.are_deterministic_algorithms_enabled():
        return (weights.double() * 2.0**52).round().long().cumsum(-1).double() / 2.0**52
    return weights.cumsum(-1, dtype=torch.float64)


def keep_top(weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Zero all but the ``top_k`` likeliest tokens, then all but the smallest set of them that holds ``top_p``, then those
    less than ``min_p`` times as likely as the likeliest.

    Args:
        weights: (R, V) probabilities.
        top_k: (R,) long or float, 0 keeps all.
        top_p: (R,) float, 1 keeps all.
        min_p: (R,) float, 0 keeps all.
    Returns:
        The weights from the largest to the smallest, and (R, V) the token that each belongs to; of equal ones the first
        comes first.
    """
    weights, order = weights.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(weights.shape[1], device=weights.device)
    weights = weights.where((rank < top_k[:, None]) | (top_k[:, None] == 0), 0.0)
    before = running_sums(weights) - weights
    total = weights.sum(-1, keepdim=True, dtype=torch.float64)
    # `>= 1`, because rounding in `before` must not cut anything when nothing was to be cut
    weights = weights.where((before < top_p[:, None] * total) | (top_p[:, None] >= 1), 0.0)
    if min_p is not None:
        weights = weights.where(weights >= min_p[:, None] * weights[:, :1], 0.0)
    return weights, order


def penalise(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Divide positive logits of ``seen`` tokens by the (R, 1) ``penalty``, multiply negative ones (Keskar et al. 2019,
    arXiv:1909.05858, with transformers' treatment of signs)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def random_stream(seed: int, sample: int) -> np.random.Generator:
    """The random numbers of one sample: ``.random(k)`` gives its next k, float64 in [0, 1)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed % SEEDS, sample], dtype=np.uint64)))


def spaced_seed(number: int) -> int:
    """The seed of request ``number`` among many, 2^20 away from the next one's.

    vLLM draws sample j of a request with its seed + j: requests whose seeds are neighbours would share their random numbers.
    """
    return (number << 20) % SEEDS


def draw_seed() -> int:
    """The seed of an unseeded request, from torch's global generator."""
    return int(torch.randint(2**62, ()))
