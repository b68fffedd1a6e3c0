"""``rlhf-fast evaluate``: how good a model's responses to held-out prompts are."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_fast.commands import Parser
from rlhf_fast.commands.generate import (
    add_model_options,
    add_sampling_options,
    cache_tokens,
    load_policy,
    progress_bar,
    sampling_options,
)
from rlhf_fast.errors import UserError

if TYPE_CHECKING:
    from rlhf_fast.rewards import Evaluation


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        "evaluate", "Rewards of a model's responses to held-out prompts; greedy, unless a temperature is given."
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face name, model folder or run folder")
    parser.add_argument(
        "--dataset_name", required=True, metavar="DATA", help="file, folder or name of a data set of prompts"
    )
    parser.add_argument("--split", help="of the data set")
    parser.add_argument("--limit", type=int, metavar="ROWS", help="evaluate the first rows only")
    parser.add_argument(
        "--reward_funcs",
        nargs="+",
        required=True,
        metavar="REWARD",
        help="answer, math, code, exact, format, random, the folder of a reward model, package.module:function, "
        'or with parameters as JSON: \'{"name": "length", "max": 64}\'',
    )
    parser.add_argument("--n", type=int, default=1, help="responses per prompt; several give pass@k")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument(
        "-o", "--output", metavar="OUT.json", help="write the figures there, and the responses beside it"
    )
    add_model_options(parser)
    add_sampling_options(parser)
    args = parser.parse_args(argv)

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
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = {name: None if math.isnan(value) else value for name, value in result.items()}
    summary = {"metrics": figures, "faults": result.messages, "options": options}
    samples = path.with_name(f"{path.stem}.samples.jsonl")
    try:
        path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        with samples.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in result.samples)
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}") from error
    print(f"figures: {path}\nresponses: {samples}")
