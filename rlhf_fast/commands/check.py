"""``rlhf-fast check``: what a training run would make of a data set, row by row and token by token; nothing is trained.

The rows go through the trainer's own ``tokenize``, as they do before every run.
"""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_fast.cli import COMMANDS, trainer_of
from rlhf_fast.commands import Parser
from rlhf_fast.errors import UserError

if TYPE_CHECKING:
    from array import array

    from rich.console import Console

    from rlhf_fast.data import Example, Report

METHODS = tuple(name for name, command in COMMANDS.items() if command.group == "train")
LISTED = 20  # bad rows that are named one by one, unless --problems says otherwise
BINS, WIDTH = 12, 40  # of the histogram: bars, and characters of the longest
SHOWN = 120  # tokens of one stretch that are written out
OPEN, CLOSE = "⟦", "⟧"  # around what is trained, where there are no colours


def main(argv: Sequence[str]) -> int:
    options, data, settings = _parse(list(argv))

    from rich.console import Console

    from rlhf_fast.models.load import load_tokenizer
    from rlhf_fast.run.config import parse_config

    config_class, trainer = trainer_of(options.method)
    config = parse_config(config_class, settings, prog="rlhf-fast check")
    sources = {"train": data or config.dataset_name, "eval": options.eval or config.eval_dataset_name}
    model = options.model or config.model_name_or_path
    for value, what in ((sources["train"], "DATA"), (model, "--model MODEL")):
        if not value:
            raise UserError(f"{what} is missing, as in rlhf-fast check DATA --for {options.method} --model MODEL")
    tokenizer, about = load_tokenizer(model)
    console = Console(highlight=False, soft_wrap=True)
    reports, refusals = {}, []
    for name, source in sources.items():
        if source is None:
            continue
        try:
            items, report = trainer.tokenize(source, tokenizer, config, name=name, bad_rows="audit", **about)
        except UserError as error:  # an unreadable file, columns that fit nothing: there are no rows to report on
            refusals.append(f"{name}: {error}")
            continue
        reports[name] = report
        refusals += [f"{name}: {why}" for why in _refusals(report, items, config)]
        _show(console, report, items, tokenizer, options)
    if len(reports) == 2 and (shared := reports["train"].shared_with(reports["eval"])):
        console.print(f"\n{shared}", style="yellow", markup=False)
    for why in refusals:
        console.print(f"\ntraining would refuse it: {why}", style="red", markup=False)
    if not refusals:
        console.print(f"\n{options.method} would train on it", style="green", markup=False)
    return 1 if refusals else 0


def _parse(argv: list[str]) -> tuple[Namespace, str | None, list[str]]:
    """The command's own options, the data set, and the rest: settings of the trainer."""
    parser = Parser(
        "check",
        "Show what training would make of DATA: the rows that it cannot use (file, line, column, value, fix), what is cut, "
        "which tokens are trained. Settings of the trainer may follow, --config FILE among them: the rows go through its "
        "own code. Exits with 1 when training would refuse.",
        usage="rlhf-fast check DATA --for METHOD --model MODEL [--eval DATA] [options] [--SETTING VALUE ...]",
    )
    add = parser.add_argument
    add("--for", dest="method", choices=METHODS, required=True, metavar="METHOD", help=f"one of {', '.join(METHODS)}")
    add("--model", help="a model or run folder, or a name: its tokenizer and its stop tokens")
    add("--eval", metavar="DATA", help="held-out rows, checked too, and for prompts that both have")
    add("--rows", type=int, default=3, metavar="N", help="rows to show token by token")
    add("--problems", type=int, default=LISTED, metavar="N", help="bad rows to name")
    # taken off first, so that no setting's value passes for it
    data = argv.pop(0) if argv and not argv[0].startswith("-") else None
    options, settings = parser.parse_known_args(argv)
    return options, data, settings


def _refusals(report: Report, items: list[Any], config: Any) -> Iterator[str]:
    """Why training would not begin."""
    from rlhf_fast.data.formats import HOW_TO_GO_ON

    if config.bad_rows == "error" and report.problems:
        first = report.problems[0]
        yield f"{len(report.problems):,} bad rows, first {first.where}: {first.message} {HOW_TO_GO_ON}"
    if report.refusal:
        yield report.refusal
    functions = [spec for spec in getattr(config, "reward_funcs", ()) if not Path(str(spec)).is_dir()]
    if items and functions:
        from rlhf_fast.rewards import check_columns, resolve_all

        try:
            check_columns(*resolve_all(functions), [*items[0].columns, "prompt_ids"])
        except UserError as error:
            yield str(error)


