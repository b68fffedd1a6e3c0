"""Which sequences share a micro-batch, and in which order a data set is read."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any


def pack_bins(lengths: Sequence[int], max_length: int, seed: int | None = None) -> list[list[int]]:
    """Group sequences so that each group has at most ``max_length`` tokens: best-fit decreasing.

    The longest sequence goes first, each into the fullest bin that still has room. At most 11/9 of the optimal number of
    bins plus one (Johnson et al. 1974).

    Args:
        lengths: tokens of each sequence.
        seed: puts the bins in a random order (they come longest sequence first otherwise).
    Returns:
        Indices into ``lengths``, each exactly once; ascending within a bin. The same call gives the same bins.
    Raises:
        ValueError: a sequence is longer than ``max_length``.
    """
    too_long = next((i for i, n in enumerate(lengths) if n > max_length), None)
    if too_long is not None:
        raise ValueError(f"sequence {too_long} has {lengths[too_long]} tokens, more than max_length {max_length}")
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(max_length + 1)]  # open bins, by the tokens they still take
    occupied = 0  # bit r is set where by_room[r] has a bin, so that the tightest fit is one bit scan
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = occupied >> lengths[i]
        if fitting:
            room = lengths[i] + (fitting & -fitting).bit_length() - 1
            b = by_room[room].pop()
            if not by_room[room]:
                occupied ^= 1 << room
        else:
            room, b = max_length, len(bins)
            bins.append([])
        bins[b].append(i)
        by_room[room - lengths[i]].append(b)
        occupied |= 1 << (room - lengths[i])
    if seed is not None:
        random.Random(seed).shuffle(bins)
    return [sorted(b) for b in bins]


def micro_batches(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group items so that each group has at most ``max_tokens`` tokens, the largest group first.

    Memory then peaks in the first group of a step rather than in its last. An item larger than ``max_tokens`` is alone.

    Args:
        sizes: tokens of each item.
    Returns:
        Indices into ``sizes``, each exactly once. The same call gives the same groups.
    """
    groups = pack_bins([min(n, max_tokens) for n in sizes], max_tokens)
    return sorted(groups, key=lambda group: -sum(sizes[i] for i in group))


def micro_batches_of_bundles(
    bundles: Sequence[Sequence[int]], tokens: Callable[[list[int]], int], max_tokens: int
) -> list[list[int]]:
    """:func:`micro_batches` of items that are cheaper together: a bundle is kept whole unless it is too large itself.

    Args:
        bundles: indices of items, each exactly once.
        tokens: of items that share a micro-batch; fewer than the sum of each by itself where they share a prompt. Any other
            measure of a list of items will do.
    Returns:
        The items of each micro-batch, the largest first.
    """
    parts: list[list[int]] = []
    for bundle in bundles:
        parts.append([])
        for i in bundle:
            if parts[-1] and tokens([*parts[-1], i]) > max_tokens:
                parts.append([])
            parts[-1].append(i)
    groups = micro_batches([tokens(part) for part in parts], max_tokens)
    return [[i for part in group for i in parts[part]] for group in groups]


def fullest(sizes: Sequence[int], max_tokens: int, candidates: int = 512) -> list[int]:
    """The items whose sizes add up to the most that is not above ``max_tokens``; the largest alone if that is above it.

    Exact for up to ``candidates`` items; of more, as many are considered, evenly from the largest to the smallest.

    Returns:
        Indices into ``sizes``, the largest item first.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    if sizes[order[0]] >= max_tokens:
        return order[:1]
    order = order[:: -(-len(order) // candidates)]
    sums = [1]  # bit s is set where the items up to here have a subset of s tokens
    for i in order:
        sums.append((sums[-1] | sums[-1] << sizes[i]) & ((2 << max_tokens) - 1))
    left, chosen = sums[-1].bit_length() - 1, []
    for k in reversed(range(len(order))):
        if not sums[k] >> left & 1:
            chosen.append(order[k])
            left -= sizes[order[k]]
    return chosen[::-1]


class IndexSampler:
    """An endless sequence of indices below ``n``: one permutation after another, and a cursor that says how far it is read.

    The order depends on ``n`` and ``seed`` alone. It is that of the whole run: with several processes each takes its part of
    the same ``take``, so one process and eight read the same rows in the same step.
    """

    def __init__(self, n: int, seed: int, shuffle: bool = True):
        if n < 1:
            raise ValueError(f"cannot sample from {n} rows")
        self.n, self.seed, self.shuffle = n, seed, shuffle
        self.cursor = 0  # indices taken so far
        self._permutation: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.n

    @property
    def epoch(self) -> float:
        """Passes over the data so far, for example 1.5."""
        return self.cursor / self.n

    def take(self, k: int) -> list[int]:
        """The next ``k`` indices; they run on into the next epoch."""
        taken: list[int] = []
        while len(taken) < k:
            epoch, start = divmod(self.cursor, self.n)
            part = self._order(epoch)[start : start + k - len(taken)]
            taken += part
            self.cursor += len(part)
        return taken

    def state(self) -> dict[str, Any]:
        """What :meth:`load_state` needs to go on from here."""
        return {"n": self.n, "seed": self.seed, "shuffle": self.shuffle, "cursor": self.cursor}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken.

        Raises:
            ValueError: it belongs to another data set or another seed, whose order would differ.
        """
        for key in ("n", "seed", "shuffle"):
            if state[key] != getattr(self, key):
                raise ValueError(
                    f"cannot resume the order of the data: {key} was {state[key]}, now {getattr(self, key)}"
                )
        self.cursor = state["cursor"]

    def _order(self, epoch: int) -> list[int]:
        if self._permutation[0] != epoch:
            order = list(range(self.n))
            if self.shuffle:
                # seeded by text: torch's CPU generator reads 32 bits of a seed, too few for a pair of numbers
                random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._permutation = (epoch, order)
        return self._permutation[1]
