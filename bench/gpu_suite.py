"""One command on a machine with a GPU: build, test, time and compare with the targets, in under nine minutes.

    python -m bench.gpu_suite --part ops --out DIR
    python -m bench.gpu_suite --part ops --dry-run      # the same steps at tiny sizes on a CPU, Triton interpreted
    python -m bench.gpu_suite --part train --out DIR --models MODELS    # training steps, see bench/gpu_train.py
    python -m bench.gpu_suite --part rollout --out DIR  # tokens per second, see bench/gpu_rollout.py

Every step has a deadline. A step that fails or runs out of time is reported and the rest goes on: operations are timed
even if their tests fail, as every contender is compared with float64 first, and the rows say so. The first round of
benchmarks is ours and the ceilings, for every target; the second adds the peers. Results are written as they come, to
five files in --out: ``gpu-suite.log`` with every line of every step, ``ops-cuda.csv``, ``gpu-targets.md``, each target as
measured over target, and at the end ``ops-cuda.png`` and ``README.md``.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
BUDGET = 530.0  # seconds in all
SANITIZER = 60.0  # of them, kept for the last step
PATIENCE = 4  # times as long for everything in a dry run: interpreted, and on a few slow cores
LEAST = 12.0  # a benchmark that gets less is not started
FAMILIES = ("logprobs", "linear_logprobs", "attention", "advantages", "policy", "kl", "preference", "reward", "norm")
FAMILIES += ("lora",)


@dataclass(frozen=True)
class Sizes:
    """What differs between a run and a dry run."""

    device: str
    head: str  # N x D x V
    logits: str  # N x V
    gae: tuple[str, str]
    policy: str
    pairs: str
    norm: str  # N x D
    decode: tuple[str, str]  # B x H x Hk x S x d
    layer: str  # N x I x O
    mlp: str  # N x D x F
    seconds: float  # of samples per case
    backward: str  # pass that stands for the backward pass alone
    graph: str  # ending of a pass that is replayed


FULL = Sizes(
    "cuda",
    "8192x4096x128256",
    "8192x128256",
    ("512x4096", "4096x128"),
    "2048x1024",
    "4096",
    "16384x4096",
    ("64x28x4x1024x128", "256x28x4x1024x128"),
    "8192x4096x4096",
    "8192x4096x14336",
    1.5,
    "backward",
    ", CUDA graph",
)
LAYERS = ("5x16", ("3x4x2x20x16", "3x4x2x20x16"), "5x16x24", "5x16x24")
DRY = Sizes("cpu", "6x8x128", "5x83", ("3x7", "3x7"), "3x7", "5", *LAYERS, 0.01, "forward+backward", "")
BOTH, FORWARD, TRAINED = "forward+backward", "forward", "forward+backward, trained head"


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    tail: int = 12  # lines of its output to show


@dataclass
class Suite:
    """Runs steps, keeps their verdicts and the time."""

    out: Path
    log: TextIO
    budget: float = BUDGET
    began: float = field(default_factory=time.monotonic)
    verdicts: dict[str, str] = field(default_factory=dict)
    writing: threading.Lock = field(default_factory=threading.Lock)

    @property
    def left(self) -> float:
        return self.budget - (time.monotonic() - self.began)

    def write(self, text: str) -> None:
        """Into the log, at once: whatever ends this run, what was printed until then is there."""
        with self.writing:
            self.log.write(text + "\n")
            self.log.flush()

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.write(text)

    def run(self, *steps: Step, keep: float = 0.0) -> None:
        """Run steps at the same time, each until its deadline, leaving ``keep`` seconds of the whole budget."""
        running = []
        for step in steps:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=os.environ | step.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            last: deque[str] = deque(maxlen=step.tail)
            reader = threading.Thread(target=self._follow, args=(step.name, process, last), daemon=True)
            reader.start()
            running.append((step, process, reader, last, time.monotonic()))
        for step, process, reader, last, start in running:
            deadline = start + min(step.seconds, time.monotonic() - start + self.left - keep)
            verdict = wait(process, deadline)
            if verdict == "stopped":
                verdict = f"stopped after {time.monotonic() - start:.0f} s"
            self.verdicts[step.name] = verdict
            reader.join(5)  # what it left in the pipe; a child that escaped may hold it open
            self.say(f"== {step.name}: {verdict} ({time.monotonic() - start:.0f} s)")
            for line in list(last):
                print("   " + line, flush=True)

    def _follow(self, name: str, process: subprocess.Popen, last: deque[str]) -> None:
        for line in process.stdout:
            self.write(f"[{name}] {line.rstrip()}")
            last.append(line.rstrip())


def wait(process: subprocess.Popen, deadline: float) -> str:
    try:
        code = process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        # the whole session that it leads: compilers and test workers too
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "stopped"
    return "ok" if code == 0 else f"failed with {code}"


def main() -> int:
    from bench.gpu_train import chosen, run_train

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("ops", "train", "rollout"), default="ops", help="what is timed")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny, Triton interpreted")
    parser.add_argument("--out", type=Path, help="default: bench/results; a temporary folder for a dry run")
    parser.add_argument(
        "--stages", type=chosen, default="", help="of train, by comma; default: all, see bench/gpu_train.py"
    )
    parser.add_argument("--models", type=Path, help="of train: keep its model folder (16 GB) there for the next call")
    parser.add_argument("--again", action="store_true", help="of train: also what earlier calls into --out completed")
    args = parser.parse_args()
    out = args.out or (Path(tempfile.mkdtemp(prefix="gpu-suite-")) if args.dry_run else RESULTS)
    out = out.resolve()  # steps run in the project's folder
    out.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if args.dry_run:
        os.environ |= {"TRITON_INTERPRET": "1", "RLHF_FAST_DRY_RUN": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (out / "gpu-suite.log").open("a") as log:  # after what an earlier call left there
        suite = Suite(out, log, PATIENCE * BUDGET if args.dry_run else BUDGET)
        if args.part == "ops":
            run_ops(suite, DRY if args.dry_run else FULL)
        elif args.part == "train":
            run_train(suite, args.dry_run, args.stages, args.models, args.again)
        else:
            from bench.gpu_rollout import run_rollout

            run_rollout(suite, args.dry_run)
        ran = "dry run" if args.dry_run else "run"
        suite.say(f"{ran} of {time.monotonic() - suite.began:.0f} s; results in {out}")
    return any(verdict != "ok" and not verdict.startswith("left out") for verdict in suite.verdicts.values())


def run_ops(suite: Suite, sizes: Sizes) -> None:
    dry = sizes.device == "cpu"
    suite.run(machine_step())
    suite.run(build_step(dry))
    # all at once: they share the GPU well, and nothing is timed; on a few slow cores one after the other
    steps = [test_step(name, dry) for name in SELECTIONS]
    for together in ([step] for step in steps) if dry else [steps]:
        suite.run(*together)
    tests = {family: tests_of(family, suite.verdicts) for family in FAMILIES}
    for step in bench_steps(suite.out, sizes, tests):
        if suite.left - SANITIZER < LEAST:
            suite.verdicts[step.name] = "left out: no time"
            suite.say(f"== {step.name}: left out: no time")
            continue
        suite.run(step, keep=SANITIZER)
        write_targets(suite, sizes)
    sanitize(suite, dry)
    suite.say(write_targets(suite, sizes))
    readme = ROOT / "bench" / "README.md" if suite.out == RESULTS else suite.out / "README.md"
    suite.run(
        Step("tables", python("-m", "bench.ops", "--render", "--out", str(suite.out), "--readme", str(readme)), 60)
    )


def csv_of(out: Path, device: str) -> Path:
    """All operations in one file: few come back from a borrowed machine."""
    return out / f"ops-{device}.csv"


def write_targets(suite: Suite, sizes: Sizes) -> str:
    from bench.report import read

    table = targets_table(Rows(read(csv_of(suite.out, sizes.device))), sizes, suite.verdicts)
    (suite.out / "gpu-targets.md").write_text(table)
    return table


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


MACHINE = """
import platform, torch
from bench.report import PEERS, version
print(platform.platform(), "python", platform.python_version())
print(torch.cuda.get_device_properties(0) if torch.cuda.is_available() else "no CUDA device")
versions = {name: version(name) for name in (*PEERS, "pytest", "pytest-xdist", "hypothesis", "ninja", "cmake", "pybind11")}
print(*(f"{name} {number}" for name, number in versions.items()), sep=", ")
missing = [name for name, number in versions.items() if number == "none"]
print("MISSING, so not compared or not run:", ", ".join(missing) if missing else "nothing")
"""


def machine_step() -> Step:
    """What there is, and which peers are missing."""
    return Step("machine", python("-c", MACHINE), 60, tail=40)


def build_step(dry: bool) -> Step:
    """Build for this GPU alone; a dry run builds elsewhere, for one architecture, and leaves the tree as it is."""
    code = "import torch; print('%d%d' % torch.cuda.get_device_capability() if torch.cuda.is_available() else '90')"
    try:
        probe = subprocess.run(python("-c", code), capture_output=True, text=True, check=False, timeout=30)
        number = probe.stdout.strip() or "90"
    except subprocess.TimeoutExpired:  # a driver that hangs: the steps say so, each until its deadline
        number = "90"
    where = ["--inplace"]
    if dry:
        folder = tempfile.mkdtemp(prefix="gpu-suite-build-")
        where = ["--build-lib", f"{folder}/lib", "--build-temp", f"{folder}/temp"]
    environment = {"RLHF_FAST_CUDA_ARCHS": f"{number}-real"}
    return Step(
        f"build for sm_{number}", python("setup.py", "build_ext", *where), 420 if dry else 150, environment, tail=4
    )


# ---- tests


@dataclass(frozen=True)
class Selection:
    """Tests of one process."""

    files: tuple[str, ...]
    families: tuple[str, ...] = FAMILIES  # whose rows tell of their failure
    chosen: str = "triton or cuda or by_hand"  # hand-worked examples are in every file
    dry: str = "by_hand"
    workers: int = 0
    environment: tuple[tuple[str, str], ...] = ()

    def arguments(self, dry: bool) -> list[str]:
        expression = self.dry if dry else self.chosen
        return [*(f"tests/{file}" for file in self.files), *(["-k", expression] if expression else [])]


LAYER_TESTS = "tests of layers on a GPU"
SELECTIONS = {
    "tests that need a GPU": Selection(("kernels/test_gpu.py",), chosen="", dry="triton and float32"),
    LAYER_TESTS: Selection(
        ("models/test_gpu.py", "models/test_attention.py", "trainers/test_optimizers.py"),
        ("norm", "lora"),
        chosen="cuda or on_a_gpu or paged",
        dry="cpu and not checkpointing",
    ),
    **{f"tests of {family}": Selection((f"kernels/test_{family}.py",), (family,)) for family in FAMILIES},
    "tests of the losses in Triton": Selection(
        ("kernels/test_triton_losses.py", "kernels/test_launches.py"),
        ("logprobs", "advantages", "policy", "kl", "preference", "reward"),
        chosen="",
        dry="hopeless or no_pairs or makes_no_zeros",
        workers=4,
    ),
    "tests of drawn cases": Selection(
        ("kernels/properties",),
        chosen="triton or cuda",
        dry="dpo_loss and triton",
        workers=4,
        environment=(("RLHF_FAST_CASES", "40"),),
    ),
}


def test_step(name: str, dry: bool) -> Step:
    """The tests of one selection; a dry run takes a few quick ones of each file."""
    selection = SELECTIONS[name]
    command = python("-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *selection.arguments(dry))
    if selection.workers and importlib.util.find_spec("xdist") is not None and not dry:
        command += ["-n", str(selection.workers)]
    return Step(name, command, 150 * (PATIENCE if dry else 1), dict(selection.environment), tail=8)


def tests_of(family: str, verdicts: dict[str, str]) -> str:
    """What the rows of a family say of its tests: passed, stopped or failed, the worst of its steps."""
    mine = [verdicts.get(name, "stopped") for name, selection in SELECTIONS.items() if family in selection.families]
    if any(verdict.startswith("failed") for verdict in mine):
        return "failed"
    return "passed" if all(verdict == "ok" for verdict in mine) else "stopped"


# ---- benchmarks


def bench_steps(out: Path, sizes: Sizes, tests: dict[str, str]) -> list[Step]:
    """Ours and the ceilings for every target, then all contenders, whose rows replace the first ones.

    A process each, so that a crash costs its own rows only. What was there before the peers stays if there is no time.
    """
    dry = sizes.device == "cpu"
    common = ["--device", sizes.device, "--no-render", "--csv", str(csv_of(out, sizes.device))]
    common += ["--tiny", "--threads", "1"] if dry else []
    dtype = [] if dry else ["--dtype", "bf16"]
    # family, operations, shapes, dtypes, seconds for ours (0: no target is waiting for it), seconds for all
    groups = [
        ("linear_logprobs", ["linear_logprobs"], [sizes.head], dtype, 40, 90),
        ("logprobs", ["token_logprobs"], [sizes.logits], dtype, 30, 80),
        ("advantages", ["gae", "kl_shaped_gae"], list(dict.fromkeys(sizes.gae)), [], 30, 60),
        ("policy", ["policy_loss", "value_loss"], [sizes.policy], [], 25, 50),
        ("preference", ["dpo_loss"], [sizes.pairs], [], 20, 30),
        ("linear_logprobs", ["linear_cross_entropy"], [sizes.head], dtype, 30, 60),
        ("attention", ["decode_attention"], list(dict.fromkeys(sizes.decode)), dtype, 15, 40),
        ("norm", ["rms_norm"], [sizes.norm], dtype, 0, 40),
        ("lora", ["lora_linear"], [sizes.layer], dtype, 0, 40),
        ("lora", ["lora_mlp"], [sizes.mlp], dtype, 0, 50),
    ]
    return [
        Step(
            f"bench of {', '.join(ops)}, {who}",
            python("-m", "bench.ops", *ops, *common, "--tests", tests[family], "--contenders", who)
            + ["--seconds", str(seconds), "--shapes", *shapes, *types],
            limits[who == "all"] * (PATIENCE if dry else 1),
            tail=40,
        )
        for who, seconds in (("ours", sizes.seconds / 3), ("all", sizes.seconds))
        for family, ops, shapes, types, *limits in groups
        if limits[who == "all"]
    ]


# ---- compute-sanitizer

SANITIZED = ["tests/kernels/test_gpu.py", "-k", "agree_with_the_reference and float32 and (triton or cuda)"]


def sanitize(suite: Suite, dry: bool) -> None:
    """Out-of-bounds accesses of every kernel and races in shared memory, where compute-sanitizer is installed.

    A dry run collects the tests that it would run, which fails if there are none.
    """
    pytest = python("-m", "pytest", "-q", "-p", "no:cacheprovider", *SANITIZED)
    if dry:
        suite.run(Step("tests for compute-sanitizer", [*pytest, "--collect-only"], 60, tail=1))
        return
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        suite.verdicts["compute-sanitizer"] = "left out: no compute-sanitizer"
        suite.say("== compute-sanitizer: left out: no compute-sanitizer")
        return
    # without PyTorch's own cache, so that a step past a tensor is a step past an allocation
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "RLHF_FAST_SMALL": "1"}
    suite.run(
        *(
            Step(
                f"compute-sanitizer, {kind}",
                [tool, "--tool", kind, "--error-exitcode", "9", *pytest, "-x"],
                90,
                environment,
            )
            for kind in ("memcheck", "racecheck")
        )
    )


# ---- targets


@dataclass(frozen=True)
class Target:
    """A row of the table: what is measured, how, and which side of the target is good."""

    name: str
    target: float
    unit: str
    measure: Callable[[Rows, Sizes], float]
    at_least: bool = True


class Rows:
    """The rows of a run, looked up by what they are."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows = rows
        self.absent = ""  # why the last look-up found nothing
        self.tests = ""  # how the tests of what it found ended, unless they passed

    def value(
        self, column: str, op: str, passed: str, shape: str, contender: str = "rlhf_fast", variant: str = ""
    ) -> float:
        """A number of the first row that fits; NaN, and the reason in ``absent``, if there is none."""
        mine = [r for r in self.rows if (r["op"], r["pass"], r["shape"], r["variant"]) == (op, passed, shape, variant)]
        row = next((r for r in mine if r["contender"].partition(" (")[0] == contender), None)
        if row is None:
            self.absent = f"no row of {contender}"
        elif row["status"] != "ok":
            self.absent = f"{contender}: {row['status']}"
        else:
            number = row[column]
            if contender == "rlhf_fast" and row.get("tests") in ("failed", "stopped"):
                self.tests = f", its tests {row['tests']}"
            if number not in ("", None) and not math.isnan(float(number)):
                return float(number)
            self.absent = f"no {column} of {contender}"
        return math.nan

    def over_ours(self, op: str, passed: str, shape: str, rival: str, variant: str = "") -> float:
        """Time of a rival over ours."""
        ours = self.value("median_ms", op, passed, shape, variant=variant)
        return self.value("median_ms", op, passed, shape, rival, variant) / ours


