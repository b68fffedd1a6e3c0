"""The part ``train`` of ``bench.gpu_suite``: whole training steps of an 8B model beside TRL's, under caps of GPU memory.

In the order of what they are worth, as time may run out: QLoRA and LoRA SFT against TRL, QLoRA with offload, PPO inside
24 GB, the longest rows, GRPO and DPO. Results go to ``train-cuda.csv`` and ``.md``, each target to ``gpu-train.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.report import read_text

if TYPE_CHECKING:
    from bench.gpu_suite import Suite

MODEL = "llama-3.1-8b"
OFFLOAD = "offload_activations=true"
TESTS = ["tests/kernels/test_lora.py", "tests/kernels/test_norm.py", "tests/models/test_attention.py"]


@dataclass(frozen=True)
class Stage:
    """One call of ``bench.train``."""

    name: str
    arguments: list[str]
    seconds: float


STAGES = (
    Stage("QLoRA SFT", ["--bits", "4", "--methods", "sft"], 150),
    Stage("LoRA SFT", ["--bits", "16", "--methods", "sft"], 110),
    Stage("QLoRA SFT, offload", ["--bits", "4", "--methods", "sft", "--peers", "none", "--set", OFFLOAD], 60),
    Stage("PPO in 24 GB", ["--bits", "4", "--methods", "ppo", "--cap-gb", "24", "--steps", "2"], 120),
    Stage("longest rows", ["--bits", "4", "--max-context", "--cap-gb", "24", "48"], 150),
    Stage("QLoRA GRPO", ["--bits", "4", "--methods", "grpo", "--steps", "2"], 150),
    Stage("QLoRA DPO", ["--bits", "4", "--methods", "dpo", "--steps", "3"], 100),
    Stage("longest row in 80 GB", ["--bits", "4", "--max-context", "--cap-gb", "80"], 100),
)


def run_train(suite: Suite, dry: bool) -> None:
    """Run the stages until time is up; a dry run takes each at reduced size on the CPU."""
    from bench.gpu_suite import LEAST, PATIENCE, Step, build_step, machine_step, python

    suite.run(machine_step())
    if not dry:
        suite.run(build_step(dry))
        chosen = ["-k", "triton or cuda or gpu"]
        pytest = python("-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *TESTS, *chosen)
        suite.run(Step("tests of layers", pytest, 90, tail=8))
    folders = suite.out / "models"
    make = f"from bench.train import random_model; from pathlib import Path; random_model({'cpu' if dry else MODEL!r}, Path({str(folders)!r}))"
    suite.run(Step("model folder", python("-c", make), 120))
    for stage in STAGES:
        if suite.left < LEAST:
            suite.verdicts[stage.name] = "left out: no time"
            continue
        command = python("-m", "bench.train", "--out", str(suite.out), "--folders", str(folders))
        command += dry_arguments(stage) if dry else ["--model", MODEL, *stage.arguments]
        limit = stage.seconds * (PATIENCE if dry else 1)
        # a side may take less than half, so that one that is stopped has its row and the other its turn
        suite.run(Step(stage.name, [*command, "--limit", str(0.45 * limit)], limit, tail=6))
        (suite.out / "gpu-train.md").write_text(targets(suite.out, suite.verdicts, dry))
    suite.say(targets(suite.out, suite.verdicts, dry))
    _remove(folders)


def dry_arguments(stage: Stage) -> list[str]:
    """The stage on a CPU: a small model in float32, a step, no cap; peers where the stage has them."""
    kept = [x for x in stage.arguments if x not in ("4", "16", "--bits", "--steps", "2", "3")]
    if "--cap-gb" in kept:
        at = kept.index("--cap-gb")
        kept = kept[:at] + [x for x in kept[at + 1 :] if not x.isdigit()]
    return ["--model", "cpu", "--bits", "32", "--steps", "1", *kept]


def _remove(folder: Path) -> None:
    """16 GB of random weights are no result."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


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
