"""``rlhf-fast plan``: what a run needs in memory, part by part, and which settings make it fit, before anything is loaded."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_fast.commands import Parser
from rlhf_fast.errors import UserError

if TYPE_CHECKING:
    from rlhf_fast.run.memory import Job, Plan

# option -> field of a job
FIELDS = {
    "length": "length",
    "prompt_length": "prompt_length",
    "full": "full",
    "base": "base",
    "lora_r": "lora_r",
    "lora_target_modules": "lora_targets",
    "optim": "optimizer",
    "kernels": "kernels",
    "micro_batch_tokens": "micro_batch_tokens",
    "gradient_checkpointing": "checkpointing",
    "offload_activations": "offload",
    "rollout_batch_size": "rollout_batch_size",
    "num_generations": "num_generations",
}


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)

    from rlhf_fast.run import memory

    job, settled = _job(args)
    free = [field for field in memory.FREE if field not in settled]
    plans = {name: memory.choose(job, memory.gpu_bytes(name), free=free) for name in args.gpu}
    if args.json:
        print(json.dumps({name: memory.as_dict(made) for name, made in plans.items()}, indent=2))
    elif len(plans) == 1:
        _show(next(iter(plans.values())), next(iter(plans)))
    else:
        _compare(plans)
    return 0 if all(made.fits for made in plans.values()) else 1


def _parse(argv: Sequence[str]) -> Namespace:
    from rlhf_fast.run.memory import METHODS, SIZES

    parser = Parser(
        "plan",
        "Print what a run needs in memory, part by part, and the settings that make it fit; nothing is loaded. With one "
        "--gpu every part, with several a line for each. A run folder's adapter, base and optimizer are its own, a "
        "--config's settings those of its run; options win over both. Exits with 1 when something does not fit.",
        argument_default=None,
    )
    add = parser.add_argument
    add("--model", help="a model or run folder, or a name, as Qwen2.5-7B; needed unless the --config names it")
    add("--config", metavar="FILE", help="a recipe's name or a YAML file, as the trainers take it")
    add("--method", choices=METHODS, help="algorithm; that of the --config, or sft")
    add("--length", type=_count, help="tokens of the longest sequence, prompt included; 2048 when nothing says")
    add("--prompt_length", type=_count, help="tokens of its prompt, when sampling; a quarter when nothing says")
    add("--gpu", nargs="+", default=[str(size) for size in SIZES], help="sizes in GB, or names as rtx4090, h100")
    add("--full", type=_switch, nargs="?", const=True, help="train all weights rather than a LoRA adapter")
    add("--base", choices=("bf16", "nf4"), help="frozen weights; the plan chooses when nothing says")
    add("--lora_r", type=_count, help="rank of the adapters; 16 when nothing says")
    add("--lora_target_modules", nargs="+", metavar="NAME", help="layers with an adapter, lm_head too; or all-linear")
    add("--optim", choices=("adamw", "adamw_8bit", "paged_adamw_8bit"), help="8 or 2 bytes a weight; adamw")
    add("--kernels", choices=("fused", "peft"), help="whose layers run; fused when nothing says")
    add("--beta", type=float, help="of GRPO: above 0 it needs a reference; that of the --config, or 0")
    add("--micro_batch_tokens", type=_count, help="fixed; the plan chooses when nothing says")
    add("--gradient_checkpointing", type=_switch, help="true or false; the plan chooses when nothing says")
    add("--offload_activations", type=_switch, help="true or false; the plan chooses when nothing says")
    add("--rollout_batch_size", type=_count, help="most sequences sampled at a time; 128 when nothing says")
    add("--num_generations", type=_count, help="of which so many share a prompt, in GRPO; 8 when nothing says")
    add("--json", action="store_true", default=False, help="print JSON, in bytes")
    return parser.parse_args(argv)


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise ArgumentTypeError(f"{word!r} is not a whole number of at least 1")
    return int(word)


def _switch(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise ArgumentTypeError(f"{word!r} is neither true nor false")
    return word.lower() == "true"


def _job(args: Namespace) -> tuple[Job, set[str]]:
    """The job, and the names of its fields that options, config or run settle: options first, then as they come."""
    from rlhf_fast.run.memory import REFERENCED, Job, find_shape, sources

    flags = {field: value for option, field in FIELDS.items() if (value := getattr(args, option)) is not None}
    if isinstance(targets := flags.get("lora_targets"), list):
        flags["lora_targets"] = targets[0] if len(targets) == 1 else tuple(targets)
    if flags.get("full") and flags.get("base") == "nf4":
        raise UserError("--full trains all weights, and a 4-bit base is frozen: leave one of --full and --base nf4 out")
    if flags.get("base") == "nf4":
        flags["full"] = False
    method, config = _config(args) if args.config else (args.method or "sft", None)
    if method == "grpo" and config and args.beta is not None:
        config = replace(config, beta=args.beta)
    model = args.model or (config and config.model_name_or_path)
    if not model:
        raise UserError("say which model: --model NAME or FOLDER, or model_name_or_path in the --config file")
    # a length that is given makes that of the config's prompts irrelevant
    settings = {} if config is None else sources.of_settings(method, config, "length" in flags)
    fields = {**sources.combine(sources.of_run(model), settings), **flags, "method": method}
    if fields.get("full") and fields.get("base") == "nf4":  # a run's, of which --full takes the model alone
        del fields["base"]
    if config is None:
        needed = method in REFERENCED or (method == "grpo" and bool(args.beta))
    else:
        needed = config.needs_reference
    reference = sources.has_reference(needed, model, fields.get("full", False))
    job = Job(shape=find_shape(model), reference=reference, **fields)
    if config is not None:
        job = replace(job, window_tokens=sources.window_tokens(config, job.unit))
    _check(job)
    return job, set(fields)


def _config(args: Namespace) -> tuple[str, Any]:
    """The method that ``--config`` is for, and its trainer's config; reads the trainer, which takes a few seconds."""
    from rlhf_fast.cli import trainer_of
    from rlhf_fast.run.config import parse_config
    from rlhf_fast.run.memory import METHODS

    begun = [method for method in METHODS if f"{Path(args.config).stem}-".startswith(f"{method}-")]
    method = args.method or (begun[0] if begun else None)
    if method is None:
        raise UserError(f"--config {args.config}: its name does not begin with a method; add --method METHOD")
    return method, parse_config(trainer_of(method)[0], ["--config", args.config])


