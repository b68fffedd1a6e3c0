"""A trainer whose weights are sharded over its processes (FSDP2, see :mod:`rlhf_fast.run.sharding`): passes take all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_fast.data.batch import Example, TokenBatch
from rlhf_fast.errors import UserError
from rlhf_fast.models.adapters import is_4bit
from rlhf_fast.models.policy import in_eval_mode
from rlhf_fast.run import sharding

from .algorithm import Window
from .resume import frozen_digest

if TYPE_CHECKING:
    from .trainer import Trainer


def check(trainer: Trainer) -> None:
    """Raise UserError for settings and data that sharded weights do not go with."""
    a = trainer.args
    refused = {
        "load_in_4bit": is_4bit(trainer.policy.model),
        f"optim {a.optim}": a.optim != "adamw",
        "rollout_merge_lora": bool(getattr(a, "rollout_merge_lora", False)),
        "memory_check": bool(a.memory_check),
    }
    if names := [name for name, wanted in refused.items() if wanted]:
        raise UserError(
            f"sharded weights (FSDP2) do not go with {', '.join(names)}: leave that out, or run replicas (DDP)"
        )
    if trainer.eval_records is not None and len(trainer.eval_records) < len(trainer.ranks):
        raise UserError(
            f"eval_dataset has fewer rows than this run has processes ({len(trainer.ranks)}), which all need one"
        )


def shard(trainer: Trainer, optimizer: Any) -> tuple[Any, Any]:
    """Policy and optimizer, each process with its part of them from here on."""
    check(trainer)
    policy = trainer.policy
    # of weights that stand still, taken while they are in one piece
    policy.note_base()
    trainer.frozen = frozen_digest(trainer)
    model, optimizer = sharding.prepare(trainer.accelerator, policy, policy.layer_classes, optimizer)
    # the module that runs first is the root from then on
    probe = TokenBatch.pack([Example([0, 0], [False, True])], policy.device)
    with torch.no_grad(), in_eval_mode(policy):
        policy(probe)
    sharding.part(policy)
    return model, optimizer


def idle_losses(trainer: Trainer, parts: list[list[Any]], window: Window) -> Iterator[Tensor]:
    """Losses that do not count, of passes made because other ranks have more micro-batches and need this one's weights."""
    for part in parts:
        before = dict(vars(trainer))
        for loss, *_ in trainer.losses(part, window):
            yield loss
        vars(trainer).update(before)  # what the losses noted down
