"""What a reward function returns in a score's place when it could not find one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """No score, and not because the completion is bad: it is masked, counted and described, never trained on."""

    reason: str  # continues "reward 'name' ..."
