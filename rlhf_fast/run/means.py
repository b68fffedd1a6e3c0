"""Figures of a training step, averaged on the device."""

from __future__ import annotations

from collections import defaultdict

import torch
from accelerate.utils import gather_object
from torch import Tensor


class Means:
    """Weighted running means (or maxima, for names ending in ``max``) kept on the device until somebody asks."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = defaultdict(float)

    def add(self, values: dict[str, Tensor | float | tuple[Tensor, float]], weight: float) -> None:
        """Take in ``values``, each with ``weight``, or as a pair with a weight of its own."""
        common = weight
        for name, value in values.items():
            value, weight = value if isinstance(value, tuple) else (value, common)
            value = torch.as_tensor(value, dtype=torch.float32).detach()
            if name.endswith("max"):
                self._sums[name] = torch.maximum(self._sums[name], value) if name in self._sums else value
                self._weights[name] = 1.0
            else:
                self._sums[name] = self._sums.get(name, 0.0) + value * weight
                self._weights[name] += weight

    def state(self) -> dict[str, dict]:
        """What was added since the last read, on this rank, for :meth:`load_state`."""
        return {"sums": dict(self._sums), "weights": dict(self._weights)}

    def load_state(self, state: dict[str, dict]) -> None:
        """Go on where :meth:`state` was taken."""
        self._sums, self._weights = dict(state["sums"]), defaultdict(float, state["weights"])

    def read(self) -> dict[str, float]:
        """Means over all ranks since the last read."""
        totals: dict[str, list[float]] = {}
        for part in gather_object([{n: (float(s), self._weights[n]) for n, s in self._sums.items()}]):
            for name, (total, weight) in part.items():
                seen = totals.setdefault(name, [total if name.endswith("max") else 0.0, 0.0])
                seen[0] = max(seen[0], total) if name.endswith("max") else seen[0] + total
                seen[1] = 1.0 if name.endswith("max") else seen[1] + weight
        self.__init__()
        return {name: total / weight for name, (total, weight) in totals.items() if weight}
