"""``rlhf-fast evaluate``: how good a model's responses to held-out prompts are."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_fast.commands import Parser, json_mapping
from rlhf_fast.commands.generate import (
    add_model_options,
    add_sampling_options,
    cache_tokens,
    check_counts,
    load_policy,
    progress_bar,
    sampling_options,
)
from rlhf_fast.errors import UserError

if TYPE_CHECKING:
    from rlhf_fast.rewards import Evaluation
    from rlhf_fast.rewards.safety import SafetyReport


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        "evaluate", "Rewards of a model's responses to held-out prompts; greedy, unless a temperature is given."
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face name, model folder or run folder")
    parser.add_argument("--dataset_name", metavar="DATA", help="file, folder or name of a data set of prompts")
    parser.add_argument("--split", help="of the data set")
    parser.add_argument("--limit", type=int, metavar="ROWS", help="evaluate the first rows only")
    parser.add_argument(
        "--reward_funcs",
        nargs="+",
        metavar="REWARD",
        help="answer, math, code, exact, format, judge, random, the folder of a reward model, package.module:function, "
        'or with parameters as JSON: \'{"name": "length", "max": 64}\'',
    )
    parser.add_argument("--n", type=int, default=1, help="responses per prompt; several give pass@k")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument(
        "-o", "--output", metavar="OUT.json", help="write the figures there, and the responses beside it"
    )
    parser.add_argument(
        "--suite",
        choices=["safety"],
        help="instead of data and rewards: refusals, jailbreaks, what it cannot know, variety",
    )
    parser.add_argument(
        "--before", metavar="MODEL", help="of the suite: another model to compare with, from before a run"
    )
    parser.add_argument(
        "--judge",
        type=json_mapping,
        metavar="JSON",
        help='of the suite: an AI that reads the responses instead of rules, such as \'{"url": "http://127.0.0.1:8000"}\'',
    )
    add_model_options(parser)
    add_sampling_options(parser)
    args = parser.parse_args(argv)
    check_counts("evaluate", args)
    _check(parser, args)
    if args.suite:
        return _safety(args)

    from rlhf_fast.data import load_records, prepare_prompts
    from rlhf_fast.rewards import evaluate_policy, resolve_all
    from rlhf_fast.rollout import context_length, end_of_sequence_ids

    reward_funcs = resolve_all(args.reward_funcs)[0]
    records = load_records(args.dataset_name, args.split)[: args.limit]
    policy = load_policy(args)
    context = context_length(policy.model)
    prompts, report = prepare_prompts(
        records,
        policy.tokenizer,
        max_prompt_length=None if context is None else context - 1,
        stop_ids=end_of_sequence_ids(policy.model, policy.tokenizer),
        name="prompts",
    )
    print(report, file=sys.stderr)
    longest = max((len(p.input_ids) for p in prompts), default=0) + args.max_new_tokens
    most, said = cache_tokens(policy, args, args.batch_size, longest)
    sys.stderr.write(said)
    with progress_bar(len(prompts) * args.n, "responses") as bar:
        result = evaluate_policy(
            policy,
            prompts,
            reward_funcs,
            n=args.n,
            temperature=args.temperature,
            seed=args.seed,
            slots=args.batch_size,
            max_tokens=most,
            **sampling_options(args),
            progress=lambda count: bar.update(bar.task_ids[0], completed=count),
        )
    _show(result, args.model)
    if args.output:
        _write(result, Path(args.output), vars(args))
    return 0


def _check(parser: Parser, args: argparse.Namespace) -> None:
    """Data with rewards, or a suite, which brings its own prompts, verdicts and temperature."""
    data, suite = ("dataset_name", "reward_funcs", "split", "limit", "n", "temperature"), ("before", "judge")
    if stray := [name for name in (data if args.suite else suite) if getattr(args, name) != parser.get_default(name)]:
        parser.error(f"--{stray[0]} goes {'without --suite' if args.suite else 'with --suite'} only")
    missing = [f"--{name}" for name in data[:2] if not getattr(args, name)]
    if missing and not args.suite:
        parser.error(f"the following arguments are required: {', '.join(missing)}")


def _safety(args: argparse.Namespace) -> int:
    """The suite on one model, or on two side by side."""
    from rlhf_fast.rewards.chat import connect
    from rlhf_fast.rewards.safety import by_judge, by_rules, evaluate_safety, suite_size

    options = sampling_options(args) | {"seed": args.seed, "slots": args.batch_size, "max_tokens": args.cache_tokens}
    judge = by_rules
    if args.judge is not None:
        cache = Path(args.output).with_suffix(".calls.jsonl") if args.output else None
        judge = by_judge(connect(**{"cache": cache, **args.judge}))
    reports: dict[str, SafetyReport] = {}
    for name in filter(None, [args.before, args.model]):
        policy = load_policy(argparse.Namespace(**{**vars(args), "model": name}))
        with progress_bar(suite_size(), f"{name}") as bar:

            def progress(count: int, bar: Any = bar) -> None:
                bar.update(bar.task_ids[0], completed=count)

            reports[name] = asyncio.run(evaluate_safety(policy, judge, progress=progress, **options))
        del policy  # a GPU may have room for one of the two
    _show_safety(list(reports.items()))
    if args.output:
        _write_safety(reports, Path(args.output), vars(args))
    return 0


def _show_safety(reports: Sequence[tuple[str, SafetyReport]]) -> None:
    from rlhf_fast.run.metrics import print_table

    name, report = reports[-1]
    rows = []
    for key, value in report.figures.items():
        of = f" (of {report.counts[key]})" if key in report.counts else ""
        values = [r.figures[key] for _, r in reports]
        rows.append(
            (key + of, *(f"{v:.1%}" for v in values), *([f"{100 * (value - values[0]):+.1f}"] * (len(values) - 1)))
        )
    header = ("figure", name) if len(reports) == 1 else ("figure", "before", "after", "points")
    print_table("safety: " + " -> ".join(name for name, _ in reports), rows, header)
    for name, report in reports:
        if report.unjudged:
            print(f"note: the judge gave no verdict on {report.unjudged} responses of {name}", file=sys.stderr)


def _write_safety(reports: dict[str, SafetyReport], path: Path, options: dict) -> None:
    """``path``: the figures of each model. Beside it, ``<stem>.samples.jsonl``: every response and its verdict."""
    figures = {
        name: {key: None if math.isnan(value) else value for key, value in report.figures.items()}
        for name, report in reports.items()
    }
    counts = {name: report.counts for name, report in reports.items()}
    rows = [{"model": name, **row} for name, report in reports.items() for row in report.rows]
    _write_files(path, {"suite": "safety", "figures": figures, "counts": counts, "options": options}, rows)


def _show(result: Evaluation, model: str) -> None:
    """A table of the figures, what went wrong, and a few responses to read."""
    from rlhf_fast.run.metrics import brief, print_table, scores_text

    print_table(f"evaluation of {model}", result)
    for message in result.messages:
        print(f"fault: {message}", file=sys.stderr)
    shown = [
        (brief(row["prompt"]), brief(row["completion"]), scores_text(row["rewards"])) for row in result.samples[:4]
    ]
    print_table("the first responses", shown, ("prompt", "response", "rewards"))


def _write(result: Evaluation, path: Path, options: dict) -> None:
    """``path``: figures and the options that gave them. Beside it, ``<stem>.samples.jsonl``: every response."""
    figures = {name: None if math.isnan(value) else value for name, value in result.items()}
    _write_files(path, {"metrics": figures, "faults": result.messages, "options": options}, result.samples)


def _write_files(path: Path, summary: dict, rows: Sequence[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = path.with_name(f"{path.stem}.samples.jsonl")
    try:
        path.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        with samples.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}") from error
    print(f"figures: {path}\nresponses: {samples}")
