"""``rlhf-fast export``: a run's model as a plain Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rlhf_fast.commands import Parser
from rlhf_fast.errors import UserError


def main(argv: Sequence[str]) -> int:
    parser = Parser("export", "Write the model of a run as a plain Hugging Face folder that any library loads.")
    parser.add_argument("run", metavar="RUN", help="run folder, or any model folder")
    parser.add_argument(
        "-o", "--output", metavar="DIR", help="folder to write, new or empty; RUN-merged when not given"
    )
    parser.add_argument("--merge", action="store_true", help="fold the adapter into the base's weights")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the merged weights; auto is the base's. Merge a bfloat16 base in float32 to lose nothing of the adapter",
    )
    args = parser.parse_args(argv)
    run = Path(args.run)
    output = Path(args.output) if args.output else run.with_name(f"{run.resolve().name}-merged")
    _check(run, output)

    import torch

    from rlhf_fast.models import load
    from rlhf_fast.models.adapters import is_4bit

    name = _stored_dtype(run) if args.dtype == "auto" else args.dtype
    policy = load(run, dtype=getattr(torch, name), device="cpu")
    adapter = bool(policy.adapters.names)
    if adapter and not args.merge:
        policy.save(output)
        print(f"wrote the adapter of {run} to {output}; with --merge it is folded into its base")
        return 0
    policy.export(output)
    if is_4bit(policy.model):
        print(f"the base is in 4 bit: dequantized to {name} and merged there, never quantized again")
    size = sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
    print(f"wrote {output}: {'adapter merged, ' if adapter else ''}{name}, {size / 1e6:,.1f} MB")
    print(f"next: rlhf-fast generate {output}, or transformers.AutoModelForCausalLM.from_pretrained({str(output)!r})")
    return 0


def _check(run: Path, output: Path) -> None:
    if not run.is_dir():
        raise UserError(f"{run} is not a folder; give the output_dir of a run")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not an empty folder; choose another with -o")


def _stored_dtype(run: Path) -> str:
    """The dtype in which the (base) model's weights are stored."""
    from transformers import AutoConfig

    from rlhf_fast.models.adapters import adapter_base

    base = adapter_base(run) if (run / "adapter_config.json").is_file() else str(run)
    try:
        dtype = AutoConfig.from_pretrained(base).dtype
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise UserError(f"{run} holds no model that can be exported: {str(error).splitlines()[0]}") from error
    return str(dtype or "float32").removeprefix("torch.")
