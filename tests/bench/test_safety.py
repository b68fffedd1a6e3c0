"""The safety checks keep their promises when they are run."""

from __future__ import annotations

import json
import sys

import pytest

from bench import alarms, safety
from bench.report import read_text


def test_sevens_are_what_is_paid_for_and_what_costs():
    assert safety.sevens(["077", "123", "7"]) == [2.0, 0.0, 1.0]
    assert safety.has_seven(["077", "123", "7"]) == [1.0, 0.0, 1.0]


def test_alarms_of_runs_elsewhere_are_counted_and_runs_without_a_guard_left_out(tmp_path):
    runs = {
        "seed-3/addition/ppo/rlhf_fast": [{"guard/reward": x / 10} for x in range(20)],
        "seed-3/sft": [{"loss": 1.0}],
    }
    runs["seed-3/addition/ppo/rlhf_fast"][7]["guard/tripped/repeat"] = 1.0
    for name, rows in runs.items():
        (tmp_path / name).mkdir(parents=True)
        lines = [json.dumps({"step": step, "time": 0.0, **row}) for step, row in enumerate(rows, start=1)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    alarms.main(["-o", str(out), "--seeds", "", "--also", str(tmp_path)])
    (row,) = read_text(out / "alarms.csv")
    assert row == {
        "run": "addition/ppo", "seed": "3", "batches": "20", "reward, first tenth": "0.05", "reward, last tenth": "1.85",
        "alarms": "repeat at 8",
    }  # fmt: skip


@pytest.mark.slow
def test_the_guard_stops_a_cheat_in_time_and_a_cost_stays_within_its_limit(tmp_path, monkeypatch):
    """One seed of GRPO; with the SFT model it begins from, about ten minutes of a quiet core."""
    monkeypatch.setattr(sys, "argv", ["safety", "-o", str(tmp_path), "--seeds", "0", "--kinds", "grpo"])
    safety.main()
    (guard,), (safe,) = (read_text(tmp_path / f"{part}.csv") for part in ("guard", "safe"))
    before = float(guard["SFT accuracy"])
    assert guard["by"] and before - float(guard["accuracy when tripped"]) < 0.1
    assert float(guard["accuracy rolled back"]) > before - 0.05 > float(guard["accuracy unguarded"]) + 0.1
    assert float(safe["cost"]) <= safety.LIMIT < float(safe["SFT cost"])
    assert float(safe["reward"]) > float(safe["SFT reward"])
