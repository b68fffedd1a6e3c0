"""Advantages within groups that no kernel makes by itself: by hand."""

from __future__ import annotations

import math

import pytest

from rlhf_fast.trainers.groups import relative_advantages


def test_whitened_advantages_equal_hand_numbers():
    """Less the group's mean they are 0.5, -0.5, 0.5, -0.5, on 1, 3, 2, 2 tokens.

    The mean of a token is (0.5 - 1.5 + 1 - 1) / 8 = -0.125, its variance 0.25 - 0.125^2 = 0.234375.
    """
    got = relative_advantages([1.0, 0.0, 30.0, 29.0], [1, 3, 2, 2], 2, baseline="mean", scale="whiten")
    high, low = 0.625 / math.sqrt(0.234375), -0.375 / math.sqrt(0.234375)
    assert got == pytest.approx([high, low, high, low], abs=1e-6)


def test_whitening_leaves_out_what_was_not_scored():
    """As if it were not there, and a response without tokens to train moves no mean."""
    want = relative_advantages([1.0, 0.0, 3.0, 1.0], [1, 3, 2, 2], 2, baseline="mean", scale="whiten")
    rewards, tokens = [1.0, 0.0, 3.0, 1.0, math.nan, 5.0], [1, 3, 2, 2, 9, 0]
    got = relative_advantages(rewards, tokens, 2, baseline="mean", scale="whiten")
    assert got[:4] == pytest.approx(want)
    assert got[4] == 0.0


def test_groups_that_are_all_alike_whiten_to_nothing():
    assert relative_advantages([2.0] * 4, [1, 2, 3, 4], 2, baseline="mean", scale="whiten") == [0.0] * 4


def test_leaving_one_out_doubles_the_advantages_of_a_pair():
    for scale, want in (("none", [1.0, -1.0]), ("whiten", [1.0, -1.0])):
        got = relative_advantages([1.0, 0.0], [4, 4], 2, baseline="leave_one_out", scale=scale)
        assert got == pytest.approx(want, abs=1e-6)
