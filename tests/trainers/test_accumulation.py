"""One micro-batch of eight is eight micro-batches of one: same losses, same gradients, same weights."""

from __future__ import annotations

import functools

import pytest
import torch

from rlhf_fast import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from rlhf_fast.models.adapters import lora_config

# 11 ragged rows: a full window of 8, and one of 3
WORDS = ["a", "hello", "to be", "x+y=z", "no", "seventeen", "1,000,000", "q", "well, well", "ok", "end."]


def sft(make, **settings):
    rows = [{"prompt": f"{i}. ", "completion": w, "weight": 1 + i % 3} for i, w in enumerate(WORDS)]
    return make(SFTTrainer, SFTConfig(packing=False, **settings), rows)


def reward(make, **settings):
    """Pairs with margins, and rankings of three among them."""
    rows = [{"prompt": f"{i}. ", "responses": [w, w[::-1] + "!"], "margin": 0.3 * (i % 2)} for i, w in enumerate(WORDS)]
    for row in rows[::4]:
        row["responses"], row["margin"] = [*row["responses"], "third"], None
    for row in rows:
        row["ranking"] = list(range(1, 1 + len(row["responses"])))
    return make(RewardTrainer, RewardConfig(center_rewards_coefficient=0.1, **settings), rows)


def dpo(make, **settings):
    rows = [{"prompt": f"{i}. ", "chosen": w, "rejected": w[:1] + "?"} for i, w in enumerate(WORDS)]
    return make(DPOTrainer, DPOConfig(beta=0.5, **settings), rows)


def letters(completions, **_):
    """How many different ones: rewards differ within groups."""
    return [float(len(set(c))) for c in completions]


def grpo(make, scripted, loss_type="dapo", **settings):
    """Two prompts of four responses in a window; the last window has one prompt."""
    script = {f"{i}+": WORDS[i : i + 3] + ["cut!"] for i in range(3)}
    rows = [{"prompt": p} for p in script]
    settings |= {"num_generations": 4, "num_iterations": 2, "beta": 0.1, "mask_truncated_completions": True}
    args = GRPOConfig(loss_type=loss_type, **settings)
    return make(GRPOTrainer, args, rows, reward_funcs=letters, engine=scripted(script))


def ppo(make, scripted, **settings):
    script = {f"{i}+": [w] for i, w in enumerate(WORDS)}
    rows = [{"prompt": p} for p in script]
    args = PPOConfig(num_ppo_epochs=2, entropy_coef=0.01, vf_coef=1.0, beta=0.1, **settings)
    return make(PPOTrainer, args, rows, reward_funcs=letters, engine=scripted(script))


ALGORITHMS = {"sft": sft, "reward": reward, "dpo": dpo, "grpo": grpo, "ppo": ppo}
# losses with other denominators
ALGORITHMS |= {f"grpo {loss}": functools.partial(grpo, loss_type=loss) for loss in ("grpo", "dr_grpo", "luspo")}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_how_a_window_is_split_changes_nothing(name, lora, sgd, make_model, tokenizer, settings, scripted, run):
    """Ragged rows, and a last window that is not full, in which the last micro-batch is not either (2 + 1 and 3)."""

    def make(trainer_class, args, rows, **more):
        peft = lora_config(r=4, alpha=8) if lora else None
        return trainer_class(
            make_model(), args=args, train_dataset=rows, processing_class=tokenizer, peft_config=peft, **more
        )

    more = {"scripted": scripted} if name[:4] in ("grpo", "ppo") else {}
    results = []
    # by records, and by tokens: so few that the longest records are alone and the others share
    for size, budget in ((8, None), (2, None), (1, None), (8, 24), (8, 1)):
        split = settings(per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, learning_rate=0.02)
        results.append(run(ALGORITHMS[name](make, **more, **split, micro_batch_tokens=budget)))
    whole, *splits = results
    assert len(whole.losses) == {"sft": 2, "reward": 2, "dpo": 2, "grpo": 4, "ppo": 4}[name.split()[0]]
    for split in splits:
        assert split.losses == pytest.approx(whole.losses, abs=1e-6, rel=1e-6)
        for got, want in zip(split.steps, whole.steps):
            for extreme in ("min_reward", "max_reward"):  # means over micro-batches of theirs
                got.pop(extreme, None), want.pop(extreme, None)
            assert got == pytest.approx(want, abs=1e-5, rel=1e-4)
        for parameter, weight in whole.weights.items():
            torch.testing.assert_close(split.weights[parameter], weight, atol=1e-6, rtol=0, msg=parameter)
