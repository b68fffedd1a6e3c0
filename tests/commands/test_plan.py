"""``rlhf-fast plan``: every model, method, length and GPU gets an answer, at once, for people and for programs."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_fast import DPOConfig, GRPOConfig, KTOConfig, PPOConfig, RewardConfig, SafePPOConfig
from rlhf_fast.cli import main
from rlhf_fast.models.scratch import new_model
from rlhf_fast.run.config import build_config, save_config
from rlhf_fast.run.memory import METHODS, REFERENCED
from rlhf_fast.trainers.sft import SFTConfig, SFTTrainer

ROOT = Path(__file__).resolve().parents[2]


def ask(capsys, *argv):
    code = main(["plan", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("model", ["Qwen2.5-7B", "Llama-3.1-8B"])
@pytest.mark.parametrize("method", METHODS)
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
            assert ("rollout_batch_size" in answer["settings"]) == (method in ("ppo", "safe-ppo", "grpo"))
        sizes = [answers[gpu] for gpu in ("24", "48", "80", "141")]
        assert all(big["fits"] or not small["fits"] for small, big in itertools.pairwise(sizes))
        assert sizes[-1]["fits"]
    assert time.perf_counter() - began < 30, "twelve plans"


def test_the_answer_needs_no_torch_and_no_transformers(run_folder):
    code = (
        "import sys; from rlhf_fast.cli import main; main(['plan', '--model', 'Qwen2.5-7B', '--gpu', '24']); "
        "main(['plan', '--model', sys.argv[1]]); "
        "bad = {'torch', 'transformers', 'numpy', 'accelerate'} & set(sys.modules); assert not bad, bad"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run_folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "fits on --gpu 24" in done.stdout


def test_one_gpu_shows_every_part_and_settings_that_a_trainer_takes(capsys):
    code, out, _ = ask(capsys, "--model", "Qwen2.5-7B", "--method", "ppo", "--gpu", "rtx4090")
    assert code == 0
    for part in ("linear layers", "head", "both adapters", "inputs of the layers", "keys and values"):
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
    assert "NO" in out
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


def one(capsys, *argv):
    """The answer for 80 GB."""
    return json.loads(ask(capsys, *argv, "--json", "--gpu", 80)[1])["80"]


def part(answer, name: str) -> float:
    return sum(p["bytes"] for p in answer["parts"] if name in p["name"])


@pytest.fixture
def run_folder(tmp_path):
    """A run of QLoRA, as far as its files matter: rank 64 on queries, values and the head, moments in 8 bit."""
    folder = tmp_path / "runs" / "sft-7b"
    folder.mkdir(parents=True)
    adapter = {"base_model_name_or_path": "Qwen/Qwen2.5-7B-Instruct", "r": 64}
    adapter["target_modules"] = ["lm_head", "v_proj", "q_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "rlhf_fast.json").write_text(json.dumps({"role": "policy", "base": {"format": "nf4 on cuda"}}))
    save_config(SFTConfig(use_peft=True, load_in_4bit=True, optim="adamw_8bit"), folder / "config.yaml")
    return folder


def test_a_run_folder_goes_on_as_it_was_trained(run_folder, capsys):
    answer = one(capsys, "--model", run_folder, "--method", "grpo")
    assert answer["model"] == "Qwen/Qwen2.5-7B"
    assert (answer["base"], answer["optim"], answer["lora_r"]) == ("nf4", "adamw_8bit", 64)
    assert answer["lora_target_modules"] == ["lm_head", "q_proj", "v_proj"]
    adapter = 64 * (28 * (3584 + 3584 + 3584 + 512) + 3584 + 152_064)
    assert part(answer, "adapter, float32") == 4 * adapter
    flags = ["--lora_r", 8, "--base", "bf16", "--optim", "adamw", "--lora_target_modules", "all-linear"]
    changed = one(capsys, "--model", run_folder, "--method", "grpo", *flags)
    assert [changed[k] for k in ("lora_r", "base", "optim", "lora_target_modules")] == [
        8,
        "bf16",
        "adamw",
        "all-linear",
    ]


def test_what_goes_on_from_a_trained_adapter_keeps_it_as_the_reference(run_folder, capsys):
    """Its 4-byte copy, besides the reward model's in PPO; GRPO needs none unless beta says so, SFT never."""
    adapter = part(one(capsys, "--model", run_folder), "adapter, float32")
    for method, more, frozen in (
        ("sft", [], 0),
        ("dpo", [], 1),
        ("grpo", [], 0),
        ("grpo", ["--beta", 0.1], 1),
        ("ppo", [], 2),
        ("safe-ppo", [], 3),
    ):
        answer = one(capsys, "--model", run_folder, "--method", method, *more)
        assert part(answer, "frozen adapters") == frozen * adapter
    fresh = one(capsys, "--model", "Qwen2.5-7B", "--method", "dpo")
    assert part(fresh, "frozen adapters") == 0, "the base is the reference"


