"""What a run was, and what it came from, is in its folder: appended to, whatever happens, and without passwords."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from rlhf_fast.cli import main
from rlhf_fast.errors import UserError
from rlhf_fast.models.scratch import new_model
from rlhf_fast.run.record import FILE, REDACTED, Record, commit, lineage, read_record, redacted

SUMS = [{"prompt": f"{a}+1=", "chosen": str(a + 1), "rejected": "?"} for a in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("runs")
    new_model("nano", [row["prompt"] + row["chosen"] for row in SUMS] * 20, made / "base", vocab_size=300, quiet=True)
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    return made


def train(folder, kind, run, *flags):
    common = ["--dataset_name", folder / "rows.jsonl", "--output_dir", folder / run, "--quiet", "--save_steps", 1]
    return main([kind, *map(str, (*common, *flags))])


def test_a_ppo_run_knows_the_sft_and_the_reward_run_it_came_from(folder, capsys, monkeypatch):
    """Base -> SFT -> reward model on the SFT model -> PPO on both; a second call goes on with the same run."""
    steps = ("--max_steps", 1)
    assert train(folder, "sft", "sft", "--model_name_or_path", folder / "base", *steps) == 0
    assert train(folder, "reward", "reward", "--model_name_or_path", folder / "sft", *steps) == 0
    models = (
        "--model_name_or_path",
        folder / "sft",
        "--reward_model_path",
        folder / "reward",
        "--max_completion_length",
        4,
    )
    assert train(folder, "ppo", "ppo", *models, *steps) == 0
    assert train(folder, "ppo", "ppo", *models, "--max_steps", 2, "--resume") == 0
    lines = read_record(folder / "ppo")
    assert [line["event"] for line in lines] == ["start", "end", "resume", "end"]
    assert len({line["run"] for line in lines}) == 1
    assert [line["step"] for line in lines] == [0, 1, 1, 2]
    assert lines[-1]["outcome"] == "finished"
    assert "objective/scores" in lines[1]["figures"]
    assert "loss" in lines[-1]["figures"]
    parents = {parent["setting"]: parent for parent in lines[0]["lineage"]}
    sft, reward = read_record(folder / "sft")[0], read_record(folder / "reward")[0]
    assert parents["model_name_or_path"]["run"] == sft["run"]
    assert parents["reward_model_path"]["run"] == reward["run"]
    assert parents["reward_model_path"]["method"] == "reward"
    assert (parents["reward_model_path"]["step"], parents["reward_model_path"]["outcome"]) == (1, "finished")
    (grandparent,) = parents["reward_model_path"]["lineage"]
    assert grandparent["run"] == sft["run"]
    assert grandparent["lineage"][0]["path"] == str(folder / "base")
    assert lines[0]["data"]["train"]["sha256"] == lines[2]["data"]["train"]["sha256"] != sft["data"]["train"]["sha256"]
    assert lines[0]["config"]["max_completion_length"] == 4
    assert lines[0]["versions"]["torch"]
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "300")  # else the tables break their words
    assert main(["env", str(folder / "ppo")]) == 0
    shown = capsys.readouterr().out
    for part in (lines[0]["run"], "resume", "finished", "reward_model_path", "began from"):
        assert part in shown


def test_other_data_under_the_same_name_is_refused(folder, capsys, tmp_path):
    """As many rows, so that only the hash can tell."""
    models = ("--model_name_or_path", folder / "base")
    assert train(folder, "sft", "other", *models, "--max_steps", 1) == 0
    changed = [*SUMS[:-1], {**SUMS[-1], "chosen": "7"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in changed))
    assert train(folder, "sft", "other", *models, "--max_steps", 2, "--dataset_name", path, "--resume") == 2
    assert "are other ones than the checkpoint's run began with" in capsys.readouterr().err


def test_a_run_that_fails_says_how(tmp_path):
    with pytest.raises(UserError), Record(tmp_path, {"method": "sft"}, None) as record:
        record.step = 7
        raise UserError("the disk is full")
    end = read_record(tmp_path)[-1]
    assert (end["event"], end["step"], end["outcome"]) == ("end", 7, "failed: UserError: the disk is full")


def test_it_is_only_appended_to_and_a_torn_line_costs_itself(tmp_path):
    with Record(tmp_path, {"method": "sft"}, None):
        pass
    path = tmp_path / FILE
    before = path.read_bytes()
    path.write_bytes(before + b'{"event": "res')
    with Record(tmp_path, {"method": "sft"}, 3):
        pass
    assert path.read_bytes().startswith(before)
    lines = read_record(tmp_path)
    assert [line["event"] for line in lines] == ["start", "end", "resume", "end"]
    assert len({line["run"] for line in lines}) == 1
    with Record(tmp_path, {"method": "sft"}, None):
        pass
    assert len({line["run"] for line in read_record(tmp_path)}) == 2, "a fresh start is another run"


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ({"api_key": "abc", "max_tokens": 3, "eos_token": "x"}, {"api_key": REDACTED, "max_tokens": 3}),
        ({"judge": [{"password": "p", "model": "m"}]}, {"judge": [{"password": REDACTED, "model": "m"}]}),
        ({"url": "http://me:word@host:80/x"}, {"url": f"http://{REDACTED}@host:80/x"}),
        ({"note": "use hf_abcdefghij0123 here"}, {"note": f"use {REDACTED} here"}),
        ({"note": "sk-abcdefgh12345678"}, {"note": REDACTED}),
        ({"micro_batch_tokens": 64, "hf_home": "hf_home", "lr": float("inf")}, {"hf_home": "hf_home", "lr": "inf"}),
    ],
    ids=str,
)
def test_passwords_are_not_written(value, kept):
    out = redacted(value)
    assert {key: out[key] for key in kept} == kept


def test_a_checkout_is_known_by_its_commit():
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a checkout")
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert commit()["hash"] == head.stdout.strip()


def test_names_that_are_no_folders_have_no_lineage(tmp_path):
    assert lineage({"model_name_or_path": "Qwen/Qwen2.5-7B", "output_dir": str(tmp_path), "seed": 3, "x": None}) == []
