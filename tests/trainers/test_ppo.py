"""PPO: what a response earns token by token, by hand; what two passes over it do, in plain PyTorch."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math

import pytest
import torch

from rlhf_fast import PPOConfig, PPOTrainer, RewardConfig, RewardTrainer
from rlhf_fast.data.batch import Example, TokenBatch
from rlhf_fast.models import load
from rlhf_fast.models.adapters import lora_config
from rlhf_fast.trainers.trainer import Window

SCRIPT = {"1+1=": ["2"], "name ": ["a longer one"], "x": ["y z"], "say ": ["hi!"]}
SCORES = {"2": 1.0, "a longer one": -0.5, "y z": 2.0, "hi": 0.25}


def by_hand(completions, **_):
    return [SCORES[c] for c in completions]


@pytest.fixture
def trainer(tokenizer, settings, scripted):
    def make(model, script=SCRIPT, reward=by_hand, peft=None, **more):
        args = PPOConfig(**settings(**{"per_device_train_batch_size": 4, "max_grad_norm": 0.0, **more}))
        rows = [{"prompt": p} for p in script]
        return PPOTrainer(
            model,
            reward,
            args=args,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=peft,
            engine=scripted(script),
        )

    return make


# ---- one response of three tokens: "a", "b", <eos>

OLD, REFERENCE, VALUES = [-1.0, -2.0, -0.5], [-1.5, -1.0, -0.5], [0.2, 0.4, 1.0]


@pytest.fixture
def three_tokens(trainer, model):
    """three_tokens(**settings) -> the experience of "q" -> "ab", its log-probabilities and values as given above."""

    def collect(response="ab", reference=REFERENCE, **more):
        made = trainer(model, {"q": [response]}, lambda completions, **_: [2.0], **more)
        numbers = {"policy": OLD, "reference": reference}
        made.logprobs = lambda batch, role: torch.tensor([0.0, *numbers[role]])
        made.policy.values = lambda batch, role: torch.tensor([0.0, *VALUES])
        (experience,) = made.collect(made.train_records)
        return made, experience

    return collect


def test_rewards_advantages_and_returns_of_three_tokens_equal_hand_numbers(three_tokens):
    """KL is 0.5, -1, 0, so rewards are -0.05, 0.1, 2. Then, with lambda 0.5 and no discount:

    delta3 = 2 - 1 = 1, delta2 = 0.1 + 1 - 0.4 = 0.7, delta1 = -0.05 + 0.4 - 0.2 = 0.15;
    A3 = 1, A2 = 0.7 + 0.5 * 1 = 1.2, A1 = 0.15 + 0.5 * 1.2 = 0.75; the returns are A + V.
    """
    made, experience = three_tokens(kl_coef=0.1, lam=0.5)
    assert experience.returns.tolist() == pytest.approx([0.0, 0.95, 1.6, 2.0], abs=1e-6)
    # mean 0.98333, variance 0.0338889
    assert experience.advantages.tolist() == pytest.approx([0.0, -1.267499, 1.176963, 0.090536], abs=1e-4)
    assert experience.old_logprobs.tolist() == [0.0, *OLD]
    assert experience.ref_logprobs.tolist() == [0.0, *REFERENCE]
    figures = made.metrics.read()
    assert figures["objective/scores"] == pytest.approx(2.0)
    assert figures["objective/kl"] == pytest.approx(-0.5)
    assert figures["objective/non_score_reward"] == pytest.approx(0.05)
    assert figures["objective/rlhf_reward"] == pytest.approx(2.05)
    # residuals 0.75, 1.2, 1 around returns 0.95, 1.6, 2
    assert figures["val/explained_variance"] == pytest.approx(1 - 0.0338889 / 0.1872222, abs=1e-4)


def test_ratios_and_losses_of_three_tokens_equal_hand_numbers(three_tokens):
    """Log-ratios 0.3, -0.3, 0 give ratios 1.349859, 0.740818, 1; advantages are 1, -0.5, 2, clips 0.2.

    Policy: min(1.349859, 1.2) = 1.2; min(-0.370409, -0.4) = -0.4; 2: the mean of these is 0.933333, the loss its negative.
    Value: errors (0.5 - 0.95)^2 = 0.2025, but kept at 0.4 0.3025; (0.1 - 1.6)^2 = 2.25, kept at 0.2 1.96; (1 - 2)^2 = 1:
    the larger of each over 2, on average 3.5525 / 6. KL (k3) for d = -0.8, 1.3, 0: 0.249329, 1.369297, 0.
    """
    made, experience = three_tokens(lam=0.5, kl_coef=0.1, beta=0.25, entropy_coef=0.5, vf_coef=0.7)
    experience.advantages = torch.tensor([0.0, 1.0, -0.5, 2.0])
    new, values = torch.tensor([0.0, -0.7, -2.3, -0.5]), torch.tensor([0.0, 0.5, 0.1, 1.0])
    passes = {"logprobs": (new, torch.tensor([9.0, 1.0, 2.0, 0.6]) * torch.tensor([0.0, 1, 1, 1])), "values": values}
    made.model = lambda batch, output="logprobs", **_: passes[output]
    (policy, figures, _), (value, value_figures, _) = made.losses([experience], Window(1, 3))
    kl = (0.249329 + 1.369297) / 3
    assert float(policy) == pytest.approx(-0.933333 + 0.25 * kl - 0.5 * 1.2, abs=1e-5)
    assert float(value) == pytest.approx(0.7 * 3.5525 / 6, abs=1e-5)
    assert float(figures["val/ratio"]) == pytest.approx((1.349859 + 0.740818 + 1) / 3, abs=1e-5)
    assert float(figures["policy/clipfrac_avg"]) == pytest.approx(2 / 3)
    assert float(figures["kl"]) == pytest.approx(kl, abs=1e-5)
    assert float(figures["objective/entropy"]) == pytest.approx(1.2)
    assert float(value_figures["loss/value_avg"]) == pytest.approx(3.5525 / 6, abs=1e-5)


def backwards(rewards, values, gamma, lam):
    """Advantages by the recursion of arXiv:1506.02438."""
    advantages, following, next_value = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards), reversed(values)):
        following = reward + gamma * next_value - value + gamma * lam * following
        next_value = value
        advantages.insert(0, following)
    return advantages


ESTIMATES = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: math.exp(-d) - 1 + d,
    "abs": abs,
}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gamma": 0.9},
        {"lam": 1.0},
        {"kl_coef": 0.5},
        {"kl_estimator": "k2"},
        {"kl_estimator": "k3"},
        {"kl_estimator": "abs"},
        {"whiten_rewards": True},
        {"reward_scale": 3.0},
        {"reward_clip": 0.5},
        {"reward_scale": 3.0, "reward_clip": 4.0},
        {"reward_clip": 1.0, "missing_eos_penalty": 0.75, "response": "abc!"},  # the penalty is not cut
        {"normalize_rewards": True},  # the only score so far is the mean
        {"missing_eos_penalty": 0.75},  # it ended, so there is nothing to pay
        {"missing_eos_penalty": 0.75, "response": "abc!"},
        {"response": "abc!"},
    ],
    ids=str,
)
def test_every_setting_of_the_rewards_changes_them_as_it_says(more, three_tokens):
    _, experience = three_tokens(**more)
    s = {"gamma": 1.0, "lam": 0.95, "kl_coef": 0.05, "kl_estimator": "k1"} | more
    rewards = [-s["kl_coef"] * ESTIMATES[s["kl_estimator"]](o - r) for o, r in zip(OLD, REFERENCE)]
    score = 0.0 if "normalize_rewards" in more else 2.0 * more.get("reward_scale", 1.0)
    rewards[-1] += min(score, more.get("reward_clip", math.inf)) - (
        0.75 if "missing_eos_penalty" in more and "response" in more else 0.0
    )
    if "whiten_rewards" in more:
        mean = sum(rewards) / 3
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 3)
        rewards = [(r - mean) / std + mean for r in rewards]
    advantages = backwards(rewards, VALUES, s["gamma"], s["lam"])
    assert experience.returns.tolist()[1:] == pytest.approx([a + v for a, v in zip(advantages, VALUES)], abs=1e-5)
    mean = sum(advantages) / 3
    std = math.sqrt(sum((a - mean) ** 2 for a in advantages) / 3)
    assert experience.advantages.tolist()[1:] == pytest.approx([(a - mean) / std for a in advantages], abs=1e-4)


def test_whitened_rewards_are_looked_back_over_once(three_tokens, monkeypatch):
    """And what is logged is the same as without: rewards and KL before they are whitened."""
    figures = three_tokens()[0].metrics.read()
    monkeypatch.setattr("rlhf_fast.trainers.ppo.kl_shaped_gae", lambda *_, **__: pytest.fail("twice"))
    whitened = three_tokens(whiten_rewards=True)[0].metrics.read()
    names = [name for name in figures if name.startswith("objective/")]
    assert {n: whitened[n] for n in names} == pytest.approx({n: figures[n] for n in names})


@pytest.mark.parametrize(
    ("nats", "target", "error"), [(2.1, 2.0, 0.05), (0.9, 1.0, -0.1), (2.1, 1.0, 0.2), (-0.5, 6.0, -0.2)]
)
def test_the_adaptive_coefficient_moves_as_in_equation_8(nats, target, error, three_tokens):
    """Of arXiv:1909.08593, for one response and a horizon of 10: the relative error, cut at 20%, over 10."""
    made, _ = three_tokens(kl_target=target, kl_horizon=10, reference=[-1.0 - nats, -2.0, -0.5])
    assert made.kl_coef == pytest.approx(0.05 * (1 + error / 10), rel=1e-5)
    figures = made.metrics.read()
    assert figures["objective/kl"] == pytest.approx(nats, abs=1e-6)
    assert figures["objective/kl_coef"] == pytest.approx(0.05)  # what these rewards paid


# ---- the update


@pytest.fixture
def by_the_book(plain, ids):
    """by_the_book(policy, critic, head, steps, ...) -> losses; changes all three by gradient descent."""

    def loop(policy, critic, head, steps, vf_coef, entropy_coef=0.0, clip=0.2, clip_value=0.2, beta=0.0, lr=0.1):
        asked = [(ids(p), ids(r[0].rstrip("!"), end="!" not in r[0])) for p, r in SCRIPT.items()]
        scores = [SCORES[r[0].rstrip("!")] for r in SCRIPT.values()]

        def values_and_entropies():
            critic.set_attn_implementation("eager")
            values, entropies = [], []
            for prompt, response in asked:
                row, before = torch.tensor([[*prompt, *response]]), slice(len(prompt) - 1, -1)
                values.append(critic.get_decoder()(row).last_hidden_state[0, before] @ head[0] + head[1])
                logits = policy(row).logits[0, before]
                entropies.append(torch.distributions.Categorical(logits=logits).entropy())
            return values, torch.cat(entropies)

        with torch.no_grad():
            old = torch.cat([plain(policy, p, r) for p, r in asked])
            old_values = values_and_entropies()[0]
            # the reference is where the run begins, so the KL is 0
            raw = [backwards([0.0] * (len(v) - 1) + [s], v.tolist(), 1.0, 0.95) for s, v in zip(scores, old_values)]
        advantages = torch.tensor([a for part in raw for a in part])
        old_values = torch.cat(old_values)
        returns = advantages + old_values
        advantages = (advantages - advantages.mean()) / advantages.std(unbiased=False)
        results = []
        for _ in range(steps):
            values, entropies = values_and_entropies()
            values = torch.cat(values)
            log_ratio = torch.cat([plain(policy, p, r) for p, r in asked]) - old
            ratio = torch.exp(log_ratio)
            kl = torch.exp(-log_ratio) + log_ratio - 1
            surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
            near = old_values + (values - old_values).clamp(-clip_value, clip_value)
            errors = torch.maximum((values - returns) ** 2, (near - returns) ** 2) / 2
            results.append((-surrogate - entropy_coef * entropies + vf_coef * errors + beta * kl).mean())
            everything = [*policy.parameters(), *critic.parameters(), *head]
            grads = torch.autograd.grad(results[-1], everything, allow_unused=True)
            with torch.no_grad():
                for parameter, grad in zip(everything, grads):
                    parameter -= lr * grad if grad is not None else 0.0
        return [float(r.detach()) for r in results]

    return loop


@pytest.mark.parametrize(
    "more", [{}, {"entropy_coef": 0.5}, {"cliprange": 0.05, "cliprange_value": 0.01}, {"beta": 2.0}], ids=str
)
def test_three_passes_take_the_steps_of_the_formulas(more, sgd, trainer, model, by_the_book, run):
    policy, critic = copy.deepcopy(model), copy.deepcopy(model)
    made = trainer(model, num_ppo_epochs=3, vf_coef=0.7, learning_rate=0.05, **more)
    head = [p.detach().clone().requires_grad_() for p in made.policy.heads["value"].parameters()]
    clips = {"clip": more.get("cliprange", 0.2), "clip_value": more.get("cliprange_value", 0.2)}
    result = run(made)
    clips["beta"] = more.get("beta", 0.0)
    losses = by_the_book(policy, critic, head, 3, 0.7, more.get("entropy_coef", 0.0), lr=0.05, **clips)
    assert result.losses == pytest.approx(losses, abs=1e-4)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(result.weights[f"model.{name}"], parameter, atol=2e-5, rtol=1e-4, msg=name)
    for name, parameter in critic.named_parameters():
        torch.testing.assert_close(result.weights[f"copies.value.{name}"], parameter, atol=2e-5, rtol=1e-4, msg=name)
    torch.testing.assert_close(result.weights["heads.value.weight"], head[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(result.weights["heads.value.bias"], head[1], atol=2e-5, rtol=1e-4)
    assert result.steps[0]["val/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert result.steps[2]["policy/clipfrac_avg"] > 0.0


def test_mini_batches_cover_every_response_once_in_each_pass(trainer, model):
    made = trainer(model, num_mini_batches=3, num_ppo_epochs=2)
    plan = made.make_plan(7)
    assert [len(window) for window in plan] == [2, 3, 2] * 2
    for one_pass in (plan[:3], plan[3:]):
        assert sorted(itertools.chain(*one_pass)) == list(range(7))
    assert plan[:3] != plan[3:]


def test_each_pass_touches_its_own_adapter(trainer, model):
    """The policy's loss has gradients in the policy's adapter alone, the value's in the critic's and its head alone."""
    made = trainer(model, peft=lora_config(r=4, alpha=8))
    records = made.collect(made.train_records)
    window = Window(len(records), sum(map(made.size, records)))
    touched = []
    for loss, _, _ in made.losses(records, window):
        made.policy.zero_grad(set_to_none=True)
        loss.backward()
        touched.append({n for n, p in made.policy.named_parameters() if p.grad is not None})
    policy, value = touched
    assert policy == {n for n, p in made.policy.named_parameters() if ".policy." in n}
    assert value == {n for n, p in made.policy.named_parameters() if ".value." in n}
    assert "heads.value.weight" in value


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_critic_warmup_trains_the_critic_alone(lora, trainer, model, run):
    """For two steps; the third moves the policy too."""
    moved = []
    for steps in (2, 3):
        made = trainer(
            copy.deepcopy(model),
            peft=lora_config(r=4, alpha=8) if lora else None,
            critic_warmup_steps=2,
            max_steps=steps,
            num_ppo_epochs=1,
        )
        before = {n: p.detach().clone() for n, p in made.policy.named_parameters()}
        after = run(made).weights
        changed = {n for n, w in after.items() if not torch.equal(w, before[n])}
        moved.append({"critic" if "value" in n else "policy" for n in changed})
    assert moved == [{"critic"}, {"critic", "policy"}]


def test_a_policy_that_moved_target_kl_drops_the_rest_of_its_passes(trainer, model, run):
    """Each batch of responses is then used once or twice instead of ten times, and the run ends with its data."""
    made = trainer(model, num_ppo_epochs=10, target_kl=1e-4, num_train_epochs=3)
    result = run(made)
    assert len(made.engine.requests) == 3
    assert made.total_steps == 30
    assert len(result.steps) == 6  # the first pass of each starts where it sampled, the second sees that it moved
    assert made.finished
    assert all(step["policy/approxkl_avg"] > 1e-4 for step in result.steps[1::2])


# ---- what must teach nothing


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_nothing_scored_moves_no_weight(lora, trainer, model, run):
    peft = lora_config(r=4, alpha=8) if lora else None
    made = trainer(model, reward=lambda completions, **_: [None] * len(completions), peft=peft, missing_eos_penalty=1.0)
    before = {n: p.detach().clone() for n, p in made.policy.named_parameters()}
    result = run(made)
    assert all(torch.equal(weight, before[name]) for name, weight in result.weights.items())
    assert all(math.isfinite(value) for step in result.steps for value in step.values())


def test_an_unscored_response_might_as_well_not_exist(sgd, trainer, make_model, run):
    """Same scores, losses and weights as a run without it."""

    def all_but_one(completions, **_):
        return [None if c == "a longer one" else SCORES[c] for c in completions]

    without = {p: r for p, r in SCRIPT.items() if p != "name "}
    runs = [
        run(trainer(make_model(), script, reward, num_ppo_epochs=2))
        for script, reward in ((SCRIPT, all_but_one), (without, by_hand))
    ]
    names = ("loss", "grad_norm", "objective/scores", "objective/kl", "objective/rlhf_reward", "val/explained_variance")
    for unscored, absent in zip(runs[0].steps, runs[1].steps):
        assert [unscored.get(n) for n in names] == [absent.get(n) and pytest.approx(absent[n], abs=1e-5) for n in names]
    for name, weight in runs[1].weights.items():
        torch.testing.assert_close(runs[0].weights[name], weight, atol=1e-5, rtol=0, msg=name)


def test_two_functions_are_mixed_by_their_weights(trainer, model, run):
    def short(completions, **_):
        return [-float(len(c)) for c in completions]

    step = run(trainer(model, reward=[by_hand, short], reward_weights=[2.0, 0.25])).steps[0]
    want = [2 * score - 0.25 * len(text) for text, score in SCORES.items()]
    assert step["objective/scores"] == pytest.approx(sum(want) / 4)


# ---- real sampling


def vowels(completions, **_):
    return [sum(c.count(v) for v in "aeiou") / 4 for c in completions]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_policy_learns_what_is_rewarded_and_a_high_kl_coefficient_holds_it(
    lora, make_model, tokenizer, settings, run
):
    last = {}
    for kl_coef in (0.0, 10.0):
        args = PPOConfig(
            **settings(
                learning_rate=1e-2,
                max_steps=20,
                num_ppo_epochs=2,
                per_device_train_batch_size=32,
                max_completion_length=4,
                kl_coef=kl_coef,
            )
        )
        rows = [{"prompt": p} for p in "bcdfghj"]
        peft = lora_config(r=4, alpha=8) if lora else None
        made = PPOTrainer(
            make_model(), vowels, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=peft
        )
        steps = [s for s in run(made).steps if "objective/scores" in s]
        last[kl_coef] = steps[0], steps[-1]
    (first, free), (_, held) = last[0.0], last[10.0]
    assert free["objective/scores"] > first["objective/scores"] + 0.25
    assert free["objective/kl"] > 1.0
    assert held["objective/scores"] < free["objective/scores"] - 0.2
    assert abs(held["objective/kl"]) < 0.3 * free["objective/kl"]


def test_the_critic_comes_to_explain_the_returns(trainer, model, run):
    """Four prompts, four fixed answers, four scores: all of the variance can be explained."""
    result = run(trainer(model, learning_rate=3e-3, num_train_epochs=25, critic_warmup_steps=1000, cliprange_value=5.0))
    explained = [s["val/explained_variance"] for s in result.steps if "val/explained_variance" in s]
    assert explained[0] < 0.5
    assert explained[-1] > 0.9


# ---- a trained reward model on the same base


def test_a_reward_adapter_scores_on_the_policys_own_base(make_model, tokenizer, settings, scripted, tmp_path, ids, run):
    """As it does when loaded alone, and untouched by the training of the others."""
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base, peft = str(tmp_path / "base"), lora_config(r=4, alpha=8)
    pairs = [{"prompt": p, "chosen": r[0].rstrip("!"), "rejected": "no"} for p, r in SCRIPT.items()]
    args = RewardConfig(**settings(num_train_epochs=20, learning_rate=1e-2))
    judge = RewardTrainer(base, args, train_dataset=pairs, processing_class=tokenizer, peft_config=peft)
    judge.train()
    asked = [(ids(p), ids(r[0].rstrip("!"), end="!" not in r[0])) for p, r in SCRIPT.items()]
    probe = TokenBatch.pack([Example(p + r, [False] * len(p) + [True] * len(r)) for p, r in asked])
    with torch.no_grad():
        want = load(judge.args.output_dir).scores(probe)
    args = PPOConfig(
        **settings(reward_model_path=judge.args.output_dir, per_device_train_batch_size=4, num_train_epochs=2)
    )
    rows = [{"prompt": p} for p in SCRIPT]
    given = {"train_dataset": rows, "processing_class": tokenizer, "peft_config": peft, "engine": scripted(SCRIPT)}
    made = PPOTrainer(base, args=args, **given)
    mixed = PPOTrainer(base, [by_hand], dataclasses.replace(args, reward_weights=[0.5, 2.0], max_steps=1), **given)
    figures = mixed.train()
    assert figures["rewards/by_hand/mean"] == pytest.approx(sum(SCORES.values()) / 4)
    assert figures["rewards/reward_model/mean"] == pytest.approx(float(want.mean()), abs=1e-5)
    assert figures["objective/scores"] == pytest.approx(
        0.5 * sum(SCORES.values()) / 4 + 2 * float(want.mean()), abs=1e-5
    )
    twice = PPOTrainer(
        base,
        args=dataclasses.replace(args, reward_model_path=[judge.args.output_dir] * 2, reward_weights=[1.0, -3.0]),
        **given,
    )
    assert set(twice.policy.adapters.names) == {"policy", "value", "reward", "reward_2"}
    (figures, *_) = run(twice).steps
    assert figures["rewards/reward_model_2/mean"] == pytest.approx(float(want.mean()), abs=1e-5)
    assert figures["objective/scores"] == pytest.approx(-2 * float(want.mean()), abs=1e-5)
    assert set(made.policy.adapters.names) == {"policy", "value", "reward"}
    assert len(made.policy.copies) == 0
    scores = [s["objective/scores"] for s in run(made).steps if "objective/scores" in s]
    assert want.std() > 0.01
    assert scores == pytest.approx([float(want.mean())] * 2, abs=1e-5)
