"""Whether a run fits, and which settings make it fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_fast.errors import UserError

from .activations import saved_per_token
from .job import GB, Job, Part
from .parts import OPTIMIZER_BYTES, passes, resident, rollout, rollout_peak

CONTEXT_BYTES = 600_000_000  # CUDA context, cuBLAS workspaces, loaded kernels
SLACK = 0.04  # of the peak: rounding and fragments in the caching allocator
SEQUENCES = (32, 8)  # sampled at a time: what a plan wants, and what it takes; fewer leave a GPU idle
SIZES = (24, 48, 80, 141)  # GB of the GPUs that a plan compares
# GiB that torch reports, less than on the box: error correction and the driver take their part
GPUS = {
    "rtx3090": 23.6,
    "rtx4090": 23.5,
    "a100-40": 39.4,
    "l40s": 44.4,
    "a6000": 47.4,
    "a100": 79.1,
    "h100": 79.1,
    "h200": 139.8,
}


def gpu_bytes(name: str) -> int:
    """Bytes of a GPU by name, or of a size: ``24`` is 24 * 10^9, what a 24 GB card surely has.

    Raises:
        UserError: neither.
    """
    word = name.lower().removesuffix("gb").strip()
    if word in GPUS:
        return int(GPUS[word] * 2**30)
    try:
        size = float(word)
    except ValueError:
        size = 0.0
    if not 0 < size < math.inf:
        raise UserError(f"--gpu {name}: give a size in GB, as 24, or one of {', '.join(GPUS)}")
    return int(size * GB)


@dataclass(frozen=True)
class Plan:
    """A job with its settings, what it needs and whether that is there."""

    job: Job
    parts: tuple[Part, ...]
    available: int | None  # bytes of the device; None: nobody asked
    rank: int = 0  # which of the attempts it is: 0 asks the least of the user
    changes: tuple[str, ...] = ()  # what would make it fit, one line each

    def total(self, *whens: str) -> float:
        return sum(p.bytes for p in self.parts if p.when in whens)

    @property
    def peaks(self) -> dict[str, float]:
        """Bytes of tensors at the moments that can be the worst."""
        always, update, layer = self.total("always"), self.total("update"), self.total("layer")
        gradients = self.total("gradients")
        begun = always + update + self.total("inputs") + (0 if self.job.one_micro_batch else gradients)
        return {
            "backward of the last layer": begun + layer,
            "backward of the first layer": always + gradients + update + layer,
            "loss": begun + self.total("head"),
            **({"prompts of a rollout": always + self.total("prefill")} if self.job.writes else {}),
            **({"tokens of a rollout": always + self.total("decode")} if self.job.writes else {}),
        }

    @property
    def tensors(self) -> float:
        """Peak bytes of tensors, what ``torch.cuda.max_memory_allocated`` measures."""
        return max(self.peaks.values())

    @property
    def needed(self) -> float:
        """With what tensors do not account for; a vLLM that sleeps through updates meets the weights alone."""
        return max(self.tensors, self.total("always", "vllm")) + self.total("outside")

    @property
    def host(self) -> float:
        """Bytes of pinned host memory."""
        return self.total("host")

    @property
    def fits(self) -> bool:
        return self.available is None or self.needed <= self.available

    @property
    def settings(self) -> dict[str, Any]:
        """What a config would say."""
        chosen = {
            "micro_batch_tokens": self.job.tokens,
            "gradient_checkpointing": self.job.checkpointing,
            "offload_activations": self.job.offload,
        }
        return chosen | ({"rollout_batch_size": self.job.rollout_batch_size} if self.job.writes else {})

    def line(self) -> str:
        """The plan in one line."""
        chosen = ", ".join(f"{k} {_word(v)}" for k, v in self.settings.items())
        of = "" if self.available is None else f" of {self.available / GB:.1f} GB"
        host = f", {self.host / GB:.1f} GB of host memory" if self.host else ""
        return f"memory: {self.tensors / GB:.1f} GB planned{of}: {chosen}{host}"


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:,}" if isinstance(value, int) else str(value)


def plan(
    job: Job, available: int | None = None, weights: Sequence[Part] | None = None, sequences: int = SEQUENCES[-1]
) -> Plan:
    """What ``job`` takes with exactly its settings.

    Args:
        available: bytes of the device. Sampling is then cut to what fits, but not below ``sequences`` at a time.
        weights: the "always" parts, counted on a real model; from the shape when None.
    """
    always = list(weights if weights is not None else resident(job))
    if job.writes and available is not None:
        taken = 0.0 if job.vllm_sleeps else job.vllm_share
        room = available * (1 - taken) / (1 + SLACK) - CONTEXT_BYTES - sum(p.bytes for p in always)
        group = 8 * job.num_generations  # prompts are shared: count whole groups
        most = int(room / (rollout_peak(rollout(job, group)) / group)) if room > 0 else 0
        least = min(sequences, job.rollout_batch_size)
        job = replace(job, rollout_batch_size=max(min(job.rollout_batch_size, most), least))
    parts = [*always, *passes(job, available), *(rollout(job, job.rollout_batch_size) if job.writes else [])]
    made = Plan(job, tuple(p for p in parts if p.bytes), available)
    if job.device == "cpu":
        return made
    outside = [Part("CUDA context", CONTEXT_BYTES, "outside"), Part("allocator slack", SLACK * made.tensors, "outside")]
    if available is not None and job.vllm_share:
        name, when = ("vLLM while it samples", "vllm") if job.vllm_sleeps else ("vLLM", "outside")
        outside.append(Part(name, job.vllm_share * available, when))
    return replace(made, parts=(*made.parts, *outside))


FREE = ("base", "checkpointing", "offload", "micro_batch_tokens")


def attempts(job: Job, free: Collection[str] = FREE) -> list[Job]:
    """``job`` with the settings in ``free`` varied, the fastest first; a setting that is not in ``free`` stays as it is."""
    big, small = (32768, 16384, 8192), (4096, 2048, 1024, 0)
    rows = [("bf16", False, False, n) for n in big[1:]]
    rows += [("bf16", True, False, n) for n in big]
    rows += [("nf4", False, False, 8192)]
    rows += [("nf4", True, False, n) for n in big[1:]]
    rows += [(base, True, True, 8192) for base in ("bf16", "nf4")]
    rows += [(base, True, offload, n) for offload in (False, True) for n in small for base in ("bf16", "nf4")]
    jobs = {}
    for row in rows:
        values = dict(zip(FREE, row))
        values["micro_batch_tokens"] = max(job.unit, values["micro_batch_tokens"])
        if job.full and values.pop("base") == "nf4":
            continue
        option = replace(job, **{name: value for name, value in values.items() if name in free})
        if option.checkpointing or not option.offload:
            jobs[option] = None
    return list(jobs)


def choose(job: Job, available: int, weights: Sequence[Part] | None = None, free: Collection[str] = FREE) -> Plan:
    """The first of :func:`attempts` that fits into ``available`` bytes; the thriftiest one, with advice, if none does."""
    options = attempts(job, free)
    wanted = SEQUENCES if job.writes else SEQUENCES[-1:]
    thriftiest = None
    for rank, (sequences, option) in enumerate(itertools.product(wanted, options)):
        made = replace(plan(option, available, weights, sequences), rank=rank)
        if made.fits:
            return made
        if thriftiest is None or made.needed < thriftiest.needed:
            thriftiest = made
    return replace(thriftiest, rank=len(wanted) * len(options), changes=tuple(_changes(job, available, weights, free)))


def _changes(job: Job, available: int, weights: Sequence[Part] | None, free: Collection[str]) -> Iterator[str]:
    """What to change about a job that does not fit, each line tried; with counted ``weights`` as long as they are true."""

    def best(opened: Collection[str] = FREE[1:], size: int = available, **values: Any) -> Plan:
        counted = _still_true(weights, job, values)
        options = [plan(o, size, counted) for o in attempts(replace(job, **values), {*free, *opened})]
        return min(options, key=lambda made: made.needed)

    if (made := best()).fits:
        yield "leave it to the plan: " + ", ".join(f"{k}: {_word(v)}" for k, v in made.settings.items())
        return
    # another base is another model, which nobody has counted
    source = "" if weights is None else " (weights by the config's sizes, not counted)"
    # of a fresh adapter the base is the reference
    fresh = {"full": False, "reference": False if job.full else job.reference}
    lora = "use_peft: true, " if job.full else ""
    if job.full and best(**fresh, base="bf16").fits:
        yield lora + "an adapter on frozen weights instead of training them all" + source
    elif job.base != "nf4" and "base" not in free and best(**fresh, base="nf4").fits:
        yield lora + "load_in_4bit: true, the frozen base in 4 bit" + source
    if job.optimizer == "adamw" and best(optimizer="adamw_8bit").fits:
        yield "optim: adamw_8bit, two bytes of optimizer state a weight instead of eight"
    if job.kernels != "fused" and best(kernels="fused").fits:
        yield "fused kernels: activations without PEFT's copies"
    length = job.length
    while length > 256:
        length //= 2
        if best(length=length, prompt_length=None).fits:
            yield f"sequences of at most {length:,} tokens"
            break
    size = next((size for size in SIZES if best(size=size * GB).fits), None)
    yield f"a GPU of {size} GB" if size else f"a smaller model: no GPU of up to {SIZES[-1]} GB holds this one"


def _still_true(weights: Sequence[Part] | None, job: Job, values: dict[str, Any]) -> Sequence[Part] | None:
    """The counted "always" parts of ``job`` with ``values`` changed, None where only the shape can tell."""
    if weights is None or values.keys() & {"full", "base"}:
        return None
    if "optimizer" not in values:
        return weights
    ratio = OPTIMIZER_BYTES[values["optimizer"]] / OPTIMIZER_BYTES[job.optimizer]
    return [p._replace(bytes=p.bytes * ratio) if p.name == f"{job.optimizer} state" else p for p in weights]


def as_dict(made: Plan) -> dict[str, Any]:
    """For ``--json``: plain values, bytes."""
    return {
        "model": made.job.shape.name,
        "method": made.job.method,
        "length": made.job.length,
        "base": made.job.base,
        "full": made.job.full,
        "lora_r": None if made.job.full else made.job.lora_r,
        "lora_target_modules": None if made.job.full else made.job.lora_targets,
        "optim": made.job.optimizer,
        "reference": made.job.reference,
        "kernels": made.job.kernels,
        "parameters": made.job.shape.parameters(),
        "parts": [{"name": p.name, "bytes": round(p.bytes), "when": p.when} for p in made.parts],
        "peaks": {name: round(value) for name, value in made.peaks.items()},
        "tensors": round(made.tensors),
        "needed": round(made.needed),
        "host": round(made.host),
        "available": made.available,
        "fits": made.fits,
        "settings": made.settings,
        "changes": list(made.changes),
        "saved_per_token_and_layer": {k: round(v) for k, v in saved_per_token(made.job).items()},
    }