def test_the_files_of_a_real_run_are_those_that_the_plan_reads(tmp_path, capsys):
    model = new_model("nano", ["a b c"], tmp_path / "base", quiet=True)
    settings = {"use_peft": True, "lora_r": 3, "lora_target_modules": ["q_proj", "lm_head"], "fused_layers": False}
    config = SFTConfig(**settings, output_dir=str(tmp_path / "run"), max_steps=1, quiet=True)
    trainer = SFTTrainer(str(model), config, train_dataset=[{"prompt": "a", "completion": " b"}] * 8)
    trainer.train()
    answer = one(capsys, "--model", tmp_path / "run", "--method", "dpo")
    assert (answer["base"], answer["kernels"], answer["reference"]) == ("bf16", "peft", True)
    trained = sum(p.numel() for p in trainer.policy.parameters() if p.requires_grad)
    assert part(answer, "adapter, float32") == part(answer, "frozen adapters") == 4 * trained
    config = SFTConfig(output_dir=str(tmp_path / "full"), max_steps=1, quiet=True)
    SFTTrainer(str(model), config, train_dataset=[{"prompt": "a", "completion": " b"}] * 8).train()
    assert one(capsys, "--model", tmp_path / "full")["full"]
    assert not one(capsys, "--model", tmp_path / "full", "--full", "false")["full"]


def test_a_recipe_is_planned_as_its_trainer_would_run_it(capsys):
    """grpo-7b-qlora: prompts of 512 tokens, 768 sampled, 64 at a time, groups of 8 with each prompt read once."""
    answer = one(capsys, "--config", "grpo-7b-qlora")
    assert (answer["method"], answer["length"], answer["base"], answer["lora_r"]) == ("grpo", 1280, "nf4", 16)
    assert answer["settings"]["rollout_batch_size"] == 64
    assert part(answer, "mask of the prompts") == 64 / 8 * 512**2
    assert answer["settings"]["micro_batch_tokens"] <= 128 * 1280, "no larger than an optimizer step"
    flags = ["--model", "Llama-3.1-8B", "--num_generations", 4, "--length", 2048, "--base", "bf16", "--method", "grpo"]
    changed = one(capsys, "--config", "grpo-7b-qlora", *flags)
    assert (changed["model"], changed["length"], changed["base"]) == ("meta-llama/Llama-3.1-8B", 2048, "bf16")
    assert part(changed, "mask of the prompts") == 64 / 4 * 512**2


def test_a_recipe_of_kto_is_planned_with_responses_one_by_one(capsys):
    answer = one(capsys, "--config", "kto-7b-lora", "--micro_batch_tokens", 1)
    assert (answer["method"], answer["length"]) == ("kto", 2048)
    assert answer["settings"]["micro_batch_tokens"] == 2048, "no pairs"


def test_methods_have_a_reference_without_a_config_where_their_default_configs_need_one():
    configs = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig, "kto": KTOConfig}
    configs |= {"ppo": PPOConfig, "safe-ppo": SafePPOConfig, "grpo": GRPOConfig}
    assert configs.keys() == set(METHODS)
    assert {method for method, config in configs.items() if config().needs_reference} == set(REFERENCED)


