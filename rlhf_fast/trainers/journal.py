"""What a run writes about itself: the log of its figures, and the record of what it was made from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_fast.run.metrics import MetricsLog
from rlhf_fast.run.record import Record, lineage, redacted

from . import memory

if TYPE_CHECKING:
    from .trainer import Trainer

ASIDE = ("evaluate", "save")  # what a run spends time on beside learning


def open_record(trainer: Trainer, out: Path, resumed: int | None) -> Record:
    """The run's record in the folder ``out``; ``resumed`` is the step gone on from."""
    config = dataclasses.asdict(trainer.args) | {"model_name_or_path": trainer.model_name}
    data = {
        name: {"source": r.source, "rows": r.rows, "kept": r.kept, "sha256": r.sha256}
        for name, r in trainer.reports.items()
    }
    about = {"method": trainer.method, "config": config, "data": data, "lineage": lineage(config)}
    about["processes"] = len(trainer.ranks)
    return Record(out, about, resumed, enabled=trainer.accelerator.is_main_process)


class Journal(MetricsLog):
    """The log of a run: a :class:`.MetricsLog` that knows which figures a trainer has.

    Args:
        resumed: the step gone on from; None for a fresh start.
        figures: takes the last value of each figure.
    """

    def __init__(self, trainer: Trainer, out: Path, resumed: int | None, figures: dict[str, float]) -> None:
        self.trainer, self.figures = trainer, figures
        self._tokens = trainer.num_tokens  # of all ranks, at the last line
        a = trainer.args
        super().__init__(
            out,
            trainer.headline,
            trainer.expected_steps,
            trackers=a.report_to,
            quiet=a.quiet,
            resume_step=resumed,
            config=redacted(dataclasses.asdict(a)),
            enabled=trainer.accelerator.is_main_process,
        )

    def write(self) -> dict[str, float]:
        """A line with the means and seconds since the last one; returns its figures. Collective."""
        t = self.trainer
        figures, seconds, tokens = t.metrics.read(), t.times.read(), t.num_tokens
        figures["lr"] = t.scheduler.get_last_lr()[0]
        figures["epoch"] = t.sampler.epoch
        figures["num_tokens"] = tokens
        learning = sum(value for name, value in seconds.items() if name not in ASIDE)
        figures["tokens_per_second"] = (tokens - self._tokens) / max(learning, 1e-9)
        self._tokens = tokens
        figures.update({f"time/{name}": value for name, value in seconds.items()})
        figures.update(memory.figures(t.memory_plan))
        self.add(figures)
        t.after_log(figures)
        return figures

    def add(self, figures: dict[str, Any]) -> None:
        """A line of its own with ``figures``."""
        self.log(self.trainer.step, figures)
        self.figures.update(figures)
