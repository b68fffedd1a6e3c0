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


def fleiss_kappa(units: Sequence[Sequence[Hashable]]) -> float | None:
    r"""Fleiss' kappa of several annotators (Fleiss 1971), who need not be the same, or as many, on every unit.

    .. math:: \kappa = (\bar P - \bar P_e) / (1 - \bar P_e), \qquad
        P_i = \frac{\sum_j n_{ij}^2 - n_i}{n_i (n_i - 1)}, \qquad \bar P_e = \sum_j p_j^2

    with :math:`n_{ij}` of the :math:`n_i` annotators of unit i giving label j, and :math:`p_j` the share of j in all labels.

    Args:
        units: the labels of each unit; those with fewer than two say nothing about agreement and are left out.
    Returns:
        at most 1; 0 is chance. None without units, or where all labels are the same one.
    """
    counts = [Counter(labels) for labels in units if len(labels) > 1]
    if not counts:
        return None
    total = sum((unit for unit in counts), Counter())
    expected = sum((n / total.total()) ** 2 for n in total.values())
    agreed = [sum(n * (n - 1) for n in unit.values()) / (unit.total() * (unit.total() - 1)) for unit in counts]
    observed = sum(agreed) / len(agreed)
    return None if expected == 1 else (observed - expected) / (1 - expected)
