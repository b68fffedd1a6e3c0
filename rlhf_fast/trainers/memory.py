"""Memory of a run on a real model: the plan that settles what the config leaves open, and its rehearsal.

The arithmetic is in :mod:`rlhf_fast.run.memory`; here are the counts of the model, the device's size, and the trial of the
largest micro-batch before the first step, so that a run that does not fit says so at once and not hours later.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlhf_fast.errors import UserError
from rlhf_fast.models import Policy
from rlhf_fast.models.adapters import is_4bit
from rlhf_fast.models.load import held_bytes
from rlhf_fast.run import memory
from rlhf_fast.run.memory import GB, OPTIMIZER_BYTES, Job, Part, Plan

from .trial import trial

if TYPE_CHECKING:
    from .trainer import Trainer

logger = logging.getLogger(__name__)


def job_of(trainer: Trainer) -> Job:
    """The trainer's run as the plan sees it, with the settings that are in force."""
    a, policy = trainer.args, trainer.policy
    config = policy.model.config.to_dict()
    name = str(getattr(policy.model, "name_or_path", "")) or config.get("model_type", "")
    lora = policy.adapters.config(policy.role) if policy.adapters.names else None
    wide = policy.model.get_input_embeddings().weight.element_size() == 4 and policy.compute_dtype is None
    job = Job(
        shape=memory.Shape.of(config, name, strict=False),
        method=trainer.method,
        full=lora is None,
        base="fp32" if wide else "nf4" if is_4bit(policy.model) else "bf16",
        **({} if lora is None else {"lora_r": lora.r, "lora_targets": _targets(lora.target_modules)}),
        optimizer=a.optim,
        checkpointing=a.gradient_checkpointing is not False,
        offload=bool(a.offload_activations),
        device=trainer.accelerator.device.type,
        reference="reference" in policy.adapters.names or "reference" in policy.copies,
        merge_lora=getattr(a, "rollout_merge_lora", False) is True,
        # evaluations are written by the policy itself
        samples_here=not getattr(a, "use_vllm", False) or trainer.eval_records is not None,
        vllm_share=getattr(a, "vllm_share", 0.0),
        vllm_sleeps=getattr(a, "vllm_enable_sleep_mode", False),
        reward_models=len(getattr(a, "reward_models", ())),
        cost_models=len(getattr(a, "cost_models", ())),
        **trainer.sizes(),
    )
    return replace(job, kernels="fused" if _fused(policy, job) else "peft")


def _targets(modules: str | Collection[str]) -> str | tuple[str, ...]:
    return modules if isinstance(modules, str) else tuple(sorted(modules))


def _fused(policy: Policy, job: Job) -> bool:
    """Whether all that can be runs fused in training: a LoRA layer or MLP that does not keeps what PEFT keeps."""
    layers = ["norm"] if job.full else ["lora", "mlp"]
    known = policy.model.config.get_text_config().model_type in memory.ARCHITECTURES
    # no MLP of ours is one without an adapter, or with gate and up in one linear, as Phi 3 has them
    if known and (job.shape.traits.fused or not any(x.name.startswith("mlp.") for x in job.adapted)):
        layers = layers[:1]
    training = policy.training
    policy.train()  # dropout is PEFT's
    whole = policy.fusion.covers(*layers)
    policy.train(training)
    return whole


def weights_of(models: Iterable[nn.Module], optimizer: str) -> list[Part]:
    """The "always" parts, counted: what is frozen, what is trained, and what training adds to it."""
    tensors = {}
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            tensors[tensor.untyped_storage().data_ptr(), tensor.storage_offset()] = tensor
    frozen = sum(held_bytes(t) for t in tensors.values() if not t.requires_grad)
    trained = [t for t in tensors.values() if t.requires_grad]
    count = sum(t.numel() for t in trained)
    parts = [
        Part("frozen weights", frozen, "always"),
        Part("trained weights", sum(t.nbytes for t in trained), "always"),
        Part("gradients", sum(t.nbytes for t in trained), "gradients"),
        Part(f"{optimizer} state", OPTIMIZER_BYTES[optimizer] * count, "always"),
    ]
    return [p for p in parts if p.bytes]


