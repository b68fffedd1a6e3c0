"""``rlhf-fast judge``: an AI says which responses are better."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_fast.commands import Parser, json_mapping
from rlhf_fast.commands.generate import (
    add_model_options,
    add_sampling_options,
    file_to_file,
    load_policy,
    progress_bar,
)
from rlhf_fast.errors import UserError

if TYPE_CHECKING:
    from rlhf_fast.feedback.constitution import Constitution
    from rlhf_fast.rewards.chat import Chat

GIVE_UP_AFTER = 20  # failed calls in a row


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        "judge",
        "Have an AI compare the responses to each prompt, in both orders, by a rubric or by principles, and write its "
        "preferences for `reward` and `dpo`. "
        "Every answer is kept beside the output at once: the same command goes on after an interruption, and asks nothing twice.",
    )
    parser.add_argument(
        "data",
        metavar="DATA",
        help="rows with `prompt` and `responses`, or a `completion` each (as generate --n writes them), or people's "
        "preferences, with which the judge's are then compared; with --policy, prompts",
    )
    parser.add_argument("-o", "--output", required=True, metavar="OUT.jsonl", help="the labelled rows")
    add_chat_options(parser, "the judge", max_new_tokens=1024)
    parser.add_argument("--rubric", help="compare, or a text file with {prompt} and {responses}")
    parser.add_argument(
        "--constitution",
        metavar="FILE.yaml",
        help="principles, of which one, drawn for each prompt, stands in the rubric for {principle}; default: the shipped ones",
    )
    parser.add_argument(
        "--policy", metavar="MODEL", help="write the responses first, to OUT.responses.jsonl: whose they are"
    )
    parser.add_argument("--num_responses", type=int, default=2, help="of --policy to each prompt")
    parser.add_argument("--response_temperature", type=float, default=1.0, help="of --policy's sampling")
    parser.add_argument("--response_tokens", type=int, default=256, help="most tokens of --policy's responses")
    parser.add_argument(
        "--chat", action="store_true", help="give --policy a prompt that is plain text as the user's message"
    )
    parser.add_argument(
        "--format", choices=["pairs", "ranked"], help="of the output; pairs where all prompts have two responses"
    )
    parser.add_argument(
        "--together", type=int, default=2, help="responses shown at once; 2 compares every pair, more need fewer calls"
    )
    parser.add_argument("--one_order", action="store_true", help="half the calls, but a liking for a place counts")
    parser.add_argument("--split", help="of the data set")
    parser.add_argument("--limit", type=int, metavar="ROWS", help="read the first rows only")
    args = parser.parse_args(argv)
    output = Path(args.output)
    calls = calls_file(output, args.data)

    from rlhf_fast.data import load_records
    from rlhf_fast.feedback.candidates import read_candidates
    from rlhf_fast.feedback.judge import label
    from rlhf_fast.rewards.judge import Panel
    from rlhf_fast.rewards.judging import Rubric

    rubric, constitution = Rubric(args.rubric or ("principle" if args.constitution else "compare")), None
    if args.constitution:
        constitution = read_constitution(None if args.constitution == "default" else args.constitution)
        if "principle" not in rubric.columns:
            raise UserError(
                f"rubric {args.rubric}: has no {{principle}}, where a principle of --constitution should stand"
            )
    records = load_records(args.data, args.split)[: args.limit]
    if not args.policy and "prompt" in records[0] and not {"completion", "responses", "chosen"} & set(records[0]):
        raise UserError(
            f"judge: {args.data} has prompts and nothing to compare; --policy MODEL writes the responses first"
        )
    if args.policy:
        records = load_records(str(_written(args, records)))
    candidates, alone = read_candidates(records)
    panel = Panel(chat_for(args, calls), rubric, args.together, swap=not args.one_order)
    if alone:
        print(f"{alone} prompts have fewer than two different responses and are left out", file=sys.stderr)
    total = sum(len(panel.orders(len(c.responses))) for c in candidates)
    how = {"constitution": constitution, "seed": args.seed}
    labels = asyncio.run(
        _with_bar(lambda progress: label(panel, candidates, args.format, progress, **how), total, "answers")
    )
    write_rows(output, labels.rows)
    report(output, f"{panel.chat.name} on {args.data}", labels.figures, labels.notes, vars(args))
    print(f"labels: {output}")
    return 0


def _written(args: argparse.Namespace, prompts: Any) -> Path:
    """The file of --policy's responses, with those that it lacked; the policy is in memory until here only."""
    if args.num_responses < 2 or args.response_temperature <= 0:
        raise UserError(
            "judge: --policy needs --num_responses of at least 2 and a --response_temperature above 0, got "
            f"{args.num_responses} and {args.response_temperature:g}: there is nothing to compare in less"
        )
    plain = argparse.ArgumentParser()
    add_sampling_options(plain)
    mine = {"model": args.policy, "prompts": prompts, "n": args.num_responses, "chat": args.chat, "restart": False}
    mine |= {"temperature": args.response_temperature, "max_new_tokens": args.response_tokens, "seed": args.seed}
    mine |= {"output": args.output.removesuffix(".jsonl") + ".responses.jsonl"}
    model = {name: getattr(args, name) for name in ("dtype", "load_in_4bit", "device")}
    options = argparse.Namespace(**{**vars(plain.parse_args([])), **model, **mine})
    file_to_file(load_policy(options), options)
    return Path(options.output)


