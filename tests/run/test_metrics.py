"""The metrics of a run: the file always, the bar for people, trackers when asked."""

import io
import json
import math

import pytest
import torch
from rich.console import Console

from rlhf_fast.errors import UserError
from rlhf_fast.run import metrics
from rlhf_fast.run.metrics import MetricsLog, format_duration, format_number, print_table, read_metrics


def lines(run_dir):
    return [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_every_log_is_one_line_of_json(tmp_path):
    with MetricsLog(tmp_path / "new" / "run", ["loss"], 10, quiet=True) as log:
        log.log(1, {"loss": 0.5, "count": 3, "on_device": torch.tensor(2.5, dtype=torch.bfloat16)})
        # readable while the run is alive
        first = lines(tmp_path / "new" / "run")
        log.log(2, {"loss": 0.25})
    assert [{k: v for k, v in line.items() if k != "time"} for line in first] == [
        {"step": 1, "loss": 0.5, "count": 3, "on_device": 2.5}
    ]
    second = lines(tmp_path / "new" / "run")[1]
    assert (second["step"], second["loss"]) == (2, 0.25)
    assert second["time"] >= first[0]["time"] >= 0


def test_nan_and_infinity_are_valid_json_and_come_back(tmp_path):
    with MetricsLog(tmp_path, ["loss"], 10, quiet=True) as log:
        log.log(1, {"loss": math.nan, "kl": -math.inf, "ratio": torch.tensor(math.inf), "fine": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    strict = json.loads(text, parse_constant=pytest.fail)
    assert strict["loss"] is None
    assert strict["nonfinite"] == {"loss": "nan", "kl": "-inf", "ratio": "inf"}
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["loss"])
    assert (row["kl"], row["ratio"], row["fine"]) == (-math.inf, math.inf, 1.0)
    assert "nonfinite" not in row


def test_what_is_no_number_is_refused(tmp_path):
    with MetricsLog(tmp_path, [], 10, quiet=True) as log, pytest.raises(TypeError, match="metric name is a str"):
        log.log(1, {"name": "x"})


def test_resuming_drops_lines_past_the_step_and_a_torn_one(tmp_path):
    """Killed at step 40 while writing; the checkpoint is of step 20."""
    with MetricsLog(tmp_path, ["loss"], 100, quiet=True) as log:
        for step in (10, 20, 30):
            log.log(step, {"loss": float(step)})
        log.log(20, {"eval_loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    with MetricsLog(tmp_path, ["loss"], 100, quiet=True, resume_step=20) as log:
        log.log(30, {"loss": -1.0})
    assert [(r["step"], r.get("loss")) for r in lines(tmp_path)] == [(10, 10.0), (20, 20.0), (20, None), (30, -1.0)]


def test_a_fresh_run_keeps_the_earlier_metrics_under_another_name(tmp_path):
    for loss in (1.0, 2.0, 3.0):
        with MetricsLog(tmp_path, ["loss"], 1, quiet=True) as log:
            log.log(1, {"loss": loss})
    assert [r["loss"] for r in lines(tmp_path)] == [3.0]
    kept = [json.loads((tmp_path / f"metrics-{n}.jsonl").read_text())["loss"] for n in (1, 2)]
    assert kept == [1.0, 2.0]


def test_reading_forgives_a_torn_last_line_and_no_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2')
    assert read_metrics(tmp_path) == [{"step": 1}]
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 1 is not JSON"):
        read_metrics(tmp_path)
    assert read_metrics(tmp_path / "nowhere") == []


def test_without_a_terminal_every_log_is_a_plain_line(tmp_path, capsys, monkeypatch):
    """At 2 of 10 steps after 4 seconds, 8 steps are left: 16 seconds."""
    clock = iter([100.0, 104.0, 104.0, 110.0, 110.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    with MetricsLog(tmp_path, ["reward", "kl"], 10) as log:
        log.log(2, {"loss": 1.0, "kl": 0.01234, "reward": 0.5})
        log.tick(3)
        log.print("half [way]")
        log.log(10, {"eval_reward": 1.0, "eval_loss": 9.0})
    assert capsys.readouterr().out.splitlines() == [
        "step  2/10  reward 0.5000  kl 0.0123  eta 0:16",
        "half [way]",
        "step 10/10  eval_reward 1",
    ]


def test_a_terminal_shows_a_bar_with_the_headline(tmp_path, monkeypatch):
    """The bar counts steps, resumes where the run does, and leaves the figures behind as lines."""
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120, highlight=False)
    monkeypatch.setattr(metrics, "Console", lambda **options: terminal)
    with MetricsLog(tmp_path, ["reward"], 10, resume_step=4) as log:
        log.tick(5, note="generating [1/2]")
        log.log(6, {"reward": 0.75})
        log.table("done", {"reward": 0.75})
    shown = screen.getvalue()
    assert "6/10" in shown
    assert "reward 0.7500" in shown
    assert "done" in shown
    assert "\x1b[?25h" in shown, "the cursor must come back"


def test_quiet_and_other_ranks_print_nothing(tmp_path, capsys):
    for folder, options in (("quiet", {"quiet": True}), ("rank1", {"enabled": False})):
        with MetricsLog(tmp_path / folder, ["loss"], 10, **options) as log:
            log.log(1, {"loss": 1.0})
            log.tick(2, "x")
            log.print("x")
            log.table("x", {"a": 1})
    assert capsys.readouterr().out.strip() == ""
    assert (tmp_path / "quiet" / "metrics.jsonl").exists()
    assert not (tmp_path / "rank1").exists()


def test_tensorboard_gets_the_same_figures(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = {"learning_rate": 1e-5, "report_to": ["tensorboard"], "none": None}
    with MetricsLog(tmp_path, ["loss"], 10, trackers=["tensorboard"], quiet=True, config=config) as log:
        log.log(3, {"loss": 0.5})
        log.log(6, {"loss": 0.25, "kl": math.nan})
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 0.5), (6, 0.25)]


def test_an_unknown_tracker_is_named(tmp_path):
    with pytest.raises(UserError, match="unknown tracker 'tensorbord'; known are .*tensorboard"):
        MetricsLog(tmp_path, [], 10, trackers="tensorbord", quiet=True)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234567, "1,234,567"),
        (0.5, "0.5000"),
        (12.0, "12"),
        (12.3456, "12.35"),
        (0.00012345, "0.0001234"),
        (1e-9, "1e-09"),
        (12345.6, "12,346"),
        (1.5e12, "1.5e+12"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (True, "True"),
    ],
)
def test_numbers_read_well(value, text):
    assert format_number(value) == text


def test_durations_read_well():
    assert [format_duration(s) for s in (0.4, 59.6, 3599, 3600, 100_000)] == [
        "0:00",
        "1:00",
        "59:59",
        "1:00:00",
        "27:46:40",
    ]


def test_a_table_takes_rows_or_a_mapping_and_any_text(capsys):
    print_table("result [held-out]", [("[before]", 0.25), ("after", 0.5)], ("policy", "accuracy"))
    print_table("figures", {"loss": 0.125})
    out = capsys.readouterr().out
    for part in ("result [held-out]", "[before]", "accuracy", "0.2500", "loss", "0.1250"):
        assert part in out


def test_names_in_any_script_are_written_as_they_are(tmp_path):
    with MetricsLog(tmp_path, ["정답률"], 1, quiet=True) as log:
        log.log(1, {"정답률": 0.5})
    assert '"정답률": 0.5' in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert read_metrics(tmp_path)[0]["정답률"] == 0.5
