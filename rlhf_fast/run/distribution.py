"""The processes of a run: which rows are this one's, and the few numbers that all of them agree on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from rlhf_fast.errors import RolloutError, UserError

T = TypeVar("T")
BUCKET_BYTES = 64 << 20  # of gradients sent at a time
LEFT = "rlhf_fast/left"  # where a rank that leaves alone says why, in the store that ranks meet by


class Ranks:
    """This process among those of a run; alone, nothing here communicates."""

    def __init__(self, accelerator: Accelerator, apart: bool = False) -> None:
        self.accelerator = accelerator
        self.apart = apart

    def __len__(self) -> int:
        return 1 if self.apart else self.accelerator.num_processes

    @property
    def index(self) -> int:
        """Which of them this process is, from 0."""
        return 0 if self.apart else self.accelerator.process_index

    def alone(self) -> Ranks:
        """This process by itself, for work that may fail on one rank while the others go on."""
        return Ranks(self.accelerator, apart=True)

    def bounds(self, count: int) -> tuple[int, int]:
        """Where this rank's contiguous part of ``count`` rows begins and ends."""
        return round(count * self.index / len(self)), round(count * (self.index + 1) / len(self))

    def share(self, rows: Sequence[T]) -> Sequence[T]:
        """This rank's part of ``rows``."""
        return rows[slice(*self.bounds(len(rows)))]

    def sum(self, *numbers: float) -> tuple[float, ...]:
        """Each of ``numbers`` summed over all ranks. Collective."""
        if len(self) == 1:
            return numbers
        # float32: some devices and backends reduce no wider numbers
        total = torch.tensor(numbers, dtype=torch.float32, device=self.accelerator.device)
        return tuple(self.accelerator.reduce(total, "sum").tolist())

    def gather(self, rows: Sequence[T]) -> Sequence[T]:
        """The ``rows`` of all ranks, in their order. Collective."""
        return rows if len(self) == 1 else gather_object(rows)

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any rank. Collective."""
        return self.sum(float(flag))[0] > 0

    @torch.no_grad()
    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Give all ranks the mean of their gradients; who has none counts as 0 where another has one. Collective."""
        if len(self) == 1:
            return
        found = self.sum(*(float(p.grad is not None) for p in parameters))
        some = [p for p, count in zip(parameters, found) if count]
        for p in some:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for bucket in _buckets([p.grad for p in some]):
            mean = self.accelerator.reduce(torch.cat([g.reshape(-1) for g in bucket]), "mean")
            for gradient, part in zip(bucket, mean.split([g.numel() for g in bucket])):
                gradient.copy_(part.view_as(gradient))

    def leave(self, why: str) -> None:
        """Say why this rank ends alone, to those that wait for it in a collective call and will fail there."""
        _store().set(LEFT, f"process {self.index}: {why}")

    def left(self) -> str | None:
        """What a rank has said that has left, if one has."""
        try:
            return _store().get(LEFT).decode() if _store().check([LEFT]) else None
        except RuntimeError:  # the rank that kept the store has gone too
            return None

    def together(self, work: Callable[[], T]) -> T:
        """What ``work`` gives here, once it has succeeded on every rank. Collective.

        A rank that fails alone would leave the others waiting for it in whatever all of them do next.

        Raises:
            RolloutError, UserError, RuntimeError: it failed somewhere: the same kind of error on all ranks. What ``work`` itself
                raised here if that is of the kind, else what it raised elsewhere, and where.
        """
        if len(self) == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except Exception as failure:  # noqa: BLE001 (every rank raises it, or what it stands for, below)
            error = failure
        told = gather_object([None if error is None else (_kind(error).__name__, str(error) or type(error).__name__)])
        wrong = {rank: failure for rank, failure in enumerate(told) if failure}
        if not wrong:
            return result
        # the gravest of all: a run whose servers are gone is saved, and that takes every rank
        kind = next(
            k for k in (RuntimeError, UserError, RolloutError) if any(name == k.__name__ for name, _ in wrong.values())
        )
        if error is not None and _kind(error) is kind:
            raise error
        said = "; ".join(f"process {rank}: {text}" for rank, (_, text) in wrong.items())
        raise kind(said) from error

    def from_main(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on the first rank, where alone it is done, on every rank. Collective.

        Raises:
            as :meth:`together`.
        """
        results = [self.together(work if self.index == 0 else lambda: None)]
        if len(self) > 1:
            broadcast_object_list(results)
        return results[0]


def _store() -> torch.distributed.Store:
    return torch.distributed.distributed_c10d._get_default_store()


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """``gradients`` in their order, neighbours of one dtype together up to ``BUCKET_BYTES``."""
    for _, group in itertools.groupby(gradients, lambda g: g.dtype):
        bucket: list[Tensor] = []
        for gradient in group:
            if bucket and sum(g.nbytes for g in bucket) + gradient.nbytes > BUCKET_BYTES:
                yield bucket
                bucket = []
            bucket.append(gradient)
        yield bucket


def _kind(error: Exception) -> type[Exception]:
    """As what all ranks raise it."""
    return (
        RolloutError if isinstance(error, RolloutError) else UserError if isinstance(error, UserError) else RuntimeError
    )