# --------------------------------------------------------------------------- what all commands that ask an AI share


def read_constitution(source: str | None) -> Constitution:
    """The principles in a YAML file; the shipped ones without any."""
    from rlhf_fast.feedback.constitution import DEFAULT, Constitution
    from rlhf_fast.run.config import read_yaml

    return Constitution.read(read_yaml(source or DEFAULT), source or DEFAULT)


def add_chat_options(parser: argparse.ArgumentParser, whom: str, max_new_tokens: int) -> None:
    """Whom to ask, and how."""
    from_url = "(with --url)"
    parser.add_argument("--model", help=f"{whom}: its name at the URL, else a Hugging Face name, model or run folder")
    parser.add_argument("--url", help="OpenAI-compatible server, such as https://api.openai.com/v1")
    parser.add_argument(
        "--api_key_env",
        default="RLHF_FAST_JUDGE_API_KEY",
        metavar="NAME",
        help=f"environment variable of the key {from_url}",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="of the replies; 0 is greedy")
    parser.add_argument("--max_new_tokens", type=int, default=max_new_tokens, help="most tokens of a reply")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--concurrency", type=int, default=16, help=f"calls in flight {from_url}")
    parser.add_argument("--timeout", type=float, default=120.0, help=f"seconds for a call {from_url}")
    parser.add_argument("--retries", type=int, default=6, help=f"further tries of a call {from_url}")
    parser.add_argument("--backoff", type=float, default=1.0, help=f"seconds before the first, then doubled {from_url}")
    parser.add_argument("--deadline", type=float, default=600.0, help=f"seconds for all tries of a call {from_url}")
    parser.add_argument(
        "--extra",
        type=json_mapping,
        metavar="JSON",
        help=f"more fields of the request body; null leaves one out {from_url}",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="replies that a local model writes at once")
    add_model_options(parser)


def chat_for(args: argparse.Namespace, calls: Path) -> Chat:
    """The model that the options name; its answers are kept in ``calls``."""
    from rlhf_fast.rewards.chat import connect

    options: dict[str, Any] = {"cache": calls, "give_up_after": GIVE_UP_AFTER, "seed": args.seed}
    options |= {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens}
    if args.url is None:
        if args.model is None:
            raise UserError("name the model to ask: --model FOLDER, or --url of a server")
        chat = connect(load_policy(args), batch_size=args.batch_size, **options)
        chat.name = args.model
    else:
        names = ("api_key_env", "concurrency", "timeout", "retries", "backoff", "deadline", "extra")
        chat = connect(args.model, args.url, **options, **{name: getattr(args, name) for name in names})
    if len(chat.ledger):
        print(f"{calls} holds {len(chat.ledger)} answers: none of them is asked for again", file=sys.stderr)
    if chat.ledger.torn:
        print(f"{calls}: {chat.ledger.torn} lines cut short by a kill are passed over", file=sys.stderr)
    return chat


def calls_file(output: Path, data: str) -> Path:
    """Where the answers behind ``output`` are kept; ``output`` must be ours to overwrite.

    Raises:
        UserError: it is the data, or something else.
    """
    calls = output.with_name(f"{output.stem}.calls.jsonl")
    if output.exists() and (not calls.exists() or (Path(data).exists() and output.samefile(data))):
        raise UserError(f"{output} exists and was not written by this command; choose another -o, or delete it")
    return calls


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSONL, whole or not at all."""
    from rlhf_fast.data.sources import write_jsonl

    temporary = path.with_name(path.name + ".tmp")
    write_jsonl((dict(row) for row in rows), temporary)
    temporary.replace(path)


def report(output: Path, title: str, figures: Mapping[str, float], notes: Sequence[str], options: Any) -> None:
    """Print the figures and what went wrong, and write both beside ``output``."""
    from rlhf_fast.run.metrics import print_table

    print_table(title, figures)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    summary = {"figures": dict(figures), "notes": list(notes), "options": options}
    path = output.with_name(f"{output.stem}.report.json")
    path.write_text(json.dumps(summary, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


async def _with_bar(work: Any, total: int, what: str) -> Any:
    with progress_bar(total, what) as bar:
        return await work(lambda count: bar.update(bar.task_ids[0], completed=count))