def _check(job: Job) -> None:
    """Raise UserError for sizes and names that do not go together."""
    if job.prompt_length is not None and job.prompt_length > job.length:
        raise UserError(f"--prompt_length {job.prompt_length} exceeds --length {job.length}, which includes it")
    if not job.full and not job.shape.adapted(job.lora_targets):
        names = ", ".join(dict.fromkeys(x.name.rpartition(".")[2] for x in job.shape.linears))
        wanted = job.lora_targets if isinstance(job.lora_targets, str) else ", ".join(job.lora_targets)
        raise UserError(
            f"lora_target_modules {wanted} matches no layer of {job.shape.name}; two or more names of {names}, lm_head, "
            "one pattern such as '.*v_proj', or all-linear"
        )


def _show(made: Plan, gpu: str) -> None:
    """Every part of one plan."""
    from rlhf_fast.run.memory import GB
    from rlhf_fast.run.metrics import print_table

    job, peaks = made.job, made.peaks
    worst = max(peaks, key=peaks.get)
    what = "all weights" if job.full else f"LoRA r {job.lora_r} on {job.base}"
    print_table(
        f"{job.method} of {job.shape.name}, {what}, {job.length:,} tokens",
        [(p.name, f"{p.bytes / GB:.2f}", WHEN[p.when]) for p in made.parts],
        ("part", "GB", "there"),
    )
    rows = [(name, f"{value / GB:.2f}") for name, value in peaks.items()]
    rows += [("with what tensors do not account for", f"{made.needed / GB:.2f}")]
    print_table(f"peak: in the {worst}", rows, ("moment", "GB"))
    _verdict(made, gpu)


WHEN = {
    "always": "always",
    "gradients": "after a backward pass",
    "inputs": "to its layer's backward",
    "update": "forward and backward",
    "head": "loss",
    "layer": "backward of a layer",
    "prefill": "rollout: prompts",
    "decode": "rollout: tokens",
    "vllm": "rollout: outside",
    "outside": "outside",
    "host": "pinned host memory",
}


def _verdict(made: Plan, gpu: str) -> None:
    from rlhf_fast.run.memory import GB, head_rows

    room = f"{made.needed / GB:.1f} of {made.available / GB:.1f} GB"
    room += f", and {made.host / GB:.1f} GB of host memory" if made.host else ""
    print(f"\n{'fits' if made.fits else 'does NOT fit'} on --gpu {gpu}: {room}")
    if made.fits:
        print("settings:")
        for key, value in settings(made).items():
            print(f"  {key}: {str(value).lower() if isinstance(value, bool) else value}")
        print(f"logits exist for {head_rows(made.job.tokens, made.job.shape.vocab):,} tokens at a time")
    for change in made.changes:
        print(f"  it would with: {change}")


def settings(made: Plan) -> dict[str, bool | int]:
    """What a config file would say."""
    first = {} if made.job.full else {"use_peft": True, "load_in_4bit": made.job.base == "nf4"}
    return first | made.settings


def _compare(plans: dict[str, Plan]) -> None:
    """A line for each GPU."""
    from rlhf_fast.run.memory import GB
    from rlhf_fast.run.metrics import print_table

    job = next(iter(plans.values())).job
    rows = []
    for name, made in plans.items():
        j = made.job
        row = [name, f"{made.needed / GB:.1f}", "yes" if made.fits else "NO", "full" if j.full else j.base]
        row += [f"{j.tokens:,}", "yes" if j.checkpointing else "no", "yes" if j.offload else "no"]
        rows.append([*row, *([str(j.rollout_batch_size)] if j.writes else [])])
    header = ["GPU", "GB", "fits", "base", "tokens", "recompute", "offload", *["sampled"] * job.writes]
    print_table(f"{job.method} of {job.shape.name}, {job.length:,} tokens", rows, header)
    for name, made in plans.items():
        for change in made.changes:
            print(f"--gpu {name} would do with: {change}")
    print("\ntokens of a micro-batch at most; --gpu with one of them shows every part")
