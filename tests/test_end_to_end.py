"""The whole road through the command line: every trainer for two steps on what the one before it made, and every mistake
answered in a sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_fast.cli import main
from rlhf_fast.run.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A model of two layers, and a file of each kind."""
    folder = tmp_path_factory.mktemp("road")
    sums = [(a, b) for a in range(1, 9) for b in range(1, 9)]
    files = {
        "sft": [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in sums],
        "pairs": [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a * 10 + b)} for a, b in sums],
        "prompts": [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in sums],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["new-model", "--preset", "nano", "--corpus", folder / "sft.jsonl", "-o", folder / "model"]
    assert main([str(a) for a in argv]) == 0
    return folder


def command(folder: Path, name: str, model: str, data: str, *more) -> list[str]:
    common = ["--model_name_or_path", folder / model, "--dataset_name", folder / f"{data}.jsonl"]
    run = ["--output_dir", folder / name, "--max_steps", 2, "--logging_steps", 1, "--quiet", "--learning_rate", "1e-3"]
    return [str(a) for a in (name, *common, *run, *more)]


@pytest.fixture(scope="module", params=["full", "lora"])
def road(request, workplace):
    """{command: its run folder}; the reward model and PPO start from the SFT run, as does GRPO."""
    folder = workplace / request.param
    folder.mkdir()
    for shared in ("model", "sft.jsonl", "pairs.jsonl", "prompts.jsonl"):
        (folder / shared).symlink_to(workplace / shared)
    lora = ["--use_peft", "--lora_r", 4] if request.param == "lora" else []
    rl = [
        "--max_completion_length",
        4,
        "--per_device_train_batch_size",
        8,
        "--eval_dataset_name",
        folder / "prompts.jsonl",
    ]
    rl += ["--num_eval_prompts", 4]
    for argv in (
        command(folder, "sft", "model", "sft", "--eval_dataset_name", folder / "sft.jsonl", *lora),
        command(folder, "reward", "model", "pairs", *lora),
        command(folder, "dpo", "sft", "pairs", *lora),
        command(folder, "ppo", "sft", "prompts", "--reward_model_path", folder / "reward", *rl, *lora),
        command(folder, "grpo", "sft", "prompts", "--reward_funcs", "answer", *rl, *lora),
    ):
        assert main(argv) == 0, argv
    return folder


HEADLINES = {
    "sft": ("loss", "mean_token_accuracy", "entropy", "eval_loss"),
    "reward": ("loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward"),
    "dpo": ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"),
    "grpo": (
        "reward",
        "reward_std",
        "rewards/answer/mean",
        "frac_reward_zero_std",
        "entropy",
        "completions/mean_length",
    )
    + (
        "clip_ratio/low_mean",
        "clip_ratio/high_mean",
        "clip_ratio/region_mean",
        "completions/clipped_ratio",
        "eval_reward",
    ),
    "ppo": (
        "objective/kl",
        "objective/entropy",
        "objective/scores",
        "objective/non_score_reward",
        "objective/rlhf_reward",
    )
    + ("policy/approxkl_avg", "policy/clipfrac_avg", "loss/policy_avg", "loss/value_avg", "val/ratio")
    + ("val/explained_variance", "rewards/reward_model/mean", "eval_reward"),
}


def test_every_trainer_logs_its_figures(road):
    for name, keys in HEADLINES.items():
        rows = read_metrics(road / name)
        logged = {key: value for row in rows for key, value in row.items()}
        assert {row["step"] for row in rows} == {1, 2}
        assert not {*keys, "grad_norm", "lr", "tokens_per_second"} - logged.keys(), name


def test_every_run_folder_is_a_model(road, capsys):
    """It answers prompts; a continued adapter run stays an adapter on the first base."""
    from rlhf_fast.models import load

    for name in ("sft", "dpo", "ppo", "grpo"):
        assert main(["generate", str(road / name), "--prompt", "3+4=", "--max_new_tokens", "3"]) == 0, (
            capsys.readouterr().err
        )
        policy = load(road / name)
        assert policy.adapters.names == (["policy"] if road.name == "lora" else [])
    reward = load(road / "reward")
    assert list(reward.heads) == ["reward"]
    assert reward.role == "reward"


def test_the_policys_training_starts_from_the_sft_run(road):
    """Not from the base: the first DPO log-probabilities are those that SFT reached."""
    rows = read_metrics(road / "dpo")
    assert rows[0]["rewards/margins"] == 0.0
    config = (road / "dpo" / "config.yaml").read_text()
    assert f"model_name_or_path: {road / 'sft'}" in config


# ---- mistakes


