"""Truncated importance sampling: weights by hand, and what they do to the advantages of a run."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fast import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer
from rlhf_fast.data.batch import Example, Experience
from rlhf_fast.errors import UserError
from rlhf_fast.models import load
from rlhf_fast.rollout import GenerateEngine, SlotEngine
from rlhf_fast.trainers.importance import MODES, distance, distance_of, importance_weights, weigh

# one prompt token, then three of the response: ratios 2, 1/4 and 4, together 2
OLD = torch.tensor([0.0, -1.0, -1.0, -1.0])
ROLLOUT = OLD - torch.tensor([0.0, math.log(2), -math.log(4), math.log(4)])


@pytest.mark.parametrize(
    ("mode", "low", "high", "weights"),
    [
        ("token_truncate", 0.0, 3.0, [1.0, 2.0, 0.25, 3.0]),
        ("token_truncate", 0.5, None, [1.0, 2.0, 0.5, 4.0]),
        ("token_mask", 0.0, 3.0, [1.0, 2.0, 0.25, 0.0]),
        ("token_mask", 0.5, 3.0, [1.0, 2.0, 0.0, 0.0]),
        ("sequence_truncate", 0.0, 3.0, [2.0] * 4),
        ("sequence_truncate", 0.0, 1.5, [1.5] * 4),
        ("sequence_mask", 0.0, 3.0, [2.0] * 4),
        ("sequence_mask", 0.0, 1.5, [0.0] * 4),
        ("sequence_mask", 2.5, None, [0.0] * 4),
    ],
)
def test_weights_equal_hand_numbers(mode, low, high, weights):
    assert importance_weights(OLD, ROLLOUT, mode, low, high).tolist() == pytest.approx(weights)


def test_a_token_that_the_engine_could_not_score_has_ratio_1():
    rollout = ROLLOUT.clone()
    rollout[3] = torch.nan
    assert importance_weights(OLD, rollout, "token_truncate", 0.0, 3.0).tolist() == pytest.approx([1.0, 2.0, 0.25, 1.0])
    assert importance_weights(OLD, rollout, "sequence_truncate").tolist() == pytest.approx([0.5] * 4)


def test_the_distance_by_hand_counts_no_prompt_and_no_token_without_a_score():
    """ln 2, ln 4, and one that the engine could not score; 9 where the prompt is."""
    mine, mask = torch.tensor([9.0, -1.0, -1.0, -1.0]), torch.tensor([False, True, True, True])
    rollout = torch.tensor([0.0, -1.0 - math.log(2), -1.0 + math.log(4), torch.nan])
    found = distance(mine, rollout, mask)
    assert float(found["sampling/sampling_logp_difference/mean"]) == pytest.approx(1.5 * math.log(2))
    assert float(found["sampling/sampling_logp_difference/max"]) == pytest.approx(math.log(4))
    assert float(distance(mine, rollout, mask & False)["sampling/sampling_logp_difference/mean"]) == 0


class Waits(TorchDispatchMode):
    """Refuses what makes the host wait for a device: reading a number, or a shape that depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
        assert not (func.overloadpacket is torch.ops.aten.index and any(x.dtype == torch.bool for x in args[1])), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", MODES)
def test_nothing_waits_for_the_device(mode):
    mask = [False, True, True, True]
    rows = [Experience(Example([1, 2, 3, 4], mask), 0.0, rollout_logprobs=ROLLOUT, old_logprobs=OLD) for _ in range(3)]
    for row in rows:
        row.advantages = torch.ones(4)
    with Waits():
        figures = [*distance_of(rows)[0].values(), *weigh(rows, mode, 0.0, 3.0)[0].values()]
    assert all(x.ndim == 0 for x in figures) and distance_of(rows)[1] == 9


SCRIPT = {"ab": ["a", "bb", "ccc!", "dd"]}


def lengths(completions, **_):
    return [float(len(c)) for c in completions]


