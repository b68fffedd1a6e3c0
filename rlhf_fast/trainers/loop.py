"""The loop that all trainers share, over rounds, windows and micro-batches.

A *round* turns some rows of the data set into records to learn from (``collect``: for offline algorithms the rows
themselves, for reinforcement learning sampled and scored responses). A *window* is what one optimizer step learns from.
It is split into micro-batches, by tokens or by records, whose losses are sums over one denominator, that of the whole
window on all ranks: any split of the window gives the same gradient.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_fast.run import sharding
from rlhf_fast.run.checkpoint import rng_state, set_rng_state
from rlhf_fast.run.record import Record
from rlhf_fast.run.signals import StopSignals

from . import memory, nonfinite
from .algorithm import Window
from .journal import Journal
from .resume import load_best, save, saved_if_refused, saved_if_rollouts_fail
from .shards import idle_losses

if TYPE_CHECKING:
    from .trainer import Trainer


def run(trainer: Trainer, out: Path, resumed: int | None, record: Record) -> None:
    """Make a run's steps from wherever it stands, and save the model that it ends with.

    Args:
        resumed: the step gone on from; None for a fresh start.
        record: takes the last figures and how it ended.
    """
    a = trainer.args
    with Journal(trainer, out, resumed, record.figures) as log, StopSignals() as stop:
        while not trainer.finished:
            if not trainer.plan:
                with trainer.timed("collect"), saved_if_rollouts_fail(trainer, out):
                    begin_round(trainer)
            with trainer.timed("train"), saved_if_refused(trainer, out):
                optimizer_step(trainer, trainer.plan.pop(0))
            log.total_steps = trainer.expected_steps
            # read once: a signal that comes while logging waits for the next step
            interrupted = asked_to_stop(trainer, stop)
            ends = trainer.finished or interrupted
            logged = log.write() if ends or trainer.step % a.logging_steps == 0 else {}
            trainer.callbacks.call("on_step", trainer, logged)  # which may end the run
            record.step = trainer.step
            if evaluation_due(trainer) and not interrupted:  # who asked to stop will not wait for it
                # one process of several may fail alone here, and the others would wait for it to save
                with saved_if_rollouts_fail(trainer, out) if len(trainer.ranks) == 1 else contextlib.nullcontext():
                    evaluate(trainer, log, stop)
                interrupted = asked_to_stop(trainer, stop)
            is_best = trainer.best.step == trainer.step
            if trainer.finished or interrupted or trainer.step % a.save_steps == 0 or is_best:
                with trainer.timed("save"):
                    folder = save(trainer, out)
                trainer.callbacks.call("on_save", trainer, folder)
                interrupted = interrupted or asked_to_stop(trainer, stop)  # now it costs no step
            if trainer.stopped and not logged:
                log.write()
            if trainer.stopped:
                log.print(f"stopped at step {trainer.step}: {trainer.stopped}")
            elif interrupted:
                log.print(f"{stop.name or 'stopped'}: saved at step {trainer.step}; continue with --resume")
                break
            log.tick(trainer.step)
    if trainer.finished and (a.load_best_model_at_end or trainer.rolls_back):
        trainer.say(load_best(trainer, out))
    if trainer.memory_plan is not None and torch.cuda.is_available():
        trainer.say(memory.compare(trainer.memory_plan, torch.cuda.max_memory_allocated()))
    trainer.save_model(out)
    interruption = f"interrupted by {stop.name or 'another rank'}"
    record.outcome = trainer.stopped or ("finished" if trainer.finished else interruption)


def begin_round(trainer: Trainer) -> None:
    """Draw rows, make records of them, and plan the windows over these."""
    trainer.round_began = trainer.sampler.state(), trainer.rows_drawn
    # the last round is as short as the data, but every window of every rank needs a row: it may run on into the next
    # epoch by a few
    fewest = trainer.windows_per_round * len(trainer.ranks)
    count = min(trainer.schedule.rows_per_round, max(fewest, trainer.rows_left))
    samples = trainer.record_class is not None
    with trainer.whole() if samples else contextlib.nullcontext():  # ranks write at a pace of their own
        trainer.records = trainer.collect(trainer.draw(count, *trainer.ranks.bounds(count)))
        if samples:
            trainer.callbacks.call("on_rollout", trainer, trainer.records)
        trainer.plan = trainer.make_plan(len(trainer.records))


def optimizer_step(trainer: Trainer, indices: list[int]) -> None:
    """One step on the round's records at ``indices``, this rank's part of a window."""
    records = [trainer.records[i] for i in indices]
    window = trainer.window(records)
    memory.halving(trainer, records, lambda parts: accumulate(trainer, parts, window))
    if not trainer.sharded:
        trainer.ranks.average_gradients(trainer.parameters)
    norm = trainer.accelerator.clip_grad_norm_(trainer.parameters, trainer.args.max_grad_norm or math.inf)
    apply(trainer, sharding.gathered(norm).to(trainer.accelerator.device), records, window)
    trainer.tokens_seen += sum(len(e) for record in records for e in trainer.examples(record))
    trainer.step += 1
    trainer.after_step()
    # a schedule is a function of where the run is
    trainer.scheduler.last_epoch = trainer.position - 1
    trainer.scheduler.step()


def accumulate(trainer: Trainer, parts: list[list[Any]], window: Window) -> None:
    """Add up the gradients of a window's micro-batches. Nothing here waits for the device."""
    world, idle = len(trainer.ranks), trainer.idle_passes(len(parts))
    # replicas meet afterwards, once all have come through: a process without enough memory leaves no other waiting. Sharded
    # gradients meet each time: whole, they would soon be too much
    hold = world > 1 and not trainer.sharded
    for part in parts:
        with trainer.accelerator.no_sync(trainer.model) if hold else contextlib.nullcontext():
            for loss, metrics, weight in trainer.losses(part, window):
                # gradients are averaged over ranks; the denominator already counts them all
                trainer.accelerator.backward(loss * world)
                trainer.metrics.add(metrics, weight)
                trainer.window_loss = trainer.window_loss + loss.detach()
    for loss in idle_losses(trainer, parts[-1:] * idle, window):
        trainer.accelerator.backward(loss * 0.0)


