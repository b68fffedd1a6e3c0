"""A step whose gradient is not finite: which rows are at fault, and the batch in a file, to look at and to send."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf_fast.errors import StepRefused
from rlhf_fast.run.disk import disk_faults

from .algorithm import Window
from .trial import trial

if TYPE_CHECKING:
    from .trainer import Trainer

logger = logging.getLogger(__name__)
MAX_SKIPPED_STEPS = 3  # in a row
FOLDER = "skipped"  # of the run folder
NAMED = 3  # rows in a message


def skip(trainer: Trainer, norm: float, records: list[Any], window: Window) -> None:
    """Say which step is left out and why.

    Raises:
        StepRefused: it is one of too many in a row.
    """
    trainer.skipped += 1
    told = report(trainer, records, window)
    logger.warning("step %d skipped: the gradient norm is %s; %s", trainer.step + 1, norm, told)
    if trainer.skipped == MAX_SKIPPED_STEPS:
        raise StepRefused(
            f"{MAX_SKIPPED_STEPS} steps in a row had non-finite gradients, the last at step {trainer.step + 1}; "
            f"lower the learning rate (now {trainer.scheduler.get_last_lr()[0]:g}) or inspect the data there: {told}"
        )


def report(trainer: Trainer, records: list[Any], window: Window) -> str:
    """Write a skipped step's records to ``skipped/step-<n>.jsonl`` of the run folder, and say which of them are at fault.

    Each record's loss and gradient are computed again, by themselves: a step is skipped rarely, and who looks into it wants
    to know. Weights, figures and random state are as before, gradients are dropped. Where weights are sharded, passes take all
    ranks, and the batch is kept only.
    """
    if trainer.sharded:
        figures, rows = [(None, None)] * len(records), "with sharded weights rows are not looked at one by one"
    else:
        figures = _alone(trainer, records, window)
        rows = _at_fault(trainer, records, figures)
    rank = trainer.ranks.index
    path = Path(trainer.args.output_dir) / FOLDER / f"step-{trainer.step + 1:08d}{f'-rank{rank}' if rank else ''}.jsonl"
    with disk_faults("a skipped step's batch", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for record, (loss, norm) in zip(records, figures):
                file.write(json.dumps(_plain(_line(trainer, record, loss, norm)), ensure_ascii=False) + "\n")
    return f"{rows}; the batch is in {path}"


def _at_fault(trainer: Trainer, records: list[Any], figures: list[tuple[float, float]]) -> str:
    guilty = [
        f"{_where(trainer, record)} (loss {loss:g}, gradient norm {norm:g})"
        for record, (loss, norm) in zip(records, figures)
        if not (math.isfinite(loss) and math.isfinite(norm))
    ]
    more = f" and {len(guilty) - NAMED} more" if len(guilty) > NAMED else ""
    return f"rows at fault: {', '.join(guilty[:NAMED])}{more}" if guilty else "no row is at fault by itself"


def _alone(trainer: Trainer, records: list[Any], window: Window) -> list[tuple[float, float]]:
    """Loss and norm of the gradient of each record by itself."""
    figures = []
    with trial(trainer):
        for record in records:
            trainer.optimizer.zero_grad(set_to_none=True)
            total = 0.0
            for loss, *_ in trainer.losses([record], window):
                trainer.accelerator.backward(loss)
                total += float(loss.detach())
            norms = [p.grad.norm() for p in trainer.parameters if p.grad is not None]
            figures.append((total, float(torch.stack(norms).norm()) if norms else 0.0))
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
