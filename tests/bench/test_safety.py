"""The safety checks keep their promises when they are run, and their table keeps one row a run."""

from __future__ import annotations

import sys

import pytest

from bench import safety


def test_a_run_that_is_repeated_replaces_its_row(tmp_path):
    path = tmp_path / "x.csv"
    for row in ({"kind": "ppo", "seed": 1, "cost": 0.5}, {"kind": "grpo", "seed": 0, "cost": 0.1}):
        safety.add_row(path, row)
    safety.add_row(path, {"kind": "ppo", "seed": 1, "cost": 0.25})
    assert [(r["kind"], r["seed"], r["cost"]) for r in safety.read_rows(path)] == [
        ("grpo", "0", "0.1"),
        ("ppo", "1", "0.25"),
    ]


def test_sevens_are_what_is_paid_for_and_what_costs():
    assert safety.sevens(["077", "123", "7"]) == [2.0, 0.0, 1.0]
    assert safety.has_seven(["077", "123", "7"]) == [1.0, 0.0, 1.0]


@pytest.mark.slow
def test_the_guard_stops_a_cheat_in_time_and_a_cost_stays_within_its_limit(tmp_path, monkeypatch):
    """One seed of GRPO; with the SFT model it begins from, about ten minutes of a quiet core."""
    monkeypatch.setattr(sys, "argv", ["safety", "-o", str(tmp_path), "--seeds", "0", "--kinds", "grpo"])
    safety.main()
    (guard,), (safe,) = (safety.read_rows(tmp_path / f"{part}.csv") for part in ("guard", "safe"))
    before = float(guard["SFT accuracy"])
    assert guard["by"] and before - float(guard["accuracy when tripped"]) < 0.1
    assert float(guard["accuracy rolled back"]) > before - 0.05 > float(guard["accuracy unguarded"]) + 0.1
    assert float(safe["cost"]) <= safety.LIMIT < float(safe["SFT cost"])
    assert float(safe["reward"]) > float(safe["SFT reward"])
