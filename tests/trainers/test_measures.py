"""What responses look like in numbers, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_fast.trainers.measures import Moments, by_group, longest_repeat, variety, within_groups


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([1, 2, 3, 4, 5, 6], 0.0),
        ([7, 7, 7, 7], 1.0),
        ([5, 5, 1, 2], 0.0),  # twice is not thrice
        ([9, 1, 2, 1, 2, 1, 2, 8], 6 / 8),
        ([9, 1, 2, 1, 2, 1, 2, 1, 8, 8], 7 / 10),  # the last time it is cut
        ([1, 2, 3] * 3 + [4, 4, 4], 9 / 12),  # the longest of two
        ([], 0.0),
        ([3], 0.0),
        ([3, 3, 3], 1.0),
    ],
    ids=str,
)
def test_the_longest_piece_back_to_back(ids, share):
    assert longest_repeat(ids) == pytest.approx(share)


def test_the_longest_repeat_agrees_with_a_search_over_all_stretches():
    """Every stretch and every unit tried, on random sequences of two letters."""
    random = torch.Generator().manual_seed(0)
    for length in range(3, 24):
        ids = torch.randint(2, (length,), generator=random).tolist()
        stretches = [
            end - start
            for start in range(length)
            for end in range(start + 1, length + 1)
            for unit in range(1, (end - start) // 3 + 1)
            if all(ids[i] == ids[i + unit] for i in range(start, end - unit))
        ]
        assert longest_repeat(ids) == max(stretches, default=0) / length, ids


def test_variety_of_groups():
    """Two different ones of three, and three of three."""
    shares = variety(["a", "a", "b", "a", "b", "c", "x"], [1, 1, 1, 2, 2, 2, 3])
    assert sum(shares[:3]) == 2 and sum(shares[3:6]) == 3 and math.isnan(shares[6])


def test_what_stands_out_in_its_group():
    got = within_groups([1.0, 3.0, math.nan, 10.0, 10.0], "aaabb")
    assert got[:2] == [-1.0, 1.0] and math.isnan(got[2]) and got[3:] == [0.0, 0.0]
    assert within_groups([1.0, 3.0], "ab") == [1.0, 3.0]


def test_groups_count_once():
    """Four siblings are one prompt: the mean of those that were scored, at the first."""
    got = by_group([1.0, math.nan, 3.0, 5.0, math.nan], "aabac")
    assert (got[0], got[2]) == (3.0, 3.0) and all(math.isnan(got[i]) for i in (1, 3, 4))
    gap = Moments.of([1.0, 3.0]).less(Moments.of([0.0, 0.0]))
    assert (gap.mean, gap.error) == (2.0, pytest.approx(1 / math.sqrt(2)))


def test_moments_of_two_windows_are_those_of_both():
    x, y = [1.0, 2.0, math.nan, 4.0, 9.0], [2.0, 1.0, 5.0, 6.0, 7.0]
    both = Moments.of(x[:2], y[:2]) + Moments.of(x[2:], y[2:])
    kept = torch.tensor([[1.0, 2.0, 4.0, 9.0], [2.0, 1.0, 6.0, 7.0]], dtype=torch.float64)
    assert (both.count, both.mean) == (4, 4.0)
    assert both.error == pytest.approx(float(kept[0].std(unbiased=False)) / 2)
    assert both.correlation == pytest.approx(float(torch.corrcoef(kept)[0, 1]))
    assert Moments.of([3.0, 3.0], [1.0, 2.0]).correlation == 0.0
    assert math.isnan(Moments().mean) and math.isnan(Moments().error)
