"""``rlhf-fast generate``: a model's responses to prompts, from a file to a file, or typed in."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_fast.commands import Parser
from rlhf_fast.errors import UserError

if TYPE_CHECKING:
    from rlhf_fast.data.batch import Prompt
    from rlhf_fast.models import Policy
    from rlhf_fast.rollout import GenerateEngine, Request, Sample, SlotEngine


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        "generate",
        "Responses of a model to prompts: JSONL to JSONL (an interrupted run goes on where it stopped), or to the terminal. "
        "Without --prompts and --prompt, prompts are read line by line.",
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face name, model folder or run folder")
    parser.add_argument(
        "--prompts", metavar="FILE", help="rows with a `prompt`, `messages`, or `question` and `answer`"
    )
    parser.add_argument("--prompt", metavar="TEXT", action="append", help="one prompt; may be given several times")
    parser.add_argument("--chat", action="store_true", help="put a prompt that is plain text as the user's message")
    parser.add_argument(
        "-o", "--output", metavar="OUT.jsonl", help="one line per response; the terminal when not given"
    )
    parser.add_argument("--restart", action="store_true", help="begin OUT.jsonl anew, whatever it holds")
    parser.add_argument("--n", type=int, default=1, help="responses per prompt")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    add_model_options(parser)
    add_sampling_options(parser)
    args = parser.parse_args(argv)
    check_counts("generate", args)
    if args.prompts and args.prompt:
        raise UserError("generate: give --prompts or --prompt, not both")
    if args.output and not args.prompts:
        raise UserError("generate: -o needs --prompts FILE; responses to a single prompt go to the terminal")
    if args.n > 1 and args.temperature == 0:
        raise UserError(
            f"generate: {args.n} greedy responses to a prompt are all the same; set --temperature, or --n 1"
        )

    policy = load_policy(args)
    if args.prompts and args.output:
        return file_to_file(policy, args)
    if args.prompts:
        groups: Iterator[list[Prompt]] = _blocks(_prompts(policy, args.prompts, args), args)
    else:
        texts = args.prompt or _typed()
        groups = (_prompts(policy, [{"prompt": text}], args, quiet=True) for text in texts)
    engine, start = _engine(policy, args, None), 0
    for prompts in groups:
        for row in _responses(engine, prompts, args, start):
            print(json.dumps(row, ensure_ascii=False, default=str) if args.prompts else row["completion"], flush=True)
        start += len(prompts)
    return 0


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How to load the model."""
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="of the weights"
    )
    parser.add_argument(
        "--load_in_4bit", action="store_true", default=None, help="hold the base in NF4; a run trained so always is"
    )
    parser.add_argument("--device", help="such as cuda:1 or cpu; the first GPU if there is one when not given")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How to continue a prompt."""
    parser.add_argument("--max_new_tokens", type=int, default=256, help="most tokens of a response")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="sample from the likeliest tokens with this probability"
    )
    parser.add_argument("--top_k", type=int, default=0, help="sample from this many likeliest tokens; 0 is all")
    parser.add_argument(
        "--min_p", type=float, default=0.0, help="only tokens at least this share as likely as the likeliest; 0 is all"
    )
    parser.add_argument(
        "--repetition_penalty", type=float, default=1.0, help="divides the logits of tokens already there; 1 is off"
    )
    parser.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="strings that end a response")
    parser.add_argument("--stop_ids", nargs="+", type=int, default=[], metavar="ID", help="tokens that end a response")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--batch_size", type=int, default=128, help="responses written at once")
    parser.add_argument(
        "--cache_tokens", type=int, help="most tokens, prompts included, held at once; what is free when not given"
    )


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """What ``add_sampling_options`` asked for, as the fields of a ``Request``; seed and batch size apart."""
    names = ("max_new_tokens", "top_p", "top_k", "min_p", "repetition_penalty")
    lists = {"stop": tuple(args.stop), "stop_ids": tuple(args.stop_ids)}
    return {name: getattr(args, name) for name in names} | lists


def load_policy(args: argparse.Namespace) -> Policy:
    """The model that the options name.

    Raises:
        UserError: it cannot be loaded, or it is a reward model.
    """
    import torch
    from transformers.utils import logging

    from rlhf_fast.models import load

    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # noise in a log file
    try:
        policy = load(
            args.model,
            dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
            device=args.device,
            load_in_4bit=args.load_in_4bit,
        )
    except (RuntimeError, AssertionError) as error:  # torch's words for a device that does not exist
        if args.device is None:
            raise
        raise UserError(f"--device {args.device}: {str(error).splitlines()[0]}") from error
    if policy.role != "policy":
        raise UserError(f"{args.model} is a {policy.role} model, which scores responses and writes none")
    return policy


def cache_tokens(policy: Policy, args: argparse.Namespace, slots: int, longest: int | None) -> tuple[int | None, str]:
    """Most tokens whose keys and values may be held: ``--cache_tokens``, or what memory allows now, and a line that says so."""
    from rlhf_fast.rollout.budget import default_budget
    from rlhf_fast.rollout.slots import PREFILL_TOKENS, slot_refusal

    if args.cache_tokens is not None or slot_refusal(policy, policy.role, longest):
        return args.cache_tokens, ""
    budget = default_budget(policy, slots, PREFILL_TOKENS)
    return (None, "") if budget is None else (budget.tokens, f"memory: {budget}; --cache_tokens says otherwise\n")


def progress_bar(total: int, what: str) -> Any:
    """A rich progress bar on stderr, as a context manager, with one task."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("eta"))
    progress = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    progress.add_task(what, total=total)
    return progress


