"""Which evaluation was the best, by one of its figures."""

from __future__ import annotations

import difflib
import math
from typing import Any

from rlhf_fast.errors import UserError


class Best:
    """The best evaluation so far.

    Args:
        metric: a figure of the evaluations, with or without ``eval_`` in front.
        greater_is_better: None: yes, unless the metric's name ends in ``loss``.
        threshold: an evaluation counts as better when it beats the best by more than this.
    """

    def __init__(self, metric: str, greater_is_better: bool | None = None, threshold: float = 0.0):
        self.metric, self.threshold = metric, threshold
        self.greater_is_better = not metric.endswith("loss") if greater_is_better is None else greater_is_better
        self.step: int | None = None
        self.value = math.nan  # of the metric at that step

    def update(self, step: int, figures: dict[str, float]) -> bool:
        """Note the evaluation at ``step``; returns whether it is the best. NaN never is.

        Raises:
            UserError: ``figures`` do not have the metric; names the nearest that they have.
        """
        value = self._read(figures)
        gain = (value - self.value) * (1 if self.greater_is_better else -1)
        better = not math.isnan(value) and (math.isnan(self.value) or gain > self.threshold)
        if better:
            self.step, self.value = step, value
        return better

    def _read(self, figures: dict[str, float]) -> float:
        for name in (self.metric, f"eval_{self.metric}"):
            if name in figures:
                return float(figures[name])
        near = difflib.get_close_matches(f"eval_{self.metric}", figures, n=1)
        raise UserError(
            f"metric_for_best_model is {self.metric!r}, which evaluations do not have. "
            + (f"Did you mean {near[0]!r}? " if near else "")
            + f"There are {', '.join(sorted(figures))}"
        )

    def state(self) -> dict[str, Any]:
        """What :meth:`load_state` needs to go on from here."""
        return {"step": self.step, "value": self.value}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self.step, self.value = state["step"], state["value"]
