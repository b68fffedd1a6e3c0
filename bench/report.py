"""Results of benchmarks: CSV files, and the tables, plots and sources in bench/README.md that are made from them."""

from __future__ import annotations

import csv
import importlib.metadata
import inspect
import math
import os
import platform
import textwrap
import time
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.harness import COLUMNS, GRAPH

CONDITIONS = ("machine", "threads", "huge_pages", "tests", "date", "versions")
KEY = COLUMNS[:6]  # what makes a case
NUMBERS = ("median_ms", "q1_ms", "q3_ms", "ratio", "peak_mb", "max_error", "percent_copy", "percent_gemm")
PEERS = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels")
MARK = "<!-- everything below is written by `python -m bench.ops --render` -->"

README = Path(__file__).with_name("README.md")  # whose head is the head of every README


def conditions(device: str, tested: str) -> dict[str, Any]:
    """The machine, the settings and the versions behind a row."""
    import torch

    return {
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE", "0"),
        "tests": tested,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": " ".join(f"{name}={version(name)}" for name in PEERS),
    }


def machine(device: str) -> str:
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


# ---- CSV


def path_of(out: Path, device: str, family: str) -> Path:
    return out / f"ops-{device}-{family}.csv"


def merge(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put the rows of one case into its file, in place of what an earlier run found."""
    put_rows(path, rows, KEY, (*COLUMNS, *CONDITIONS))


def put_rows(
    path: Path, rows: list[dict[str, Any]], key: tuple[str, ...], columns: tuple[str, ...]
) -> list[dict[str, str]]:
    """Put rows into a CSV file in place of those with the same ``key``, sorted by it. Returns all of them as written."""
    fresh = [{name: written(row.get(name)) for name in columns} for row in rows]
    replaced = {case_of(row, key) for row in fresh}
    kept = [row for row in read_text(path) if case_of(row, key) not in replaced]
    merged = sorted(kept + fresh, key=lambda row: case_of(row, key))
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    with new.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged)
    os.replace(new, path)
    return merged


def case_of(row: dict[str, Any], key: tuple[str, ...] = KEY) -> tuple:
    return tuple(row[name] for name in key)


def written(x: Any) -> str:
    if isinstance(x, float):
        return "" if math.isnan(x) else f"{x:.5g}"
    return "" if x is None else str(x)


def read_text(path: Path) -> list[dict[str, str]]:
    """The rows of a file as they stand there; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, numbers as numbers; NaN where there is none."""
    return [row | {n: float(row[n]) if row[n] else math.nan for n in NUMBERS} for row in read_text(path)]


# ---- tables

HEADER = ("contender", "median", "quartiles", "ratio", "peak", "error", "copy", "GEMM", "launches")


def table(rows: Iterable[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Cells of one case, columns that nobody fills left out; the header first."""
    lines = [HEADER, *map(cells, rows)]
    filled = [i for i in range(len(HEADER)) if any(line[i] for line in lines[1:])]
    return [tuple(line[i] for i in filled) for line in lines]


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    name = row["contender"]
    if row["status"] != "ok":
        return (name, row["status"], *[""] * (len(HEADER) - 2))
    get = {n: math.nan if row.get(n) in (None, "") else float(row[n]) for n in NUMBERS}
    return (
        name,
        duration(get["median_ms"]),
        f"{duration(get['q1_ms'])} – {duration(get['q3_ms'])}",
        known("{:.2f}", get["ratio"]),
        known("{:,.0f} MB", get["peak_mb"]),
        known("{:.0e}", get["max_error"]),
        *(known("{:.0f}%", get[n]) for n in ("percent_copy", "percent_gemm")),
        str(row.get("launches") or ""),
    )


def known(form: str, x: float) -> str:
    return "" if math.isnan(x) else form.format(x)


def duration(ms: float) -> str:
    """Three digits in the unit that fits."""
    if math.isnan(ms):
        return ""
    value, unit = (ms * 1e3, "µs") if ms < 1 else (ms, "ms") if ms < 1e3 else (ms / 1e3, "s")
    return f"{value:.{max(0, 2 - int(math.log10(max(value, 1))))}f} {unit}"


def show(rows: list[dict[str, Any]], seconds: float) -> None:
    lines = table(rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    # a reason for not being timed may be long: it does not set the width of the column of medians
    widths[1:2] = [max(len(line[1]) for line in lines if line[2:] != ("",) * len(line[2:])) if len(lines[0]) > 2 else 0]
    for line in lines:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    print(f"  ({seconds:.0f} s)", flush=True)


# ---- README


def render(out: Path, readme: Path) -> None:
    """Write tables, plots and sources below the mark of ``readme``; what stands above it is kept."""
    kept = (readme if readme.exists() else README).read_text().partition(MARK)[0]
    lines = [MARK, ""]
    for device, title in (("cpu", "CPU"), ("cuda", "GPU")):
        rows = [row for path in sorted(out.glob(f"ops-{device}*.csv")) for row in read(path)]
        if not rows:
            continue
        lines += [f"## {title}", "", *about(rows), ""]
        if plot(rows, out / f"ops-{device}.png"):
            place = os.path.relpath(out / f"ops-{device}.png", readme.parent)
            lines += [f"![time of each contender over ours]({place})", ""]
        for (op, variant), group in groupby(rows, key=lambda row: (row["op"], row["variant"])):
            lines += section(op, variant, list(group), device)
    readme.write_text(kept + "\n".join(lines).rstrip() + "\n")


def about(rows: list[dict[str, Any]]) -> list[str]:
    """One line per set of conditions that rows were measured under."""
    seen = dict.fromkeys(
        tuple(row[name] for name in ("machine", "threads", "huge_pages", "versions", "date")) for row in rows
    )
    return [
        f"- {machine}, {threads} thread(s), THP_MEM_ALLOC_ENABLE={pages}; {versions}; {date}"
        for machine, threads, pages, versions, date in seen
    ]


def section(op: str, variant: str, rows: list[dict[str, Any]], device: str) -> list[str]:
    lines = [f"### {op}" + (f", {variant}" if variant else ""), ""]
    for key, group in groupby(rows, key=case_of):
        group = list(group)
        header, *body = table(group)
        _, _, _, shape, dtype, passed = key
        tests = f"; its tests: {group[0]['tests']}" if group[0]["tests"] in ("failed", "stopped") else ""
        lines += [f"**{shape.replace('x', ' × ')}, {dtype}, {passed}**{tests}", ""]
        lines += ["| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *map(escaped, body))]
        lines += [""]
    return lines + sources(op, variant, device)


def escaped(row: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(cell.replace("|", "\\|") for cell in row)


def sources(op: str, variant: str, device: str) -> list[str]:
    """The code of every contender, once each."""
    from bench.peers import tasks

    task = next((t for t in tasks(device) if (t.op, t.variant) == (op, variant)), None)
    if task is None:
        return []
    names: dict[Any, list[str]] = {}
    for contender in task.contenders:
        # without our backends: tables of a GPU are rendered on machines without one too
        names.setdefault(contender.function, []).append(contender.name.partition(" (")[0])
    lines = ["<details><summary>What was run</summary>", "", "```python"]
    constants = {n: x for f in names for n, x in constants_of(f).items()}
    lines += [f"{name} = {value!r}" for name, value in constants.items()] + ([""] if constants else [])
    for function, who in names.items():
        lines += [
            f"# {'; '.join(dict.fromkeys(who))}",
            *textwrap.dedent(inspect.getsource(function)).rstrip().splitlines(),
            "",
        ]
    return [*lines[:-1], "```", "", "</details>", ""]


def constants_of(function: Any) -> dict[str, float]:
    """The numbers that a contender reads from its module: they are not in its source."""
    named = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    return {name: x for name, x in named.items() if isinstance(x, (int, float))}


def plot(rows: list[dict[str, Any]], path: Path) -> bool:
    """Time over ours of every timed contender, one line per case, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [row for row in rows if row["status"] == "ok" and not math.isnan(row["ratio"])]
    timed = [row for row in timed if not row["contender"].startswith("rlhf_fast (") or row["ratio"] != 1]
    cases = list(dict.fromkeys(map(case_of, timed)))
    if not cases:
        return False
    kinds = list(dict.fromkeys(kind(row["contender"]) for row in timed))
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.19 * len(cases)))
    for index, name in enumerate(kinds):
        mine = [row for row in timed if kind(row["contender"]) == name]
        heights = [len(cases) - cases.index(case_of(row)) for row in mine]
        axes.scatter([row["ratio"] for row in mine], heights, s=14, label=name, color=f"C{index}")
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(cases), 0, -1), [caption(case) for case in cases], fontsize=6)
    axes.set_xlabel("time over ours (right of 1: we are faster)")
    axes.grid(axis="x", which="both", alpha=0.2)
    axes.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.3, 1))
    figure.tight_layout()
    # no date and no version inside: the same rows make the same file
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)
    return True


def kind(contender: str) -> str:
    name = contender.partition(",")[0].partition(" (")[0]
    return "our other backends" if name == "rlhf_fast" else name


def caption(case: tuple) -> str:
    op, variant, _, shape, dtype, passed = case
    passed = passed.replace("forward+backward", "fwd+bwd").replace("forward", "fwd").replace(GRAPH, ", graph")
    return " ".join(x for x in (op, variant, shape, dtype, passed) if x)
