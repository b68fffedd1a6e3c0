"""`rlhf-fast constitution` from prompts to data files: a scripted server, an interruption, and a tiny local model."""

from __future__ import annotations

import json

import pytest

from bench.scripted import ScriptedServer
from rlhf_fast.cli import main
from rlhf_fast.models.scratch import new_model

YAML = """\
critique_request: "CRITIQUE {critique}"
revision_request: "REVISE {revision}"
principles:
  - {name: calm, critique: find shouting, revision: be calm}
"""


def calmer(messages):
    last = messages[-1]["content"]
    if last.startswith("CRITIQUE"):
        return "It shouts."
    return messages[-4]["content"].replace("!", ".") if last.startswith("REVISE") else f"안녕 {last}!"


@pytest.fixture
def folder(tmp_path):
    rows = [{"prompt": f"질문 {i}"} for i in range(5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    (tmp_path / "calm.yaml").write_text(YAML)
    return tmp_path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_an_interrupted_command_goes_on_and_ends_with_all_files(folder, capsys):
    """The key is refused in the middle, at the eighth call: two of five critiques are there, and are not asked again."""
    out = folder / "out"
    with ScriptedServer(calmer, plan=[None] * 7 + [401]) as server:
        argv = ["constitution", str(folder / "prompts.jsonl"), "-o", str(out), "--url", server.url, "--rounds", "1"]
        argv += ["--constitution", str(folder / "calm.yaml"), "--concurrency", "1"]
        assert main(argv) == 2
        assert "RLHF_FAST_JUDGE_API_KEY is not set" in capsys.readouterr().err
        assert [row["response"] for row in read(out / "chain.jsonl")] == [f"안녕 질문 {i}!" for i in range(5)]
        assert not (out / "sft.jsonl").exists()
        assert main(argv) == 0
        assert len(server.calls) == 8 + 8
    assert [(r["prompt"], r["completion"]) for r in read(out / "sft.jsonl")] == [
        (f"질문 {i}", f"안녕 질문 {i}.") for i in range(5)
    ]
    assert [r["rejected"] for r in read(out / "pairs.jsonl")] == [f"안녕 질문 {i}!" for i in range(5)]
    assert [r["steps"][0]["critique"] for r in read(out / "chain.jsonl")] == ["It shouts."] * 5
    assert "안녕" in (out / "chain.jsonl").read_text(encoding="utf-8")
    report = json.loads((out / "chain.report.json").read_text(encoding="utf-8"))
    assert report["figures"]["finished/changed"] == 5 and report["figures"]["calls/answered now"] == 8


def test_a_tiny_local_model_runs_end_to_end_with_the_shipped_principles(folder, capsys):
    """Random weights, and half of the vocabulary ends a reply: some chains come to a revision, others to an empty reply."""
    model = new_model(
        "nano", folder / "prompts.jsonl", folder / "model", vocab_size=300, quiet=True, max_position_embeddings=4096
    )
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": list(range(0, 300, 3))}))
    out = folder / "out"
    argv = ["constitution", str(folder / "prompts.jsonl"), "-o", str(out), "--model", str(model), "--rounds", "1"]
    assert main([*argv, "--max_new_tokens", "50", "--temperature", "1"]) == 0
    chains = read(out / "chain.jsonl")
    finished = [chain for chain in chains if "revised" in chain]
    assert finished and all(chain.get("fault") in (None, "a reply was empty") for chain in chains)
    assert [row["completion"] for row in read(out / "sft.jsonl")] == [chain["revised"] for chain in finished]
    assert ("left out: a reply was empty" in capsys.readouterr().err) == (len(finished) < len(chains))
    before = (out / "chain.calls.jsonl").read_bytes()
    assert main([*argv, "--max_new_tokens", "50", "--temperature", "1"]) == 0
    assert (out / "chain.calls.jsonl").read_bytes() == before and read(out / "chain.jsonl") == chains


def test_replies_that_are_cut_are_no_data_and_are_said(folder, capsys):
    model = new_model("nano", folder / "prompts.jsonl", folder / "model", vocab_size=300, quiet=True)
    argv = ["constitution", str(folder / "prompts.jsonl"), "-o", str(folder / "out"), "--model", str(model)]
    assert main([*argv, "--max_new_tokens", "3", "--temperature", "1"]) == 0
    assert "5 prompts are left out: a reply was cut at max_new_tokens" in capsys.readouterr().err
    assert len(read(folder / "out" / "chain.calls.jsonl")) == 5 and read(folder / "out" / "sft.jsonl") == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--constitution", "nowhere.yaml"], "nowhere.yaml"),
        ([], "name the model to ask"),
    ],
)
def test_a_mistake_is_one_line(arguments, told, folder, capsys):
    assert main(["constitution", str(folder / "prompts.jsonl"), "-o", str(folder / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
