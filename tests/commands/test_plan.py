"""``rlhf-fast plan``: every model, method, length and GPU gets an answer, at once, for people and for programs."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_fast.cli import main
from rlhf_fast.run.config import build_config
from rlhf_fast.trainers.sft import SFTConfig

ROOT = Path(__file__).resolve().parents[2]


def ask(capsys, *argv):
    code = main(["plan", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("model", ["Qwen2.5-7B", "Llama-3.1-8B"])
@pytest.mark.parametrize("method", ["sft", "reward", "dpo", "ppo", "grpo"])
def test_every_question_has_an_answer(model, method, capsys):
    began = time.perf_counter()
    for length in (2048, 8192, 32768):
        options = ["--model", model, "--method", method, "--length", length]
        code, out, _ = ask(capsys, *options, "--json")
        answers = json.loads(out)
        assert list(answers) == ["24", "48", "80", "141"]
        assert code == (0 if all(a["fits"] for a in answers.values()) else 1)
        for answer in answers.values():
            assert answer["fits"] or answer["changes"]
            assert answer["settings"]["micro_batch_tokens"] >= length
            assert sum(p["bytes"] for p in answer["parts"]) > answer["tensors"]
            assert ("rollout_batch_size" in answer["settings"]) == (method in ("ppo", "grpo"))
        sizes = [answers[gpu] for gpu in ("24", "48", "80", "141")]
        assert all(big["fits"] or not small["fits"] for small, big in itertools.pairwise(sizes))
        assert sizes[-1]["fits"]
    assert time.perf_counter() - began < 30, "twelve plans"


def test_the_answer_needs_no_torch_and_no_transformers():
    code = (
        "import sys; from rlhf_fast.cli import main; main(['plan', '--model', 'Qwen2.5-7B', '--gpu', '24']); "
        "bad = {'torch', 'transformers', 'numpy', 'accelerate'} & set(sys.modules); assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fits on --gpu 24" in done.stdout


def test_one_gpu_shows_every_part_and_settings_that_a_trainer_takes(capsys):
    code, out, _ = ask(capsys, "--model", "Qwen2.5-7B", "--method", "ppo", "--gpu", "rtx4090")
    assert code == 0
    for part in ("linear layers", "head", "adapters: policy and critic", "inputs of the layers", "keys and values"):
        assert part in out
    lines = out.split("settings:\n")[1].splitlines()
    chosen = dict(line.strip().split(": ") for line in lines if line.startswith("  "))
    assert {"use_peft", "micro_batch_tokens", "gradient_checkpointing", "offload_activations"} <= chosen.keys()
    taken = {"micro_batch_tokens": int(chosen["micro_batch_tokens"])}
    taken |= {key: chosen[key] == "true" for key in ("gradient_checkpointing", "offload_activations", "use_peft")}
    assert build_config(SFTConfig, taken).micro_batch_tokens == taken["micro_batch_tokens"]


def test_several_gpus_get_a_line_each_and_what_does_not_fit_a_remedy(capsys):
    code, out, _ = ask(capsys, "--model", "Qwen2.5-7B", "--method", "dpo", "--length", 32768, "--gpu", 24, 80)
    assert code == 1
    assert "too much" in out
    assert "--gpu 24 would do with: sequences of at most 16,384 tokens" in out
    assert "--gpu 80 would" not in out


def test_what_is_given_is_not_chosen(capsys):
    given = ["--base", "nf4", "--micro_batch_tokens", 3000, "--offload_activations", "true", "--json", "--gpu", 80]
    answer = json.loads(ask(capsys, "--model", "Qwen2.5-7B", *given)[1])["80"]
    assert answer["base"] == "nf4"
    assert answer["settings"]["micro_batch_tokens"] == 3000
    assert answer["settings"]["offload_activations"] is True
    thrifty = ["--optim", "adamw_8bit", "--lora_r", 64]
    needs = [
        json.loads(ask(capsys, "--model", "Qwen2.5-7B", *given, *more)[1])["80"]["needed"] for more in ([], thrifty)
    ]
    assert needs[0] != needs[1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "Qwen3.5-7B"], "Qwen3.5-7B: no folder with a config.json and no size known here"),
        (["--model", "Qwen2.5-7B", "--gpu", "huge"], "--gpu huge: give a size in GB"),
        (["--model", "Qwen2.5-7B", "--length", "0"], "'0' is not a whole number of at least 1"),
        (["--model", "Qwen2.5-7B", "--offload_activations", "maybe"], "'maybe' is neither true nor false"),
        (["--model", "Qwen2.5-7B", "--full", "--base", "nf4"], "leave one of --full and --base nf4 out"),
        (["--model", "Qwen2.5-7B", "--prompt_length", "4096"], "--prompt_length 4096 exceeds --length 2048"),
        (["--gpu", "24"], "the following arguments are required: --model"),
    ],
)
def test_mistakes_are_answered_with_a_fix(argv, message, capsys):
    code, _, err = ask(capsys, *argv)
    assert code == 2
    assert message in err