@pytest.mark.parametrize(
    ("method", "lines", "frozen"),
    [
        ("dpo", [], 1),
        ("dpo", ["loss_type: [orpo]"], 0),
        ("dpo", ["loss_type: [simpo]"], 0),
        ("dpo", ["loss_type: [cpo]"], 0),
        ("dpo", ["loss_type: [sft, sigmoid]"], 1),
        ("kto", [], 1),
        ("grpo", [], 0),
        ("grpo", ["beta: 0.1"], 1),
        ("grpo", ["kl_coef: 0.1"], 1),
        ("ppo", ["reward_model_path: runs/a"], 2),
        ("ppo", ["reward_model_path: [runs/a, runs/b, runs/c]"], 4),
        ("ppo", ["reward_funcs: [answer]"], 1),
        ("safe-ppo", ["reward_model_path: runs/a"], 3),
        ("safe-ppo", ["reward_model_path: runs/a", "cost_model_path: [runs/b, runs/c]"], 4),
        ("safe-ppo", ["reward_funcs: [answer]", "cost_funcs: [length]"], 1),
        ("grpo", ["cost_model_path: runs/a"], 1),
    ],
)
@pytest.mark.parametrize("full", ["true", "false"])
def test_frozen_models_are_counted_as_the_trainer_would_hold_them(
    method, lines, frozen, full, tmp_path, run_folder, capsys
):
    """Whole models in full fine-tuning, adapters where a trained one goes on."""
    path = tmp_path / f"{method}.yaml"
    path.write_text("\n".join(["max_steps: 1", *lines]))
    model = "Qwen2.5-7B" if full == "true" else run_folder
    answer = one(capsys, "--config", path, "--model", model, "--full", full, "--length", 512)
    adapter = 64 * (28 * (3584 + 3584 + 3584 + 512) + 3584 + 152_064)
    what, one_of_them = ("models", part(answer, "weights, float32")) if full == "true" else ("adapters", 4 * adapter)
    assert part(answer, f"frozen {what}") == frozen * one_of_them


@pytest.mark.parametrize(
    ("mode", "sleeps", "share"), [("colocate", "false", 0.4), ("colocate", "true", 0), ("server", "false", 0)]
)
def test_what_a_vllm_on_the_same_gpu_keeps_is_not_there_for_training(mode, sleeps, share, tmp_path, capsys):
    path = tmp_path / "grpo.yaml"
    lines = ["use_peft: true", "use_vllm: true", "vllm_gpu_memory_utilization: 0.4"]
    lines += [f"vllm_mode: {mode}", f"vllm_enable_sleep_mode: {sleeps}"]
    path.write_text("\n".join(lines))
    answer = one(capsys, "--config", path, "--model", "Qwen2.5-7B")
    taken = {p["name"]: p["bytes"] for p in answer["parts"] if "vLLM" in p["name"]}
    asleep = {"vLLM while it samples": 0.4 * 80e9} if sleeps == "true" else {}
    assert taken == ({"vLLM": share * 80e9} if share else asleep)
    assert not [p for p in answer["parts"] if p["when"] in ("prefill", "decode")], "the policy writes nothing here"
    path.write_text("\n".join([*lines, "eval_dataset_name: held_out.jsonl"]))
    evaluated = one(capsys, "--config", path, "--model", "Qwen2.5-7B")
    assert [p for p in evaluated["parts"] if p["when"] == "decode"], "but its own evaluations"
    assert answer["needed"] <= answer["available"]


