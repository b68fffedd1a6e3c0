"""How far annotators agree beyond chance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    r"""Cohen's kappa of two annotators' labels of the same items (Cohen 1960).

    .. math:: \kappa = (p_o - p_e) / (1 - p_e)

    with the observed agreement and the one of independent annotators who use each label as often.

    Returns:
        at most 1; 0 is chance. None without items, or where both always say the same one label: nothing was told apart.
    """
    n = len(first)
    if n != len(second):
        raise ValueError(f"the annotators labelled {n} and {len(second)} items")
    if not n:
        return None
    observed = sum(a == b for a, b in zip(first, second)) / n
    counts = Counter(first), Counter(second)
    expected = sum(counts[0][label] * counts[1][label] for label in counts[0]) / n**2
    return None if expected == 1 else (observed - expected) / (1 - expected)
