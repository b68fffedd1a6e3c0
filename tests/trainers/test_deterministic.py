"""``deterministic``: the same run ends with the same bits, whatever cannot repeat them is refused, and nothing is left behind."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os

import pytest
import torch

from rlhf_fast import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, PPOConfig, SFTConfig, SFTTrainer
from rlhf_fast.errors import UserError
from rlhf_fast.run.determinism import WORKSPACE
from tests.trainers.test_faults import ROWS, hold
from tests.trainers.test_processes import EXAMPLES, PAIRS, PROMPTS, save_model, start

PROMPTED = [{"prompt": row["prompt"]} for row in ROWS]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What the mode tells cuBLAS stays for the process, and is not this one's."""
    monkeypatch.setenv(WORKSPACE, ":4096:8")


def test_two_processes_that_hash_otherwise_end_with_the_same_bits(tmp_path, tokenizer):
    """Each trainer with its sampling, twice; Python draws another order of its sets in each process."""
    save_model(tmp_path / "model", tokenizer)
    ask = [{"prompt": row["prompt"]} for row in EXAMPLES]
    short = {"max_completion_length": 5, "num_train_epochs": 1}
    table = {
        "sft": (EXAMPLES, {"packing": False}),
        "dpo": (PAIRS, {"use_peft": True, "precompute_ref_log_probs": True}),
        "grpo": (PROMPTS, {"use_peft": True, "num_generations": 4, "num_iterations": 2, "beta": 0.1, **short}),
        "ppo": (ask, {"use_peft": True, "num_ppo_epochs": 2, **short}),
    }
    workers = []
    for seed in "12":
        common = {"quiet": True, "logging_steps": 1, "learning_rate": 1e-2, "lora_r": 4, "deterministic": True}
        cases = {
            kind: {"kind": kind, "model": str(tmp_path / "model"), "rows": rows}
            | {"settings": {**common, **more, "output_dir": str(tmp_path / seed / kind)}}
            for kind, (rows, more) in table.items()
        }
        path = tmp_path / f"cases-{seed}.json"
        path.write_text(json.dumps(cases))
        workers += start(path, 1, {"PYTHONHASHSEED": seed})
    said = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [w.returncode for w in workers] == [0, 0], "\n".join(said)
    for kind in table:
        first, second = (
            {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / s / kind).glob("*.safetensors")}
            for s in "12"
        )
        assert first and first == second, kind


@pytest.mark.parametrize("ends", ["well", "in an error"])
def test_the_mode_is_on_in_every_pass_and_off_after_the_run(ends, make_model, tokenizer, settings, run):
    """Sampling, rewards, losses, backward passes and evaluations; another trainer of the process is not in it."""
    seen = set()

    def note(where):
        seen.add((where, torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic))

    def reward(completions, **_):
        note("reward")
        return [float(i) for i in range(len(completions))]

    def made(deterministic):
        args = GRPOConfig(
            **settings(num_generations=2, max_completion_length=3, max_steps=1, deterministic=deterministic)
        )
        given = {"train_dataset": PROMPTED, "eval_dataset": PROMPTED[:1], "processing_class": tokenizer}
        trainer = GRPOTrainer(make_model(), reward, args, **given)
        embeddings = trainer.policy.model.get_input_embeddings()
        embeddings.register_forward_hook(lambda *_: note("pass" if torch.is_grad_enabled() else "sampling"))
        embeddings.weight.register_hook(lambda gradient: note("backward"))
        return trainer

    trainer, other = made(True), made(False)
    assert not torch.are_deterministic_algorithms_enabled()
    if ends == "in an error":
        trainer.after_step = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError) if ends == "in an error" else contextlib.nullcontext():
        run(trainer)
    assert seen == {(where, True, True) for where in ("reward", "sampling", "pass", "backward")}
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic
    seen.clear()
    trainer.evaluate()
    assert seen == {(where, True, True) for where in ("reward", "sampling")}
    seen.clear()
    run(other)
    assert seen == {(where, False, False) for where in ("reward", "sampling", "pass", "backward")}


def test_the_references_log_probabilities_are_computed_in_it_too(make_model, tokenizer, settings, monkeypatch):
    seen = []
    computed = DPOTrainer.complete_data

    def noted(self, records):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return computed(self, records)

    monkeypatch.setattr(DPOTrainer, "complete_data", noted)
    pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "no"} for r in ROWS]
    for wanted in (True, False):
        args = DPOConfig(**settings(precompute_ref_log_probs=True, deterministic=wanted))
        DPOTrainer(make_model(), args, train_dataset=pairs, processing_class=tokenizer)
    assert seen == [True, False]


def test_an_operation_that_cannot_repeat_its_bits_ends_the_run_with_its_place(make_model, tokenizer, settings, run):
    """``put_`` into one place twice, as a loss of somebody's own may do; without the mode it passes."""

    def made(deterministic):
        args = SFTConfig(**settings(max_steps=1, deterministic=deterministic))
        trainer = SFTTrainer(make_model(), args, train_dataset=ROWS, processing_class=tokenizer)
        losses = trainer.losses

        def own(records, window):
            for loss, metrics, weight in losses(records, window):
                torch.zeros(3).put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))
                yield loss, metrics, weight

        trainer.losses = own
        return trainer

    run(made(False))
    with pytest.raises(
        UserError, match=r"no form of put_ that repeats its bits, called at .*test_deterministic\.py, line"
    ):
        run(made(True))


def test_memory_that_runs_out_ends_the_run_and_halves_nothing(make_model, tokenizer, settings, run):
    """How much is free is chance, and other micro-batches round otherwise: in the run, and before it."""
    for check in (False, True):
        args = SFTConfig(
            **settings(max_steps=1, packing=False, micro_batch_tokens=20, memory_check=check, deterministic=True)
        )
        made = SFTTrainer(make_model(), args, train_dataset=ROWS, processing_class=tokenizer)
        hold(made, 12)
        with pytest.raises(UserError, match="deterministic is on: set micro_batch_tokens 10 and begin again"):
            run(made)


def test_rollouts_hold_as_many_tokens_whatever_memory_is_free(make_model, tokenizer, settings):
    def made(deterministic):
        args = GRPOConfig(
            **settings(num_generations=2, max_completion_length=6, rollout_batch_size=4, deterministic=deterministic)
        )
        return GRPOTrainer(make_model(), "random", args, train_dataset=PROMPTED, processing_class=tokenizer)

    trainer = made(True)
    assert trainer.engine.max_tokens == trainer.rollout_tokens == 8 * trainer.sizes()["length"]
    assert made(False).engine.max_tokens is None


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (GRPOConfig, {"use_vllm": True}, "deterministic does not go with use_vllm"),
        (PPOConfig, {"rollout_merge_lora": None}, "rollout_merge_lora left open asks how much memory is free"),
    ],
)
def test_what_depends_on_chance_is_refused_by_name(config, values, message):
    config(**values)
    with pytest.raises(UserError, match=message):
        config(**values, deterministic=True)


def test_cublas_is_told_when_the_trainer_is_made(make_model, tokenizer, settings, monkeypatch):
    monkeypatch.delenv(WORKSPACE)
    for wanted, told in ((False, None), (True, ":4096:8")):
        args = SFTConfig(**settings(deterministic=wanted))
        SFTTrainer(make_model(), args, train_dataset=ROWS, processing_class=tokenizer)
        assert os.environ.get(WORKSPACE) == told
