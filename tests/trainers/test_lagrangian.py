"""Safe RLHF's Lagrangian by hand, and that GRPO's advantages, figures and evaluations are what it says."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from rlhf_fast import GRPOConfig, GRPOTrainer, SafePPOConfig, SafePPOTrainer
from rlhf_fast.errors import UserError
from rlhf_fast.rewards import Fault
from rlhf_fast.trainers.lagrangian import CostConfig, Lagrangian

REWARDS = {"aa": 1.0, "b": 0.0, "ccc": 4.0, "dd": 2.0}
COSTS = {"aa": 0.5, "b": -1.0, "ccc": 3.5, "dd": 1.0}
ALONE = SimpleNamespace(sum=lambda *numbers: numbers)


def lagrangian(**settings):
    return Lagrangian(CostConfig(cost_funcs=["length"], **settings), ALONE)


def test_lambda_follows_equation_31_by_hand():
    """Mean cost (3 + 1 - 1) / 3 = 1 against a limit of 0.5: ln lambda = ln 2 + 0.1 * 2 * 0.5."""
    made = lagrangian(lambda_init=2.0, lambda_lr=0.1, cost_limit=0.5)
    figures = made.update([3.0, 1.0, -1.0, math.nan], step=0)
    want = 2.0 * math.exp(0.1)
    assert figures == pytest.approx({"cost": 1.0, "cost_violations": 2 / 3, "lambda": want})
    assert made.mix(3.0, 1.0) == pytest.approx((3.0 - want) / (1 + want))
    both = made.mix(torch.tensor([3.0, 0.0]), torch.tensor([1.0, 2.0]))
    assert both.tolist() == pytest.approx([(3.0 - want) / (1 + want), -2 * want / (1 + want)])
    assert made.update([math.nan], step=1) == {"lambda": made.value}


def test_lambda_stays_within_its_limits_and_where_it_is_while_it_warms_up():
    made = lagrangian(lambda_min=0.5, lambda_max=1.5, lambda_lr=1.0, lambda_warmup_steps=3)
    assert [made.update([9.0], step)["lambda"] for step in (0, 2)] == [1.0, 1.0]
    assert made.update([9.0], step=3)["lambda"] == pytest.approx(1.5)
    assert made.update([-9.0], step=4)["lambda"] == pytest.approx(0.5)
    again = lagrangian(lambda_min=0.5, lambda_max=1.5, lambda_lr=1.0, lambda_warmup_steps=3)
    again.load_state(made.state())
    assert again.value == made.value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lambda_init": 20.0}, "lambda_init is 20; it must lie within lambda_min 0.01 .* and lambda_max 10"),
        ({"lambda_min": 0.0}, "lambda_min 0 "),
        ({"lambda_lr": -1.0}, "lambda_lr is -1.0; it must be at least 0"),
        (
            {"cost_funcs": [], "cost_limit": 2.0},
            "cost_limit has no effect without costs: name cost_funcs or a cost_mod",
        ),
        ({"cost_funcs": [], "lambda_max": 2.0}, "lambda_max has no effect"),
    ],
    ids=str,
)
def test_senseless_multipliers_are_refused_by_name(values, message):
    with pytest.raises(UserError, match=message):
        GRPOConfig(**{"cost_funcs": ["length"], **values})


@pytest.fixture
def trainer(make_model, tokenizer, settings, scripted):
    def make(cost, **more):
        common = {"num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 8}
        return GRPOTrainer(
            make_model(),
            lambda completions, **_: [REWARDS[c] for c in completions],
            args=GRPOConfig(**settings(cost_funcs=[cost], **{**common, **more})),
            train_dataset=[{"prompt": "q"}],
            eval_dataset=[{"prompt": "q"}],
            processing_class=tokenizer,
            engine=scripted({"q": list(REWARDS)}),
        )

    return make


def harm(completions, **_):
    return [COSTS.get(c, 7.0) for c in completions]


def test_a_group_is_compared_by_reward_less_priced_cost(trainer):
    """Mean cost 1 against 0 raises lambda from 1 to e^0.5 before this batch is compared; no scaling by the deviation."""
    made = trainer(harm, scale_rewards="none", lambda_lr=0.5)
    experiences = made.collect(made.train_records)
    price = math.exp(0.5)
    worth = [(REWARDS[c] - price * COSTS[c]) / (1 + price) for c in REWARDS]
    mean = sum(worth) / 4
    assert [float(e.advantages[-1]) for e in experiences] == pytest.approx([w - mean for w in worth], abs=1e-6)
    assert [e.reward for e in experiences] == list(REWARDS.values())
    figures = made.metrics.read()
    assert figures["cost"] == 1.0 and figures["cost_violations"] == 0.75 and figures["reward"] == 1.75
    assert figures["lambda"] == pytest.approx(price)
    assert figures["costs/harm/mean"] == 1.0


def test_a_response_whose_cost_nobody_knows_teaches_nothing(trainer):
    def sometimes(completions, **_):
        return [Fault("no answer") if c == "ccc" else COSTS[c] for c in completions]

    made = trainer(sometimes, lambda_lr=0.0, scale_rewards="none")
    experiences = made.collect(made.train_records)
    worth = [(REWARDS[c] - COSTS[c]) / 2 for c in ("aa", "b", "dd")]
    mean = sum(worth) / 3
    advantages = [float(e.advantages[-1]) for e in experiences]
    assert advantages == pytest.approx([worth[0] - mean, worth[1] - mean, 0.0, worth[2] - mean], abs=1e-6)
    assert made.size(experiences[2]) == 0
    assert made.metrics.read()["costs/sometimes/faults"] == 1.0


def test_the_cost_of_greedy_answers_is_evaluated(trainer):
    assert trainer(harm).evaluate()["eval_cost"] == 7.0


def test_groups_of_one_worth_are_sampled_again_whatever_their_rewards(trainer):
    """At lambda 1 a cost like the reward cancels it: a group with different rewards teaches nothing."""
    cancels = trainer(
        lambda completions, **_: [REWARDS[c] for c in completions], lambda_lr=0.0, dynamic_sampling_rounds=1
    )
    assert {float(e.advantages[-1]) for e in cancels.collect(cancels.train_records)} == {0.0}
    assert cancels.metrics.read()["resampled_prompts"] == 1.0
    differs = trainer(harm, lambda_lr=0.0, dynamic_sampling_rounds=1)
    differs.collect(differs.train_records)
    assert differs.metrics.read()["resampled_prompts"] == 0.0


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_run_brings_its_cost_within_the_limit_while_its_reward_rises(kind, make_model, tokenizer, settings, run):
    """Vowels earn, three of the five cost as well: it learns to write the other two."""
    trainer_class, config = {"grpo": (GRPOTrainer, GRPOConfig), "ppo": (SafePPOTrainer, SafePPOConfig)}[kind]
    own = {"num_generations": 8, "max_steps": 12} if kind == "grpo" else {"num_ppo_epochs": 2, "max_steps": 26}
    more = {"per_device_train_batch_size": 64, "max_completion_length": 6, "learning_rate": 1e-2}
    args = config(**settings(cost_funcs=[some_vowels], cost_limit=0.2, lambda_lr=0.5, **more, **own))
    data = {"train_dataset": [{"prompt": p} for p in "abcdefgh"], "processing_class": tokenizer}
    steps = [s for s in run(trainer_class(make_model(), vowels, args, **data)).steps if "cost" in s]
    reward, last = "reward" if kind == "grpo" else "objective/scores", steps[-3:]
    assert steps[0]["cost"] > 0.2 > max(s["cost"] for s in last)
    assert min(s[reward] for s in last) > steps[0][reward] + 2


def vowels(completions, **_):
    return [float(sum(c.count(v) for v in "aeiou")) for c in completions]


def some_vowels(completions, **_):
    return [float(sum(c.count(v) for v in "aei")) for c in completions]
