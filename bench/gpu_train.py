"""The part ``train`` of ``bench.gpu_suite``: whole training steps of an 8B model beside TRL's, under caps of GPU memory.

    python -m bench.gpu_suite --part train --out DIR --models MODELS            # again and again, until nothing is left
    python -m bench.gpu_suite --part train --out DIR --stages qlora,ppo --again

The stages take longer than one call may. They run in the order of what they are worth; one that cannot be expected to end
in time is left for the next call, which skips what ``train-cuda.csv`` in DIR holds. Rows are written as they come, so a
call that is cut off keeps its own. Results go to ``train-cuda.csv`` and ``.md``, each target to ``gpu-train.md``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.report import read_text

if TYPE_CHECKING:
    from bench.gpu_suite import Step, Suite

MODEL = "llama-3.1-8b"
OFFLOAD = "offload_activations=true"
STEPS_FILE = "gpu-train-steps.json"  # how the steps of earlier calls ended


@dataclass(frozen=True)
class Stage:
    """One call of ``bench.train``."""

    name: str
    title: str
    arguments: list[str]
    seconds: float  # until it is stopped; usually it takes about half
    sides: int = 1  # that run one after the other


def _longest(cap: int, seconds: float) -> Stage:
    arguments = ["--bits", "4", "--max-context", "--cap-gb", str(cap)]
    return Stage(f"context-{cap}", f"longest row in {cap} GB", arguments, seconds)


# first what issue and design name as targets
STAGES = (
    Stage("qlora", "QLoRA SFT", ["--bits", "4", "--methods", "sft"], 170, sides=2),
    Stage("lora", "LoRA SFT", ["--bits", "16", "--methods", "sft"], 130, sides=2),
    Stage(
        "qlora-offload",
        "QLoRA SFT, offload",
        ["--bits", "4", "--methods", "sft", "--peers", "none", "--set", OFFLOAD],
        80,
    ),
    Stage("ppo-24", "PPO in 24 GB", ["--bits", "4", "--methods", "ppo", "--cap-gb", "24", "--steps", "1"], 240),
    _longest(24, 110),
    _longest(48, 140),
    _longest(80, 200),
    Stage("grpo", "QLoRA GRPO", ["--bits", "4", "--methods", "grpo", "--steps", "2"], 200, sides=2),
    Stage("dpo", "QLoRA DPO", ["--bits", "4", "--methods", "dpo", "--steps", "3"], 150, sides=2),
)


def chosen(names: str) -> list[Stage]:
    """The stages of a comma-separated list, in the order of ``STAGES``; all for "".

    Raises:
        argparse.ArgumentTypeError: a name is unknown.
    """
    asked = [name.strip() for name in names.split(",") if name.strip()]
    known = [stage.name for stage in STAGES]
    if unknown := [name for name in asked if name not in known]:
        raise argparse.ArgumentTypeError(f"unknown stage {unknown[0]}; known: {', '.join(known)}")
    return [stage for stage in STAGES if not asked or stage.name in asked]


def run_train(suite: Suite, dry: bool, stages: list[Stage], models: Path | None = None, again: bool = False) -> None:
    """Run the stages until time is up; a dry run takes each at reduced size on the CPU.

    Args:
        models: where the model folder is made, found and left; None: in a temporary folder, removed at the end.
        again: also run what earlier calls completed.
    """
    from bench.gpu_suite import LAYER_TESTS

    earlier = _verdicts(suite.out)
    folders = models or Path(tempfile.mkdtemp(prefix="gpu-train-"))
    try:
        _prepare(suite, dry, folders, tested=earlier.get(LAYER_TESTS) == "ok" and not again)
        before = dict.fromkeys((s.name for s in stages), "open") if again else standing(suite.out, dry)
        # what failed before must not keep the others from their turn
        for stage in sorted(stages, key=lambda stage: before[stage.name] == "failed"):
            if before[stage.name] == "complete":
                suite.say(f"== {stage.title}: there already")
            elif suite.left < stage.seconds / 2:
                suite.verdicts[stage.title] = "left out: no time, call again"
                suite.say(f"== {stage.title}: left out: no time, call again")
            else:
                suite.run(stage_step(suite.out, stage, folders, dry, again))
            _write(suite, dry, earlier)
        suite.say(_write(suite, dry, earlier))
    finally:
        if models is None:
            shutil.rmtree(folders, ignore_errors=True)  # 16 GB of random weights are no result


def _prepare(suite: Suite, dry: bool, folders: Path, tested: bool) -> None:
    """Build, test the layers unless they were tested in an earlier call, make the model folder unless it is there."""
    from bench.gpu_suite import LAYER_TESTS, Step, build_step, machine_step, python, test_step

    suite.run(machine_step())
    if not dry:
        suite.run(build_step(dry))
        if not tested:
            suite.run(test_step(LAYER_TESTS, dry))
    make = "from bench.train import random_model; from pathlib import Path; "
    make += f"print(random_model({'cpu' if dry else MODEL!r}, Path({str(folders.resolve())!r})))"
    suite.run(Step("model folder", python("-c", make), 180))


def stage_step(out: Path, stage: Stage, folders: Path, dry: bool, again: bool) -> Step:
    from bench.gpu_suite import PATIENCE, Step, python

    command = python("-m", "bench.train", "--out", str(out), "--folders", str(folders.resolve()))
    command += dry_arguments(stage) if dry else ["--model", MODEL, *stage.arguments]
    limit = stage.seconds * (PATIENCE if dry else 1)
    # a side that is stopped has its row, and leaves the other its turn
    command += ["--limit", str((0.92 if stage.sides == 1 else 0.47) * limit), *([] if again else ["--resume"])]
    return Step(stage.title, command, limit, tail=6)


def dry_arguments(stage: Stage) -> list[str]:
    """The stage on a CPU: a small model in float32, a step, no cap; peers where the stage has them."""
    kept = [x for x in stage.arguments if x not in ("1", "4", "16", "--bits", "--steps", "2", "3")]
    if "--cap-gb" in kept:
        at = kept.index("--cap-gb")
        kept = kept[:at] + [x for x in kept[at + 1 :] if not x.isdigit()]
    return ["--model", "cpu", "--bits", "32", "--steps", "1", *kept]


def standing(out: Path, dry: bool) -> dict[str, str]:
    """Stage -> "complete", "failed" where a row is there that should be run again, else "open"."""
    from bench import train

    device = "cpu" if dry else "cuda"
    complete = train.finished(out, device).keys()
    there = {train.case(row) for row in read_text(out / f"train-{device}.csv")}
    found = {}
    for stage in STAGES:
        args = train.parse(dry_arguments(stage) if dry else ["--model", MODEL, *stage.arguments])
        cases = {train.case(train.about(job)) for race in train.races(args, device, Path()) for job in race}
        found[stage.name] = "complete" if cases <= complete else "failed" if cases & there - complete else "open"
    return found


def _verdicts(out: Path) -> dict[str, str]:
    """How each step of earlier calls ended."""
    path = out / STEPS_FILE
    return json.loads(path.read_text()) if path.exists() else {}


def _write(suite: Suite, dry: bool, earlier: dict[str, str]) -> str:
    """The table of targets, and how the steps of this call and of earlier ones ended."""
    verdicts = earlier | suite.verdicts
    (suite.out / STEPS_FILE).write_text(json.dumps(verdicts, indent=1) + "\n")
    table = targets(suite.out, verdicts, dry)
    (suite.out / "gpu-train.md").write_text(table)
    return table


# ---- targets


@dataclass(frozen=True)
class Target:
    name: str
    target: float
    unit: str
    column: str
    row: dict[str, str]
    at_least: bool = False


PLAIN = {"method": "sft", "settings": "{}"}
TARGETS = (
    Target("QLoRA SFT, speed over TRL", 1.3, "x", "ratio", PLAIN | {"bits": "4"}, at_least=True),
    Target("QLoRA SFT, memory over TRL", 0.8, "x", "memory_ratio", PLAIN | {"bits": "4"}),
    Target("LoRA SFT, speed over TRL", 1.3, "x", "ratio", PLAIN | {"bits": "16"}, at_least=True),
    Target("LoRA SFT, memory over TRL", 0.8, "x", "memory_ratio", PLAIN | {"bits": "16"}),
    Target("QLoRA SFT, peak", 7.8, " GiB", "peak_gb", PLAIN | {"bits": "4"}),
    Target("QLoRA SFT with offload, peak", 7.0, " GiB", "peak_gb", {"method": "sft", "settings": "offload"}),
    Target("PPO QLoRA, 1k tokens, on 24 GB", 21.5, " GiB", "reserved_gb", {"method": "ppo", "cap_gb": "24"}),
)


def targets(out: Path, verdicts: dict[str, str], dry: bool) -> str:
    """Each target as measured over target."""
    found = [row for path in out.glob("train-*.csv") for row in read_text(path)]
    lines = ["# GPU targets of training steps", ""]
    lines += ["Dry run on a CPU at reduced size: no number below means anything.", ""] if dry else []
    lines += ["| what | measured | target | |", "|---|---|---|---|"]
    for target in TARGETS:
        row = next((r for r in found if r["side"] == "ours" and _fits(r, target.row)), {})
        shown, verdict = "", f"not measured: {row.get('status', 'no row')}"
        if row.get(target.column):
            value = float(row[target.column])
            good = value >= target.target if target.at_least else value <= target.target
            shown, verdict = f"{value:.3g}{target.unit}", "met" if good else "missed"
        lines.append(
            f"| {target.name} | {shown} | {'≥' if target.at_least else '≤'} {target.target:g}{target.unit} | {verdict} |"
        )
    longest = [r for r in found if r.get("longest_row")]
    lines += [f"| longest SFT row in {r['cap_gb'] or 'all'} GiB | {r['longest_row']} tokens | | |" for r in longest]
    lines += ["", "| step | |", "|---|---|", *(f"| {name} | {verdict} |" for name, verdict in verdicts.items())]
    return "\n".join(lines) + "\n"


def _fits(row: dict[str, str], wanted: dict[str, str]) -> bool:
    checks: dict[str, Callable[[str], bool]] = {
        "settings": lambda x: "offload" in row["settings"] if x == "offload" else row["settings"] == x,
        "cap_gb": lambda x: row["cap_gb"].split(".")[0] == x,
    }
    return all(checks.get(name, lambda x, name=name: row[name] == x)(x) for name, x in wanted.items())
