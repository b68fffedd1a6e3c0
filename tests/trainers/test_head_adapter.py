"""Every trainer with LoRA on lm_head, from its settings to the weights of a run."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer, SFTConfig, SFTTrainer
from rlhf_fast.models import load

ROWS = [{"prompt": f"{i}=", "completion": w} for i, w in enumerate(("a", "bc", "d", "ef"))]
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "lm_head"], "max_steps": 2}
SCRIPT = {"1+1=": ["2", "two"], "x=": ["left", "right"]}


@pytest.fixture
def base(make_model, tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def parameters(trainer):
    return {n: p.detach().clone() for n, p in trainer.policy.adapters.parameters("policy").items()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_loses_what_transformers_loses_and_moves_the_head(base, settings, run, plain, ids, checkpointing):
    """The first step's loss is the mean of -log p by plain logits; both factors of the head are trained, W is not."""
    more = {**LORA, "per_device_train_batch_size": 4, "gradient_checkpointing": checkpointing}
    trainer = SFTTrainer(str(base), SFTConfig(**settings(**more)), train_dataset=ROWS)
    before, weight = parameters(trainer), trainer.policy.model.lm_head.weight.clone()
    figures = run(trainer)
    own = [plain(load(base).model, ids(r["prompt"]), ids(r["completion"], end=True)) for r in ROWS]
    assert figures.losses[0] == pytest.approx(-torch.cat(own).mean().item(), rel=1e-5)
    assert figures.losses[1] < figures.losses[0]
    after = parameters(trainer)
    assert all((after[f"lm_head.lora_{x}.weight"] != before[f"lm_head.lora_{x}.weight"]).any() for x in "AB")
    assert torch.equal(trainer.policy.model.lm_head.weight, weight)


def test_grpo_and_ppo_go_on_from_an_sft_run_with_an_adapter_on_the_head(base, settings, scripted):
    sft = SFTTrainer(str(base), SFTConfig(**settings(**LORA)), train_dataset=ROWS)
    sft.train()
    rows, wanted = [{"prompt": p} for p in SCRIPT], {"2", "right"}

    def reward(completions, **_):
        return [float(c in wanted) for c in completions]

    args = GRPOConfig(**settings(num_generations=2, max_completion_length=8, max_steps=2, beta=0.1))
    grpo = GRPOTrainer(sft.args.output_dir, reward, args=args, train_dataset=rows, engine=scripted(SCRIPT))
    args = PPOConfig(**settings(max_completion_length=8, max_steps=2))
    ppo = PPOTrainer(sft.args.output_dir, reward, args=args, train_dataset=rows, engine=scripted(SCRIPT))
    for trainer in (grpo, ppo):
        before, weight = parameters(trainer), trainer.policy.model.lm_head.weight.clone()
        figures = trainer.train()
        assert figures["loss"] == figures["loss"]
        after = parameters(trainer)
        assert any((after[n] != p).any() for n, p in before.items() if "lm_head" in n)
        frozen = trainer.policy.adapters.parameters("reference")["lm_head.lora_B.weight"]
        assert torch.equal(frozen, sft.policy.adapters.parameters("policy")["lm_head.lora_B.weight"])
        assert torch.equal(trainer.policy.model.lm_head.weight, weight)