def device_bytes(device: torch.device, whole: bool = False) -> int | None:
    """Bytes of a GPU that this process may use, what it holds already and its CUDA context included; None on a CPU.

    ``whole``: whatever others hold, which may be something else next time.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    free = total if whole else free
    mine = torch.cuda.memory_reserved(device)
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
    return min(free + mine, int(total * fraction)) + memory.CONTEXT_BYTES


def plan_of(trainer: Trainer, available: int | None = None, settle: bool = False) -> Plan:
    """What the run takes as it is; with ``settle``, what it had best do about the settings that the config leaves open."""
    a, job = trainer.args, job_of(trainer)
    weights = weights_of(trainer.models(), job.optimizer)
    if not settle:
        return memory.plan(job, available, weights)
    given = {
        "checkpointing": a.gradient_checkpointing,
        "offload": a.offload_activations,
        "micro_batch_tokens": a.micro_batch_tokens,
    }
    return memory.choose(job, available, weights, free=[name for name, value in given.items() if value is None])


def settle(trainer: Trainer) -> Plan | None:
    """Switch checkpointing and offload on as the config says; on a GPU the plan answers what it leaves open."""
    a, made = trainer.args, None
    checkpointing, offload = a.gradient_checkpointing is not False, bool(a.offload_activations)
    if trainer.shards:
        trainer.say("no memory plan: it knows no sharded weights; micro_batch_tokens is yours to set")
    elif (available := device_bytes(trainer.accelerator.device, a.deterministic)) is not None:
        try:
            made = plan_of(trainer, available, settle=True)
        except UserError as error:  # a config that is no known decoder's
            trainer.say(f"no memory plan: {error}")
        else:
            checkpointing, offload = made.job.checkpointing, made.job.offload
            trainer.micro_batch_tokens = made.job.tokens
            trainer.say("\n".join([made.line(), *(f"it does not fit; try {change}" for change in made.changes)]))
    if checkpointing:
        trainer.policy.checkpoint_activations(offload=offload)
    return made


def figures(made: Plan | None) -> dict[str, float]:
    """Peak and plan for a log line; nothing on a CPU."""
    if not torch.cuda.is_available():
        return {}
    measured = {"memory/peak_gb": torch.cuda.max_memory_allocated() / GB}
    return measured | ({} if made is None else {"memory/planned_gb": made.tensors / GB})


def compare(made: Plan, peak: int) -> str:
    """The plan beside what the device measured, in one line."""
    off = made.tensors / max(peak, 1) - 1
    return f"memory: planned {made.tensors / GB:.1f} GB, peak {peak / GB:.1f} GB ({off:+.0%})"


# -------------------------------------------------------------------------------------------------------------- rehearsal


def check(trainer: Trainer) -> None:
    """Try the largest micro-batch, if the config or a GPU asks for it; from here on the peak is that of training."""
    cuda = trainer.accelerator.device.type == "cuda"
    # of sharded weights a pass takes all ranks: one that ran out of memory would leave the others waiting
    if trainer.args.memory_check if trainer.args.memory_check is not None else cuda and not trainer.sharded:
        began = time.perf_counter()
        tokens = rehearse(trainer)
        trainer.say(f"memory: the largest micro-batch, {tokens:,} tokens, fits ({time.perf_counter() - began:.1f} s)")
    if cuda:
        torch.cuda.reset_peak_memory_stats()


def halving(trainer: Trainer, records: list[Any], accumulate: Callable[[list[list[Any]]], None]) -> None:
    """Call ``accumulate`` with the micro-batches of a window; if memory runs out, anew with such of half the size. Collective.

    Losses are sums over the window's own denominator, so the gradient does not depend on the split. The smaller size stays
    for the rest of the run. Where one process of several runs out, all begin again.

    Raises:
        UserError: a single record does not fit, or weights are sharded: their passes take all processes, and the others wait
            inside one.
    """
    while True:
        parts = trainer.micro_batches(records)
        before, figures, short = dict(vars(trainer)), trainer.metrics.state(), None
        try:
            accumulate(parts)
        except torch.OutOfMemoryError as error:
            short = _Shortage.of(trainer, parts, str(error).splitlines()[0])
        except RuntimeError as error:
            if len(trainer.ranks) > 1 and (why := trainer.ranks.left()):
                raise UserError(why) from error
            raise
        # outside of the handler, whose traceback holds the pass that did not fit
        if short is not None and trainer.sharded and len(trainer.ranks) > 1:
            why = f"{short.what}, and of sharded weights a pass takes all processes; {short.remedy}"
            trainer.ranks.leave(why)
            raise UserError(why)
        if trainer.sharded or not trainer.ranks.any(short is not None):
            return
        vars(trainer).update(before)  # what the losses noted down
        trainer.metrics.load_state(figures)
        trainer.optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _halve(trainer, [x for x in trainer.ranks.gather([short]) if x is not None])


@dataclass
class _Shortage:
    """A micro-batch that one process had no memory for."""

    tokens: int  # of its largest micro-batch
    smallest: int  # tokens of its largest record
    what: str
    one_record: str  # what to change where that is one record
    said: str  # by the device

    @classmethod
    def of(cls, trainer: Trainer, parts: list[list[Any]], said: str) -> _Shortage:
        tokens = max(map(trainer.tokens, parts))
        smallest = max(trainer.tokens([record]) for part in parts for record in part)
        where = f" in process {trainer.ranks.index}" if len(trainer.ranks) > 1 else ""
        what = f"out of memory at step {trainer.step + 1}{where}, in a micro-batch of {tokens:,} tokens"
        return cls(tokens, smallest, what, _remedy(trainer, job_of(trainer)), said)

    @property
    def fewer(self) -> int:
        """Tokens of half a micro-batch, or of a record."""
        return max(self.smallest, self.tokens // 2)

    @property
    def remedy(self) -> str:
        if self.tokens <= self.smallest:
            return f"it is one record; {self.one_record}. The device said: {self.said}"
        return f"go on with --resume and micro_batch_tokens {self.fewer}. The device said: {self.said}"


def _halve(trainer: Trainer, shortages: list[_Shortage]) -> None:
    for short in shortages:
        if short.tokens <= short.smallest:
            raise UserError(f"{short.what}, one record; {short.one_record}. The device said: {short.said}")
    worst = min(shortages, key=lambda short: short.fewer)
    _refuse_by_chance(trainer, worst.what, worst.fewer)
    trainer.micro_batch_tokens = worst.fewer
    if trainer.accelerator.is_main_process:
        told = "%s: the step begins again with micro_batch_tokens %d, and so it stays"
        logger.warning(told, worst.what, worst.fewer)


def _refuse_by_chance(trainer: Trainer, what: str, fewer: int) -> None:
    """Memory is not what a run that repeats its bits may depend on: sums in other parts are rounded otherwise."""
    if trainer.args.deterministic:
        raise UserError(
            f"{what}; a smaller one would round otherwise than a run that finds more memory, and deterministic is on: set "
            f"micro_batch_tokens {fewer} and begin again"
        )


@dataclass
class Trial:
    """How far the trial of a micro-batch came."""

    tokens: int
    stage: str = "optimizer's state"
    error: str | None = None  # None: it fitted


def rehearse(trainer: Trainer) -> int:
    """Forward and backward of the largest micro-batch, without effect; halves ``micro_batch_tokens`` until it fits.

    What a step holds besides is there meanwhile, as ballast: the optimizer's state, and gradients of micro-batches before.
    Weights, optimizer, metrics and random state are as before, gradients are dropped. Every process tries by itself, and
    what does not fit on one is halved on all.

    Returns:
        Tokens of the micro-batch that fitted.
    Raises:
        UserError: the smallest micro-batch does not fit; says in which pass, what takes the most, and what to change.
    """
    smallest = trainer.sizes()["record_tokens"]
    while trainer.ranks.any((tried := _try(trainer)).error is not None):
        if tried.tokens <= smallest:
            raise UserError(_too_large(trainer, tried))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        fewer = max(smallest, tried.tokens // 2)
        _refuse_by_chance(trainer, f"memory: a micro-batch of {tried.tokens:,} tokens does not fit", fewer)
        trainer.micro_batch_tokens = fewer
        trainer.say(
            f"memory: a micro-batch of {tried.tokens:,} tokens does not fit (in the {tried.stage}); going on with "
            f"micro_batch_tokens {trainer.micro_batch_tokens}"
        )
    return tried.tokens


def _try(trainer: Trainer) -> Trial:
    tried, ballast = Trial(0), None
    try:
        with trial(trainer):
            trainer.step = trainer.largest_step  # what steps differ in is tried at its largest
            records = trainer.largest()
            tried.tokens = trainer.tokens(records)
            ballast = _ballast(trainer)
            tried.stage = "forward pass"
            if trainer.record_class is None:
                records = trainer.collect(records)
            for loss, *_ in trainer.losses(records, trainer.own_window(records)):
                tried.stage = "backward pass"
                trainer.accelerator.backward(loss)
                tried.stage = "forward pass"
    except torch.OutOfMemoryError as error:
        tried.error = str(error).splitlines()[0]
    finally:
        del ballast
    return tried


def _ballast(trainer: Trainer) -> torch.Tensor:
    """As much memory as the optimizer's state and the gradients of a step will take that are not there yet."""
    there = sum(x.nbytes for s in trainer.optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor))
    coming = OPTIMIZER_BYTES[trainer.args.optim] * sum(p.numel() for p in trainer.parameters)
    gradients = 0 if job_of(trainer).one_micro_batch else sum(p.nbytes for p in trainer.parameters)
    size = max(0, int(coming) - there) + gradients
    return torch.empty(size, dtype=torch.uint8, device=trainer.accelerator.device)


def _too_large(trainer: Trainer, tried: Trial) -> str:
    if tried.error is None:
        return f"out of memory on another process, with one record of {tried.tokens:,} tokens; it says more"
    made = plan_of(trainer)
    parts = sorted((p for p in made.parts if p.when not in (*memory.SAMPLING, "host")), key=lambda p: -p.bytes)[:3]
    takes = ", ".join(f"{p.name} {p.bytes / GB:.2f} GB" for p in parts)
    return (
        f"out of memory in the {tried.stage} of the smallest micro-batch, one record of {tried.tokens:,} tokens "
        f"({takes}); {_remedy(trainer, made.job)}. The device said: {tried.error}"
    )


def _remedy(trainer: Trainer, job: Job) -> str:
    """The one setting to change next."""
    if not job.checkpointing:
        return "set gradient_checkpointing: true"
    if trainer.policy.host_inputs is None:
        return "set offload_activations: true"
    limit = "max_completion_length" if job.samples else "max_length"
    return f"halve {limit} (now {getattr(trainer.args, limit, job.length)}), or train an adapter on a 4-bit base"
