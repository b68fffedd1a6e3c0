"""Who competes at each operation. Peers are imported when they run, so that a missing one costs its row only."""

from __future__ import annotations

from bench.harness import Task

from . import advantages, attention, head, layers, logprobs, policy, preference


def tasks(device: str) -> list[Task]:
    """Every task, with our backends of that device among the contenders."""
    return [
        t
        for module in (logprobs, head, attention, advantages, policy, preference, layers)
        for t in module.tasks(device)
    ]