def make_bad_inputs(folder: Path) -> None:
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n{"prompt": "1+2=", "completion": \n')
    (folder / "columns.jsonl").write_text('{"prompt": "1+1=", "complation": "2"}\n')
    (folder / "null.jsonl").write_text(
        '{"prompt": "1+1=", "completion": "2"}\n{"prompt": "1+2=", "completion": null}\n'
    )
    (folder / "number.jsonl").write_text('{"prompt": "1+1=", "completion": 2}\n')
    (folder / "dictionary.yaml").write_text("learning_rat: 1\n")
    (folder / "word.yaml").write_text("learning_rate: fast\n")
    (folder / "tab.yaml").write_text("learning_rate: 1\n\tseed: 2\n")
    (folder / "no-tokenizer").mkdir()
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (folder / "no-tokenizer" / name).symlink_to(folder / "model" / name)
    (folder / "no-model").mkdir()


@pytest.fixture(scope="module")
def bad(workplace):
    make_bad_inputs(workplace)
    return workplace


# what is wrong -> arguments beside the usual ones, and what the one line must say; {} is the folder
MISTAKES = {
    "a missing file": (["sft", "--dataset_name", "{}/sfd.jsonl"], ["{}/sfd.jsonl", "sft.jsonl"]),
    "a wrong column": (["sft", "--dataset_name", "{}/columns.jsonl"], ["columns.jsonl", "`complation`", "Rename"]),
    "an empty data set": (["sft", "--dataset_name", "{}/empty.jsonl"], ["empty.jsonl", "empty"]),
    "a malformed line": (["sft", "--dataset_name", "{}/broken.jsonl"], ["broken.jsonl", "line 2"]),
    "a null value": (["sft", "--dataset_name", "{}/null.jsonl"], ["null.jsonl", "line 2", "`completion` is null"]),
    "a wrong type": (
        ["sft", "--dataset_name", "{}/number.jsonl"],
        ["number.jsonl", "line 1", "must be a string", "int 2"],
    ),
    "data of another kind": (["dpo", "--dataset_name", "{}/sft.jsonl"], ["sft.jsonl", "`chosen`", "`rejected`"]),
    "an unknown flag": (["sft", "--learning_rat", "1"], ["--learning_rat", "did you mean --learning_rate?"]),
    "an unknown key": (["sft", "--config", "{}/dictionary.yaml"], ["dictionary.yaml", "learning_rat", "learning_rate"]),
    "a wrong value in a file": (["sft", "--config", "{}/word.yaml"], ["word.yaml", "learning_rate", "'fast'"]),
    "broken YAML": (["sft", "--config", "{}/tab.yaml"], ["tab.yaml", "line 2"]),
    "a model without tokenizer": (["sft", "--model_name_or_path", "{}/no-tokenizer"], ["no-tokenizer", "no tokenizer"]),
    "a folder without model": (["sft", "--model_name_or_path", "{}/no-model"], ["no-model", "no config.json"]),
    "no such model folder": (["sft", "--model_name_or_path", "{}/modle"], ["{}/modle", "no such model folder"]),
    "an unknown loss": (["dpo", "--loss_type", "sigmiod"], ["loss_type is 'sigmiod'", "sigmoid"]),
    "an unknown reward": (["grpo", "--reward_funcs", "anser"], ["'anser'", "Did you mean 'answer'?"]),
    "no reward": (["grpo"], ["reward_funcs is empty"]),
    "no reward for PPO": (["ppo"], ["--reward_model_path"]),
    "a reward model that is none": (["ppo", "--reward_model_path", "{}/model"], ["{}/model", "rlhf-fast reward"]),
    "a reward without its column": (
        ["grpo", "--reward_funcs", "answer", "--dataset_name", "{}/sft.jsonl"],
        ["'answer'", "column"],
    ),
    "groups that do not fit": (
        ["grpo", "--reward_funcs", "answer", "--num_generations", "3"],
        ["num_generations is 3"],
    ),
    "nothing to resume": (["sft", "--resume"], ["no checkpoint"]),
    "a batch of nothing": (["sft", "--per_device_train_batch_size", "0"], ["per_device_train_batch_size is 0"]),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_message_and_exit_code_2(what, bad, tmp_path, capsys):
    """It names file, row or key, and what to do. No traceback, and no run folder that looks like a run."""
    (name, *more), said = MISTAKES[what]
    data = {"sft": "sft", "dpo": "pairs"}.get(name, "prompts")
    argv = [name, "--quiet", "--output_dir", str(tmp_path / "run"), *(a.format(bad) for a in more)]
    for key, value in (("--model_name_or_path", bad / "model"), ("--dataset_name", bad / f"{data}.jsonl")):
        argv += [key, str(value)] if key not in argv else []
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") <= 2
    for part in said:
        assert part.format(bad) in captured.err
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_so_it_is_in_a_process_of_its_own(bad, tmp_path):
    """``python -m rlhf_fast`` with a broken line in the data: the same message, code 2, and no traceback."""
    argv = [
        "sft",
        "--model_name_or_path",
        bad / "model",
        "--dataset_name",
        bad / "broken.jsonl",
        "--output_dir",
        tmp_path / "x",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_fast", *map(str, argv)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert f"{bad / 'broken.jsonl'}, line 2" in done.stderr
