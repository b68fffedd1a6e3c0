"""The benchmark of shared prompts compares gradients before it times, and writes down what it found."""

from __future__ import annotations

import csv

import pytest

from bench import shared_prefix
from rlhf_fast import DPOTrainer, GRPOTrainer
from rlhf_fast.models import attention


@pytest.fixture
def small(monkeypatch):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    monkeypatch.setattr(shared_prefix, "MODEL", {**shared_prefix.MODEL, **sizes})


@pytest.mark.parametrize("trainer", [GRPOTrainer, DPOTrainer])
def test_both_sides_are_measured_and_written_down(trainer, small, monkeypatch, tmp_path):
    case = shared_prefix.Case(trainer, 40, 8, 2, lora=trainer is DPOTrainer, target=1.4)
    monkeypatch.setattr(shared_prefix, "CASES", {"tried": case})
    rows = shared_prefix.measure("tried", case, rounds=2)
    assert [(r["sharing"], r["tokens"]) for r in rows] == [("off", 96), ("on", 56)]
    assert rows[1]["token_ratio"] == pytest.approx(96 / 56)
    assert rows[0]["ratio"] == 1.0 and rows[1]["ratio"] > 0.0
    assert 0.0 < rows[1]["gradient_difference"] < 1e-5
    shared_prefix.write(tmp_path / "x.csv", rows)
    text = shared_prefix.markdown(list(csv.DictReader((tmp_path / "x.csv").open())))
    assert "| tried | 40, 8, 2 | 96, 56 |" in text and "≥ 1.4" in text


def test_a_wrong_gradient_is_not_timed(small, monkeypatch):
    """Responses that see another's prompt only in part: two keys of it are taken for others."""
    right = attention.Segments.of

    def wrong(batch, implementation):
        segments = right(batch, implementation)
        for bucket in segments.buckets[0]:
            if bucket.prefix:
                bucket.keys[:, 0] = bucket.keys[:, 1]
        return segments

    monkeypatch.setattr(attention.Segments, "of", wrong)
    with pytest.raises(SystemExit, match="tried: gradients differ by .* nothing is timed"):
        shared_prefix.measure("tried", shared_prefix.Case(GRPOTrainer, 40, 8, 4), rounds=1)
