"""Two processes that share every window make the steps of one process with the whole of it."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlhf_fast.models import load
from tests.rollout.conftest import Served

RUNNER = Path(__file__).with_name("processes.py")
WORDS = ["a", "hello", "to be", "x+y=z", "no", "seventeen", "q", "well, well", "ok", "end.", "i"]
EXAMPLES = [{"prompt": f"{i} ", "completion": w} for i, w in enumerate(WORDS)]
PAIRS = [{"prompt": e["prompt"], "chosen": e["completion"], "rejected": "no " + e["prompt"]} for e in EXAMPLES]
LABELLED = [{**e, "label": i % 3 > 0} for i, e in enumerate(EXAMPLES)]
PROMPTS = [{"prompt": f"{i} "} for i in range(3)]

ASK = [{"prompt": r["prompt"]} for r in EXAMPLES]


def cases(folder: Path, model: Path, processes: int, servers: list[str]) -> dict:
    """The same global batch: 8 examples, or 2 groups of 4 responses. The last windows are ragged or a single row.

    Args:
        servers: URLs of one that answers, and of one that does not answer everybody.
    """
    common = {"quiet": True, "logging_steps": 1, "learning_rate": 1e-3, "lora_r": 4, "num_train_epochs": 1}
    sft = {"packing": False, "per_device_train_batch_size": 8 // processes // 2, "gradient_accumulation_steps": 2}
    grpo = {"num_generations": 4, "num_iterations": 2, "beta": 0.1, "max_completion_length": 5}
    grpo |= {"per_device_train_batch_size": 8 // processes, "gradient_checkpointing": False, "max_steps": 4}
    ppo = {"num_ppo_epochs": 2, "kl_target": 1.0, "kl_horizon": 10, "max_completion_length": 5}
    ppo |= {"per_device_train_batch_size": 8 // processes}
    pairs = {"per_device_train_batch_size": 8 // processes // 2, "gradient_accumulation_steps": 2}
    served = {**grpo, "use_peft": True, "use_vllm": processes > 1, "vllm_importance_sampling_correction": False}
    served |= {"vllm_enable_sleep_mode": True, "vllm_server_base_url": servers[0]}
    sorted_pairs = {
        **pairs,
        "loss_type": ["aot", "bco", "sft"],
        "precompute_ref_log_probs": True,
        "num_train_epochs": 2,
    }
    table = {
        "sft full": ("sft", EXAMPLES, sft),
        "sft lora": ("sft", EXAMPLES, {**sft, "use_peft": True}),
        "grpo full": ("grpo", PROMPTS, grpo),
        "grpo lora": ("grpo", PROMPTS, {**grpo, "use_peft": True}),
        # groups of the whole batch are compared, and those that are all alike replaced, wherever they are
        "grpo whitened": (
            "grpo",
            PROMPTS,
            {**grpo, "scale_rewards": "whiten", "dynamic_sampling_rounds": 2, "kl_coef": 0.1}
            | {"cost_funcs": [{"name": "length", "max": 3}], "cost_limit": -1.0, "lambda_lr": 1.0},
        ),
        "grpo batch": ("grpo", PROMPTS, {**grpo, "scale_rewards": "batch", "loss_type": "grpo"}),
        # one process samples by itself, two from a server
        "grpo served": ("grpo", PROMPTS, {**served, "dynamic_sampling_rounds": 2}),
        "grpo broken": ("grpo", PROMPTS, {**served, "vllm_server_base_url": servers[1]}),
        "dpo full": ("dpo", PAIRS, sorted_pairs),
        "kto lora": ("kto", LABELLED, {**pairs, "use_peft": True, "num_train_epochs": 2, "learning_rate": 1e-2}),
        "reward full": ("reward", PAIRS, {**pairs, "num_heads": 3}),
        # 9 rows: a last window with fewer rows than processes
        "sft one row": ("sft", EXAMPLES[:9], sft),
        "ppo full": ("ppo", ASK, {**ppo, "normalize_rewards": True}),
        "safe ppo": (
            "safe-ppo",
            ASK,
            {**ppo, "cost_funcs": [{"name": "length", "max": 3}], "lambda_lr": 1.0},
        ),
        "ppo lora": ("ppo", ASK, {**ppo, "use_peft": True}),
    }
    short = {"micro_batch_tokens": 60, "memory_check": True, "num_train_epochs": 2, "learning_rate": 1e-2}
    table |= {
        "sft short": ("sft", EXAMPLES, {**sft, **short}),
        "kto short": ("kto", LABELLED, {**pairs, **short}),
        "aot short": ("dpo", PAIRS, {**pairs, **short, "loss_type": "aot"}),
    }
    halved = {"micro_batch_tokens": 60, "num_train_epochs": 2, "learning_rate": 1e-2}
    table |= {
        "sft halved": ("sft", EXAMPLES, {**sft, **halved}),
        "ppo halved": ("ppo", ASK, {**ppo, **halved, "use_peft": True, "num_train_epochs": 1, "learning_rate": 1e-3}),
        "sft too long": ("sft", EXAMPLES, {**sft, **halved}),
        "ppo alarmed": ("ppo", ASK, {**ppo, "alarm_limits": {"kl": 1e-9}}),
    }
    held = {"short": 25, "halved": 15, "long": 3}
    return {
        name: {
            **({"last_holds": held[name.split()[-1]]} if name.split()[-1] in held else {}),
            "kind": kind,
            "model": str(model),
            "rows": rows,
            "settings": {**common, **more, "output_dir": str(folder / name.replace(" ", "-"))},
        }
        for name, (kind, rows, more) in table.items()
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory, tokenizer):
    """{name: (one process, rank 0 of two, rank 1 of two)}"""
    folder = tmp_path_factory.mktemp("processes")
    save_model(folder / "model", tokenizer)
    deaf = functools.partial(Deaf, ear=tokenizer(PROMPTS[2]["prompt"])["input_ids"][0])
    served = [
        Served(load(folder / "model", device="cpu"), wrap, slots=8, name=str(folder / "model")).start()
        for wrap in (None, deaf)
    ]
    workers = []
    for processes in (1, 2):
        path = folder / f"cases-of-{processes}.json"
        path.write_text(
            json.dumps(cases(folder / str(processes), folder / "model", processes, [s.url for s in served]))
        )
        workers += start(path, processes)
    try:
        said = [worker.communicate(timeout=600)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
        for server in served:
            server.stop()
    assert [w.returncode for w in workers] == [0, 0, 0], "\n".join(said)
    notes = [folder / f"cases-of-{n}.rank{rank}" for n, rank in ((1, 0), (2, 0), (2, 1))]
    parts = [json.loads(path.read_text()) for path in notes]
    return {name: [part[name] for part in parts] for name in parts[0]}


class Deaf:
    """Stands before a server and answers 500 to prompts that begin with the token ``ear``."""

    def __init__(self, app, ear):
        self.app, self.ear = app, ear

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["path"] != "/v1/completions":
            await self.app(scope, receive, send)
            return
        first = await receive()
        prompt = json.loads(first["body"])["prompt"]
        waiting = iter([first])

        async def replay():
            return next(waiting, None) or await receive()

        if prompt[0] == self.ear:
            await send({"type": "http.response.start", "status": 500, "headers": []})
            await send({"type": "http.response.body", "body": b"not you"})
        else:
            await self.app(scope, replay, send)


def start(path: Path, processes: int, launcher: dict | None = None) -> list[subprocess.Popen]:
    """One training: a plain process, or several started as torchrun starts them, with more of a ``launcher``'s environment."""
    common = {
        **os.environ,
        **(launcher or {}),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(RUNNER.parents[2]),
    }
    ranks = [{}]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        common |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    command = [sys.executable, str(RUNNER), str(path)]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen(command, env=common | rank, **output) for rank in ranks]


