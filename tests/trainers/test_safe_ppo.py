"""PPO-Lagrangian: two critics, one price of the KL, and a lambda that waits for the critics."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_fast import SafePPOConfig, SafePPOTrainer
from rlhf_fast.errors import UserError
from rlhf_fast.models.adapters import lora_config
from rlhf_fast.rewards import Fault

SCRIPT = {"w": ["aa"], "x": ["b"], "y": ["ccc"], "z": ["dd!"]}
REWARDS = {"aa": 1.0, "b": 0.0, "ccc": 4.0, "dd": 2.0}
COSTS = {"aa": 0.5, "b": -1.0, "ccc": 3.5, "dd": 1.0}


@pytest.fixture
def trainer(make_model, tokenizer, settings, scripted):
    def make(cost=None, lora=True, **more):
        common = {"per_device_train_batch_size": 4, "num_ppo_epochs": 1, "max_completion_length": 8, "lam": 1.0}
        cost = cost or (lambda completions, **_: [COSTS[c] for c in completions])
        return SafePPOTrainer(
            make_model(),
            lambda completions, **_: [REWARDS[c] for c in completions],
            args=SafePPOConfig(**settings(cost_funcs=[cost], **{**common, **more})),
            train_dataset=[{"prompt": p} for p in SCRIPT],
            processing_class=tokenizer,
            peft_config=lora_config(r=4, alpha=8) if lora else None,
            engine=scripted(SCRIPT),
        )

    return make


def disturb(policy, roles):
    """Let the policy leave its reference, and the critics differ from 0 and from each other."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if any(f".{role}." in name for role in roles):
                parameter += 0.1 * torch.randn_like(parameter)


def text(experience, tokenizer):
    ids = [i for i, m in zip(experience.example.input_ids, experience.example.response_mask) if m]
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_advantages_by_hand(trainer, tokenizer):
    """Without discounts a token's advantage is what is still to come less what its critic expects: of the reward, less
    lambda times that of the cost, over 1 + lambda, less the KL still to come at a price that does not depend on lambda."""
    made = trainer(kl_coef=0.3, lambda_init=2.0, lambda_lr=0.5, cost_limit=0.25)
    disturb(made.policy, ("policy", "value", "cost_value"))
    experiences = made.collect(made.train_records)
    price = 2.0 * math.exp(0.5 * 2.0 * (1.0 - 0.25))  # the mean cost is 1
    assert made.lagrangian.value == pytest.approx(min(price, 10.0))
    price = made.lagrangian.value
    raw = []
    for e in experiences:
        said, mask = text(e, tokenizer), torch.tensor(e.example.response_mask)
        kl = (e.old_logprobs - e.ref_logprobs)[mask].double()
        to_come = kl.flip(0).cumsum(0).flip(0)
        expected = (e.values - price * e.cost_values)[mask] / (1 + price)
        raw.append((REWARDS[said] - price * COSTS[said]) / (1 + price) - 0.3 * to_come - expected)
        torch.testing.assert_close(e.cost_returns[mask].double(), COSTS[said] + 0.3 * to_come, atol=1e-5, rtol=1e-5)
        assert kl.abs().min() > 1e-3 and (e.values - e.cost_values)[mask].abs().min() > 1e-4
    flat = torch.cat(raw)
    want = (flat - flat.mean()) / flat.std(unbiased=False)
    got = torch.cat([e.advantages[torch.tensor(e.example.response_mask)] for e in experiences])
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-4)
    figures = made.metrics.read()
    assert (figures["cost"], figures["cost_violations"]) == (1.0, 0.75)
    assert figures["objective/scores"] == pytest.approx(1.75)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_both_critics_learn_alone_while_lambda_waits(lora, trainer, run):
    made = trainer(lora=lora, critic_warmup_steps=1, max_steps=2, lambda_lr=0.5)
    start = {n: p.detach().clone() for n, p in made.policy.named_parameters() if p.requires_grad}
    roles = {n: next((r for r in ("cost_value", "value") if f".{r}." in n), "policy") for n in start}

    def moved(role):
        now = dict(made.policy.named_parameters())
        return any(not torch.equal(now[n], start[n]) for n, r in roles.items() if r == role)

    lambdas, policy_moved = [], []

    def watch(event, trainer, what):
        if event == "on_step":
            lambdas.append(trainer.lagrangian.value)
            policy_moved.append(moved("policy"))
            assert moved("value") and moved("cost_value")

    made.callbacks.members.append(watch)
    steps = run(made).steps
    assert policy_moved == [False, True]
    assert lambdas == pytest.approx([1.0, math.exp(0.5)])
    assert steps[-1]["loss/cost_value_avg"] > 0 and steps[-1]["loss/value_avg"] > 0


def test_a_fault_of_the_cost_masks_its_response_alone(trainer):
    made = trainer(lambda completions, **_: [Fault("no") if c == "b" else COSTS[c] for c in completions])
    experiences = made.collect(made.train_records)
    assert [made.size(e) for e in experiences] == [3, 0, 4, 2]
    assert all(bool(torch.isfinite(e.advantages).all()) for e in experiences)
    assert made.metrics.read()["cost"] == pytest.approx(5.0 / 3)


def test_what_safe_ppo_cannot_do_without_is_asked_for(make_model, tokenizer, settings):
    given = {"train_dataset": [{"prompt": "q"}], "processing_class": tokenizer}
    with pytest.raises(UserError, match="safe PPO needs a cost: --cost_model_path"):
        SafePPOTrainer(make_model(), "random", args=SafePPOConfig(**settings()), **given)
    with pytest.raises(UserError, match="whiten_rewards would price the KL twice"):
        SafePPOConfig(**settings(whiten_rewards=True))
