"""The part ``train`` of the GPU suite: its calls are ones that bench.train understands, its targets read the right rows."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

import pytest

from bench import gpu_suite, gpu_train, train
from bench.report import machine


@pytest.mark.parametrize("stage", gpu_train.STAGES, ids=lambda stage: stage.name)
def test_bench_train_understands_every_stage(stage):
    asked = train.parse(["--model", gpu_train.MODEL, *stage.arguments])
    assert asked.model == [gpu_train.MODEL]
    dry = train.parse(gpu_train.dry_arguments(stage))
    assert (dry.model, dry.bits, dry.steps, dry.cap_gb) == (["cpu"], [32], 1, None)
    assert (dry.methods, dry.max_context, dry.set, dry.peers) == (
        asked.methods,
        asked.max_context,
        asked.set,
        asked.peers,
    )


def test_targets_are_measured_on_the_rows_they_name(tmp_path):
    """A run with offload is no run without it; a missed target says so, and one without a row says why."""
    base = {name: "" for name in train.COLUMNS} | {"side": "ours", "method": "sft", "bits": "4", "settings": "{}"}
    offload = {"settings": '{"offload_activations": true}', "peak_gb": "7.4"}
    rows = [
        {**base, **offload},
        {**base, "status": "ok", "peak_gb": "7.5", "ratio": "1.52", "memory_ratio": "0.85"},
        {**base, "side": "TRL", "peak_gb": "8.8"},
        {**base, "method": "ppo", "cap_gb": "24.0", "status": "failed: out of memory"},
        {**base, "method": train.LONGEST, "cap_gb": "24.0", "longest_row": "81920", "settings": "{}"},
    ]
    with (tmp_path / "train-cuda.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, train.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    table = gpu_train.targets(tmp_path, {"QLoRA SFT": "ok"}, dry=False).splitlines()
    found = {line.split("|")[1].strip(): line.split("|")[2:5] for line in table if line.startswith("| ")}
    assert [x.strip() for x in found["QLoRA SFT, speed over TRL"]] == ["1.52x", "≥ 1.3x", "met"]
    assert [x.strip() for x in found["QLoRA SFT, memory over TRL"]] == ["0.85x", "≤ 0.8x", "missed"]
    assert [x.strip() for x in found["QLoRA SFT, peak"]] == ["7.5 GiB", "≤ 7.8 GiB", "met"]
    assert [x.strip() for x in found["QLoRA SFT with offload, peak"]] == ["7.4 GiB", "≤ 7 GiB", "missed"]
    assert found["PPO QLoRA, 1k tokens, on 24 GB"][2].strip() == "not measured: failed: out of memory"
    assert found["LoRA SFT, speed over TRL"][2].strip() == "not measured: no row"
    assert found["longest SFT row in 24.0 GiB"][0].strip() == "81920 tokens"


def rows_of(stage: gpu_train.Stage, **more) -> list[dict[str, str]]:
    """The rows that a dry run of the stage writes when all goes well."""
    args = train.parse(gpu_train.dry_arguments(stage))
    jobs = [job for race in train.races(args, "cpu", Path()) for job in race]
    measured = {"status": "ok", "first_loss": 9.01, "tokens_per_second": 2345.0}
    return [{**train.about(job), **measured, **more} for job in jobs]


def test_a_second_call_takes_up_what_is_open_then_what_failed(tmp_path, monkeypatch):
    """Complete stages are skipped; one with a failed row goes last; one that cannot end in time is left out."""
    first, second, third = stages = gpu_train.chosen("qlora,qlora-offload,ppo-24")
    train.write(tmp_path, "cpu", rows_of(second) + rows_of(first, status="failed: out of memory"))
    found = gpu_train.standing(tmp_path, dry=True)
    assert [found[s.name] for s in stages] == ["failed", "complete", "open"]
    monkeypatch.setattr(gpu_train, "_prepare", lambda *args, **options: None)
    ran = []
    monkeypatch.setattr(gpu_suite.Suite, "run", lambda suite, *steps, **more: ran.extend(s.name for s in steps))
    for again, budget, want in (
        (False, 1e6, [third.title, first.title]),
        (True, 1e6, [s.title for s in stages]),
        (False, third.seconds / 2 - 1, [first.title]),
        (False, 1.0, []),
    ):
        ran.clear()
        with (tmp_path / "log").open("w") as log:
            suite = gpu_suite.Suite(tmp_path, log, budget)
            gpu_train.run_train(suite, True, list(stages), tmp_path / "models", again)
        assert ran == want
    assert suite.verdicts == dict.fromkeys([third.title, first.title], "left out: no time, call again")


def test_rows_of_another_machine_other_work_or_a_run_cut_short_are_run_again(tmp_path):
    (stage,) = gpu_train.chosen("qlora-offload")
    for change in (
        {"machine": "another"},
        {"work": "1 x (0 + 8)"},
        {"first_loss": None},
        {"status": "stopped after 9 s"},
    ):
        train.write(tmp_path, "cpu", rows_of(stage, **change))
        assert gpu_train.standing(tmp_path, dry=True)[stage.name] != "complete", change
    train.write(tmp_path, "cpu", rows_of(stage))
    assert gpu_train.standing(tmp_path, dry=True)[stage.name] == "complete"


def test_rows_that_are_kept_keep_their_numbers_and_their_date(tmp_path):
    row = rows_of(gpu_train.STAGES[2], date="2020-01-01", longest_row=131072)[0]
    train.write(tmp_path, "cpu", [row])
    (kept,) = train.finished(tmp_path, "cpu").values()
    assert (kept["date"], kept["longest_row"], kept["ratio"]) == ("2020-01-01", 131072, None)
    train.write(tmp_path, "cpu", [kept])
    assert list(train.finished(tmp_path, "cpu").values()) == [kept]
    assert kept["machine"] == machine("cpu")


def test_stages_are_chosen_by_name_in_the_order_of_their_worth():
    assert [s.name for s in gpu_train.chosen("ppo-24, qlora")] == ["qlora", "ppo-24"]
    assert gpu_train.chosen("") == list(gpu_train.STAGES)
    with pytest.raises(
        argparse.ArgumentTypeError, match="unknown stage ppo; known: qlora, lora, qlora-offload, ppo-24"
    ):
        gpu_train.chosen("ppo")


def test_what_the_issue_asks_for_comes_first_and_a_call_has_time_for_it():
    """No stage alone is longer than what a call has left once it has built; the targets' rows are in the first seven."""
    assert [s.name for s in gpu_train.STAGES[7:]] == ["grpo", "dpo"]
    assert max(s.seconds for s in gpu_train.STAGES) < gpu_suite.BUDGET - 200


def test_folders_of_models_stay_where_they_were_asked_for_and_go_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_train, "_prepare", lambda suite, dry, folders, tested: made.append(folders))
    for models in (tmp_path / "models", None):
        made = []
        (tmp_path / "models").mkdir(exist_ok=True)
        with (tmp_path / "log").open("w") as log:
            gpu_train.run_train(gpu_suite.Suite(tmp_path, log), True, [], models)
        assert made[0].exists() is (models is not None)


def test_without_trl_its_row_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    job = train.Job("TRL", "sft", "cpu", 32, "", train.Work(0, 8, 1), 1)
    assert train.run(job, limit=1)["status"] == "trl is not installed"


def test_a_report_after_every_step_is_a_row_even_if_the_run_is_stopped(capsys):
    clock = train.Clock(train.Job("ours", "sft", "cpu", 32, "", train.Work(0, 8, 2), 2))
    for _ in range(train.UNCOUNTED + 2):
        clock.step()
    lines = [json.loads(x.removeprefix("RESULT ")) for x in capsys.readouterr().out.splitlines()]
    assert [x["steps"] for x in lines] == [1, 2]
    assert all(x["tokens_per_second"] > 0 for x in lines)