@pytest.fixture
def collected(make_model, tokenizer, settings, scripted):
    """collected(kind, swaps, **settings) -> trainer and experiences. The engine says -1.0 for every token."""

    def make(kind, swaps=False, **more):
        config, trainer_class = {"ppo": (PPOConfig, PPOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}[kind]
        engine = scripted(SCRIPT)
        sizes = {"per_device_train_batch_size": 4} | ({"num_generations": 4} if kind == "grpo" else {})
        made = trainer_class(
            make_model(),
            lengths,
            config(**settings(**sizes, **more)),
            train_dataset=[{"prompt": "ab"}],
            processing_class=tokenizer,
            engine=engine,
        )
        if swaps:  # not before: it would be sent adapters
            engine.capabilities = engine.capabilities | {"lora_swap"}
        torch.manual_seed(0)
        return made, made.collect(made.train_records * (4 if kind == "ppo" else 1))

    return make


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_advantages_are_weighed_and_nothing_else(kind, mode, collected):
    options = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 0.5}
    options |= {"vllm_importance_sampling_clip_min": 0.01}
    _, plain = (
        collected(kind, vllm_importance_sampling_correction=False, num_iterations=2)
        if kind == "grpo"
        else (collected(kind, vllm_importance_sampling_correction=False))
    )
    made, weighed = collected(kind, vllm_importance_sampling_correction=True, **options)
    difference, used = [], []
    for before, after in zip(plain, weighed):
        mask = torch.tensor(after.example.response_mask)
        apart = torch.where(mask, after.old_logprobs + 1.0, 0.0)
        ratio = torch.exp(apart.sum() if mode == "sequence_mask" else apart)
        inside = (ratio >= 0.01) & (ratio <= 0.5)
        weight = ratio * inside if mode == "sequence_mask" else ratio.clamp(0.01, 0.5)
        torch.testing.assert_close(after.advantages[mask], (before.advantages * weight)[mask])
        assert torch.equal(after.old_logprobs, before.old_logprobs)
        difference += apart[mask].abs().tolist()
        used += weight.expand_as(apart)[mask].tolist()
    assert any(u == 0 for u in used) == (mode == "sequence_mask")
    figures = made.metrics.read()
    assert figures["sampling/sampling_logp_difference/mean"] == pytest.approx(
        sum(difference) / len(difference), rel=1e-5
    )
    assert figures["sampling/sampling_logp_difference/max"] == pytest.approx(max(difference), rel=1e-5)
    assert figures["sampling/importance_sampling_ratio/mean"] == pytest.approx(sum(used) / len(used), rel=1e-5)


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_it_is_on_where_the_engine_has_weights_of_its_own(kind, collected):
    for swaps in (False, True):
        made, _ = collected(kind, swaps)
        assert made.corrects is swaps
        assert ("sampling/importance_sampling_ratio/mean" in made.metrics.read()) is swaps
    assert not collected(kind, True, vllm_importance_sampling_correction=False)[0].corrects


def test_an_engine_in_this_process_agrees_with_the_trainer(make_model, tokenizer, settings, run):
    """What the engine reports is the full-vocabulary log-softmax at the sampling temperature: ratios are 1."""
    made = GRPOTrainer(
        make_model(),
        lengths,
        GRPOConfig(
            **settings(temperature=0.7, max_completion_length=6, max_steps=1, vllm_importance_sampling_correction=True)
        ),
        train_dataset=[{"prompt": p} for p in "abc"],
        processing_class=tokenizer,
    )
    (step, *_) = run(made).steps
    assert step["sampling/sampling_logp_difference/max"] < 1e-4
    assert step["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "more", "rounds", "engine"),
    [
        ("grpo", {}, 2, None),
        ("grpo", {}, 2, GenerateEngine),
        ("grpo", {"num_iterations": 2}, 1, None),
        ("ppo", {}, 1, None),
    ],
    ids=["GRPO", "GRPO over generate", "GRPO, two iterations", "PPO"],
)
def test_every_run_measures_how_far_the_engine_in_its_process_is_from_the_trainer(
    kind, more, rounds, engine, make_model, tokenizer, settings, run
):
    """Two steps. Not nothing, as the two add up in another order, and no more than float32's rounding."""
    config, trainer_class = {"ppo": (PPOConfig, PPOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}[kind]
    policy = load(make_model(), tokenizer=tokenizer, device="cpu")
    made = trainer_class(
        policy,
        lengths,
        config(**settings(temperature=0.7, max_completion_length=6, max_steps=2, **more)),
        train_dataset=[{"prompt": p} for p in "abcd"],
        engine=engine and engine(policy),
    )
    steps = [s for s in run(made).steps if "sampling/sampling_logp_difference/mean" in s]
    assert len(steps) == rounds
    for step in steps:
        assert 0 < step["sampling/sampling_logp_difference/mean"] < 1e-5
        assert step["sampling/sampling_logp_difference/max"] < 1e-4
        assert "sampling/importance_sampling_ratio/mean" not in step


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_an_engine_in_this_process_that_is_off_raises_the_alarm(kind, make_model, tokenizer, settings, run, caplog):
    """As a kernel with a fault would: every token reported half as likely as it is."""
    config, trainer_class = {"ppo": (PPOConfig, PPOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}[kind]
    policy = load(make_model(), tokenizer=tokenizer, device="cpu")

    class Off(SlotEngine):
        def generate(self, requests):
            groups = super().generate(requests)
            for sample in (s for group in groups for s in group):
                sample.logprobs = [x - math.log(2) for x in sample.logprobs]
            return groups

    def steps(**more):
        made = trainer_class(
            policy,
            lengths,
            config(**settings(max_completion_length=6, max_steps=1, **more)),
            train_dataset=[{"prompt": p} for p in "abcd"],
            engine=Off(policy),
        )
        return run(made).steps

    quiet, *_ = steps(vllm_logprob_tolerance=0.7)
    assert quiet["sampling/sampling_logp_difference/mean"] == pytest.approx(math.log(2), rel=1e-4)
    assert "samples from another policy" not in caplog.text
    steps()
    assert caplog.text.count("the log-probabilities of what Off sampled differ from the policy's by 0.693 nats") == 1


def test_senseless_bounds_are_refused(settings):
    with pytest.raises(UserError, match="vllm_importance_sampling_mode is 'word'; choose one of token_truncate"):
        GRPOConfig(**settings(vllm_importance_sampling_mode="word"))
    with pytest.raises(UserError, match="0 <= min < max"):
        GRPOConfig(**settings(vllm_importance_sampling_clip_min=3.0))
