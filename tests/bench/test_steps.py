"""The bench of what a step spends beside learning: every function that it times exists, and what is nested counts once."""

from __future__ import annotations

import time

import pytest

from bench import steps
from rlhf_fast.run.means import Means
from rlhf_fast.trainers import loop


def test_all_that_is_timed_is_there_and_is_as_before_afterwards():
    meter, before = steps.Meter(), (Means.add, loop.read)
    with meter.installed({**steps.PER_STEP, **steps.PER_RUN}):
        assert Means.add is not before[0] and loop.read is not before[1]
        Means().add({"x": 1.0}, 1.0)
    assert (Means.add, loop.read) == before
    assert meter.calls == {"figures": 1}
    assert meter.seconds["figures"] > 0


def test_what_is_timed_within_another_counts_for_itself(monkeypatch):
    """By hand: 5 s in all, 2 of them inside."""
    clock = iter([0.0, 1.0, 3.0, 5.0])
    monkeypatch.setattr(time, "process_time", lambda: next(clock))
    meter = steps.Meter()
    inner = meter.timed("inner", lambda: None)
    meter.timed("outer", inner)()
    assert meter.seconds == {"inner": 2.0, "outer": 3.0}


def test_the_table_has_a_row_for_a_figure_and_a_column_for_a_method():
    common = {"work": "2 x (0 + 256)", "machine": "a machine", "threads": "1", "versions": "torch", "date": "today"}
    row = {"part": "guards", "figure": "all", "unit": "% of the steps", **common}
    text = steps.markdown([{**row, "method": "sft", "value": "0.5"}, {**row, "method": "ppo", "value": "0.25"}])
    assert "| | sft, 2 x (0 + 256) | ppo, 2 x (0 + 256) |" in text
    assert "| all (% of the steps) | 0.5 | 0.25 |" in text


@pytest.mark.slow
def test_a_run_is_measured(tmp_path):
    assert steps.main(["--methods", "sft", "--steps", "2", "--rounds", "2", "-o", str(tmp_path)]) == 0
    text = (tmp_path / "steps-cpu.md").read_text()
    assert "## guards" in text and "| on over off (times the CPU seconds) |" in text
