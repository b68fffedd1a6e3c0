"""What responses look like in numbers, whatever they say: repetition, length, variety, and what their rewards go with."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LONGEST_UNIT = 32  # tokens of a piece whose repetition is noticed
FEWEST_REPEATS = 3  # times in a row: "the the the"


def longest_repeat(ids: Sequence[int]) -> float:
    """The share of a response that is its longest piece repeated back to back, three times or more.

    Args:
        ids: T tokens. A piece has up to ``LONGEST_UNIT`` of them, and its last repetition may be cut.
    Returns:
        0 when nothing repeats so, 1 when nothing else is there.
    """
    x = torch.as_tensor(ids)
    longest = 0
    for unit in range(1, min(LONGEST_UNIT, len(ids) // FEWEST_REPEATS) + 1):
        if longest == len(ids):
            break  # nothing can be longer
        # a run of r tokens that equal those one unit before them is a stretch of r + unit
        run = _longest_run(x[unit:] == x[:-unit])
        if run + unit >= FEWEST_REPEATS * unit:
            longest = max(longest, run + unit)
    return longest / max(len(ids), 1)


def _longest_run(flags: Tensor) -> int:
    """The most True in a row."""
    ends = torch.cat([torch.tensor([-1]), (~flags).nonzero().flatten(), torch.tensor([len(flags)])])
    return int((ends[1:] - ends[:-1]).max()) - 1


def variety(responses: Sequence[Hashable], groups: Sequence[Hashable]) -> list[float]:
    """Of each response, one over how many of its group are the same: their mean is the share of different ones.

    NaN in a group of one.
    """
    same, size = Counter(zip(groups, responses)), Counter(groups)
    return [1 / same[g, r] if size[g] > 1 else math.nan for g, r in zip(groups, responses)]


def by_group(values: Sequence[float], groups: Sequence[Hashable]) -> list[float]:
    """The mean of each group in place of its first member and NaN in place of the others, so that groups, which are
    independent of each other, are counted and not their members, which are not."""
    means = {group: _mean(members) for group, members in _members(values, groups).items()}
    return [means.pop(group, math.nan) for group in groups]


def within_groups(values: Sequence[float], groups: Sequence[Hashable]) -> list[float]:
    """Values less the mean of their group, so that an easy prompt is not mistaken for a good response; as they are where all
    groups have one member. NaN stays, and counts in no mean."""
    known = _members(values, groups)
    if all(len(members) <= 1 for members in known.values()):
        return list(values)
    means = {group: _mean(members) for group, members in known.items()}
    return [value - means[group] for value, group in zip(values, groups)]


def _members(values: Sequence[float], groups: Sequence[Hashable]) -> dict[Hashable, list[float]]:
    """The known values of each group; an empty list for one without any."""
    members: dict[Hashable, list[float]] = {group: [] for group in groups}
    for value, group in zip(values, groups):
        if not math.isnan(value):
            members[group].append(value)
    return members


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


class Gap(NamedTuple):
    """A difference and its standard error."""

    mean: float
    error: float


class Moments:
    """Sums over a window of responses, from which means, their standard errors and correlations follow; NaN is left out."""

    def __init__(self, sums: Sequence[float] = (0.0,) * 6):
        self.sums = list(sums)  # of 1, x, y, xx, yy, xy

    @classmethod
    def of(cls, x: Sequence[float], y: Sequence[float] | None = None) -> Moments:
        """Of the pairs of ``x`` and ``y``, or of ``x`` alone."""
        pairs = [(a, b) for a, b in zip(x, x if y is None else y) if not (math.isnan(a) or math.isnan(b))]
        return cls([sum(f(a, b) for a, b in pairs) for f in _POWERS])

    def __add__(self, other: Moments) -> Moments:
        return Moments([a + b for a, b in zip(self.sums, other.sums)])

    @property
    def count(self) -> float:
        return self.sums[0]

    @property
    def mean(self) -> float:
        return self.sums[1] / self.count if self.count else math.nan

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return math.sqrt(max(self.sums[3] / self.count - self.mean**2, 0.0) / self.count) if self.count else math.nan

    def less(self, other: Moments) -> Gap:
        """How far its mean lies above that of ``other``, of other responses."""
        return Gap(self.mean - other.mean, math.hypot(self.error, other.error))

    @property
    def correlation(self) -> float:
        """Pearson's; 0 where one of both does not vary."""
        n, x, y, xx, yy, xy = self.sums
        spread = (n * xx - x * x) * (n * yy - y * y)
        # what rounding leaves of a spread that is none counts as none
        return (n * xy - x * y) / math.sqrt(spread) if spread > 1e-12 * n * xx * n * yy else 0.0


_POWERS = (
    lambda a, b: 1.0,
    lambda a, b: a,
    lambda a, b: b,
    lambda a, b: a * a,
    lambda a, b: b * b,
    lambda a, b: a * b,
)
