"""python -m bench.learning -o DIR [--tasks addition,stories,preference] [--seeds 0,1,2] [--peers trl|none] [--results DIR] [--quick]

Every cell that is done keeps a file in DIR, and a run that was killed goes on with those that have none, or were trained with other
settings. The results are of all cells that are there; they are written at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from .cells import SETTINGS, Cell, cells
from .report import write
from .train import Lab, train


def main(argv: Sequence[str] | None = None) -> None:
    args = parsed(argv)
    transformers_logging.disable_progress_bar()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # matrices this small gain nothing from a second
    planned = list(cells(args.tasks, args.seeds, args.peers == "trl", args.quick))
    labs: dict[tuple, Lab] = {}
    for number, cell in enumerate(planned, start=1):
        if args.only and cell.trainer not in args.only:
            continue
        file = cell_file(cell, args.out)
        if done(cell, file):
            continue
        key = (cell.task, cell.seed)
        labs = labs if key in labs else {key: Lab(*key, args.out, args.quick)}
        began = time.perf_counter()
        found = train(cell, labs[key])
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.replace(file)  # whole or not at all
        print(f"[{number}/{len(planned)}] {cell}: {summary(found)} ({time.perf_counter() - began:.0f} s)", flush=True)
    report(planned, args)


def report(planned: list[Cell], args: argparse.Namespace) -> None:
    files = [file for cell in planned if done(cell, file := cell_file(cell, args.out))]
    write([json.loads(file.read_text()) for file in files], args.results or args.out)


def done(cell: Cell, file: Path) -> bool:
    """Whether the cell was trained with the settings that it has now."""
    return file.is_file() and json.loads(file.read_text())["settings"] == cell.all_settings


def cell_file(cell: Cell, out: Path) -> Path:
    return cell.folder(out) / "cell.json"


def summary(found: dict) -> str:
    """First and last value of every curve."""
    curves: dict[str, list[float]] = {}
    for _, metric, value in found["points"]:
        curves.setdefault(metric, []).append(value)
    return ", ".join(f"{name} {values[0]:.3f} -> {values[-1]:.3f}" for name, values in curves.items())


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    about = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(prog="python -m bench.learning", description=about[1])
    names = lambda text: text.split(",")
    parser.add_argument("-o", "--out", type=Path, required=True, help="models and cells")
    parser.add_argument("--results", type=Path, help="tables and pictures; default: OUT")
    parser.add_argument("--tasks", type=names, default=list(SETTINGS), help=",".join(SETTINGS))
    parser.add_argument("--only", type=names, help="trainers, for looking at one of them")
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--peers", choices=("trl", "none"), default="trl")
    parser.add_argument("--quick", action="store_true", help="two steps each on few rows, to see that all of it runs")
    args = parser.parse_args(argv)
    if args.quick:
        args.out /= "quick"
    if unknown := set(args.tasks) - set(SETTINGS):
        parser.error(f"unknown task {min(unknown)}; choose of {', '.join(SETTINGS)}")
    return args


if __name__ == "__main__":
    main()
