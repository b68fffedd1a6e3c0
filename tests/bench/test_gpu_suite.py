"""The suite for a machine with a GPU: what it selects, how it survives failures, what it leaves behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest

from bench import gpu_suite
from bench.harness import BOTH

# tests on the GPU's backends that each step must at least have, the device's own apart
AT_LEAST = {
    "tests that need a GPU": 180,
    "tests of layers on a GPU": 18,
    "tests of logprobs": 80,
    "tests of linear_logprobs": 300,
    "tests of attention": 25,
    "tests of advantages": 40,
    "tests of policy": 150,
    "tests of kl": 35,
    "tests of preference": 90,
    "tests of reward": 12,
    "tests of norm": 20,
    "tests of lora": 6,
    "tests of the losses in Triton": 190,
    "tests of drawn cases": 40,
}


def collected(*arguments: str, **environment: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command,
        check=False,
        cwd=gpu_suite.ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_every_step_selects_tests_that_use_the_backends_of_a_gpu():
    """Of one collection of all files: the ids that the step's own expression takes and that name a GPU's backend."""
    assert set(AT_LEAST) == set(gpu_suite.SELECTIONS)
    found = Counter()
    for expression in {s.chosen for s in gpu_suite.SELECTIONS.values()}:
        selections = {name: s for name, s in gpu_suite.SELECTIONS.items() if s.chosen == expression}
        files = [f"tests/{file}" for s in selections.values() for file in s.files]
        for test in collected(*files, *(["-k", expression] if expression else [])):
            for name, selection in selections.items():
                if any(test.startswith(f"tests/{file}") for file in selection.files):
                    found[name] += bool(re.search(r"triton|cuda|gpu", test))
    short = {name: found[name] for name, least in AT_LEAST.items() if found[name] < least}
    assert not short, dict(found)


def test_compute_sanitizer_gets_every_operation_on_both_backends():
    tests = collected(*gpu_suite.SANITIZED)
    assert len(tests) >= 2 * 19
    assert all("float32" in test for test in tests)


def test_a_failed_or_stopped_step_marks_the_rows_of_its_families():
    verdicts = dict.fromkeys(gpu_suite.SELECTIONS, "ok")
    assert gpu_suite.tests_of("kl", verdicts) == "passed"
    assert gpu_suite.tests_of("kl", verdicts | {"tests of kl": "stopped after 150 s"}) == "stopped"
    assert gpu_suite.tests_of("kl", verdicts | {"tests of drawn cases": "failed with 1"}) == "failed"
    assert gpu_suite.tests_of("kl", verdicts | {"tests of policy": "failed with 1"}) == "passed"


def test_ours_is_timed_for_every_target_before_any_peer(tmp_path):
    steps = gpu_suite.bench_steps(tmp_path, gpu_suite.FULL, dict.fromkeys(gpu_suite.FAMILIES, "failed"))
    who = [step.command[step.command.index("--contenders") + 1] for step in steps]
    assert who == sorted(who, reverse=True) and set(who) == {"ours", "all"}
    assert {step.command[step.command.index("--tests") + 1] for step in steps} == {"failed"}
    timed = {word for step in steps for word in step.command}
    assert {"rms_norm", "lora_linear", "lora_mlp"} <= timed
    aimed_at = {op for op in timed if any(op in target.name for target in gpu_suite.TARGETS)}
    assert aimed_at <= {word for step, side in zip(steps, who) if side == "ours" for word in step.command}


def test_what_a_step_prints_is_in_the_log_while_it_runs(tmp_path):
    """A run that is cut off loses nothing that was printed."""
    path = tmp_path / "log"
    with path.open("w") as log:
        suite = gpu_suite.Suite(tmp_path, log)
        child = "import time; print('early', flush=True); time.sleep(60)"
        step = gpu_suite.Step("slow", gpu_suite.python("-c", child), 5.0)
        running = threading.Thread(target=suite.run, args=(step,))
        running.start()
        deadline = time.monotonic() + 4.5
        while "[slow] early" not in path.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "[slow] early" in path.read_text() and "stopped" not in path.read_text()
        running.join()


def test_targets_say_measured_over_target_or_why_not():
    """One met, one missed, one whose rival could not run; the direction of each target counts."""
    sizes, case = gpu_suite.FULL, {"op": "linear_logprobs", "variant": "", "shape": gpu_suite.FULL.head}
    numbers = {"status": "ok", "median_ms": 25.0, "peak_mb": 1200.0, "launches": ""}
    rows = [
        {**case, **numbers, "pass": BOTH, "contender": "rlhf_fast (triton)"},
        {**case, **numbers, "pass": BOTH, "contender": "its GEMMs alone", "median_ms": 22.0},
        {**case, "pass": BOTH, "contender": "Liger", "status": "liger_kernel is not installed"},
    ]
    table = gpu_suite.targets_table(gpu_suite.Rows(rows), sizes, {"build": "ok"})
    assert "share of its 2 GEMMs | 0.88 | ≥ 0.85 | met |" in table
    assert "extra memory | 1.2 GB | ≤ 0.9 GB | missed |" in table
    assert "| the same over Liger's |  | ≥ 1.8x | not measured: Liger: liger_kernel is not installed |" in table
    late = gpu_suite.targets_table(gpu_suite.Rows([row | {"tests": "stopped"} for row in rows]), sizes, {})
    assert "| 0.88 | ≥ 0.85 | met, its tests stopped |" in late
    assert "| gae (512, 4096) |  | ≤ 15 µs | not measured: no row of rlhf_fast |" in table


def test_a_step_past_its_deadline_is_stopped_with_its_children_and_the_next_runs(tmp_path):
    with (tmp_path / "log").open("w") as log:
        suite = gpu_suite.Suite(tmp_path, log)
        child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
        suite.run(gpu_suite.Step("slow", gpu_suite.python("-c", child), 1.0))
        suite.run(gpu_suite.Step("bad", gpu_suite.python("-c", "print('why'); raise SystemExit(3)"), 20))
        suite.run(gpu_suite.Step("good", gpu_suite.python("-c", "pass"), 20))
    assert list(suite.verdicts.values()) == ["stopped after 1 s", "failed with 3", "ok"]
    assert "why" in (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("part", ["ops", "train"])
def test_a_dry_run_ends_with_every_step_well(part, tmp_path):
    """The very steps of a GPU, tiny: build, tests, both rounds of benchmarks; only a peer may be missing."""
    command = gpu_suite.python("-m", "bench.gpu_suite", "--part", part, "--dry-run", "--out", str(tmp_path))
    done = subprocess.run(command, check=False, cwd=gpu_suite.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    name = {"ops": "gpu-targets.md", "train": "gpu-train.md"}[part]
    targets, steps = (tmp_path / name).read_text().split("| step | |")
    verdicts = [line.rsplit("| ", 1)[1].rstrip(" |") for line in steps.splitlines()[2:] if line]
    assert len(verdicts) > 8 and set(verdicts) <= {"ok", "left out: no compute-sanitizer"}
    allowed = "is not installed|needs a CUDA device|no row|ok$|no (launches|percent_copy)|failed: TRL"
    unmeasured = [line for line in targets.splitlines() if "not measured" in line]
    assert not [line for line in unmeasured if not re.search(allowed, line.rstrip("| "))]
