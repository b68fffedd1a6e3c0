"""A step whose gradient is not finite: which rows are at fault, and the batch in a file, to look at and to send."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf_fast.run.checkpoint import rng_state, set_rng_state
from rlhf_fast.run.disk import disk_faults

from .algorithm import Window

if TYPE_CHECKING:
    from .trainer import Trainer

FOLDER = "skipped"  # of the run folder
NAMED = 3  # rows in a message


def report(trainer: Trainer, records: list[Any], window: Window) -> str:
    """Write a skipped step's records to ``skipped/step-<n>.jsonl`` of the run folder, and say which of them are at fault.

    Each record's loss and gradient are computed again, by themselves: a step is skipped rarely, and who looks into it wants
    to know. Weights, figures and random state are as before, gradients are dropped. Where weights are sharded, passes take all
    ranks, and the batch is kept only.
    """
    figures = [(0.0, 0.0)] * len(records) if trainer.sharded else _alone(trainer, records, window)
    rank = trainer.ranks.index
    path = Path(trainer.args.output_dir) / FOLDER / f"step-{trainer.step + 1:08d}{f'-rank{rank}' if rank else ''}.jsonl"
    with disk_faults("a skipped step's batch", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for record, (loss, norm) in zip(records, figures):
                loss, norm = (None, None) if trainer.sharded else (loss, norm)
                file.write(json.dumps(_plain(_line(trainer, record, loss, norm)), ensure_ascii=False) + "\n")
    guilty = [
        f"{_where(trainer, record)} (loss {loss:g}, gradient norm {norm:g})"
        for record, (loss, norm) in zip(records, figures)
        if not (math.isfinite(loss) and math.isfinite(norm))
    ]
    more = f" and {len(guilty) - NAMED} more" if len(guilty) > NAMED else ""
    rows = f"rows at fault: {', '.join(guilty[:NAMED])}{more}" if guilty else "no row is at fault by itself"
    if trainer.sharded:
        rows = "with sharded weights rows are not looked at one by one"
    return f"{rows}; the batch is in {path}"


def _alone(trainer: Trainer, records: list[Any], window: Window) -> list[tuple[float, float]]:
    """Loss and norm of the gradient of each record by itself."""
    before, random = dict(vars(trainer)), rng_state()
    alone = len(trainer.ranks) == 1
    trainer.ranks = trainer.ranks.alone()
    figures = []
    try:
        for record in records:
            trainer.optimizer.zero_grad(set_to_none=True)
            total = 0.0
            with contextlib.nullcontext() if alone else trainer.accelerator.no_sync(trainer.model):
                for loss, *_ in trainer.losses([record], window):
                    trainer.accelerator.backward(loss)
                    total += float(loss.detach())
            norms = [p.grad.norm() for p in trainer.parameters if p.grad is not None]
            figures.append((total, float(torch.stack(norms).norm()) if norms else 0.0))
    finally:
        vars(trainer).update(before)  # what the losses noted down
        trainer.optimizer.zero_grad(set_to_none=True)
        set_rng_state(random)
    return figures


def _where(trainer: Trainer, record: Any) -> str:
    """The rows of the data behind a record: one, or several that were packed together."""
    places = dict.fromkeys(e.where for e in trainer.examples(record) if e.where)
    return " with ".join(places) or repr(trainer.tokenizer.decode(trainer.examples(record)[0].input_ids)[:60])


def _line(trainer: Trainer, record: Any, loss: float | None, norm: float | None) -> dict[str, Any]:
    texts = [trainer.tokenizer.decode(e.input_ids) for e in trainer.examples(record)]
    content = record if isinstance(record, list) else [record]
    fields = [dataclasses.asdict(part) for part in content]
    return {"where": _where(trainer, record), "loss": loss, "gradient_norm": norm, "texts": texts, "records": fields}


def _plain(value: Any) -> Any:
    """As strict JSON has it: tensors as lists, what is not finite as a word."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