GEMMS = "its GEMMs alone"


def head(passed: str, rival: str, op: str = "linear_logprobs") -> Callable[[Rows, Sizes], float]:
    return lambda rows, sizes: rows.over_ours(op, passed, sizes.head, rival)


def of_copy(passed: str) -> Callable[[Rows, Sizes], float]:
    def share(rows: Rows, sizes: Sizes) -> float:
        which = sizes.backward if passed == "backward" else passed
        return rows.value("percent_copy", "token_logprobs", which, sizes.logits, variant="with entropy") / 100

    return share


def microseconds(op: str, passed: str, shape: Callable[[Sizes], str]) -> Callable[[Rows, Sizes], float]:
    """Device time: replayed from a graph."""
    return lambda rows, sizes: 1e3 * rows.value("median_ms", op, passed + sizes.graph, shape(sizes))


def launches(op: str, shape: Callable[[Sizes], str]) -> Callable[[Rows, Sizes], float]:
    return lambda rows, sizes: rows.value("launches", op, BOTH, shape(sizes))


def gigabytes(rows: Rows, sizes: Sizes) -> float:
    return rows.value("peak_mb", "linear_logprobs", BOTH, sizes.head) / 1e3


def over_trl(rows: Rows, sizes: Sizes) -> float:
    return rows.over_ours("token_logprobs", FORWARD, sizes.logits, "TRL", "logprobs only")


