"""Agreement against worked examples of Cohen's and Fleiss' kappa."""

from __future__ import annotations

import pytest

from rlhf_fast.feedback.agreement import cohen_kappa, fleiss_kappa


def test_cohen_kappa_by_hand():
    """50 items: both yes 20, both no 15, yes/no 5, no/yes 10. Observed 0.7; by chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5."""
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(first, second) == pytest.approx((0.7 - 0.5) / (1 - 0.5))


def test_kappa_is_one_for_the_same_answers_and_none_where_nothing_is_told_apart():
    assert cohen_kappa([1, -1, 0], [1, -1, 0]) == 1
    assert cohen_kappa([1, 1], [1, 1]) is None and cohen_kappa([], []) is None
    assert cohen_kappa([1, -1, 1, -1], [-1, 1, -1, 1]) == -1
    with pytest.raises(ValueError, match="1 and 2 items"):
        cohen_kappa([1], [1, 2])


def test_fleiss_kappa_by_hand():
    """Fleiss 1971 as worked in textbooks: 14 raters, 10 subjects, 5 categories; mean P 0.378, P_e 0.213, kappa 0.210."""
    table = [
        (0, 0, 0, 0, 14),
        (0, 2, 6, 4, 2),
        (0, 0, 3, 5, 6),
        (0, 3, 9, 2, 0),
        (2, 2, 8, 1, 1),
        (7, 7, 0, 0, 0),
        (3, 2, 6, 3, 0),
        (2, 5, 3, 2, 2),
        (6, 5, 2, 1, 0),
        (0, 2, 2, 3, 7),
    ]
    units = [[label for label, n in enumerate(row) for _ in range(n)] for row in table]
    assert fleiss_kappa(units) == pytest.approx(0.20993, abs=1e-5)


def test_fleiss_kappa_with_different_numbers_of_annotators_by_hand():
    """[a a], [a b b], [b b]: P = 1, 1/3, 1; of 7 labels 3 are a and 4 are b, so by chance 9/49 + 16/49 = 25/49."""
    units = ["aa", "abb", "bb", "a"]  # the last has one annotator and counts for nothing
    assert fleiss_kappa(units) == pytest.approx((7 / 9 - 25 / 49) / (1 - 25 / 49))
    assert fleiss_kappa(["aa", "bb"]) == 1
    assert fleiss_kappa(["aa", "aa"]) is None and fleiss_kappa(["a"]) is None and fleiss_kappa([]) is None