# ----------------------------------------------------------------------------------------------------------- what is shown


def _show(console: Console, report: Report, items: list[Any], tokenizer: Any, options: Namespace) -> None:
    from rlhf_fast.data.prepare import examples_of
    from rlhf_fast.run.metrics import print_table

    console.print(str(report), markup=False)
    sequences = [example for item in items for example in examples_of(item)]
    if sequences:
        stops, bos = report.stop_ids, tokenizer.bos_token_id
        ended = sum(e.input_ids[-1] in stops and e.response_mask[-1] for e in sequences)
        begun = "" if bos is None else f", {sum(e.input_ids[0] == bos for e in sequences):,} begin with bos"
        console.print(f"{report.name}: {ended:,} of {len(sequences):,} sequences end with a trained stop token{begun}")
    console.print(f"{report.name}: {_shortened(report)}", markup=False)
    if report.problems:
        counts = Counter(problem.reason for problem in report.problems)
        print_table(f"{report.name}: bad rows", counts.items(), ("what", "rows"), console)
        listed = [(p.where, p.column, p.message) for p in report.problems[: options.problems]]
        print_table(f"{report.name}: the first {len(listed)}", listed, ("row", "column", "what is wrong"), console)
    if report.lengths:
        print_table(f"{report.name}: tokens of a sequence", _histogram(report.lengths), ("tokens", "rows", ""), console)
    for number, item in enumerate(items[: options.rows], start=1):
        console.print(f"\n{report.name}: row {number} of those kept", style="bold")
        for example in examples_of(item) or [item]:
            console.print(_painted(example, tokenizer, report.stop_ids, console.is_terminal))


def _shortened(report: Report) -> str:
    """The share of rows that lose something, and how long most are."""
    if not report.lengths:
        return "no row could be tokenized"
    ordered = sorted(report.lengths)
    half, most = (ordered[min(int(share * len(ordered)), len(ordered) - 1)] for share in (0.5, 0.99))
    limit = "no limit" if report.max_length is None else f"the limit of {report.max_length:,}"
    share = f"{report.shortened:,} rows ({report.shortened / report.rows:.1%}) cut or dropped at {limit}"
    return f"{share}; half of the sequences have at most {half:,} tokens, 99% at most {most:,}"


def _histogram(lengths: array) -> list[tuple[str, int, str]]:
    """A bar for each of `BINS` equal ranges of lengths."""
    top = max(lengths)
    size = max(1, -(-top // BINS))
    counts = [0] * (-(-top // size))
    for length in lengths:
        counts[max(length - 1, 0) // size] += 1
    scale = WIDTH / max(counts)
    return [
        (f"{i * size + 1:,} - {min((i + 1) * size, top):,}", count, "█" * round(count * scale) or "▏" * bool(count))
        for i, count in enumerate(counts)
    ]


def _painted(example: Example, tokenizer: Any, stops: Sequence[int], colours: bool) -> Any:
    """The text of a sequence, what is trained green or between marks, its stop tokens standing out."""
    from rich.text import Text

    mask = getattr(example, "response_mask", None) or [False] * len(example.input_ids)
    out = Text()
    for trained, group in itertools.groupby(zip(mask, example.input_ids), key=lambda pair: pair[0]):
        ids = [token for _, token in group]
        marks = (OPEN, CLOSE) if trained and not colours else ("", "")
        out.append(marks[0])
        for stop, part in itertools.groupby(_elided(ids), key=lambda token: token in stops):
            style = "bold magenta" if stop and trained else "green" if trained else "dim"
            out.append(_decoded(list(part), tokenizer), style)
        out.append(marks[1])
    return out


def _elided(ids: list[int]) -> list[int | str]:
    """A long stretch without its middle, which becomes a note."""
    if len(ids) <= SHOWN:
        return list(ids)
    return [*ids[: SHOWN // 2], f" [... {len(ids) - SHOWN:,} tokens ...] ", *ids[-SHOWN // 2 :]]


def _decoded(part: list[int | str], tokenizer: Any) -> str:
    pieces = []
    for note, group in itertools.groupby(part, key=lambda token: isinstance(token, str)):
        group = list(group)
        pieces.append("".join(group) if note else tokenizer.decode(group, clean_up_tokenization_spaces=False))
    return "".join(pieces)
