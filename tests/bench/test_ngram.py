"""The n-gram baseline is a fair opponent: a true probability, with the smoothing that its source describes."""

from __future__ import annotations

import math
import random

import pytest

from bench.ngram import NGram


def fitted(order: int, vocab_size: int = 7, seed: int = 0) -> NGram:
    """On 60 sequences of a skewed source: enough to see counts of 1 to 4, few enough to leave contexts unseen."""
    rng = random.Random(seed)
    sequences = [[min(int(rng.expovariate(0.6)), vocab_size - 1) for _ in range(8)] for _ in range(60)]
    return NGram(order, vocab_size).fit(sequences, [[True] * 8] * 60)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_sum_to_one_after_every_context(order):
    model = fitted(order)
    for context in [(a, b) for a in range(7) for b in range(7)]:
        assert math.isclose(sum(model.probability(context, w) for w in range(7)), 1.0, rel_tol=1e-12)
        assert all(model.probability(context, w) > 0 for w in range(7))


def test_bigram_by_hand():
    """Sequences 0 1 0 1 0 2: after 0 come 1, 1 and 2; too few events, so the discounts are 1/2, 1 and 3/2.

    Unigrams count contexts: 0 follows START and 1, and 1 and 2 follow 0, so 2, 1, 1 of 4. With V = 4,
    p(1) = (1 - 1/2 + (1 + 1/2 + 1/2) / 4) / 4 = 1/4, and p(1|0) = (2 - 1 + (1 + 1/2) * p(1)) / 3 = 11/24.
    """
    model = NGram(2, 4).fit([[0, 1, 0, 1, 0, 2]], [[True] * 6])
    assert math.isclose(model.probability((0,), 1), 11 / 24)
    assert math.isclose(model.probability((3,), 1), 1 / 4), "an unseen context falls back to the unigrams"


def test_only_masked_tokens_count_but_unmasked_ones_are_context():
    model = NGram(2, 4).fit([[3, 1, 2]], [[False, True, False]])
    assert model.counts[1] == {(3,): {1: 1}}
    assert math.isclose(model.loss([[3, 1, 2]], [[False, True, False]]), -math.log(model.probability((3,), 1)))


def test_a_longer_history_helps_where_there_is_one():
    """The next token is the sum of the last two modulo 5: a trigram can know it, a bigram cannot."""
    rng = random.Random(0)
    sequences = []
    for _ in range(40):
        ids = [rng.randrange(5), rng.randrange(5)]
        while len(ids) < 12:
            ids.append((ids[-1] + ids[-2]) % 5)
        sequences.append(ids)
    masks = [[False] * 2 + [True] * 10] * 40
    losses = [NGram(n, 5).fit(sequences[:30], masks).loss(sequences[30:], masks) for n in (2, 3)]
    assert losses[1] < 0.2
    assert losses[0] > 1.0
