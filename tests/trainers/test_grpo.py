"""GRPO and its relatives, against a loop written out in plain PyTorch on transformers' own forward pass."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import rlhf_fast.trainers.grpo
from rlhf_fast import GRPOConfig, GRPOTrainer
from rlhf_fast.errors import UserError
from rlhf_fast.losses.policy import LOSS_TYPES
from rlhf_fast.models.adapters import lora_config
from rlhf_fast.rollout import Sample
from rlhf_fast.rollout.sampling import spaced_seed
from rlhf_fast.trainers.groups import group_metrics
from rlhf_fast.trainers.trainer import Window

# a "!" cuts the response there; rewards are by hand
SCRIPT = {"1+1=": ["2", "two", "3 or so!", "2, i think"], "go ": ["left", "right", "up", "down the road!"]}
REWARDS = {"2": 1.0, "two": 0.5, "3 or so": 0.0, "2, i think": 0.75}
REWARDS |= {"left": 0.25, "right": 1.0, "up": -1.0, "down the road": 3.0}
ROWS = [{"prompt": p} for p in SCRIPT]
LIMIT = 16  # max_completion_length
EPS = 1e-4  # what group_advantages adds to the standard deviation


def by_hand(completions, **_):
    return [REWARDS[c] for c in completions]


@pytest.fixture
def trainer(tokenizer, settings, scripted):
    def make(model, script=SCRIPT, reward=by_hand, peft=None, **more):
        common = {"num_generations": 4, "max_completion_length": LIMIT, "max_grad_norm": 0.0}
        args = GRPOConfig(**settings(**common, **more))
        rows = [{"prompt": p} for p in script]
        return GRPOTrainer(
            model,
            reward,
            args=args,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=peft,
            engine=scripted(script),
        )

    return make


# ---- the definition, written out


def standardised(rewards: list[float]) -> list[float]:
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    return [(r - mean) / (std + EPS) for r in rewards]


ADVANTAGES = {p: standardised([REWARDS[r.rstrip("!")] for r in responses]) for p, responses in SCRIPT.items()}


def token_losses(kind, new, old, advantage, low, high, delta):
    """(T,) losses of one response. ``new`` and ``old`` are log-probabilities."""
    ratio = torch.exp(new - old)
    if kind == "cispo":
        return -torch.clamp(ratio, max=high).detach() * advantage * new
    if kind == "reinforce":
        return -advantage * new
    if kind == "sapo":  # logged is what has the same gradient
        tau = 1.0 if advantage > 0 else 1.05
        gate = torch.sigmoid(tau * (ratio - 1))
        loss = -4 / tau * gate * advantage
        return loss + (-4 * gate * (1 - gate) * ratio * advantage * new - loss).detach()
    if kind == "vespo":
        k, decay = (2.0, 3.0) if advantage >= 0 else (3.0, 2.0)
        whole = torch.exp((new - old).detach().sum())
        return -(whole**k) * torch.exp(decay * (1 - whole)) * advantage * new
    loss = -torch.minimum(ratio * advantage, torch.clamp(ratio, 1 - low, 1 + high) * advantage)
    return torch.minimum(loss, torch.full_like(loss, -delta * advantage)) if delta and advantage < 0 else loss


def aggregated(loss_type, losses: list[torch.Tensor]) -> torch.Tensor:
    if loss_type in ("grpo", "sapo"):
        return torch.stack([l.mean() for l in losses]).mean()
    if loss_type == "dr_grpo":
        return torch.cat(losses).sum() / (len(losses) * LIMIT)
    if loss_type == "luspo":
        return torch.cat(losses).sum() / len(losses)
    return torch.cat(losses).mean()


def sequence_ratio(new, old, level):
    """Log-probabilities whose ratio to ``old`` is the level's."""
    if level == "token":
        return new
    mean = (new - old).mean()
    return old + (mean if level == "sequence" else mean.detach() + new - new.detach())


