"""From cells to a CSV of all curve points, a page of tables and checks, and pictures."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path

from .cells import SETTINGS
from .checks import LIBRARIES, NAMES, Found, chosen, claims, curve, final, mean_and_error, text
from .curves import draw

VERDICTS = {True: "yes", False: "**no**", None: "one seed"}
COLUMNS = ("task", "trainer", "variant", "library", "seed", "samples", "metric", "value")
# on the page, in this order; the CSV has all
METRICS = {
    "addition": ("reward", "greedy accuracy", "preferred to SFT", "eos rate"),
    "stories": ("reward", "greedy accuracy", "preferred to SFT", "eos rate"),
    "preference": (
        "pair accuracy",
        "Kendall tau",
        "reward",
        "quality",
        "greedy quality",
        "greedy accuracy",
        "preferred to SFT",
    ),
}


def write(found: Found, folder: Path) -> None:
    """``learning.csv``, ``learning.md`` and ``learning-*.png`` in ``folder``."""
    if not found:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "learning.csv", "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        for cell in found:
            for samples, metric, value in cell["points"]:
                rows.writerow([*(cell[name] for name in COLUMNS[:5]), samples, metric, f"{value:.5g}"])
    (folder / "learning.md").write_text(page(found))
    draw(found, folder)


# ---- the page


def page(found: Found) -> str:
    seeds = sorted({cell["seed"] for cell in found})
    about = ", ".join(f"{name} {value}" for name, value in found[0]["machine"].items())
    lines = ["# Learning checks", "", INTRODUCTION, "", f"Seeds {', '.join(map(str, seeds))}. {about}.", ""]
    lines += [
        "## What must hold",
        "",
        *as_table(
            ("claim", "mean ± standard error", "holds"),
            [(c.what, c.figure, VERDICTS[c.holds]) for c in claims(found)],
        ),
    ]
    for task in SETTINGS:
        if any(cell["task"] == task for cell in found):
            lines += ["", f"## {task}", "", *task_lines(found, task)]
    return "\n".join(lines) + "\n"


INTRODUCTION = """Written by `python -m bench.learning`. Every figure is of held-out prompts, judged by one engine and one judge for both
libraries, mean ± standard error over seeds (data, weights, order and sampling follow the seed). Both libraries start from the same
files and get the same rows and settings. Seconds are of `train()` without the judging, on a machine with other work: CPU seconds say
more. `reward` is of answers sampled at temperature 1."""


def task_lines(found: Found, task: str) -> list[str]:
    kinds = dict.fromkeys((c["trainer"], c["variant"], c["library"]) for c in found if c["task"] == task)
    metrics = [m for m in METRICS[task] if any(curve(c, m) for c in found if c["task"] == task)]
    rows, settings = [], {}
    for trainer, variant, library in kinds:
        cells = chosen(found, task, trainer, variant, library)
        values = [text(*mean_and_error([final(c, m) for c in cells])) if curve(cells[0], m) else "" for m in metrics]
        spent = [f"{statistics.fmean([c[key] for c in cells]):.0f}" for key in ("seconds", "cpu_seconds")]
        name = NAMES[trainer] + (f", {variant}" if variant else "")
        settings.setdefault(name, cells[0]["settings"])
        rows.append((name, LIBRARIES[library], str(len(cells)), *values, *spent))
    lines = as_table(("trainer", "library", "seeds", *metrics, "seconds", "CPU seconds"), rows)
    lines += ["", "Settings, the same on both sides; what is not listed is the default:", ""]
    lines += [f"- {name}: `{', '.join(f'{k} {v}' for k, v in of.items())}`" for name, of in settings.items()]
    return lines


def as_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