def save_model(folder, tokenizer):
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2}
    config = Qwen2Config(
        **sizes, vocab_size=len(tokenizer), eos_token_id=0, bos_token_id=None, tie_word_embeddings=False
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


SAME = ["sft full", "sft lora", "dpo full", "kto lora", "reward full"]
SAME += ["sft short", "kto short", "aot short", "sft halved", "ppo halved"]
SAME += ["grpo served", "grpo full", "grpo lora", "grpo whitened", "grpo batch", "ppo full", "ppo lora"]


# figures of a log that do not depend on who has which rows
KEPT = (
    "loss",
    "lr",
    "num_tokens",
    "grad_norm",
    "reward",
    "kl",
    "entropy",
    "mean_token_accuracy",
    "completions/mean_length",
    "eval_loss",
    "objective/scores",
    "objective/kl",
    "rewards/chosen",
    "rewards/rejected",
    "disagreement",
    "eval_ece",
)


@pytest.mark.parametrize("name", SAME)
def test_two_processes_make_the_steps_of_one(name, results):
    one, two, _ = results[name]
    assert len(one["steps"]) == len(two["steps"])
    for alone, shared in zip(one["steps"], two["steps"]):
        figures = {k: v for k, v in alone.items() if k in KEPT}
        assert {k: shared[k] for k in figures} == pytest.approx(figures, abs=1e-5, rel=1e-5)
    assert any(s["loss"] != one["steps"][0]["loss"] for s in one["steps"] if "loss" in s)
    # norms: a bias that began at 0 is a few steps of 1e-3 long, and its rounding is that of the steps
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-5, abs=1e-6)


