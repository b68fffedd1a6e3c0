"""``rlhf-fast constitution``: responses criticised and rewritten by principles."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rlhf_fast.commands import Parser
from rlhf_fast.commands.generate import progress_bar
from rlhf_fast.commands.judge import add_chat_options, calls_file, chat_for, read_constitution, report, write_rows
from rlhf_fast.errors import UserError


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        "constitution",
        "Have a model criticise responses by principles and rewrite them (Constitutional AI). Writes into DIR: sft.jsonl (the "
        "revisions), pairs.jsonl (revision over original), chain.jsonl (every step, for reading). Every answer is kept at once: "
        "the same command goes on after an interruption, and asks nothing twice.",
    )
    parser.add_argument(
        "data",
        metavar="DATA",
        help="prompts; with a `completion` each, that is what is revised, else the model answers first",
    )
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder of what comes out")
    parser.add_argument("--constitution", metavar="FILE.yaml", help="principles; the shipped ones when not given")
    parser.add_argument(
        "--rounds", type=int, default=2, help="critiques and revisions of each response, one principle each"
    )
    add_chat_options(parser, "the model", max_new_tokens=1024)
    parser.add_argument("--split", help="of the data set")
    parser.add_argument("--limit", type=int, metavar="ROWS", help="read the first rows only")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        raise UserError(f"constitution: --rounds must be at least 1, got {args.rounds}")
    folder = Path(args.output)
    chain_file = folder / "chain.jsonl"
    calls = calls_file(chain_file, args.data)

    from rlhf_fast.data import load_records
    from rlhf_fast.feedback.constitution import (
        demonstrations,
        figures,
        preferences,
        read_chains,
        revise,
    )

    constitution = read_constitution(args.constitution)
    chains = read_chains(load_records(args.data, args.split)[: args.limit])
    chat = chat_for(args, calls)
    with progress_bar(len(chains), "replies") as bar:

        def after(stage: str) -> None:
            write_rows(chain_file, [chain.row() for chain in chains])
            bar.console.print(f"{stage}: done")
            bar.reset(bar.task_ids[0])

        def progress(count: int) -> None:
            bar.update(bar.task_ids[0], completed=count)

        asyncio.run(revise(chat, constitution, chains, args.rounds, args.seed, after, progress))
    write_rows(folder / "sft.jsonl", demonstrations(chains, constitution, chat.name))
    write_rows(folder / "pairs.jsonl", preferences(chains, constitution, chat.name))
    reasons = Counter(chain.fault for chain in chains if chain.fault)
    notes = [f"{count} prompts are left out: {reason}" for reason, count in reasons.most_common(3)]
    report(chain_file, f"{chat.name} on {args.data}", figures(chains, chat), notes, vars(args))
    print(f"demonstrations: {folder / 'sft.jsonl'}\npairs: {folder / 'pairs.jsonl'}\nsteps: {chain_file}")
    if reasons:
        print("the same command asks again for what is left out", file=sys.stderr)
    return 0
