"""Agreement against the worked example of Cohen's kappa."""

from __future__ import annotations

import pytest

from rlhf_fast.feedback.agreement import cohen_kappa


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
