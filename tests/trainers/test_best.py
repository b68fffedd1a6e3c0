"""The best evaluation: which it is, that its checkpoint is kept, and that its weights become the model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rlhf_fast import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from rlhf_fast.errors import UserError
from rlhf_fast.models import load
from rlhf_fast.models.adapters import lora_config
from rlhf_fast.run.checkpoint import list_checkpoints
from rlhf_fast.trainers.best import Best

ROWS = [{"prompt": f"{i} ", "completion": w} for i, w in enumerate(["a", "hello", "to be", "x+y=z"])]


def test_losses_are_better_when_small_and_anything_else_when_large():
    for metric, first, second, better in (
        ("loss", 2.0, 1.0, True),
        ("eval_loss", 1.0, 2.0, False),
        ("reward", 1.0, 2.0, True),
        ("rewards/answer/mean", 2.0, 1.0, False),
    ):
        best, name = Best(metric), f"eval_{metric.removeprefix('eval_')}"
        assert best.update(1, {name: first})
        assert best.update(2, {name: second}) is better
        assert best.step == (2 if better else 1)
    assert not Best("reward", greater_is_better=False).greater_is_better


def test_nan_is_never_the_best():
    best = Best("reward")
    assert not best.update(1, {"eval_reward": math.nan})
    assert best.step is None
    assert best.update(2, {"eval_reward": -1.0})
    assert not best.update(3, {"eval_reward": math.nan})
    assert (best.step, best.value) == (2, -1.0)


def test_an_unknown_metric_is_answered_with_those_there_are():
    with pytest.raises(UserError, match="is 'rewards', which evaluations do not have. Did you mean 'eval_reward'"):
        Best("rewards").update(1, {"eval_reward": 1.0, "eval_loss": 2.0})


@pytest.fixture
def sft(make_model, tokenizer, settings):
    def make(scores, lora=False, **more):
        often = {"eval_steps": 1, "save_steps": 2, "save_total_limit": 1, "max_steps": len(scores)}
        args = SFTConfig(**settings(**{"packing": False, "learning_rate": 1e-2, **often, **more}))
        data = {"train_dataset": ROWS, "eval_dataset": ROWS[:1], "processing_class": tokenizer}
        made = SFTTrainer(make_model(), args, **data, peft_config=lora_config(r=4, alpha=8) if lora else None)
        coming, made.weights = iter(scores), []

        def evaluate():
            made.weights.append([p.detach().clone() for p in made.parameters])
            return {"eval_accuracy": next(coming)}

        made.evaluate = evaluate
        return made

    return make


def test_the_best_checkpoint_is_kept_beside_the_last_ones(sft):
    """Step 1 is a checkpoint only because it is the best so far; 3 is then better and 1 goes."""
    made = sft([0.5, 0.4, 0.9, 0.8, 0.7, 0.6], metric_for_best_model="accuracy")
    folder = Path(made.args.output_dir) / "checkpoints"
    seen = []
    made.callbacks.members.append(lambda event, *_: seen.append(_steps(folder)) if event == "on_save" else None)
    made.train()
    assert seen == [[1], [1, 2], [2, 3], [3, 4], [3, 6]]


def _steps(folder):
    return [int(p.name[5:]) for p in list_checkpoints(folder)]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_best_weights_become_the_model(lora, sft, capsys):
    made = sft([0.5, 0.9, 0.8, 0.7], lora, metric_for_best_model="accuracy", load_best_model_at_end=True, quiet=False)
    made.train()
    assert "best model: step 2, accuracy 0.9" in capsys.readouterr().out
    for now, best, last in zip(made.parameters, made.weights[1], made.weights[-1]):
        assert torch.equal(now, best)
    assert any(not torch.equal(b, l) for b, l in zip(made.weights[1], made.weights[-1]))
    if not lora:
        saved = load(made.args.output_dir)
        assert all(torch.equal(a, b) for a, b in zip(saved.model.parameters(), made.policy.model.parameters()))


def test_without_the_setting_the_last_weights_are_the_model(sft):
    made = sft([0.5, 0.9, 0.8], metric_for_best_model="accuracy")
    made.train()
    assert all(torch.equal(now, last) for now, last in zip(made.parameters, made.weights[-1]))


def test_a_resumed_run_knows_what_was_best(sft):
    options = {"metric_for_best_model": "accuracy", "load_best_model_at_end": True, "max_steps": 6}
    whole = sft([0.5, 0.9, 0.8, 0.7, 0.6, 0.5], **options)
    whole.train()
    stopped = sft([0.5, 0.9, 0.8, 0.7], **{**options, "max_steps": 4})
    stopped.train()
    again = sft([0.6, 0.5], **options, output_dir=stopped.args.output_dir)
    again.train(resume_from_checkpoint=True)
    assert (again.best.step, again.best.value) == (2, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters, whole.parameters))


def test_reward_is_what_reinforcement_learning_is_judged_by(make_model, tokenizer, settings):
    args = GRPOConfig(**settings(load_best_model_at_end=True, eval_steps=1))
    data = {"train_dataset": ROWS, "eval_dataset": ROWS, "processing_class": tokenizer}
    made = GRPOTrainer(make_model(), "random", args, **data)
    assert (made.best.metric, made.best.greater_is_better) == ("reward", True)


def test_a_best_evaluation_needs_evaluations(make_model, tokenizer, settings):
    with pytest.raises(UserError, match="set eval_steps"):
        SFTConfig(**settings(metric_for_best_model="loss"))
    with pytest.raises(UserError, match="early_stopping_patience is 0; it must be at least 1"):
        SFTConfig(**settings(early_stopping_patience=0))
    args = SFTConfig(**settings(early_stopping_patience=2, eval_steps=1))
    with pytest.raises(UserError, match="none without an eval_dataset"):
        SFTTrainer(make_model(), args, train_dataset=ROWS, processing_class=tokenizer)
