"""``rlhf-fast label``: people say which responses are better, on a page in the browser."""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_fast.commands import Parser
from rlhf_fast.commands.generate import add_model_options, add_sampling_options, file_to_file, load_policy
from rlhf_fast.commands.judge import write_rows
from rlhf_fast.commands.serve import address, import_uvicorn, listen, signals_end_quietly
from rlhf_fast.errors import UserError

if TYPE_CHECKING:
    from rlhf_fast.feedback.people.items import Items
    from rlhf_fast.feedback.people.store import Label, Store

TOKEN = "RLHF_FAST_LABEL_TOKEN"
ANY = ("0.0.0.0", "::")
FORMATS = ("pairs", "ranked", "safety", "kto", "argilla", "label-studio")


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    _check(args)
    from rlhf_fast.feedback.people.store import Store

    if args.model is not None:
        args.data = str(_responses(args))
        return _label_while_writing(args)
    items, imported, alone = _items(args)
    if alone:
        print(f"{alone} prompts have fewer than two different responses and are left out", file=sys.stderr)
    store = Store(_labels(args), write=args.export is None)
    _import(store, imported)
    if args.export is not None:
        return _export(args, items, store)
    return _serve(args, items, store)


def _parser() -> Parser:
    parser = Parser(
        "label",
        "Compare responses in the browser, by keyboard or mouse: two at a time with a margin, or several in a ranking. Every "
        "answer is on the disk at once; the same command goes on where it stopped. --export makes training data of them.",
    )
    parser.add_argument(
        "data",
        metavar="DATA",
        nargs="?",
        help="rows with `prompt` and `responses`, a `completion` each (as generate --n writes them), preferences to compare "
        "anew, or a JSON export of Argilla or Label Studio, whose labels are taken over",
    )
    parser.add_argument("-o", "--output", metavar="LABELS.jsonl", help="the answers; DATA.labels.jsonl when not given")
    parser.add_argument("--safety", action="store_true", help="also ask which response is safer, and which are unsafe")
    parser.add_argument("--export", metavar="FILE", help="write what the answers come to, instead of showing the page")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="of the export; pairs where all prompts have two responses, else ranked; kto: good and bad ones, by themselves",
    )
    parser.add_argument(
        "--margins",
        type=float,
        nargs=3,
        default=[1.0, 2.0, 3.0],
        metavar="REWARD",
        help="slightly, clearly and much better in exported pairs, in units of reward",
    )
    parser.add_argument("--model", help="write the responses now: Hugging Face name, model folder or run folder")
    parser.add_argument("--prompts", metavar="FILE", help="what --model answers")
    parser.add_argument("--num_responses", type=int, default=2, help="of --model to each prompt")
    parser.add_argument("--chat", action="store_true", help="put a prompt that is plain text as the user's message")
    parser.add_argument("--temperature", type=float, default=0.9, help="of the sampling")
    add_model_options(parser)
    add_sampling_options(parser)
    parser.set_defaults(batch_size=16)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; others let other machines in")
    parser.add_argument("--port", type=int, default=8700, help="0 takes a free one")
    parser.add_argument(
        "--allow_host", metavar="NAME", action="append", default=[], help="a name other machines call this one by"
    )
    parser.add_argument("--token", help=f"the key in the link, new with every start when not given; or {TOKEN}")
    parser.add_argument("--split", help="of the data set")
    parser.add_argument("--limit", type=int, metavar="ROWS", help="read the first rows only")
    return parser


def _check(args: argparse.Namespace) -> None:
    if (args.model is None) == (args.data is None):
        raise UserError("label: give DATA to compare, or --model and --prompts to have the responses written, not both")
    if args.model is not None and (args.prompts is None or args.num_responses < 2):
        raise UserError("label: --model needs --prompts FILE, and --num_responses of at least 2")
    if args.model is not None and args.temperature == 0:
        raise UserError("label: greedy responses to a prompt are all the same; set --temperature above 0")
    if args.export is not None and args.model is not None:
        raise UserError("label: --export reads DATA; give it the *.responses.jsonl that --model wrote")
    if args.format is not None and args.export is None:
        raise UserError("label: --format is of an export; add --export FILE")
    if args.host in ANY and not args.allow_host and args.export is None:
        raise UserError(
            f"label: --host {args.host} is every address; say with --allow_host by which name others call this one"
        )
    token = args.token or os.environ.get(TOKEN)
    if token is not None and not re.fullmatch(r"[A-Za-z0-9_-]{16,128}", token):
        raise UserError("label: --token must be 16 to 128 of A-Z a-z 0-9 _ -; leave it out for a random one")


def _labels(args: argparse.Namespace) -> Path:
    """Where the answers are: beside what they are about, unless told otherwise."""
    if args.output:
        return Path(args.output)
    source = Path(args.prompts or args.data)
    name = re.sub(r"(\.responses)?\.\w+(\.gz)?$", "", source.name) + ".labels.jsonl"
    return source.with_name(name) if source.exists() else Path(name)


def _responses(args: argparse.Namespace) -> Path:
    """Where --model writes: a name from which `_labels` comes to the same answers again."""
    labels = _labels(args)
    return labels.with_name(labels.name.removesuffix(".jsonl").removesuffix(".labels") + ".responses.jsonl")


# ------------------------------------------------------------------------------------------------------ items and labels