def file_to_file(
    policy: Policy, args: argparse.Namespace, heard: Callable[[list[dict[str, Any]]], None] | None = None
) -> int:
    """Append the responses to the output block by block, so that little is lost when the run is stopped.

    ``heard`` is told the rows that the output holds already, then those of each block once they are there.
    """
    from rlhf_fast.commands.responses import about_run, begin_or_resume

    prompts = _prompts(policy, args.prompts, args)
    output = Path(args.output)
    sampling = {"n": args.n, "temperature": args.temperature, "seed": args.seed, **sampling_options(args)}
    done = begin_or_resume(output, prompts, args.n, about_run(policy, prompts, sampling), args.restart)
    if done:
        print(f"{output} already holds the responses to {done} of {len(prompts)} prompts: going on", file=sys.stderr)
    if done and heard is not None:
        heard([json.loads(line) for line in output.read_text(encoding="utf-8").split("\n") if line])
    bar = progress_bar(len(prompts) * args.n, "responses")
    task, written = bar.task_ids[0], done * args.n
    # the engine counts from 0 in every block
    engine = _engine(policy, args, prompts, lambda count: bar.update(task, completed=written + count))
    with output.open("a", encoding="utf-8") as file, bar:
        bar.update(task, completed=written)
        for block in _blocks(prompts[done:], args):
            rows = _responses(engine, block, args, written // args.n)
            file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
            file.flush()
            written += len(rows)
            if heard is not None:
                heard(rows)
    print(f"{written} responses in {output}", file=sys.stderr)
    return 0


def check_counts(command: str, args: argparse.Namespace) -> None:
    """Raise UserError for a number of responses or a batch of none, before a model is loaded."""
    for name in ("n", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"{command}: --{name} must be at least 1, got {getattr(args, name)}")


def _prompts(policy: Policy, source: Any, args: argparse.Namespace, quiet: bool = False) -> list[Prompt]:
    from rlhf_fast.data import load_records, normalise, prepare_prompts
    from rlhf_fast.rollout import context_length, end_of_sequence_ids

    records = normalise(load_records(source), "prompts")
    if args.chat:
        for row in records:
            if isinstance(row["prompt"], str):
                row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    context = context_length(policy.model)
    prompts, report = prepare_prompts(
        records,
        policy.tokenizer,
        max_prompt_length=None if context is None else context - 1,
        allow_truncation=True,
        stop_ids=end_of_sequence_ids(policy.model, policy.tokenizer),
        name="prompts",
    )
    if not quiet:
        print(report, file=sys.stderr)
    return prompts


def _typed() -> Iterator[str]:
    """Lines typed at the terminal or piped in."""
    while True:
        try:
            line = input("prompt> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def _engine(
    policy: Policy, args: argparse.Namespace, prompts: Sequence[Prompt] | None, progress: Any = None
) -> SlotEngine | GenerateEngine:
    """The engine for these ``prompts``, None where they are not known yet."""
    from rlhf_fast.rollout import engine_for

    longest = None if not prompts else max(len(p.input_ids) for p in prompts) + args.max_new_tokens
    most, said = cache_tokens(policy, args, args.batch_size, longest)
    sys.stderr.write(said)
    return engine_for(policy, slots=args.batch_size, max_tokens=most, progress=progress, longest=longest)


def _blocks(prompts: list[Prompt], args: argparse.Namespace) -> Iterator[list[Prompt]]:
    """Prompts for about four times the responses written at once, so that few slots are ever empty."""
    size = max(1, 4 * args.batch_size // args.n)
    return (prompts[i : i + size] for i in range(0, len(prompts), size))


def _responses(
    engine: SlotEngine | GenerateEngine, prompts: Sequence[Prompt], args: argparse.Namespace, start: int
) -> list[dict[str, Any]]:
    """One row per response. ``start`` prompts came before these: every prompt has random numbers of its own."""
    from rlhf_fast.rollout import decode

    groups = engine.generate(_requests([prompt.input_ids for prompt in prompts], args, start))
    rows = []
    for prompt, samples in zip(prompts, groups):
        texts = decode(samples, engine.tokenizer)
        rows += [_row(prompt, text, sample) for text, sample in zip(texts, samples)]
    return rows


def _requests(prompt_ids: Sequence[Sequence[int]], args: argparse.Namespace, start: int) -> list[Request]:
    from rlhf_fast.rollout import Request

    options = {"n": args.n, "temperature": args.temperature, **sampling_options(args)}
    seed = args.seed * 2**32 + start
    return [Request(ids, seed=seed + i, **options) for i, ids in enumerate(prompt_ids)]


def _row(prompt: Prompt, text: str, sample: Sample) -> dict[str, Any]:
    shape = {"finish_reason": sample.finish_reason, "tokens": len(sample.ids)}
    return {**prompt.columns, "prompt": prompt.prompt, "completion": text, **shape}