def apply(trainer: Trainer, norm: Tensor, records: list[Any], window: Window) -> None:
    """Step the optimizer, unless a gradient is not finite or a figure forbids it: then weights stay as they are."""
    size, loss, figures = read(trainer, norm)
    if math.isfinite(size):
        trainer.inspect(figures)
        trainer.optimizer.step()
        trainer.skipped = 0
    else:
        nonfinite.skip(trainer, size, records, window)
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.metrics.add({"loss": loss, "grad_norm": size}, 1.0)


def read(trainer: Trainer, norm: Tensor) -> tuple[float, float, dict[str, float]]:
    """Gradient norm, loss, and what is watched of a window, of all ranks: one collective call, one wait for the device."""
    mine = (trainer.window_loss, *trainer.watched.values())
    sums = torch.stack([torch.as_tensor(x, dtype=torch.float32, device=norm.device) for x in mine])
    size, loss, *figures = torch.cat([norm.reshape(1), trainer.accelerator.reduce(sums, "sum")]).tolist()
    names = list(trainer.watched)
    trainer.window_loss, trainer.watched = 0.0, {}
    return size, loss, dict(zip(names, figures))


def evaluation_due(trainer: Trainer) -> bool:
    """Whether the held-out data is looked at after this step."""
    every = trainer.args.eval_steps
    return trainer.eval_records is not None and (trainer.finished or bool(every and trainer.step % every == 0))


def asked_to_stop(trainer: Trainer, stop: StopSignals) -> bool:
    """Whether a signal came to any process of a run that has steps left. Collective."""
    return trainer.ranks.any(stop.requested) and not trainer.finished


def evaluate(trainer: Trainer, log: Journal, stop: StopSignals) -> None:
    """Log what the held-out data says, and let all know that follow it; not when a signal comes before it has said it."""
    with trainer.timed("evaluate"):
        figures = held_out(trainer, stop)
    if figures is None:
        return log.print(f"{stop.name}: the evaluation at step {trainer.step} is left out")
    log.add(figures)
    if trainer.args.watches_evaluations:
        trainer.best.update(trainer.step, figures)
    trainer.callbacks.call("on_evaluate", trainer, figures)
    trainer.after_evaluation(log)


def held_out(trainer: Trainer, stop: StopSignals) -> dict[str, float] | None:
    """What the held-out data says; None when a signal has ended that, which leaves no trace in the trainer."""
    if len(trainer.ranks) > 1:  # the others would wait
        return trainer.evaluate()
    before, random = dict(vars(trainer)), rng_state()
    figures = stop.unless_requested(trainer.evaluate)
    if figures is None:
        vars(trainer).update(before)
        set_rng_state(random)
    return figures
