"""Pictures of a run. That they look right was looked at; here: which files, which curves, and the smoothing."""

import json
import math

import pytest

from rlhf_fast.run import plots
from rlhf_fast.run.plots import plot_run, smooth


def write(run_dir, rows):
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


def drawn(monkeypatch):
    """The series handed to each picture, without drawing them."""
    calls = {}
    monkeypatch.setattr(plots, "_draw", lambda path, run, series: calls.update({path.name: series}))
    return calls


@pytest.mark.parametrize("points", [1, 3, 200], ids=str)
def test_pictures_are_drawn_whatever_the_number_of_points(tmp_path, points):
    """1: no line to fit; 3: no smoothing; 200: smoothing, clipping of wild points, and a metric that is never finite."""
    rows = [
        {"step": s, "time": 1.0, "reward": s / 10, "loss": 9e9 if s == 100 else math.sin(s), "kl": None, "lr": 0.0}
        for s in range(1, points + 1)
    ]
    files = plot_run(write(tmp_path / "run [a$b$\\c]", rows))
    assert [f.name for f in files] == ["curves.png", "reward.png"]
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG")
        assert file.stat().st_size > 5000


def test_a_run_without_metrics_has_no_pictures(tmp_path):
    assert plot_run(tmp_path) == []
    assert plot_run(write(tmp_path, [{"step": 1, "loss": None, "nonfinite": {"loss": "nan"}}])) == []
    assert not (tmp_path / "plots").exists()


def test_the_key_metrics_come_first_and_each_keeps_its_own_steps(tmp_path, monkeypatch):
    calls = drawn(monkeypatch)
    rows = [
        {"step": 1, "grad_norm": 1.0, "loss": 3.0, "reward": 0.1, "time/train": 2.0, "epoch": 0.1},
        {"step": 2, "grad_norm": 1.0, "loss": None, "reward": 0.2, "nonfinite": {"loss": "inf"}},
        {"step": 2, "eval_loss": 5.0},
    ]
    plot_run(write(tmp_path, rows))
    assert list(calls["curves.png"]) == ["reward", "loss", "eval_loss", "grad_norm"]
    assert calls["curves.png"]["loss"] == ([1, 2], [3.0, math.inf])
    assert calls["curves.png"]["eval_loss"] == ([2], [5.0])
    assert calls["reward.png"] == {"reward": ([1, 2], [0.1, 0.2])}


def test_keys_and_headline_can_be_named(tmp_path, monkeypatch):
    calls = drawn(monkeypatch)
    run = write(tmp_path, [{"step": 1, "a": 1.0, "rewards/x y": 2.0}])
    files = plot_run(run, keys=["rewards/x y", "missing"], headline="a")
    assert [f.name for f in files] == ["curves.png", "a.png"]
    assert list(calls["curves.png"]) == ["rewards/x y"]
    assert plot_run(run, headline="rewards/x y")[1].name == "rewards-x-y.png"
    # unknown metrics only: what there is gets drawn
    assert list(calls["curves.png"]) == ["a", "rewards/x y"]


def test_smoothing_keeps_a_straight_line_to_its_ends():
    line = [0.5 * i - 3 for i in range(50)]
    assert smooth(line) == pytest.approx(line)
    assert smooth([*line[:20], math.nan, math.inf, *line[22:]]) == pytest.approx(line)
    assert smooth(line[:11]) == line[:11]


def test_smoothing_takes_noise_away():
    """Alternating +1, -1 around 0: a window of 2 * (140 // 14) + 1 = 21 leaves at most 1/21 inside, and its sign."""
    noise = [(-1.0) ** i for i in range(140)]
    assert max(map(abs, smooth(noise)[20:-20])) <= 1 / 21 + 1e-9
    assert max(map(abs, smooth(noise))) < 0.25


def test_smoothing_of_gaps_is_a_gap():
    values = [1.0] * 30 + [math.nan] * 30 + [2.0] * 30
    result = smooth(values)
    assert math.isnan(result[45])
    assert result[0] == pytest.approx(1.0)
    assert result[-1] == pytest.approx(2.0)
