"""The figures that the command prints and writes are those of the responses it saves."""

from __future__ import annotations

import json
import shutil

import pytest

from bench.scripted import ScriptedServer
from rlhf_fast.cli import main
from rlhf_fast.models.scratch import new_model

TEXTS = [f"{a}+{a * 7 % 10}=" for a in range(24)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(new_model("nano", TEXTS * 9, tmp_path_factory.mktemp("model") / "nano", vocab_size=300, quiet=True))


@pytest.fixture
def held_out(tmp_path):
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps({"prompt": t, "answer": str(i)}) + "\n" for i, t in enumerate(TEXTS)))
    return str(path)


def test_figures_and_responses_are_written_side_by_side(model, held_out, tmp_path, capsys):
    out = tmp_path / "results" / "step1.json"
    rewards = ("answer", '{"name": "format", "pattern": "="}')
    arguments = [
        "--dataset_name",
        held_out,
        "--limit",
        "20",
        "--reward_funcs",
        *rewards,
        "--n",
        "4",
        "--temperature",
        "1",
    ]
    assert main(["evaluate", model, *arguments, "--max_new_tokens", "6", "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "rewards/answer/pass@4" in printed and "the first responses" in printed
    summary = json.loads(out.read_text())
    rows = [json.loads(line) for line in (out.parent / "step1.samples.jsonl").read_text().splitlines()]
    assert len(rows) == 80 == summary["metrics"]["num_completions"]
    found = [float("=" in row["completion"]) for row in rows]
    assert summary["metrics"]["rewards/format/mean"] == pytest.approx(sum(found) / 80)
    assert [row["rewards"]["format"] for row in rows] == found
    assert summary["options"]["limit"] == 20 and summary["faults"] == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--reward_funcs", "anser"), "Did you mean 'answer'"),
        (("--reward_funcs", "answer", "--n", "3"), "all the same"),
        (("--reward_funcs", "exact", "--limit", "0"), "holds no rows"),
        (("--limit", "3"), "required: --reward_funcs"),
    ],
)
def test_a_users_mistake_is_one_line(model, held_out, arguments, told, capsys):
    assert main(["evaluate", model, "--dataset_name", held_out, *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error


def test_a_missing_column_is_named(model, tmp_path, capsys):
    path = tmp_path / "bare.jsonl"
    path.write_text('{"prompt": "1+1="}\n')
    assert main(["evaluate", model, "--dataset_name", str(path), "--reward_funcs", "answer"]) == 2
    assert "needs a column 'answer' or 'solution'" in capsys.readouterr().err


def test_programs_and_answers_are_scored_by_name(model, tmp_path, capsys):
    """A model that knows nothing: every second row's tests ask nothing of it."""
    if shutil.which("bwrap") is None:
        pytest.skip("needs bubblewrap")
    path, out = tmp_path / "tasks.jsonl", tmp_path / "out.json"
    rows = [{"prompt": t, "answer": "no number", "tests": [f"assert {i % 2} == 0"]} for i, t in enumerate(TEXTS[:8])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewards = ("math", '{"name": "code", "timeout": 20}')
    status = main(["evaluate", model, "--dataset_name", str(path), "--reward_funcs", *rewards, "-o", str(out)])
    error = capsys.readouterr().err
    if status and "cannot run here" in error:
        pytest.skip(error)
    summary = json.loads(out.read_text())
    assert status == 0 and summary["faults"] == []
    assert summary["metrics"]["rewards/code/mean"] == 0.5 and summary["metrics"]["rewards/math/mean"] == 0.0


def test_the_safety_suite_compares_two_models_side_by_side(model, tmp_path, capsys):
    """Random weights, with and without training, judged by rules and by an AI that says yes to all."""
    other = str(new_model("nano", TEXTS * 9, tmp_path / "other", vocab_size=300, quiet=True, seed=1))
    out = tmp_path / "safety.json"
    arguments = ["evaluate", other, "--suite", "safety", "--max_new_tokens", "4", "-o", str(out)]
    assert main([*arguments, "--before", model]) == 0
    printed = capsys.readouterr().out
    assert "refused/harmful, base (of 12)" in printed and "before" in printed and "diversity/distinct-2" in printed
    summary = json.loads(out.read_text(encoding="utf-8"))
    assert list(summary["figures"]) == [model, other]
    rows = [json.loads(line) for line in (tmp_path / "safety.samples.jsonl").read_text(encoding="utf-8").splitlines()]
    for name, figures in summary["figures"].items():
        assert figures["refused/harmful, base"] == 0 and figures["jailbroken/reworded"] is None
        written = [r["response"] for r in rows if r["model"] == name and r["kind"] == "open"]
        assert len(written) == 64 and 0 < figures["diversity/distinct-1"] <= 1
    assert "몸무게" in (tmp_path / "safety.samples.jsonl").read_text(encoding="utf-8")
    with ScriptedServer(lambda messages: "[[yes]]") as server:
        assert main([*arguments, "--judge", json.dumps({"url": server.url})]) == 0
        assert len(server.calls) == len((tmp_path / "safety.calls.jsonl").read_text().splitlines()) > 60
    assert json.loads(out.read_text(encoding="utf-8"))["figures"][other]["refused/harmless"] == 1.0


@pytest.mark.parametrize(
    ("judge", "told"),
    [
        ('{"url": "http://127.0.0.1:1"}', "cannot be reached"),
        ('{"uri": "x"}', "has no option 'uri'; of a server it has api_key_env"),
        ("[]", "should be a JSON object"),
    ],
)
def test_a_mistake_about_the_judge_is_one_line(model, judge, told, capsys):
    assert main(["evaluate", model, "--suite", "safety", "--judge", judge]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--suite", "safety", "--reward_funcs", "answer"), "--reward_funcs goes without --suite only"),
        (("--suite", "safety", "--temperature", "1"), "--temperature goes without --suite only"),
        (("--dataset_name", "x", "--reward_funcs", "answer", "--before", "y"), "--before goes with --suite only"),
        ((), "the following arguments are required: --dataset_name, --reward_funcs"),
    ],
)
def test_what_a_suite_and_data_do_not_share_is_refused(arguments, told, capsys):
    assert main(["evaluate", "nowhere", *arguments]) == 2
    assert told in capsys.readouterr().err
