"""Training on a base in NF4: what the trainers refuse, share, and check when they go on. Resuming is in test_resume.py."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast import PPOConfig, PPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from rlhf_fast.errors import UserError
from rlhf_fast.models import load
from rlhf_fast.models.adapters import is_4bit
from rlhf_fast.models.fingerprint import fingerprint
from rlhf_fast.trainers.resume import restore, state_of

pytest.importorskip("bitsandbytes")

ROWS = [
    {"prompt": f"{i}=", "completion": w, "chosen": w, "rejected": "no"} for i, w in enumerate(("a", "bc", "d", "ef"))
]
LORA = {"use_peft": True, "lora_r": 4, "load_in_4bit": True, "learning_rate": 1e-2, "max_steps": 2}


@pytest.fixture
def base(make_model, tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def sft(base, settings, **more):
    return SFTTrainer(str(base), SFTConfig(**settings(**LORA, **more)), train_dataset=ROWS)


def test_every_role_of_ppo_is_an_adapter_on_one_4bit_base(base, settings, capfd):
    """SFT, then a reward model, then PPO from the SFT run: policy, reference, critic and reward share its base."""
    first = sft(base, settings)
    first.train()
    judge = RewardTrainer(str(base), RewardConfig(**settings(**LORA)), train_dataset=ROWS)
    judge.train()
    args = PPOConfig(
        **settings(max_steps=2, max_completion_length=3, reward_model_path=judge.args.output_dir, quiet=False)
    )
    ppo = PPOTrainer(first.args.output_dir, args=args, train_dataset=ROWS)
    assert is_4bit(ppo.policy.model), "a run trained in 4 bit goes on in 4 bit"
    assert ppo.policy.adapters.names == ["policy", "reference", "value", "reward"]
    assert not ppo.policy.copies
    before = fingerprint(ppo.policy.model)
    figures = ppo.train()
    assert figures["loss"] == figures["loss"]
    assert fingerprint(ppo.policy.model) == before == fingerprint(load(base, load_in_4bit=True).model)
    said = capfd.readouterr().out
    assert "NF4, computing in float32, embeddings, norms and head in float32" in said
    assert "an adapter on the policy's base" in said


def test_all_weights_are_not_trained_in_4_bit(base, settings, tokenizer):
    config = settings(load_in_4bit=True)
    for model in (str(base), load(base, load_in_4bit=True).model):
        with pytest.raises(UserError, match="a 4-bit base is frozen and takes an adapter: add use_peft"):
            SFTTrainer(model, SFTConfig(**config), train_dataset=ROWS, processing_class=tokenizer)


@pytest.mark.parametrize("in_4bit", [False, True], ids=["plain", "nf4"])
def test_a_checkpoint_is_not_continued_on_another_base(in_4bit, base, settings, make_model):
    first = sft(base, lambda **more: settings(**{**more, "load_in_4bit": in_4bit}))
    first.train()
    other = sft(base, lambda **more: settings(**{**more, "load_in_4bit": not in_4bit}))
    with pytest.raises(UserError, match="belongs to another base than .*it was held .*; see load_in_4bit"):
        restore(other, state_of(first))
    changed = make_model()
    changed.model.norm.weight.data[0] = 3.0
    changed.save_pretrained(base)
    again = sft(base, lambda **more: settings(**{**more, "load_in_4bit": in_4bit}))
    with pytest.raises(UserError, match="belongs to another base than .*its weights are others"):
        restore(again, state_of(first))


def test_training_lowers_the_loss_on_a_4bit_base(base, settings, run):
    figures = run(sft(base, lambda **more: settings(**{**more, "max_steps": 12, "gradient_checkpointing": True})))
    assert figures.losses[-1] < 0.7 * figures.losses[0]
    assert all(w.dtype == torch.float32 for w in figures.weights.values())