@pytest.fixture
def by_the_book(plain, ids):
    """by_the_book(model, steps, ...) -> losses; changes the model as ``steps`` steps of gradient descent do."""

    def loop(
        model,
        steps,
        loss_type,
        beta=0.0,
        unbiased=True,
        low=0.2,
        high=0.2,
        delta=None,
        level="token",
        lr=0.1,
        keep=lambda r: True,
    ):
        def logprobs(m):
            asked = [(p, r, i) for p, responses in SCRIPT.items() for i, r in enumerate(responses) if keep(r)]
            return [plain(m, ids(p), ids(r.rstrip("!"), end="!" not in r)) for p, r, _ in asked]

        advantages = [a for p, rs in SCRIPT.items() for a, r in zip(ADVANTAGES[p], rs) if keep(r)]
        with torch.no_grad():
            old = logprobs(model)
        results = []
        for _ in range(steps):
            losses = []
            for new, before, advantage in zip(logprobs(model), old, advantages):
                at_level = sequence_ratio(new, before, level)
                kind = loss_type if loss_type in ("cispo", "reinforce", "sapo", "vespo") else "clip"
                loss = token_losses(kind, at_level, before, advantage, low, high, delta)
                d = before - new  # the reference is where the run began
                ratio = torch.exp(new - before) if unbiased else 1.0
                losses.append(loss + beta * ratio * (torch.exp(d) - d - 1))
            results.append(aggregated(loss_type, losses))
            grads = torch.autograd.grad(results[-1], list(model.parameters()))
            with torch.no_grad():
                for parameter, grad in zip(model.parameters(), grads):
                    parameter -= lr * grad
        return [float(r.detach()) for r in results]

    return loop


