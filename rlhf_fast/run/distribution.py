"""The processes of a run: which rows are this one's, and the few numbers that all of them agree on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

T = TypeVar("T")


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
