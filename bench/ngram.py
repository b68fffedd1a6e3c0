"""An n-gram model of token ids with modified Kneser-Ney smoothing: the baseline that a trained model has to beat."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

START = -1  # what stands before a sequence's first token

Counts = dict[tuple[int, ...], Counter[int]]  # context -> next token -> count


class NGram:
    r"""Interpolated Kneser-Ney with three discounts an order (Chen & Goodman 1999, "An empirical study of smoothing
    techniques for language modeling", sec. 4.1), the unigrams interpolated with the uniform distribution.

    .. math:: p(w|uv) = \frac{\max(c(uvw) - D(c), 0)}{c(uv\cdot)} + \gamma(uv)\, p(w|v)

    Orders below the highest count in how many contexts a token was seen, not how often. The discounts follow from the
    counts of counts, so there is nothing to tune on held-out text.

    Args:
        order: n; 3 is a trigram model.
        vocab_size: V of the uniform distribution below the unigrams.
    """

    def __init__(self, order: int, vocab_size: int):
        self.order, self.vocab_size = order, vocab_size
        self.counts: list[Counts] = []  # by length of context
        self.discounts: list[tuple[float, float, float]] = []  # for counts of 1, of 2, of 3 and more
        self.totals: list[
            dict[tuple[int, ...], tuple[float, float]]
        ] = []  # a context's count, and what discounts left over

    def fit(self, sequences: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]]) -> NGram:
        """Count the tokens whose mask is True, each with the ``order - 1`` tokens before it, masked or not."""
        counts: Counts = defaultdict(Counter)
        for ids, mask in zip(sequences, masks):
            for context, token in self._events(ids, mask):
                counts[context][token] += 1
        self.counts = [counts]
        while len(self.counts) < self.order:
            longer, shorter = self.counts[0], defaultdict(Counter)
            for context, tokens in longer.items():
                shorter[context[1:]].update(tokens.keys())
            self.counts.insert(0, shorter)
        self.discounts = [_discounts(c) for c in self.counts]
        self.totals = [
            {
                context: (tokens.total(), sum(d[min(c, 3) - 1] for c in tokens.values()))
                for context, tokens in counts.items()
            }
            for counts, d in zip(self.counts, self.discounts)
        ]
        return self

    def probability(self, context: Sequence[int], token: int) -> float:
        """p(token | the last ``order - 1`` tokens of ``context``)."""
        p = 1.0 / self.vocab_size
        for length, (counts, discounts) in enumerate(zip(self.counts, self.discounts)):
            suffix = tuple(context[len(context) - length :])
            if suffix not in counts:
                break  # nor was any longer context
            total, left = self.totals[length][suffix]
            count = counts[suffix].get(token, 0)
            p = ((count - discounts[min(count, 3) - 1] if count else 0.0) + left * p) / total
        return p

    def loss(self, sequences: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]]) -> float:
        """Mean negative log-probability in nats of the tokens whose mask is True."""
        total, tokens = 0.0, 0
        known: dict[tuple, float] = {}
        for ids, mask in zip(sequences, masks):
            for context, token in self._events(ids, mask):
                if (context, token) not in known:
                    known[context, token] = -math.log(self.probability(context, token))
                total += known[context, token]
                tokens += 1
        return total / tokens

    def _events(self, ids: Sequence[int], mask: Sequence[bool]):
        before = self.order - 1
        padded = [START] * before + list(ids)
        for t, counted in enumerate(mask):
            if counted:
                yield tuple(padded[t : t + before]), ids[t]


def _discounts(counts: Counts) -> tuple[float, float, float]:
    n = Counter(c for tokens in counts.values() for c in tokens.values() if c <= 4)
    fallback = (0.5, 1.0, 1.5)
    if not all(n[k] for k in (1, 2, 3)):
        return fallback  # too few events to estimate from
    y = n[1] / (n[1] + 2 * n[2])
    estimated = tuple(k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3))
    return estimated if all(0 < d < k for k, d in enumerate(estimated, 1)) else fallback
