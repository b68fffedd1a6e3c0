"""What a training step spends on watching over itself, and what deterministic mode costs: CPU seconds.

    python -m bench.steps [--methods sft dpo grpo ppo] [--steps 20] [--rounds 3]

*guards*: what a step does besides learning, each timed inside ordinary runs by the process's CPU clock: the check for numbers that
are not finite and the alarms, the guard against reward hacking, the distance between engine and trainer, figures and their log, what
a refused step or memory that runs out would need. Their share is of all CPU seconds of the steps, sampling included. Hashes and the
record of a run are counted in seconds a run. Timing itself counts as part of what is timed.

*deterministic*: the same runs with ``deterministic`` on and off take turns, each round beginning with the other one.

The models are those of ``bench.train``. Results go to ``steps-<device>.csv`` in --out, a row per figure, a table to ``.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.report import machine, put_rows, version
from bench.train import UNCOUNTED, WORK, Job, options, our_trainer, random_model

KEY = ("part", "method", "figure")
METHODS = ("sft", "dpo", "grpo", "ppo")
# what is timed, by what it is for; a function within another counts for itself alone
PER_STEP = {
    "finite check and alarms": (
        "trainers.loop:read",
        "trainers.rl:RLTrainer.inspect",
        "trainers.rl:RLTrainer.watch",
        "trainers.ppo:PPOTrainer.inspect",
    ),
    "reward-hacking guard": ("trainers.guard:Guard.on_rollout",),
    "distance of engine and trainer": ("trainers.rl:RLTrainer.compare", "trainers.grpo:distance"),
    "figures": ("run.means:Means.add", "run.means:Means.read", "run.times:Times.read"),
    "log": ("trainers.journal:Journal.write", "trainers.journal:Journal.tick"),
    "notes to take a step back": ("run.means:Means.state",),
}
PER_RUN = {"record": ("run.record:Record.__enter__", "run.record:Record.__exit__"), "save": ("trainers.loop:save",)}
COLUMNS = (
    "part",
    "method",
    "figure",
    "value",
    "unit",
    "work",
    "steps",
    "rounds",
    "machine",
    "threads",
    "date",
    "versions",
)


class Meter:
    """CPU seconds of this process by name, each without what is timed inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._within = [0.0]

    def timed(self, name: str, function: Any) -> Any:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            self._within.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.process_time() - began
                self.seconds[name] += whole - self._within.pop()
                self._within[-1] += whole
                self.calls[name] += 1

        return run

    @contextlib.contextmanager
    def installed(self, table: dict[str, tuple[str, ...]]) -> Iterator[None]:
        """Time the functions of ``table`` inside the block."""
        undo = []
        for name, places in table.items():
            for place in places:
                module, _, path = place.partition(":")
                owner: Any = importlib.import_module(f"rlhf_fast.{module}")
                *parents, attribute = path.split(".")
                for parent in parents:
                    owner = getattr(owner, parent)
                undo.append((owner, attribute, getattr(owner, attribute)))
                setattr(owner, attribute, self.timed(name, getattr(owner, attribute)))
        try:
            yield
        finally:
            for owner, attribute, function in undo:
                setattr(owner, attribute, function)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--parts", nargs="+", choices=("guards", "deterministic"), default=["guards", "deterministic"])
    parser.add_argument("--steps", type=int, default=20, help="timed optimizer steps of each run")
    parser.add_argument("--rounds", type=int, default=3, help="runs with deterministic on, and as many with it off")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="further settings of the trainers")
    parser.add_argument("-o", "--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = args.out / f"steps-{device}.csv"
    with tempfile.TemporaryDirectory() as folder:
        model = random_model("cpu", Path(folder))
        for method in args.methods:
            # as runs are by default: a log line every ten steps
            more = {"logging_steps": 10, "quiet": True, **options(args.set)}
            job = Job("ours", method, "cpu", 32, str(model), WORK["cpu"][method], args.steps, options=more)
            rows = guards(job) if "guards" in args.parts else []
            rows += deterministic(job, args.rounds) if "deterministic" in args.parts else []
            work = f"{job.work.batch} x ({job.work.prompt} + {job.work.response})"
            about = {"method": method, "work": work, "steps": args.steps, "machine": machine(device)}
            about |= {
                "threads": args.threads,
                "date": time.strftime("%Y-%m-%d"),
                "versions": f"torch {version('torch')}",
            }
            path.with_suffix(".md").write_text(markdown(put_rows(path, [r | about for r in rows], KEY, COLUMNS)))
            for row in rows:
                print(f"{method}: {row['part']}, {row['figure']}: {row['value']:.4g} {row['unit']}", flush=True)
    return 0


def guards(job: Job) -> list[dict[str, Any]]:
    """The share of the steps' CPU seconds of each row of ``PER_STEP``, and seconds a run of ``PER_RUN``."""
    meter = Meter()
    with meter.installed({**PER_STEP, **PER_RUN}):
        _, seconds = run(job, on_first=lambda: (meter.seconds.clear(), meter.calls.clear()))
    whole = sum(seconds)
    rows = [
        {"part": "guards", "figure": name, "value": 100 * meter.seconds[name] / whole, "unit": "% of the steps"}
        for name in PER_STEP
    ]
    rows.append({"part": "guards", "figure": "all", "value": sum(r["value"] for r in rows), "unit": "% of the steps"})
    rows.append({"part": "guards", "figure": "a step", "value": 1000 * whole / len(seconds), "unit": "CPU ms"})
    return rows + [
        {"part": "guards", "figure": name, "value": 1000 * meter.seconds[name], "unit": "CPU ms a run"}
        for name in PER_RUN
    ]


def deterministic(job: Job, rounds: int) -> list[dict[str, Any]]:
    """Median CPU seconds of a step with the mode over those without; the bits of two runs with it must agree."""
    found: dict[bool, list[float]] = {False: [], True: []}
    ends = []
    for number in range(rounds):
        for wanted in (False, True) if number % 2 == 0 else (True, False):
            weights, seconds = run(job, deterministic=wanted)
            found[wanted].append(statistics.median(seconds))
            ends += [weights] * wanted
    if any(not torch.equal(a, b) for end in ends[1:] for a, b in zip(ends[0], end)):
        raise SystemExit(f"{job.method}: two runs with deterministic differ; nothing is reported")
    ratio = statistics.median(on / off for on, off in zip(found[True], found[False]))
    spread = max(abs(x / statistics.median(found[False]) - 1) for x in found[False])
    cost = {"part": "deterministic", "figure": "on over off", "value": ratio, "unit": "times the CPU seconds"}
    noise = {"figure": "spread of the runs without", "value": 100 * spread, "unit": "% of their median"}
    return [cost | {"rounds": rounds}, {"part": "deterministic", "rounds": rounds, **noise}]


def run(job: Job, on_first: Any = None, **settings: Any) -> tuple[list[torch.Tensor], list[float]]:
    """One run; what it trained, and the CPU seconds of each step that counts, from the end of the one before."""
    with tempfile.TemporaryDirectory() as scratch:
        made = our_trainer(dataclasses.replace(job, options={**job.options, **settings}), Path(scratch))
        ends, after_step = [], made.after_step

        def stamped() -> None:
            after_step()
            ends.append(time.process_time())
            if len(ends) == UNCOUNTED and on_first:
                on_first()

        made.after_step = stamped
        made.train()
        weights = [p.detach().clone() for p in made.parameters]
    return weights, [b - a for a, b in zip(ends[UNCOUNTED - 1 :], ends[UNCOUNTED:])]


def markdown(rows: list[dict[str, str]]) -> str:
    """A table of each part, and what was run."""
    first = rows[0]
    lines = [
        "# What a step spends beside learning",
        "",
        "`python -m bench.steps`; its first lines say what is timed.",
        "",
    ]
    lines += [f"{first['machine']}, {first['threads']} thread(s), {first['versions']}, {first['date']}.", ""]
    methods = list(dict.fromkeys(r["method"] for r in rows))
    work = {r["method"]: r["work"] for r in rows}
    for part in dict.fromkeys(r["part"] for r in rows):
        lines += [f"## {part}", "", "| | " + " | ".join(f"{m}, {work[m]}" for m in methods) + " |"]
        lines.append("| --- |" + " --- |" * len(methods))
        mine = {(r["figure"], r["method"]): r for r in rows if r["part"] == part}
        for figure in dict.fromkeys(figure for figure, _ in mine):
            cells = [mine.get((figure, m), {}) for m in methods]
            unit = next(c["unit"] for c in cells if c)
            lines.append(f"| {figure} ({unit}) | " + " | ".join(c.get("value", "") for c in cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
