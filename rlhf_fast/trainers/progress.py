"""How long a run is planned to be, and where in that plan it stands: arithmetic alone."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The plan of a run, from which the learning rate and the progress bar follow.

    Args:
        rows: of the data set.
        epochs: passes over it.
        max_steps: optimizer steps of the run whatever the data; not positive: as many as the epochs give.
        rows_per_round: that all ranks together draw at once.
        steps_per_round: optimizer steps that such rows feed.
    """

    rows: int
    epochs: float
    max_steps: int
    rows_per_round: int
    steps_per_round: int

    @property
    def total_rows(self) -> float:
        """Rows that the run may draw."""
        return math.inf if self.max_steps > 0 else math.ceil(self.rows * self.epochs)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.max_steps > 0:
            return self.max_steps
        return math.ceil(self.rows * self.epochs / self.rows_per_round) * self.steps_per_round

    def position(self, step: int, rows_drawn: int, waiting: int) -> float:
        """How many of the planned steps lie behind. The learning rate follows this.

        A run of ``max_steps`` makes all of them. One of epochs makes fewer when an algorithm drops the remaining passes over
        a round or draws more rows for it: steps that were dropped, or whose rows are used up, lie behind too.

        Args:
            step: optimizer steps made.
            rows_drawn: by all ranks.
            waiting: steps of the current round that are still to come.
        """
        if self.max_steps > 0:
            return step
        rounds = rows_drawn / self.rows_per_round
        if rows_drawn >= self.total_rows:  # the last one may be shorter
            rounds = math.ceil(rounds)
        return min(rounds * self.steps_per_round, self.total_steps) - waiting
