"""``rlhf-fast plan``: what a run needs in memory, part by part, and which settings make it fit, before anything is loaded."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_fast.commands import Parser
from rlhf_fast.errors import UserError

if TYPE_CHECKING:
    from rlhf_fast.run.memory import Job, Plan

GPUS = ("24", "48", "80", "141")
# settings that the plan chooses unless they are given: option -> field of a job
CHOSEN = {
    "base": "base",
    "gradient_checkpointing": "checkpointing",
    "offload_activations": "offload",
    "micro_batch_tokens": "micro_batch_tokens",
}


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)

    from rlhf_fast.run import memory

    job = _job(args)
    free = [field for option, field in CHOSEN.items() if getattr(args, option) is None]
    plans = {name: memory.choose(job, memory.gpu_bytes(name), free=free) for name in args.gpu}
    if args.json:
        print(json.dumps({name: memory.as_dict(made) for name, made in plans.items()}, indent=2))
    elif len(plans) == 1:
        _show(next(iter(plans.values())), next(iter(plans)))
    else:
        _compare(plans)
    return 0 if all(made.fits for made in plans.values()) else 1


def _parse(argv: Sequence[str]) -> Namespace:
    parser = Parser(
        "plan",
        "Print what a run needs in memory, part by part, and the settings that make it fit; nothing is loaded. With one "
        "--gpu every part, with several a line for each. Exits with 1 when something does not fit.",
    )
    parser.add_argument(
        "--model", required=True, help="a model or run folder, or a name, as Qwen2.5-7B or Llama-3.1-8B"
    )
    parser.add_argument("--method", default="sft", choices=("sft", "reward", "dpo", "ppo", "grpo"), help="algorithm")
    parser.add_argument("--length", type=_count, default=2048, help="tokens of the longest sequence, prompt included")
    parser.add_argument(
        "--prompt_length", type=_count, help="tokens of its prompt, when sampling; a quarter by default"
    )
    parser.add_argument("--gpu", nargs="+", default=GPUS, help="sizes in GB, or names as rtx4090, h100")
    parser.add_argument("--full", action="store_true", help="train all weights rather than a LoRA adapter")
    parser.add_argument("--base", choices=("bf16", "nf4"), help="frozen weights; the plan chooses when not given")
    parser.add_argument("--lora_r", type=_count, default=16, help="rank of the adapters")
    parser.add_argument("--optim", default="adamw", choices=("adamw", "adamw_8bit"), help="8 or 2 bytes per weight")
    parser.add_argument("--kernels", default="fused", choices=("fused", "peft"), help="whose layers run")
    parser.add_argument("--micro_batch_tokens", type=_count, help="fixed; the plan chooses when not given")
    parser.add_argument("--gradient_checkpointing", type=_switch, help="true or false; the plan chooses when not given")
    parser.add_argument("--offload_activations", type=_switch, help="true or false; the plan chooses when not given")
    parser.add_argument("--rollout_batch_size", type=_count, default=128, help="most sequences sampled at a time")
    parser.add_argument("--num_generations", type=_count, default=8, help="of which so many share a prompt, in GRPO")
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes")
    return parser.parse_args(argv)


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise ArgumentTypeError(f"{word!r} is not a whole number of at least 1")
    return int(word)


def _switch(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise ArgumentTypeError(f"{word!r} is neither true nor false")
    return word.lower() == "true"


def _job(args: Namespace) -> Job:
    from rlhf_fast.run.memory import Job, find_shape

    if args.full and args.base == "nf4":
        raise UserError("--full trains all weights, and a 4-bit base is frozen: leave one of --full and --base nf4 out")
    if args.prompt_length is not None and args.prompt_length > args.length:
        raise UserError(f"--prompt_length {args.prompt_length} exceeds --length {args.length}, which includes it")
    given = {field: getattr(args, option) for option, field in CHOSEN.items() if getattr(args, option) is not None}
    return Job(
        shape=find_shape(args.model),
        method=args.method,
        length=args.length,
        prompt_length=args.prompt_length,
        full=args.full,
        lora_r=args.lora_r,
        optimizer=args.optim,
        kernels=args.kernels,
        rollout_batch_size=args.rollout_batch_size,
        num_generations=args.num_generations,
        **given,
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
    "inputs": "until its layer's backward",
    "update": "forward and backward",
    "head": "loss",
    "layer": "backward of a layer",
    "prefill": "rollout: prompts",
    "decode": "rollout: tokens",
    "outside": "outside",
    "host": "pinned host memory",
}


def _verdict(made: Plan, gpu: str) -> None:
    from rlhf_fast.run.memory import GB, head_rows

    room = f"{made.needed / GB:.1f} of {made.available / GB:.1f} GB"
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
        row = [
            name,
            f"{made.needed / GB:.1f}" + ("" if made.fits else ", too much"),
            "all weights" if j.full else j.base,
        ]
        row += [f"{j.tokens:,}", "yes" if j.checkpointing else "no", "yes" if j.offload else "no"]
        rows.append([*row, *([str(j.rollout_batch_size)] if j.samples else [])])
    header = [
        "GPU",
        "GB needed",
        "base",
        "micro_batch_tokens",
        "checkpointing",
        "offload",
        *["sampled at a time"] * job.samples,
    ]
    print_table(f"{job.method} of {job.shape.name}, {job.length:,} tokens", rows, header)
    for name, made in plans.items():
        for change in made.changes:
            print(f"--gpu {name} would do with: {change}")
    print("\n--gpu with one of them shows every part")
