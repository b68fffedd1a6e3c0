"""`rlhf-fast judge` from data to labels: through a scripted server, killed on the way, and with a tiny local model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.scripted import ScriptedServer
from rlhf_fast.cli import main
from rlhf_fast.models.scratch import new_model

ROOT = Path(__file__).resolve().parents[2]


def longer(messages):
    shown = re.findall(r"<response (.)>\n(.*?)\n</response", messages[0]["content"], re.DOTALL)
    return "[[" + " > ".join(name for name, _ in sorted(shown, key=lambda item: -len(item[1]))) + "]]"


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"질문 {i}", "chosen": "예" * (i + 2), "rejected": "no"[: i % 2 + 1]} for i in range(8)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_labels_report_and_answers_lie_side_by_side(data, tmp_path, capsys):
    out = tmp_path / "out" / "labels.jsonl"
    with ScriptedServer(longer, plan=[500, None, 429]) as server:
        argv = ["judge", str(data), "-o", str(out), "--url", server.url, "--backoff", "0.01"]
        assert main(argv) == 0
        assert len(server.calls) == 16 + 2
        printed = capsys.readouterr().out
        assert "pairs/decided" in printed and "people/accuracy on decided pairs" in printed
        rows = read(out)
        assert main(argv) == 0  # nothing is asked again
        assert len(server.calls) == 18 and read(out) == rows
    assert [row["prompt"] for row in rows] == [f"질문 {i}" for i in range(8)]
    assert all(len(row["chosen"]) > len(row["rejected"]) for row in rows)
    assert "질문" in out.read_text(encoding="utf-8")
    report = json.loads((tmp_path / "out" / "labels.report.json").read_text(encoding="utf-8"))
    assert report["figures"]["people/accuracy on decided pairs"] == 1.0 and report["notes"] == []
    assert len(read(tmp_path / "out" / "labels.calls.jsonl")) == 16


def test_a_kill_in_the_middle_never_repeats_a_call_that_was_answered(data, tmp_path):
    """kill -9 while the sixth and seventh call hang: the five answered before are on the disk, and only eleven are asked."""
    out = tmp_path / "labels.jsonl"
    with ScriptedServer(longer, plan=[None] * 5 + ["hang"] * 2) as server:
        argv = ["judge", str(data), "-o", str(out), "--url", server.url, "--concurrency", "2"]
        command = [sys.executable, "-m", "rlhf_fast", *argv]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        calls = out.with_name("labels.calls.jsonl")

        def kill(count):
            if count == 7:
                os.kill(child.pid, signal.SIGKILL)

        server.before = kill
        child.wait(timeout=120)
        assert child.returncode == -signal.SIGKILL and not out.exists()
        assert len(server.answered) == 5 == len(read(calls))
        before = [json.dumps(body, sort_keys=True) for body in server.answered]
        server.answered.clear()
        assert main(argv) == 0
        after = [json.dumps(body, sort_keys=True) for body in server.answered]
    assert len(after) == 11 and not set(before) & set(after)
    assert len(read(out)) == 8


def test_the_commands_of_the_readme_run_as_they_stand(tmp_path, monkeypatch, capsys):
    """Those that ask an AI, on a scripted server in OpenAI's place."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("### Labels from an AI") : text.index("## The kernels as a library")]
    commands = re.findall(r"^rlhf-fast ((?:judge|constitution) .*?)(?: +#.*)?$", section, re.MULTILINE)
    commands = [command for command in commands if "--policy" not in command]  # that one has a test of its own
    assert [command.split()[0] for command in commands] == ["judge", "constitution"]
    rows = [{"prompt": "p", "completion": "x" * n} for n in range(1, 5)]
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_prompts.jsonl").write_text('{"prompt": "p"}\n')
    monkeypatch.chdir(tmp_path)
    with ScriptedServer(lambda m: longer(m) if "<response A>" in m[0]["content"] else f"{len(m)}") as server:
        for command in commands:
            assert main(command.replace("https://api.openai.com/v1", server.url).split()) == 0
    assert [len(r) for r in read(tmp_path / "rankings.jsonl")[0]["responses"]] == [4, 3, 2, 1]
    assert read(tmp_path / "constitution" / "pairs.jsonl")[0]["rejected"] == "1"
    assert (tmp_path / "constitution" / "sft.jsonl").is_file()


def test_a_tiny_local_model_runs_end_to_end(data, tmp_path, capsys):
    """It has learned nothing: no verdict, so no label; the replies are kept all the same."""
    model = new_model("nano", data, tmp_path / "model", vocab_size=300, quiet=True, max_position_embeddings=4096)
    out = tmp_path / "labels.jsonl"
    argv = ["judge", str(data), "-o", str(out), "--model", str(model), "--max_new_tokens", "4", "--limit", "3"]
    assert main([*argv, "--temperature", "1"]) == 0
    captured = capsys.readouterr()
    assert "6 replies ended without a readable verdict" in captured.err
    assert read(out) == [] and len(read(tmp_path / "labels.calls.jsonl")) == 6
    assert main([*argv, "--temperature", "1"]) == 0
    assert "holds 6 answers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["-o", "{folder}/x.jsonl"], "name the model to ask"),
        (["-o", "{folder}/data.jsonl", "--url", "http://127.0.0.1:1"], "was not written by this command"),
        (["-o", "{folder}/x.jsonl", "--url", "http://127.0.0.1:1"], "cannot be reached"),
        (["-o", "{folder}/x.jsonl", "--url", "http://127.0.0.1:1", "--extra", "[1]"], "should be a JSON object"),
        (["-o", "{folder}/x.jsonl", "--rubric", "nowhere.txt"], "rubric: nowhere.txt cannot be read"),
        (["--model", "m"], "required: -o/--output"),
    ],
)
def test_a_mistake_is_one_line_and_loses_nothing(arguments, told, data, tmp_path, capsys):
    before = data.read_bytes()
    assert main(["judge", str(data), *(a.format(folder=tmp_path) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error and error.count("\n") == 1
    assert data.read_bytes() == before
