"""What held-out data says of a policy: its mean losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rlhf_fast.models.policy import in_eval_mode
from rlhf_fast.run.means import Means

from .shards import idle_losses

if TYPE_CHECKING:
    from .trainer import Trainer


@torch.no_grad()
def mean_losses(trainer: Trainer) -> dict[str, float]:
    """Mean loss and figures over the held-out records. Collective."""
    means = Means()
    mine = trainer.ranks.share(list(trainer.eval_records))
    window = trainer.window(mine)  # all of the data is one: the mean loss does not depend on the batch size
    total = torch.zeros((), device=trainer.accelerator.device)
    with in_eval_mode(trainer.policy):
        parts = trainer.micro_batches(trainer.collect(mine))
        idle = trainer.idle_passes(len(parts))
        for part in parts:
            for loss, figures, weight in trainer.losses(part, window):
                total += loss
                means.add(figures, weight)
        for _ in idle_losses(trainer, parts[-1:] * idle, window):
            pass
    means.add({"loss": trainer.accelerator.reduce(total, "sum")}, 1.0)
    return means.read()
