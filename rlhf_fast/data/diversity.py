"""How varied texts are, counted in n-grams of whatever they are sequences of: token ids, words, characters.

Token ids or characters measure any language; words only those that put spaces between them, which Korean does sparingly and
Chinese and Japanese not at all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

Text = Sequence[Hashable]


def ngrams(text: Text, n: int) -> list[tuple[Hashable, ...]]:
    """The runs of ``n`` neighbours in ``text``, in order; none when it is shorter."""
    return list(zip(*(text[i:] for i in range(n))))


def distinct(texts: Sequence[Text], n: int) -> float:
    """Share of different n-grams among all of ``texts`` together (distinct-n, Li et al. 2016, arXiv:1510.03055).

    Returns:
        1 when none repeats, towards 0 for endless repetition; NaN when no text has ``n`` items.
    """
    found = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(found)) / len(found) if found else math.nan


def self_overlap(texts: Sequence[Text], n: int) -> float:
    """How much of a text stands in the others too: BLEU's clipped n-gram precision of each against all others, averaged
    (one order of self-BLEU, Zhu et al. 2018, arXiv:1802.01886, without its length penalty).

    Returns:
        0 when texts share no n-gram, 1 when each is made of the others' n-grams; NaN with fewer than two texts of ``n`` items.
    """
    counts = [Counter(ngrams(text, n)) for text in texts]
    shares = []
    for i, own in enumerate(counts):
        others = counts[:i] + counts[i + 1 :]
        if own and others:
            shared = sum(min(count, max(other[gram] for other in others)) for gram, count in own.items())
            shares.append(shared / sum(own.values()))
    return sum(shares) / len(shares) if len(shares) > 1 else math.nan
