"""The kernels of this machine and their definitions in plain PyTorch train the same: losses, figures and weights."""

from __future__ import annotations

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
    SFTConfig,
    SFTTrainer,
)
from rlhf_fast.kernels import use_backend
from rlhf_fast.kernels.dispatch import choose
from rlhf_fast.models.adapters import lora_config

WORDS = ["a", "hello", "to be", "x+y=z", "no", "seventeen!", "q", "well, well"]
SCRIPT = {f"{i}+": [*WORDS[i : i + 3], "cut!"] for i in range(4)}
PAIRS = [{"prompt": f"{i} ", "chosen": w, "rejected": w[:1] + "?"} for i, w in enumerate(WORDS)]
LABELLED = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 3 > 0} for i, r in enumerate(PAIRS)]
PROMPTS = [{"prompt": p} for p in SCRIPT]
GRPO = {"num_generations": 4, "num_iterations": 2, "beta": 0.1, "epsilon": 0.01, "scale_rewards": "whiten"}
SOFT = {"num_generations": 4, "num_iterations": 2, "beta": 0.1}
# its gate multiplies the ratios of all tokens of a response: a step of 0.02 would turn rounding of the last bit into 1e-5
VESPO = {"loss_type": "vespo", "vespo_k_pos": 1.5, "learning_rate": 0.002}
PPO = {"num_ppo_epochs": 2, "entropy_coef": 0.01, "beta": 0.1, "whiten_rewards": True, "missing_eos_penalty": 1.0}
KINDS = {
    "sft": (
        SFTTrainer,
        SFTConfig,
        {"packing": False},
        [{"prompt": r["prompt"], "completion": r["chosen"]} for r in PAIRS],
    ),
    "reward": (RewardTrainer, RewardConfig, {"center_rewards_coefficient": 0.1}, PAIRS),
    "dpo": (DPOTrainer, DPOConfig, {"beta": 0.5}, PAIRS),
    "kto": (KTOTrainer, KTOConfig, {"beta": 0.5}, LABELLED),
    "grpo": (GRPOTrainer, GRPOConfig, GRPO, PROMPTS),
    "gspo": (GRPOTrainer, GRPOConfig, {**GRPO, "loss_type": "grpo", "importance_sampling_level": "sequence"}, PROMPTS),
    "sapo": (GRPOTrainer, GRPOConfig, {**SOFT, "loss_type": "sapo", "sapo_temperature_pos": 3.0}, PROMPTS),
    "vespo": (GRPOTrainer, GRPOConfig, {**SOFT, **VESPO}, PROMPTS),
    "ppo": (PPOTrainer, PPOConfig, PPO, PROMPTS),
}


def letters(completions, **_):
    return [float(len(set(c))) for c in completions]


@pytest.mark.skipif(choose("policy", "policy_loss", torch.zeros(1)) == "reference", reason="no kernels are built here")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", KINDS)
def test_fused_trains_as_its_definition(name, lora, sgd, make_model, tokenizer, settings, scripted, run):
    trainer_class, config, options, rows = KINDS[name]
    results = []
    for backend in ("auto", "reference"):
        online = {"reward_funcs": letters, "engine": scripted(SCRIPT)} if rows is PROMPTS else {}
        common = {"max_steps": 4, "learning_rate": 0.02, "per_device_train_batch_size": 8}
        args = config(**settings(**{**common, **options}))
        with use_backend(backend):
            made = trainer_class(
                make_model(),
                args=args,
                train_dataset=rows,
                processing_class=tokenizer,
                peft_config=lora_config(r=4, alpha=8) if lora else None,
                **online,
            )
            results.append(run(made))
    fused, plain = results
    assert fused.losses == pytest.approx(plain.losses, abs=2e-6, rel=2e-6)
    for got, want in zip(fused.steps, plain.steps):
        assert got == pytest.approx(want, abs=1e-5, rel=1e-4)
    for parameter, weight in plain.weights.items():
        torch.testing.assert_close(fused.weights[parameter], weight, atol=2e-6, rtol=1e-5, msg=parameter)