def assert_same_weights(result, model):
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(result.weights[f"model.{name}"], parameter, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_takes_the_steps_of_its_formula(loss_type, sgd, trainer, model, by_the_book, run):
    """Three steps on one batch of responses with a KL penalty: the ratios leave the clip range, the baseline stays."""
    twin = copy.deepcopy(model)
    high = 1.05 if loss_type == "cispo" else 0.3
    options = {"epsilon_high": high} if "epsilon_high" in LOSS_TYPES[loss_type].options else {}
    result = run(trainer(model, loss_type=loss_type, num_iterations=3, beta=0.05, max_steps=3, **options))
    want = by_the_book(twin, 3, loss_type, beta=0.05, high=high)
    assert result.losses == pytest.approx(want, abs=1e-4)
    assert_same_weights(result, twin)
    if LOSS_TYPES[loss_type].kind != "reinforce":
        assert result.steps[-1]["clip_ratio/region_mean"] > 0.0
    assert result.steps[0]["clip_ratio/region_mean"] == result.steps[0]["kl"] == 0.0


def test_the_bias_correction_of_the_kl_can_be_left_out(sgd, trainer, model, by_the_book, run):
    """A reference far away, so that the two gradients differ: the other's steps are not these."""
    twin, other = copy.deepcopy(model), copy.deepcopy(model)
    result = run(trainer(model, num_iterations=3, beta=2.0, use_bias_correction_kl=False, max_steps=3))
    want = by_the_book(twin, 3, "dapo", beta=2.0, unbiased=False)
    assert result.losses == pytest.approx(want, abs=1e-4)
    assert_same_weights(result, twin)
    assert by_the_book(other, 3, "dapo", beta=2.0)[2] != pytest.approx(want[2], abs=1e-2)


@pytest.mark.parametrize("level", ["sequence", "sequence_token"])
def test_sequence_ratios_take_the_steps_of_their_formula(level, sgd, trainer, model, by_the_book, run):
    """GSPO, whose clip range is narrow."""
    twin = copy.deepcopy(model)
    options = {"epsilon": 0.02, "epsilon_high": 0.05, "importance_sampling_level": level}
    result = run(trainer(model, loss_type="grpo", num_iterations=3, max_steps=3, **options))
    want = by_the_book(twin, 3, "grpo", low=0.02, high=0.05, level=level)
    assert result.losses == pytest.approx(want, abs=1e-4)
    assert_same_weights(result, twin)
    assert result.steps[-1]["clip_ratio/region_mean"] > 0.0


def test_delta_bounds_the_ratio_where_the_advantage_is_negative(sgd, trainer, make_model, by_the_book, run):
    """A first step far too long, so that bad responses have become likelier: only ``delta`` bounds their loss."""
    losses = []
    for delta in (None, 1.2):
        twin = make_model()
        result = run(
            trainer(make_model(), loss_type="grpo", num_iterations=3, delta=delta, max_steps=3, learning_rate=1.0)
        )
        losses.append(by_the_book(twin, 3, "grpo", delta=delta, lr=1.0))
        assert result.losses == pytest.approx(losses[-1], rel=1e-3, abs=1e-3)
    assert losses[0][1] > losses[1][1] + 0.01


@pytest.mark.parametrize(
    ("settings_", "advantages"),
    [
        ({}, {"1+1=": ADVANTAGES["1+1="], "go ": ADVANTAGES["go "]}),
        (
            {"scale_rewards": "none"},
            {"1+1=": [0.4375, -0.0625, -0.5625, 0.1875], "go ": [-0.5625, 0.1875, -1.8125, 2.1875]},
        ),
        (
            {"scale_rewards": "none", "advantage_baseline": "leave_one_out"},
            {"1+1=": [7 / 12, -1 / 12, -0.75, 0.25], "go ": [-0.75, 0.25, -29 / 12, 35 / 12]},
        ),
    ],
)
def test_advantages_equal_hand_numbers(settings_, advantages, trainer, model):
    """Means are 0.5625 and 0.8125; leave-one-out is 4/3 of the difference to them."""
    made = trainer(model, **settings_)
    experiences = made.collect(made.train_records)
    for prompt, record in enumerate(made.train_records):
        got = [e.advantages for e in experiences[4 * prompt : 4 * prompt + 4]]
        assert [float(a[0]) for a in got] == pytest.approx(advantages[record.prompt], abs=1e-5)
        assert all((a == a[0]).all() for a in got)


# two responses of three and two tokens with rewards 1 and 0, advantages 0.5 and -0.5; their log-ratios are 0.3 and -0.3
NEW, OLD = ([-0.7, -2.3, -0.5], [-1.2, -1.3]), ([-1.0, -2.0, -0.5], [-1.5, -1.0])


@pytest.mark.parametrize(
    ("more", "loss"),
    [
        # tokens lose -0.6, -0.370409, -0.5 (clipped at 1.2) and 0.674929, 0.4 (at 0.8)
        ({"loss_type": "grpo"}, (-1.470409 / 3 + 1.074929 / 2) / 2),
        ({"loss_type": "dapo"}, (-1.470409 + 1.074929) / 5),
        ({"loss_type": "bnpo"}, (-1.470409 + 1.074929) / 5),
        ({"loss_type": "dr_grpo"}, (-1.470409 + 1.074929) / (2 * LIMIT)),
        ({"loss_type": "luspo"}, (-1.470409 + 1.074929) / 2),
        # -0.5 (1.2 * -0.7 + 0.740818 * -2.3 - 0.5) and 0.5 (1.2 * -1.2 + 0.740818 * -1.3)
        ({"loss_type": "cispo", "epsilon_high": 1.2}, (1.521941 - 1.201532) / 5),
        ({"loss_type": "reinforce"}, (0.5 * 3.5 - 0.5 * 2.5) / 5),
        # 0.674929 is more than 1.25 * 0.5
        ({"loss_type": "dapo", "delta": 1.25}, (-1.470409 + 0.625 + 0.4) / 5),
        # the ratios of both responses are exp(0)
        ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, 0.0),
        ({"loss_type": "luspo", "importance_sampling_level": "sequence_token"}, (-1.5 + 1.0) / 2),
        # KL (k3) for d = -0.3, 0.3, 0 is 0.040818, 0.049859, 0; for -0.3, 0.3 the first two again
        (
            {"loss_type": "dapo", "beta": 2.0, "use_bias_correction_kl": False},
            (-1.470409 + 1.074929 + 2 * 2 * 0.090677) / 5,
        ),
        # with the ratios 1.349859 and 0.740818 these are 0.055098 and 0.036937
        ({"loss_type": "dapo", "beta": 2.0}, (-1.470409 + 1.074929 + 2 * 2 * 0.092035) / 5),
        # gates: p = 0.586583, 0.435530, 0.5 give 1.309383, 0.728504, 1; and 0.590842, 0.432374 at 1.05 1.305270, 0.727264
        (
            {"loss_type": "sapo"},
            (0.5 * (1.309383 * 0.7 + 0.728504 * 2.3 + 0.5) / 3 - 0.5 * (1.305270 * 1.2 + 0.727264 * 1.3) / 2) / 2,
        ),
        # the whole responses' ratios are 1, and their gates too
        ({"loss_type": "vespo"}, (0.5 * 3.5 - 0.5 * 2.5) / 5),
    ],
    ids=str,
)
def test_losses_of_three_tokens_equal_hand_numbers(more, loss, trainer, model):
    made = trainer(model, {"q": ["ab", "c"]}, num_iterations=2, scale_rewards="none", **more)
    made.logprobs = lambda batch, role: torch.tensor([0.0, *OLD[0], 0.0, *OLD[1]])
    made.args.num_generations, made.args.shared_prefix = 2, False
    made.rollouts.functions = [lambda completions, **_: [1.0, 0.0]]
    records = made.collect(made.train_records)
    assert [r.advantages.tolist() for r in records] == [[0.5] * 4, [-0.5] * 3]
    new = torch.tensor([0.0, *NEW[0], 0.0, *NEW[1]])
    made.model = lambda batch, **_: (new, torch.zeros_like(new))
    ((got, _, _),) = made.losses(records, Window(2, 5))
    assert float(got) == pytest.approx(loss, abs=1e-5)