def _items(args: argparse.Namespace) -> tuple[Items, list[Label], int]:
    """What is compared, labels that came along, and how many prompts have nothing to compare."""
    from rlhf_fast.data import load_records
    from rlhf_fast.feedback.candidates import read_candidates
    from rlhf_fast.feedback.people import exchange
    from rlhf_fast.feedback.people.items import Items

    records = load_records(args.data, args.split)[: args.limit]
    form = exchange.recognise(records)
    imported: list[Label] = []
    if form is None:
        candidates, alone = read_candidates(records)
    else:
        candidates, imported, alone = exchange.read(records, form)
    return Items(candidates), imported, alone


def _import(store: Store, labels: Sequence[Label]) -> None:
    """Take over what is not there yet; an export of labels that were never saved here sees them all the same."""
    new = [label for label in labels if store.get(label.annotator, label.item) is None]
    for label in new:
        store.adopt(label)
    if new:
        print(f"{len(new)} labels of {len({label.annotator for label in new})} annotators taken over", file=sys.stderr)


def _export(args: argparse.Namespace, items: Items, store: Store) -> int:

    from rlhf_fast.feedback.people import consensus, exchange
    from rlhf_fast.run.metrics import print_table

    out = Path(args.export)
    two = all(len(items[place][1].responses) == 2 for place in range(len(items)))
    form = args.format or ("pairs" if two else "ranked")
    for taken in (args.data, _labels(args)):
        if out.exists() and Path(taken).exists() and out.samefile(taken):
            raise UserError(f"label: --export {out} would overwrite what it is made from; choose another name")
    if form in exchange.FORMATS:
        rows = (exchange.to_argilla if form == "argilla" else exchange.to_label_studio)(items, store)
        temporary = out.with_name(out.name + ".tmp")
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
        temporary.replace(out)
        if form == "label-studio":
            config = out.with_suffix(".xml")
            config.write_text(exchange.LABEL_STUDIO_CONFIG, encoding="utf-8")
            print(f"labelling interface: {config}")
    else:
        outcome = consensus.export(items, store, form, args.margins)
        write_rows(out, outcome.rows)
        print_table(f"labels of {args.data}", outcome.figures)
        for note in outcome.notes:
            print(f"note: {note}", file=sys.stderr)
    print(f"{form}: {out}")
    return 0


# ------------------------------------------------------------------------------------------------------------- the page


def _serve(args: argparse.Namespace, items: Items, store: Store) -> int:
    uvicorn = import_uvicorn("label")
    from rlhf_fast.feedback.people.app import SERVER, Desk, build_app
    from rlhf_fast.rollout.serving.guard import is_loopback

    token = args.token or os.environ.get(TOKEN) or secrets.token_urlsafe(24)
    if store.torn:
        print(f"{store.path}: {store.torn} lines cut short by a kill are passed over", file=sys.stderr)
    listener = listen(args.host, args.port, "label")
    hosts = [*args.allow_host, *([] if args.host in ANY or is_loopback(args.host) else [args.host])]
    app = build_app(Desk(items, store, Path(args.data).name, args.safety), token, hosts)
    config = uvicorn.Config(app, timeout_graceful_shutdown=2, **SERVER)
    if not is_loopback(args.host):
        print("everybody who can reach this machine and has the link can label, under any name", file=sys.stderr)
    where = f"http://{hosts[0]}:{listener.getsockname()[1]}" if hosts else address(listener)
    print(f"label {len(items)} items at {where}/{token}/ (Ctrl-C stops)", flush=True)
    print(f"answers: {store.path}", flush=True)
    with signals_end_quietly():
        uvicorn.Server(config).run(sockets=[listener])
    store.close()
    return 0


def _label_while_writing(args: argparse.Namespace) -> int:
    """Show the page as soon as there is something to compare, while the model goes on writing."""
    from rlhf_fast.feedback.people.items import Items
    from rlhf_fast.feedback.people.store import Store

    import_uvicorn("label")
    store = Store(_labels(args), write=True)
    policy = load_policy(args)
    items, first = Items(), threading.Event()
    writer = threading.Thread(target=_write, args=(policy, args, items, first), daemon=True)
    writer.start()
    first.wait()
    if not len(items):
        writer.join()
        raise UserError(
            items.fault or "label: the model's responses to each prompt are all the same; raise --temperature"
        )
    print(f"responses: {args.data}", flush=True)
    _serve(args, items, store)
    if (
        writer.is_alive()
    ):  # in the middle of a block: it cannot be joined soon, and what it holds is written anew next time
        sys.stdout.flush()
        os._exit(0)
    return 0


def _write(policy: Any, args: argparse.Namespace, items: Items, first: threading.Event) -> None:
    """The writing thread: responses go to the file and to the page block by block."""
    from rlhf_fast.data import Records, load_records
    from rlhf_fast.feedback.candidates import read_candidates

    def heard(rows: list[dict[str, Any]]) -> None:
        try:
            items.extend(read_candidates(Records(rows, args.data))[0])
        except UserError:
            return  # no prompt of this block has two different responses
        first.set()

    try:
        items.expected = len(load_records(args.prompts))
        options = {**vars(args), "n": args.num_responses, "output": args.data, "restart": False}
        file_to_file(policy, argparse.Namespace(**options), heard)
    except (ValueError, RuntimeError, OSError) as error:  # the page says that no more will come
        items.fault = f"{error}" if isinstance(error, UserError) else f"writing failed: {error!r}"
        print(f"error: {items.fault}", file=sys.stderr)
    finally:
        items.expected = 0
        first.set()
