"""A run that stops and goes on ends like one that never stopped: the same weights bit for bit, the same figures."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from rlhf_fast import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SafePPOConfig,
    SafePPOTrainer,
    SFTConfig,
    SFTTrainer,
)
from rlhf_fast.errors import UserError
from rlhf_fast.models.adapters import lora_config
from rlhf_fast.run.checkpoint import list_checkpoints

WORDS = ["a", "hello", "to be", "x+y=z", "no", "seventeen", "q"]


def vowels(completions, **_):
    return [sum(c.count(v) for v in "aeiou") / 4 for c in completions]


def length(completions, **_):
    return [float(len(c)) for c in completions]


def rows(kind):
    if kind is SFTTrainer:
        return [{"prompt": f"{i} ", "completion": w} for i, w in enumerate(WORDS)]
    if kind is KTOTrainer:
        return [{"prompt": f"{i} ", "completion": w, "label": i % 2 == 0} for i, w in enumerate(WORDS)]
    if kind in (RewardTrainer, DPOTrainer):
        return [{"prompt": f"{i} ", "chosen": w, "rejected": w[:1] + "?"} for i, w in enumerate(WORDS)]
    return [{"prompt": f"{i} "} for i in range(len(WORDS))]


# rounds of several steps where there are any, so that checkpoints at steps 3 and 5 lie within one
KINDS = {
    "sft": (SFTTrainer, SFTConfig, {"packing": False, "per_device_train_batch_size": 3}),
    "reward": (RewardTrainer, RewardConfig, {"per_device_train_batch_size": 3}),
    "dpo": (DPOTrainer, DPOConfig, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "kto": (KTOTrainer, KTOConfig, {"per_device_train_batch_size": 3}),
    "grpo": (
        GRPOTrainer,
        GRPOConfig,
        {"num_generations": 4, "num_iterations": 2, "beta": 0.1, "max_completion_length": 5},
    ),
    "grpo dynamic": (
        GRPOTrainer,
        GRPOConfig,
        {"num_generations": 4, "num_iterations": 2, "max_completion_length": 5, "dynamic_sampling_rounds": 2}
        | {"kl_coef": 0.1, "scale_rewards": "whiten", "soft_overlong_cache": 2}
        | {"cost_funcs": [length], "cost_limit": 3.0},
    ),
    "ppo": (
        PPOTrainer,
        PPOConfig,
        {"num_ppo_epochs": 2, "num_mini_batches": 2, "max_completion_length": 5, "kl_target": 0.1, "kl_horizon": 20}
        | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "normalize_rewards": True},
    ),
    "safe ppo": (
        SafePPOTrainer,
        SafePPOConfig,
        {"num_ppo_epochs": 2, "num_mini_batches": 2, "max_completion_length": 5, "per_device_train_batch_size": 2}
        | {"gradient_accumulation_steps": 2, "cost_funcs": [length], "cost_limit": 3.0},
    ),
}


@pytest.fixture
def trainer(make_model, tokenizer, settings, tmp_path):
    """trainer(name, lora, **more): a new trainer on the same fresh model; lora="nf4": on that model in 4 bit."""

    def make(name, lora, **more):
        kind, config, options = KINDS[name]
        common = {"learning_rate": 1e-2, "lr_scheduler_type": "cosine", "logging_steps": 2, "save_total_limit": 9}
        # dropout, so that supervised fine-tuning draws random numbers too
        peft = lora_config(r=4, alpha=8, dropout=0.1) if lora else None
        given = {"reward_funcs": vowels} if kind in (GRPOTrainer, PPOTrainer, SafePPOTrainer) else {}
        args = config(**settings(**{**common, **options, "load_in_4bit": lora == "nf4", **more}))
        dataset = {"train_dataset": rows(kind), "processing_class": tokenizer, "peft_config": peft}
        model = make_model()
        if args.load_in_4bit:
            model.save_pretrained(tmp_path / "base")
            model = str(tmp_path / "base")
        return kind(model, args=args, **dataset, **given)

    return make


def assert_same_end(resumed, whole, after):
    assert resumed.weights.keys() == whole.weights.keys()
    for name, weight in whole.weights.items():
        assert torch.equal(resumed.weights[name], weight), name
    assert [s for s in resumed.steps if s["step"] > after] == [s for s in whole.steps if s["step"] > after]


@pytest.mark.parametrize("lora", [False, True, "nf4"], ids=["full", "lora", "nf4"])
@pytest.mark.parametrize("name", KINDS)
def test_resuming_anywhere_ends_in_the_same_weights(name, lora, trainer, run):
    """From a checkpoint in the middle of a round (step 3 of 4) and of a logging window, and from the end of one."""
    whole_trainer = trainer(name, lora, max_steps=6, save_steps=1)
    whole = run(whole_trainer)
    assert [s["step"] for s in whole.steps] == [2, 4, 6]
    folder = Path(whole_trainer.args.output_dir) / "checkpoints"
    for step in (3, 4):
        again = trainer(name, lora, max_steps=6)
        resumed = run(again, resume_from_checkpoint=str(folder / f"step-{step:08d}"))
        assert_same_end(resumed, whole, after=step)


@pytest.mark.parametrize("name", ["ppo", "sft"])
def test_resuming_a_run_that_is_measured_in_epochs(name, trainer, run):
    """Its last round is not full."""
    whole_trainer = trainer(name, True, num_train_epochs=2, save_steps=1)
    whole = run(whole_trainer)
    last = whole_trainer.step
    assert last == {"ppo": 8, "sft": 5}[name]
    folder = Path(whole_trainer.args.output_dir) / "checkpoints"
    again = trainer(name, True, num_train_epochs=2)
    resumed = run(again, resume_from_checkpoint=str(folder / f"step-{last - 2:08d}"))
    assert again.step == last
    assert_same_end(resumed, whole, after=last - 2)


@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_sigterm_finishes_the_step_saves_and_leaves(name, trainer, run, tmp_path):
    """In the middle of a round; ``resume_from_checkpoint=True`` in the same folder then ends like an unstopped run."""
    whole = run(trainer(name, True, max_steps=5))
    stopped = trainer(name, True, max_steps=5, output_dir=str(tmp_path / "stopped"))
    after_step = stopped.after_step

    def terminate():
        after_step()
        if stopped.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped.after_step = terminate
    part = run(stopped)
    assert stopped.step == 3
    assert not stopped.finished
    assert [p.name for p in list_checkpoints(tmp_path / "stopped/checkpoints")] == ["step-00000003"]
    assert part.steps[-1]["step"] == 3
    assert (tmp_path / "stopped/adapter_model.safetensors").is_file()
    again = trainer(name, True, max_steps=5, output_dir=str(tmp_path / "stopped"))
    resumed = run(again, resume_from_checkpoint=True)
    assert_same_end(resumed, whole, after=4)
    assert again.finished


def test_who_stops_does_not_wait_for_an_evaluation(trainer, run, monkeypatch):
    stopped = trainer("sft", True, max_steps=5)
    stopped.eval_records = stopped.train_records
    stopped.after_step = lambda: os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(stopped, "evaluate", lambda: pytest.fail("evaluated"))
    assert len(run(stopped).steps) == 1


def test_the_setting_resumes_as_the_argument_does(trainer, run, tmp_path):
    folder = str(tmp_path / "run")
    whole = run(trainer("reward", False, max_steps=4, save_steps=2, output_dir=folder))
    (list_checkpoints(tmp_path / "run/checkpoints")[-1]).rename(tmp_path / "aside")
    again = trainer("reward", False, max_steps=4, output_dir=folder, resume_from_checkpoint=True)
    assert_same_end(run(again), whole, after=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": False}, "does not fit this model and its LoRA settings: .* missing"),
        ({"lora": 8}, r"lora_A.policy.weight is \(4, 48\) there and \(8, 48\) here"),
        ({"rows": 5}, "cannot resume the order of the data: n was 7, now 5; resume with the data and the seed"),
        ({"seed": 1}, "seed was 42, now 1"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_run_is_refused(change, message, trainer, run, make_model, tokenizer, settings):
    first = trainer("sft", True, max_steps=1)
    run(first)
    folder = list_checkpoints(Path(first.args.output_dir) / "checkpoints")[-1]
    data = rows(SFTTrainer)[: change.get("rows", 7)]
    args = SFTConfig(**settings(packing=False, seed=change.get("seed", 42)))
    rank = change.get("lora", 4)
    peft = lora_config(r=rank, alpha=8) if rank else None
    other = SFTTrainer(make_model(), args, train_dataset=data, processing_class=tokenizer, peft_config=peft)
    with pytest.raises(UserError, match=message):
        other.train(resume_from_checkpoint=str(folder))
