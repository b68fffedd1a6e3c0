"""Checkpoints of a training run: all that going on bit for bit needs, and what must agree before going on."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf_fast.errors import RolloutError, StepRefused, UserError
from rlhf_fast.models.fingerprint import difference, digest
from rlhf_fast.rewards.deadline import rescue
from rlhf_fast.run.checkpoint import (
    checkpoint_path,
    find_checkpoint,
    find_fault,
    list_checkpoints,
    load_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from rlhf_fast.run.sharding import gathered, part, put, scattered

from .upgrade import FORMAT, reshape_moments, stamp, too_old, upgraded

if TYPE_CHECKING:
    from .trainer import Trainer

logger = logging.getLogger(__name__)


def save(trainer: Trainer, out: Path) -> Path:
    """Write a checkpoint of this step below ``out``, and return its folder. Collective."""
    state = state_of(trainer)
    if trainer.accelerator.is_main_process:
        best = () if trainer.best.step is None else (trainer.best.step,)
        keep = trainer.args.save_total_limit
        save_checkpoint(out / "checkpoints", trainer.step, state, keep=keep, protect=best)
    trainer.accelerator.wait_for_everyone()
    return checkpoint_path(out / "checkpoints", trainer.step)


@contextlib.contextmanager
def saved_if_rollouts_fail(trainer: Trainer, out: Path) -> Iterator[None]:
    """When the rollouts or rewards cannot be had that what is inside needs, where the run stood before is saved first."""
    before = trainer.sampler.state(), trainer.rows_drawn, trainer.metrics.state()

    def saved() -> str:
        trainer.sampler.load_state(before[0])
        trainer.rows_drawn = before[1]
        trainer.metrics.load_state(before[2])
        save(trainer, out)
        return f" (saved at step {trainer.step}; continue with --resume)"

    try:
        # a thread that saves could not ask the other processes
        with rescue(saved) if len(trainer.ranks) == 1 else contextlib.nullcontext():
            yield
    except RolloutError as error:
        raise RolloutError(f"{error}{saved()}") from error


@contextlib.contextmanager
def saved_if_refused(trainer: Trainer, out: Path) -> Iterator[None]:
    """Inside, the next step of the plan is made; when it must not be taken, where the run stood before is saved first."""
    before, figures, plan = dict(vars(trainer)), trainer.metrics.state(), list(trainer.plan)
    try:
        yield
    except StepRefused as error:
        vars(trainer).update(before)
        trainer.metrics.load_state(figures)
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.plan = plan
        if trainer.record_class is None:  # rows of the data are not saved: the round is drawn again
            trainer.plan = []
            cursor, trainer.rows_drawn = trainer.round_began
            trainer.sampler.load_state(cursor)
        save(trainer, out)
        raise StepRefused(f"{error} (saved at step {trainer.step}; continue with --resume)") from error


def load_best(trainer: Trainer, out: Path) -> str:
    """Put the weights of the best evaluation in place; returns what to say about it. The run is over: nothing else moves."""
    best = trainer.best
    if best.step is None:
        return f"no evaluation had a {best.metric}: the model is that of the last step"
    path = checkpoint_path(out / "checkpoints", best.step)
    if fault := find_fault(path):
        return f"the best evaluation's checkpoint {path} is gone ({fault}): the model is that of the last step"
    _put_weights(trainer, load_checkpoint(path, verify=False))
    return f"best model: step {best.step}, {best.metric} {best.value:.4g}"


def resume(trainer: Trainer, out: Path, which: str | bool) -> int | None:
    """Go on from the latest good checkpoint below ``out`` (``which`` is True) or from the one at a path.

    Returns:
        its step; None for a run that was killed before its first checkpoint, which begins again.
    """
    if which is True and (out / "config.yaml").is_file() and not list_checkpoints(out / "checkpoints"):
        logger.warning("the run in %s has no checkpoint yet: it begins again", out)
        return None
    path = find_checkpoint(out / "checkpoints", which)
    restore(trainer, load_checkpoint(path, verify=False))
    logger.info("resumed from %s at step %d", path, trainer.step)
    return trainer.step


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Everything that continuing bit for bit needs. Collective: every rank must call it."""
    sampled = trainer.plan and trainer.record_class
    local = {
        "rng": rng_state(),
        "plan": trainer.plan,
        "metrics": trainer.metrics.state(),
        "tokens": trainer.tokens_seen,
        "records": [dataclasses.asdict(r) for r in trainer.records] if sampled else None,
    }
    return {
        **stamp(),
        "step": trainer.step,
        "weights": weights_of(trainer),
        "optimizer": gathered(trainer.optimizer.state_dict(), keep=trainer.accelerator.is_main_process),
        "scheduler": trainer.scheduler.state_dict(),
        "sampler": trainer.sampler.state(),
        "rows_drawn": trainer.rows_drawn,
        "skipped": trainer.skipped,
        "micro_batch_tokens": trainer.micro_batch_tokens,
        "ranks": trainer.ranks.gather([local]),
        "extra": trainer.extra_state(),
        "best": trainer.best.state(),
        "stopped": trainer.stopped,
        "rolls_back": trainer.rolls_back,
        "data": _data(trainer),
        "callbacks": trainer.callbacks.state(),
        # frozen, and not in here
        "base": trainer.policy.base if trainer.policy.adapters.names else None,
        "frozen": trainer.frozen or frozen_digest(trainer),
    }


def restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """Put what :func:`state_of` gave in place.

    Raises:
        UserError: the checkpoint holds other parameters, belongs to another base, comes from other data, another seed or
            another number of processes, or from a version of rlhf_fast whose fields do not suffice.
    """
    earlier = state.get("format", 1) != FORMAT
    state = upgraded(state, state_of(trainer)) if earlier else state
    try:
        _put_in_place(trainer, state)
        if earlier:
            reshape_moments(trainer.optimizer)
    except (KeyError, TypeError) as error:
        if not earlier:
            raise
        raise too_old(f"its fields are others ({type(error).__name__}: {error})") from error
    except UserError as error:
        if not earlier:
            raise
        told = "the checkpoint is of an earlier rlhf_fast: if nothing else is new, finish its run with that version"
        raise UserError(f"{error} ({told}, which record.jsonl names)") from error


def _put_in_place(trainer: Trainer, state: dict[str, Any]) -> None:
    _check_fit(trainer, state, _trained(trainer))
    _put_weights(trainer, state)
    trainer.step = state["step"]
    trainer.optimizer.load_state_dict(scattered(state["optimizer"], trainer.optimizer))
    trainer.scheduler.load_state_dict(state["scheduler"])
    try:
        trainer.sampler.load_state(state["sampler"])
    except ValueError as error:
        raise UserError(f"{error}; resume with the data and the seed that the run began with") from error
    if state["data"] != _data(trainer):
        raise UserError(
            f"the rows of {trainer.reports['train'].source}, or the tokenizer, are other ones than the checkpoint's run began "
            "with, though as many: resume with the data as it was then"
        )
    trainer.rows_drawn, trainer.skipped = state["rows_drawn"], state["skipped"]
    # what a plan or a rehearsal had settled on: sums in other parts would round differently
    trainer.micro_batch_tokens = state["micro_batch_tokens"]
    local = state["ranks"][trainer.accelerator.process_index]
    trainer.plan = local["plan"]
    trainer.metrics.load_state(local["metrics"])
    trainer.tokens_seen = local["tokens"]
    if local["records"] is not None:
        trainer.records = [trainer.restore_record(r) for r in local["records"]]
    trainer.load_extra_state(state["extra"])
    trainer.best.load_state(state["best"])
    trainer.stopped, trainer.rolls_back = state["stopped"], state["rolls_back"]
    trainer.callbacks.load_state(state["callbacks"])
    set_rng_state(local["rng"])


def _put_weights(trainer: Trainer, state: dict[str, Any]) -> None:
    for name, parameter in _trained(trainer).items():
        put(parameter, state["weights"][name])


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What is trained, by name; of sharded weights each in one piece, on the main process alone. Collective."""
    return gathered(_trained(trainer), keep=trainer.accelerator.is_main_process)


def frozen_digest(trainer: Trainer) -> str:
    """Of what stands still beside the base."""
    return digest(_frozen(trainer))


def _trained(trainer: Trainer) -> dict[str, torch.Tensor]:
    part(trainer.policy)
    return {n: p for n, p in trainer.policy.named_parameters() if p.requires_grad}


def _frozen(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What stands still beside the base: the reference's and reward models' adapters, heads and copies."""
    ours = (".lora_", "heads.", "copies.")
    named = trainer.policy.named_parameters()
    return {n: p for n, p in named if not p.requires_grad and any(part in n for part in ours)}


def _data(trainer: Trainer) -> str:
    """A hash of the tokens that the run learns from."""
    return trainer.reports["train"].sha256


def _check_fit(trainer: Trainer, state: dict[str, Any], mine: dict[str, torch.Tensor]) -> None:
    """Raise UserError unless ``state`` belongs to a run like this one: parameters, processes, frozen base."""
    here, there = ({n: tuple(w.shape) for n, w in weights.items()} for weights in (mine, state["weights"]))
    if odd := {n for n in here.keys() | there.keys() if here.get(n) != there.get(n)}:
        name = min(odd)
        raise UserError(
            f"the checkpoint does not fit this model and its LoRA settings: {name} is {there.get(name, 'missing')} there "
            f"and {here.get(name, 'missing')} here"
        )
    if len(state["ranks"]) != trainer.accelerator.num_processes:
        raise UserError(
            f"the checkpoint was written by {len(state['ranks'])} processes, this run has "
            f"{trainer.accelerator.num_processes}; start as many"
        )
    if state["frozen"] != (trainer.frozen or frozen_digest(trainer)):
        raise UserError(
            "the checkpoint belongs to another reference or reward model than this run has loaded; resume with the "
            "model_name_or_path and reward_model_path that the run began with, as they were then (a run that is saved into "
            "the folder that it began from changes them)"
        )
    if (saved := state["base"]) is None:
        return
    base = trainer.policy.base
    how = difference(saved, base)
    if how is None and saved["format"] != base["format"]:
        how = f"it was held {saved['format']} there and {base['format']} here; see load_in_4bit"
    if how:
        raise UserError(f"the checkpoint belongs to another base than {trainer.policy.model.name_or_path}: {how}")