def test_a_config_of_ones_own_says_what_stays_and_what_the_plan_chooses(tmp_path, capsys, run_folder):
    path = tmp_path / "dpo-mine.yaml"
    lines = ["use_peft: true", "max_length: 3000", "gradient_checkpointing: true", "offload_activations: true"]
    lines += ["optim: paged_adamw_8bit", "lora_r: 4", "micro_batch_tokens: 7000", "lora_target_modules: '.*_proj'"]
    path.write_text("\n".join(["model_name_or_path: Qwen/Qwen2.5-7B", *lines]))
    answer = one(capsys, "--config", path)
    assert (answer["method"], answer["length"], answer["optim"]) == ("dpo", 3000, "paged_adamw_8bit")
    assert answer["settings"] == {
        "micro_batch_tokens": 7000,
        "gradient_checkpointing": True,
        "offload_activations": True,
    }
    everything = one(capsys, "--model", "Qwen2.5-7B", "--lora_r", 4)
    assert part(answer, "adapter, float32") == part(everything, "adapter, float32"), "the pattern is all of a layer"
    assert answer["host"] > 0
    assert f"and {answer['host'] / 1e9:.1f} GB of host memory" in ask(capsys, "--config", path, "--gpu", 80)[1]
    # going on from a run: its adapter, and a base that was held in 4 bit
    onward = one(capsys, "--config", path, "--model", run_folder)
    assert (onward["lora_r"], onward["base"], onward["optim"]) == (64, "nf4", "paged_adamw_8bit")
    assert onward["reference"]
    path.write_text("max_lenth: 10")
    assert "did you mean max_length?" in ask(capsys, "--config", path)[2]
    rl = tmp_path / "grpo.yaml"
    rl.write_text("model_name_or_path: Qwen/Qwen2.5-7B\nmax_prompt_length: null\nuse_peft: true")
    assert "leaves max_prompt_length open" in ask(capsys, "--config", rl)[2]
    assert one(capsys, "--config", rl, "--length", 4096)["length"] == 4096


@pytest.mark.parametrize("method", METHODS)
def test_tables_fit_80_columns_without_a_broken_word(method, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    asked = ["--model", "Llama-3.1-8B", "--method", method]
    thrifty = ["--optim", "paged_adamw_8bit", "--lora_target_modules", "q_proj", "lm_head", "--length", 32768]
    for more in ([], ["--full"], [*thrifty, "--base", "nf4", "--offload_activations", "true"]):
        _, out, _ = ask(capsys, *asked, *more, "--gpu", "24", "80", "141", "rtx4090")
        (header,) = [line for line in out.splitlines() if "GPU" in line and "GB" in line and "┃" in line]
        assert all(word in header for word in ("fits", "base", "tokens", "recompute", "offload"))
        tables = [line for line in out.splitlines() if line[:1] in "┏┃┡│└"]
        _, out, _ = ask(capsys, *asked, *more, "--gpu", "141")
        tables += [line for line in out.splitlines() if line[:1] in "┏┃┡│└"]
        assert max(map(len, tables)) <= 80
        for row in one(capsys, *asked, *more)["parts"]:
            assert f"│ {row['name']} " in out or row["name"].startswith(("logits of", "keys and values of"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "Qwen3.5-7B"], "Qwen3.5-7B: no folder with a config.json and no size known here"),
        (["--model", "Qwen2.5-7B", "--gpu", "huge"], "--gpu huge: give a size in GB"),
        (["--model", "Qwen2.5-7B", "--length", "0"], "'0' is not a whole number of at least 1"),
        (["--model", "Qwen2.5-7B", "--offload_activations", "maybe"], "'maybe' is neither true nor false"),
        (["--model", "Qwen2.5-7B", "--full", "--base", "nf4"], "leave one of --full and --base nf4 out"),
        (["--model", "Qwen2.5-7B", "--prompt_length", "4096"], "--prompt_length 4096 exceeds --length 2048"),
        (["--gpu", "24"], "say which model: --model NAME or FOLDER, or model_name_or_path in the --config file"),
        (["--model", "Qwen2.5-7B", "--full", "perhaps"], "'perhaps' is neither true nor false"),
        (
            ["--model", "Qwen2.5-7B", "--lora_target_modules", "query", "value"],
            "query, value matches no layer of Qwen/",
        ),
        (["--config", "sft-8b-lora"], "sft-8b-lora does not exist"),
        (["--config", "mine.yaml"], "--config mine.yaml: its name does not begin with a method; add --method METHOD"),
    ],
)
def test_mistakes_are_answered_with_a_fix(argv, message, capsys):
    code, _, err = ask(capsys, *argv)
    assert code == 2
    assert message in err
