"""The part ``rollout`` of ``bench.gpu_suite``: tokens per second of a 7B model in bf16, 64 and 256 sequences at a time, beside
``transformers.generate`` and transformers' continuous batching. Results go to ``rollout-cuda.csv`` and ``.md``, each target
to ``gpu-rollout.md``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.report import read_text

if TYPE_CHECKING:
    from bench.gpu_suite import Suite

TESTS = ["tests/rollout/test_graphs.py", "tests/kernels/test_attention.py", "tests/kernels/test_gpu.py"]
TESTS += ["-k", "graph or decode_attention or triton"]
# ours first, as time may run out
ORDER = ("slots", "generate", "continuous batching", "GenerateEngine", "generate, static cache")
STAGES = {64: 240.0, 256: 200.0}  # sequences at a time -> seconds


@dataclass(frozen=True)
class Target:
    """What ours must reach with ``batch`` sequences at a time, of the bandwidth limit or over a rival."""

    name: str
    batch: str
    rival: str | None
    target: float


TARGETS = (
    Target("share of the bandwidth limit, 64 sequences", "64", None, 0.6),
    Target("speed over generate, 64 sequences", "64", "generate", 3.0),
    Target("speed over continuous batching, 64 sequences", "64", "continuous batching", 2.0),
    Target("speed over generate, 256 sequences", "256", "generate", 3.0),
    Target("speed over continuous batching, 256 sequences", "256", "continuous batching", 2.0),
)


def run_rollout(suite: Suite, dry: bool) -> None:
    """Run the stages until time is up; a dry run takes a small model and few tokens on the CPU."""
    from bench.gpu_suite import LEAST, PATIENCE, Step, build_step, machine_step, python

    suite.run(machine_step())
    if not dry:
        suite.run(build_step(dry))
    pytest = python("-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *TESTS)
    suite.run(Step("tests of rollouts", pytest, 90, tail=8))
    for batch, seconds in STAGES.items():
        name = f"{batch} sequences"
        if suite.left < LEAST:
            suite.verdicts[name] = "left out: no time"
            continue
        command = python(
            "-m", "bench.rollout", *ORDER, "--batches", str(batch), "--rounds", "1", "--out", str(suite.out)
        )
        command += ["--prompts", "4", "--longest", "12"] if dry else ["--shape", "7b"]
        limit = seconds * (PATIENCE if dry else 1)
        suite.run(Step(name, [*command, "--seconds", str(0.6 * limit)], limit, tail=8))
        (suite.out / "gpu-rollout.md").write_text(targets(suite.out, suite.verdicts, dry))
    suite.say(targets(suite.out, suite.verdicts, dry))


def targets(out: Path, verdicts: dict[str, str], dry: bool) -> str:
    """Each target as measured over target."""
    rows = [row for path in out.glob("rollout-*.csv") for row in read_text(path)]
    found = {(row["contender"], row["batch"]): row for row in rows if row["status"] == "ok"}
    lines = ["# GPU targets of rollouts", ""]
    lines += ["Dry run on a CPU at reduced size: no number below means anything.", ""] if dry else []
    lines += ["| what | measured | target | |", "|---|---|---|---|"]
    for target in TARGETS:
        value = _value(found, target)
        verdict = "not measured" if math.isnan(value) else "met" if value >= target.target else "missed"
        shown = "" if math.isnan(value) else f"{value:.3g}"
        lines.append(f"| {target.name} | {shown} | ≥ {target.target:g} | {verdict} |")
    lines += ["", "| step | |", "|---|---|", *(f"| {name} | {verdict} |" for name, verdict in verdicts.items())]
    return "\n".join(lines) + "\n"


def _value(found: dict[tuple[str, str], dict[str, str]], target: Target) -> float:
    ours = found.get(("slots", target.batch))
    theirs = found.get((target.rival, target.batch)) if target.rival else ours
    if ours is None or theirs is None:
        return math.nan
    if target.rival is None:
        return float(ours["of_bandwidth"])
    return float(ours["tokens_per_second"]) / float(theirs["tokens_per_second"])
