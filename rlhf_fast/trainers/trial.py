"""Passes that are tried and must leave no trace: before the first step, or to find the rows that spoil one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlhf_fast.run.checkpoint import rng_state, set_rng_state

if TYPE_CHECKING:
    from .trainer import Trainer


@contextlib.contextmanager
def trial(trainer: Trainer) -> Iterator[None]:
    """Inside, passes are this process's own business. Afterwards what losses noted down and random state are as before.

    Gradients are dropped. A process that fails in here leaves no other waiting.
    """
    before, random = dict(vars(trainer)), rng_state()
    apart = len(trainer.ranks) > 1
    trainer.ranks = trainer.ranks.alone()
    try:
        with trainer.accelerator.no_sync(trainer.model) if apart else contextlib.nullcontext():
            yield
    finally:
        vars(trainer).update(before)
        trainer.optimizer.zero_grad(set_to_none=True)
        set_rng_state(random)