def over_loop(rows: Rows, sizes: Sizes) -> float:
    return rows.over_ours("gae", FORWARD, sizes.gae[0], "Python loop")


def decode_of_copy(rows: Rows, sizes: Sizes) -> float:
    return rows.value("percent_copy", "decode_attention", FORWARD, sizes.decode[0]) / 100


TARGETS = (
    Target("linear_logprobs, frozen head, forward+backward: share of its 2 GEMMs", 0.85, "", head(BOTH, GEMMS)),
    Target("the same over TRL's chunked log-probabilities", 1.5, "x", head(BOTH, "TRL")),
    Target("the same over Liger's", 1.8, "x", head(BOTH, "Liger")),
    Target("the same: extra memory", 0.9, " GB", gigabytes, at_least=False),
    Target("linear_logprobs, no_grad: share of its GEMM", 0.85, "", head(FORWARD, GEMMS)),
    Target("linear_logprobs, trained head: share of its 3 GEMMs", 0.85, "", head(TRAINED, GEMMS)),
    Target("linear_cross_entropy, trained head, over quack", 0.95, "x", head(TRAINED, "quack", "linear_cross_entropy")),
    Target("token_logprobs with entropy, forward: share of the copy rate", 0.85, "", of_copy(FORWARD)),
    Target("token_logprobs with entropy, backward: share of the copy rate", 0.90, "", of_copy("backward")),
    Target("token_logprobs over TRL's selective_log_softmax, forward", 3.0, "x", over_trl),
    Target("decode_attention, 64 sequences of Qwen2.5-7B: share of the copy rate", 0.6, "", decode_of_copy),
    Target("gae (512, 4096)", 15, " µs", microseconds("gae", FORWARD, lambda s: s.gae[0]), at_least=False),
    Target("gae (4096, 128)", 8, " µs", microseconds("gae", FORWARD, lambda s: s.gae[1]), at_least=False),
    Target("gae over the Python loop", 1000, "x", over_loop),
    Target(
        "policy_loss, 2.1 M tokens, forward+backward",
        25,
        " µs",
        microseconds("policy_loss", BOTH, lambda s: s.policy),
        at_least=False,
    ),
    Target(
        "policy_loss, forward+backward: launches", 2, "", launches("policy_loss", lambda s: s.policy), at_least=False
    ),
    Target("dpo_loss, forward+backward: launches", 2, "", launches("dpo_loss", lambda s: s.pairs), at_least=False),
)


def targets_table(rows: Rows, sizes: Sizes, verdicts: dict[str, str]) -> str:
    dry = sizes.device == "cpu"
    lines = ["# GPU targets", ""]
    lines += ["Dry run on a CPU at tiny sizes: no number below means anything.", ""] if dry else []
    lines += ["| what | measured | target | |", "|---|---|---|---|"]
    for target in TARGETS:
        rows.absent = rows.tests = ""
        measured = target.measure(rows, sizes)
        if math.isnan(measured):
            shown, verdict = "", f"not measured: {rows.absent}"
        else:
            good = measured >= target.target if target.at_least else measured <= target.target
            shown, verdict = f"{measured:.3g}{target.unit}", ("met" if good else "missed") + rows.tests
        sign = "≥" if target.at_least else "≤"
        lines.append(f"| {target.name} | {shown} | {sign} {target.target:g}{target.unit} | {verdict} |")
    lines += ["", "| step | |", "|---|---|", *(f"| {name} | {verdict} |" for name, verdict in verdicts.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