def test_a_price_of_the_kl_in_the_reward_is_paid_before_the_baseline(trainer, model):
    """The first response drifted by 0.5 + 0.25 nats, the second by -1: 1 - 0.3 and 0 + 0.4 are 0.15 from their mean."""
    made = trainer(model, {"q": ["ab", "c"]}, kl_coef=0.4, scale_rewards="none")
    made.args.num_generations, made.args.shared_prefix = 2, False
    made.rollouts.functions = [lambda completions, **_: [1.0, 0.0]]
    drift = torch.tensor([0.0, 0.5, 0.25, 0.0, 0.0, -1.0, 0.0])
    made.logprobs = lambda batch, role: torch.zeros(7) if role == "reference" else drift
    records = made.collect(made.train_records)
    assert [float(r.advantages[0]) for r in records] == pytest.approx([0.15, -0.15])
    assert [r.reward for r in records] == [1.0, 0.0]


def test_scaling_by_the_batch_divides_all_groups_by_one_number(trainer, model):
    made = trainer(model, scale_rewards="batch")
    got = [float(e.advantages[0]) for e in made.collect(made.train_records)]
    rewards = torch.tensor([REWARDS[r.rstrip("!")] for p in made.train_records for r in SCRIPT[p.prompt]]).double()
    centred = rewards.view(2, 4) - rewards.view(2, 4).mean(1, keepdim=True)
    assert got == pytest.approx((centred.flatten() / (rewards.std() + EPS)).tolist(), abs=1e-5)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16 passes"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_first_ratio_is_exactly_1(lora, half, trainer, model, run, monkeypatch):
    """Old and new log-probabilities agree to the last bit, with dropout configured, checkpointing and autocast."""
    seen = []
    real = rlhf_fast.trainers.grpo.group_policy_loss

    def spy(loss_type, logprobs, old_logprobs, *args, **kwargs):
        seen.append((logprobs.detach().clone(), old_logprobs, kwargs["ref_logprobs"]))
        return real(loss_type, logprobs, old_logprobs, *args, **kwargs)

    monkeypatch.setattr(rlhf_fast.trainers.grpo, "group_policy_loss", spy)
    options = {"num_iterations": 2, "beta": 0.1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    peft = lora_config(r=4, alpha=8, dropout=0.3) if lora else None
    made = trainer(model, peft=peft, gradient_checkpointing=True, max_steps=2, learning_rate=1e-2, **options)
    if half:  # what full fine-tuning does on a GPU
        made.policy.compute_dtype = torch.bfloat16
    run(made)
    first, second = seen[:2], seen[2:]
    for new, old, ref in first:
        assert torch.equal(new, old)
        assert torch.equal(new, ref)
        assert new.abs().sum() > 0
    for (_, old, _), (new, kept, _) in zip(first, second):
        assert torch.equal(old, kept)
        assert not torch.equal(new, kept)


# ---- what must teach nothing


def untouched(result, before):
    return all(torch.equal(weight, before[name]) for name, weight in result.weights.items())


@pytest.fixture
def before(make_model):
    return {f"model.{n}": p.detach().clone() for n, p in make_model().named_parameters()}


@pytest.mark.parametrize(
    "reward",
    [
        lambda completions, **_: [None] * len(completions),
        lambda completions, **_: [0.1] * len(completions),
        lambda completions, **_: [1.0] + [None] * (len(completions) - 1),
        lambda completions, **_: [float("nan")] * len(completions),
        lambda completions, **_: 1 / 0,
        lambda completions, **_: [1.0],
    ],
    ids=["unscored", "all equal", "one scored", "nan", "raises", "too few"],
)
def test_groups_without_two_different_rewards_move_no_weight(reward, trainer, model, before, run):
    result = run(trainer(model, reward=reward, max_steps=2))
    assert untouched(result, before)
    assert result.steps[0]["frac_reward_zero_std"] == 1.0
    assert all(math.isfinite(value) for step in result.steps for value in step.values())


def test_a_failing_reward_is_counted_and_said_once(trainer, model, run, caplog):
    def broken(completions):
        raise KeyError("no such thing")

    result = run(trainer(model, reward=broken, max_steps=3))
    assert [step["rewards/broken/faults"] for step in result.steps] == [8.0, 8.0, 8.0]
    said = [r.message for r in caplog.records if "broken" in r.message]
    assert len(said) == 1
    assert "KeyError" in said[0]
    assert "8 of 8 samples" in said[0]


def test_an_unscored_response_is_in_no_baseline_and_teaches_nothing(trainer, model):
    """The other three of its group are compared with each other: mean 0.75, deviation 0.25."""

    def three_of_four(completions, **_):
        return [None if c == "3 or so" else by_hand([c])[0] for c in completions]

    made = trainer(model, reward=three_of_four)
    got = [float(e.advantages[0]) for e in made.collect(made.train_records)[:4]]
    assert got == pytest.approx([0.25 / (0.25 + EPS), -0.25 / (0.25 + EPS), 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_the_loss_with_unscored_responses_is_that_without_them(loss_type, trainer, model):
    """In numerator, KL and denominator: a storm of faults must not shrink the step."""

    def three_of_four(completions, **_):
        return [None if c == "3 or so" else by_hand([c])[0] for c in completions]

    made = trainer(model, reward=three_of_four, loss_type=loss_type, beta=0.1)
    records = made.collect(made.train_records)
    scored = [e for e in records if not math.isnan(e.reward)]
    assert 0 < len(scored) < len(records)
    with torch.no_grad():
        for p in made.policy.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    losses = [float(next(made.losses(part, made.own_window(part)))[0]) for part in (records, scored)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != 0.0


def test_group_metrics_look_at_what_was_scored():
    nan = math.nan
    rewards = torch.tensor([1.0, 0.0, nan, nan, 2.0, 2.0, 2.0, nan, nan, nan, nan, nan])
    metrics = group_metrics(rewards, 4)
    assert float(metrics["reward"]) == pytest.approx(7 / 5)
    assert float(metrics["reward_std"]) == pytest.approx((math.sqrt(0.5) + 0.0) / 2)
    assert float(metrics["frac_reward_zero_std"]) == pytest.approx(2 / 3)


# ---- dynamic sampling

# of the prompts "a" to "f", only the responses to "b" and "e" differ in their rewards
MIXED = {p: ["up", "left", "up", "left"] if p in "be" else ["up"] * 4 for p in "abcdef"}


@pytest.fixture
def dynamic(trainer, model):
    """dynamic(rounds, prompts, **settings) -> trainer, whose data come in alphabetical order, and a round of ``prompts``."""

    def make(rounds, prompts, script=MIXED, **more):
        made = trainer(model, script, dynamic_sampling_rounds=rounds, **more)
        made.sampler.shuffle = False
        return made, made.collect(made.draw(prompts, 0, prompts))

    return make


def prompts_of(experiences, tokenizer):
    return [tokenizer.decode(e.example.input_ids[0]) for e in experiences[::4]]


@pytest.mark.parametrize(
    ("rounds", "kept", "asked"),
    [
        (0, "ab", ["ab"]),
        (1, "cb", ["ab", "c"]),
        (2, "db", ["ab", "c", "d"]),
        (3, "eb", ["ab", "c", "d", "e"]),
        (9, "eb", ["ab", "c", "d", "e"]),
    ],
)
def test_groups_scored_all_alike_give_way_to_further_prompts(rounds, kept, asked, dynamic, tokenizer):
    """In the order of the data, round after round, until all groups differ or the rounds are over."""
    made, experiences = dynamic(rounds, 2, num_train_epochs=1)
    assert prompts_of(experiences, tokenizer) == list(kept)
    assert [[tokenizer.decode(r.prompt_ids) for r in requests] for requests in made.engine.requests] == [
        list(prompts) for prompts in asked
    ]
    seeds = [r.seed for requests in made.engine.requests for r in requests]
    assert seeds == [seeds[0] + (i << 20) for i in range(len(seeds))], "no two prompts share a stream"
    figures = made.metrics.read()
    # of all that was sampled: one group in each round after the first
    sampled = "".join(asked)
    assert figures["frac_reward_zero_std"] == pytest.approx(sum(p not in "be" for p in sampled) / len(sampled))
    rewards = [REWARDS[r] for p in sampled for r in MIXED[p]]
    assert figures["reward"] == pytest.approx(sum(rewards) / len(rewards))


def test_dynamic_sampling_ends_with_the_data(dynamic, tokenizer):
    """Of one epoch: two prompts are left for three groups."""
    made, experiences = dynamic(9, 4, {p: ["up"] * 4 for p in "abcdef"}, num_train_epochs=1)
    assert prompts_of(experiences, tokenizer) == list("efcd")
    assert made.rows_left == 0
    assert made.finished


def test_unscored_groups_are_replaced_too(dynamic, tokenizer):
    made, _ = dynamic(0, 1)
    made.args.dynamic_sampling_rounds = 1
    made.rollouts.functions = [lambda completions, **_: [None] * len(completions)]
    assert prompts_of(made.collect(made.draw(2, 0, 2)), tokenizer) == list("de")


def test_truncated_responses_can_be_left_out(sgd, trainer, model, by_the_book, run):
    """They stay in the baseline; the mean is over the tokens of the others."""
    twin = copy.deepcopy(model)
    result = run(trainer(model, mask_truncated_completions=True, num_iterations=2, max_steps=2))
    want = by_the_book(twin, 2, "dapo", keep=lambda response: "!" not in response)
    assert result.losses == pytest.approx(want, abs=1e-4)
    assert_same_weights(result, twin)
    assert result.steps[0]["completions/clipped_ratio"] == pytest.approx(2 / 8)


def test_only_truncated_responses_teach_nothing(trainer, model, before, run):
    script = {p: [r.rstrip("!") + "!" for r in responses] for p, responses in SCRIPT.items()}
    assert untouched(run(trainer(model, script, mask_truncated_completions=True, max_steps=2)), before)


# ---- rollouts


def test_a_group_is_asked_for_once_and_scored_with_its_columns(model, scripted, tokenizer, settings, run):
    seen = []

    def reward(prompts, completions, completion_ids, answer, **_):
        seen.append((prompts, completions, completion_ids, answer))
        return [float(c == a) for c, a in zip(completions, answer)]

    args = GRPOConfig(**settings(num_generations=4, temperature=0.7, max_completion_length=9, seed=5))
    engine = scripted(SCRIPT)
    rows = [{"prompt": p, "answer": a} for p, a in zip(SCRIPT, ["2", "up"])]
    made = GRPOTrainer(model, [reward], args=args, train_dataset=rows, processing_class=tokenizer, engine=engine)
    step = run(made).steps[0]
    (requests,) = engine.requests
    assert [(r.n, r.max_new_tokens, r.temperature) for r in requests] == [(4, 9, 0.7)] * 2
    assert [r.seed for r in requests] == [spaced_seed(5 * 1_000_003), spaced_seed(5 * 1_000_003 + 1)]
    ((prompts, completions, completion_ids, answers),) = seen
    assert sorted(zip(prompts, completions, answers)) == sorted(
        (p, r.rstrip("!"), a) for (p, rs), a in zip(SCRIPT.items(), ["2", "up"]) for r in rs
    )
    cut = ("3 or so", "down the road")
    assert [tokenizer.decode(i) for i in completion_ids] == [c if c in cut else c + "<eos>" for c in completions]
    assert step["reward"] == step["rewards/reward/mean"] == 2 / 8
    assert step["completions/mean_length"] == pytest.approx(sum(map(len, completion_ids)) / 8)


def test_the_temperature_of_sampling_is_that_of_the_log_probabilities(trainer, model, plain, ids):
    made = trainer(model, temperature=0.5, num_iterations=2)
    experience = made.collect(made.train_records[:1])[0]
    prompt = made.train_records[0].input_ids
    want = plain(copy.deepcopy(model), prompt, experience.example.input_ids[len(prompt) :], 0.5)
    torch.testing.assert_close(experience.old_logprobs[len(prompt) :], want.detach(), atol=1e-5, rtol=0)


def test_several_rewards_are_weighed_and_logged_apart(trainer, model, run):
    def short(completions, **_):
        return [-float(len(c)) for c in completions]

    made = trainer(model, reward=[by_hand, short], reward_weights=[2.0, 0.5])
    step = run(made).steps[0]
    hand = sum(REWARDS.values()) / 8
    length = -sum(len(r) for r in REWARDS) / 8
    assert step["rewards/by_hand/mean"] == pytest.approx(hand)
    assert step["rewards/short/mean"] == pytest.approx(length)
    assert step["reward"] == pytest.approx(2 * hand + 0.5 * length)


def test_evaluation_weighs_rewards_as_training_does(tokenizer, model, settings):
    def long(completions, **_):
        return [float(len(c)) for c in completions]

    rows = [{"prompt": p} for p in "abc"]
    args = GRPOConfig(**settings(max_completion_length=5, reward_weights=[3.0, -1.0]))
    given = {"train_dataset": rows, "eval_dataset": rows, "processing_class": tokenizer}
    figures = GRPOTrainer(model, [long, lambda completions, **_: [1.0] * 3], args=args, **given).evaluate()
    assert figures["eval_rewards/long/mean"] > 0
    assert figures["eval_reward"] == pytest.approx(3 * figures["eval_rewards/long/mean"] - 1.0)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_policy_learns_what_is_rewarded(lora, make_model, tokenizer, settings, run):
    """Real sampling: a reward for every "a" brings more of them, and a KL penalty fewer than none."""

    def letters(completions, **_):
        return [c.count("a") / 4 for c in completions]

    rewards = {}
    for beta in (0.0, 20.0):
        args = GRPOConfig(
            **settings(
                learning_rate=2e-2, max_steps=12, per_device_train_batch_size=32, max_completion_length=4, beta=beta
            )
        )
        peft = lora_config(r=4, alpha=8) if lora else None
        rows = [{"prompt": p} for p in "bcdefgh"]
        made = GRPOTrainer(
            make_model(), letters, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=peft
        )
        steps = run(made).steps
        rewards[beta] = [sum(s["reward"] for s in part) / 3 for part in (steps[:3], steps[-3:])]
    assert rewards[0.0][1] > rewards[0.0][0] + 0.3
    assert rewards[20.0][1] < rewards[0.0][1] - 0.2


def test_evaluation_answers_greedily_and_touches_nothing(tokenizer, model, settings, run):
    """Twice the same figures; the training run is the same with and without it."""

    def letters(completions, **_):
        return [float(len(c)) for c in completions]

    runs = []
    for eval_rows in (None, [{"prompt": p} for p in "xyz"]):
        args = GRPOConfig(**settings(max_steps=2, learning_rate=1e-2, max_completion_length=5, eval_steps=1))
        made = GRPOTrainer(
            copy.deepcopy(model),
            letters,
            args=args,
            train_dataset=[{"prompt": p} for p in "abc"],
            eval_dataset=eval_rows,
            processing_class=tokenizer,
        )
        runs.append((made, run(made)))
    assert runs[0][1].losses == runs[1][1].losses
    made, result = runs[1]
    assert [s["step"] for s in result.steps if "eval_reward" in s] == [1, 2]
    assert made.evaluate()["eval_reward"] == made.evaluate()["eval_reward"] == result.steps[-1]["eval_reward"]


def test_engines_that_cannot_serve_reinforcement_learning_are_refused(trainer, model, tokenizer, settings):
    class TextOnly:
        capabilities = frozenset({"n"})

        def generate(self, requests) -> list[list[Sample]]:
            raise AssertionError("never asked")

    with pytest.raises(UserError, match="TextOnly cannot be used for RL"):
        GRPOTrainer(
            model,
            by_hand,
            args=GRPOConfig(**settings()),
            train_dataset=ROWS,
            processing_class=tokenizer,
            engine=TextOnly(),
        )
    with pytest.raises(UserError, match="temperature=0"):
        trainer(model, temperature=0.0)