def test_a_server_that_leaves_one_process_without_answers_stops_and_saves_both(results):
    """Neither waits for the other for ever: who has its answers learns that the other has none."""
    both = [r["error"] for r in results["grpo broken"][1:]]
    assert [kind for kind, _ in both] == ["RolloutError"] * 2
    asked = [said for _, said in both if "process" not in said.partition("rollout:")[0]]
    heard = [said for _, said in both if "process" in said.partition("rollout:")[0]]
    assert len(asked) == len(heard) == 1
    assert "no samples for prompt 0 of 1: http://127.0.0.1" in asked[0] and "(not you), after 4 tries" in asked[0]
    assert f"process {both.index(['RolloutError', asked[0]])}: {asked[0].partition(' (saved')[0]}" in heard[0]
    assert all("continue with --resume" in said for _, said in both)


def test_all_ranks_end_with_the_same_weights(results):
    for name, (_, first, second) in results.items():
        if "error" in first:
            continue
        assert first["weights"] == second["weights"], name


def test_a_last_window_with_fewer_rows_than_processes_is_filled_up(results):
    one, two, _ = results["sft one row"]
    assert [s["step"] for s in one["steps"]] == [s["step"] for s in two["steps"]]


def test_the_kl_controller_is_one_for_all_ranks(results):
    """It adapts to the responses of all processes: after the first batch it is where one process has it."""
    one, two, _ = results["ppo lora"]
    coefficients = [[s["objective/kl_coef"] for s in r["steps"] if "objective/kl_coef" in s] for r in (one, two)]
    assert abs(coefficients[0][1] / coefficients[0][0] - 1) > 0.01
    assert coefficients[1] == pytest.approx(coefficients[0], rel=1e-4)


@pytest.mark.parametrize("name", ["sft short", "kto short", "aot short", "sft halved", "ppo halved"])
def test_what_one_process_has_no_memory_for_is_halved_on_all(name, results):
    """60 tokens do not fit into the last one, nor do 30, before the run or in it; nobody waits for who stopped half way."""
    _, first, last = results[name]
    assert first["budget"] == last["budget"] <= (15 if "halved" in name else 25)


def test_a_record_that_one_process_has_no_memory_for_ends_both_with_its_sentence(results):
    both = [r["error"] for r in results["sft too long"][1:]]
    assert both[0] == both[1]
    assert both[0][0] == "UserError"
    assert (
        "out of memory at step 1 in process 1, in a micro-batch of" in both[0][1] and "one record; set " in both[0][1]
    )


def test_an_alarm_is_that_of_all_processes_and_ends_them_with_one_sentence(results):
    """The figure is the mean over the tokens of both; either alone has another."""
    one, first, second = (r["error"] for r in results["ppo alarmed"])
    assert first == second
    assert first[0] == "StepRefused" and "step 4 is not taken: the policy is" in first[1]  # the first pass warms up
    assert "(saved at step 3; continue with --resume)" in first[1]
    figures = [float(e[1].partition("the policy is ")[2].partition(" nats")[0]) for e in (one, first)]
    assert figures[1] == pytest.approx(figures[0], rel=2e-2)
