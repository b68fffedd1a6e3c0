"""Alarms: a step wildly out of range is not taken, the run is saved before it, and goes on from there with the same bits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rlhf_fast import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer, SafePPOConfig, SafePPOTrainer
from rlhf_fast.errors import StepRefused, UserError
from rlhf_fast.run.checkpoint import list_checkpoints
from rlhf_fast.run.metrics import read_metrics
from rlhf_fast.run.record import read_record
from rlhf_fast.trainers.alarms import ALARMS, alarms_of, sentence

ROWS = [{"prompt": f"{i} "} for i in range(8)]
KINDS = {
    "ppo": (PPOTrainer, PPOConfig, {"num_ppo_epochs": 2}),
    "safe ppo": (SafePPOTrainer, SafePPOConfig, {"num_ppo_epochs": 2, "cost_limit": 1.0}),
    "grpo": (GRPOTrainer, GRPOConfig, {"num_generations": 2, "num_iterations": 2, "beta": 0.1}),
}
KL = r"the policy is .* nats per token \(approximate KL\) away from where it sampled this batch \(alarm_limits kl: "


def vowels(completions, **_):
    return [sum(c.count(v) for v in "aeiou") / 4 for c in completions]


def length(completions, **_):
    return [float(len(c)) for c in completions]


@pytest.fixture
def patient_alarms():
    """Not here."""


@pytest.fixture
def trainer(make_model, tokenizer, settings):
    def make(kind, **more):
        trainer_class, config_class, options = KINDS[kind]
        options = {**options, "learning_rate": 1e-3, "max_completion_length": 5, "max_steps": 4, **more}
        costs = {"cost_funcs": [length]} if kind == "safe ppo" else {}
        args = config_class(**settings(**options, **costs))
        given = {"train_dataset": ROWS, "processing_class": tokenizer}
        return trainer_class(make_model(), vowels, args, **given)

    return make


@pytest.mark.parametrize(
    ("figures", "limits", "rung"),
    [
        ({"kl": 0.05, "ratio": 1.02, "value": 1.5}, {}, []),
        ({"kl": ALARMS["kl"].limit, "ratio": ALARMS["ratio"].limit, "value": ALARMS["value"].limit}, {}, []),
        ({"kl": 50.0, "ratio": 1e-3, "value": 1e4}, {}, ["kl", "ratio", "value"]),
        ({"ratio": 1e3}, {}, ["ratio"]),
        ({"kl": math.nan, "ratio": math.inf, "value": math.nan}, {}, ["kl", "ratio", "value"]),
        ({"kl": 0.05, "ratio": 0.6}, {"kl": 0.04, "ratio": 1.5}, ["kl", "ratio"]),
    ],
    ids=str,
)
def test_what_rings(figures, limits, rung):
    said = alarms_of(figures, limits)
    assert list(said) == rung
    assert all(f"(alarm_limits {name}: " in what for name, what in said.items())


def test_a_sentence_says_what_was_found_what_is_allowed_and_what_to_do():
    """A fix that two of them share is said once."""
    said = sentence(alarms_of({"ratio": 0.25, "kl": 12.0}, {"ratio": 3.0}))
    assert said == (
        "the ratio of new to old probabilities is 0.25 in the mean of this batch's tokens (alarm_limits ratio: 0.333 to 3), and the "
        "policy is 12 nats per token (approximate KL) away from where it sampled this batch (alarm_limits kl: 1): lower "
        "learning_rate, take fewer steps on a batch of responses, or set target_kl (PPO); or raise the limit"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_rings_is_not_taken_and_the_run_goes_on_from_before_it(kind, trainer, run):
    """The second pass over the first batch. With the limit raised, the end is that of a run where nothing rang."""
    whole = run(trainer(kind, logging_steps=2))
    stopped = trainer(kind, logging_steps=2, alarm_limits={"kl": 1e-9})
    after, step = [], stopped.after_step
    stopped.after_step = lambda: (after.append([p.detach().clone() for p in stopped.parameters]), step())
    with pytest.raises(StepRefused, match=f"step 2 is not taken: {KL}1e-09.*saved at step 1; continue with --resume"):
        run(stopped)
    assert len(after) == 1
    assert all(torch.equal(p, q) for p, q in zip(after[0], stopped.parameters))
    out = stopped.args.output_dir
    assert [p.name for p in list_checkpoints(Path(out) / "checkpoints")] == ["step-00000001"]
    assert read_record(out)[-1]["outcome"].startswith("failed: StepRefused: step 2 is not taken")
    again = trainer(kind, logging_steps=2, output_dir=out)
    resumed = run(again, resume_from_checkpoint=True)
    assert resumed.steps == whole.steps
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in whole.weights.items())


def test_a_run_may_be_warned_only_or_left_alone(trainer, run, caplog):
    quiet = run(trainer("ppo", alarm_limits={"kl": 1e-9}, alarms="off"))
    assert "nats per token" not in caplog.text
    warned = run(trainer("ppo", alarm_limits={"kl": 1e-9}, alarms="warn"))
    assert caplog.text.count("nats per token (approximate KL)") == 2
    assert [step.pop("alarms/kl", 0.0) for step in warned.steps] == [0.0, 1.0, 0.0, 1.0]
    assert warned.steps == quiet.steps
    assert all(torch.equal(a, b) for a, b in zip(warned.weights.values(), quiet.weights.values()))


def noted(made, run):
    """What is looked at before each step, and the run's log."""
    seen, inspect = [], made.inspect

    def note(figures):
        seen.append(dict(figures))
        inspect(figures)

    made.inspect = note
    run(made)
    return seen, [line for line in read_metrics(made.args.output_dir) if "loss" in line]


@pytest.mark.parametrize("parts", [8, 3], ids=["one micro-batch", "ragged micro-batches"])
def test_what_is_looked_at_is_the_mean_over_the_steps_tokens(parts, trainer, run):
    """As the log has it, however the window is split; a squared error is twice the critic's loss."""
    more = {"per_device_train_batch_size": parts, "gradient_accumulation_steps": -(-8 // parts)} if parts < 8 else {}
    seen, lines = noted(trainer("ppo", alarms="off", learning_rate=1e-2, **more), run)
    assert len(seen) == len(lines) == 4
    for figures, line in zip(seen, lines):
        assert figures["kl"] == pytest.approx(line["policy/approxkl_avg"], rel=1e-5, abs=1e-7)
        assert 1 + figures["ratio"] == pytest.approx(line["val/ratio"], rel=1e-5)
        assert figures["value"] == pytest.approx(2 * line["loss/value_avg"], rel=1e-5)
    assert seen[1]["kl"] > 1e-4
    seen, _ = noted(trainer("grpo", num_iterations=1, alarms="off"), run)
    assert seen == [{}] * 4, "a policy that takes one step on a batch is where it sampled"


def test_the_critics_error_is_judged_by_the_largest_returns_so_far(trainer, run):
    """Returns of about 30, then of about 0: an error that is small for the first stays small for the run. Below 1 it is as it is."""
    made = trainer("ppo", alarms="off", kl_coef=0.0, lam=1.0)
    scores = iter([[30.0] * 8, [0.0] * 8])
    made.rollouts.functions = [lambda completions, **_: next(scores)]
    seen, _ = noted(made, run)
    assert [figures["value scale"] for figures in seen] == pytest.approx([900, 900, 0, 0], abs=1e-3)
    assert made.scales["value"] == pytest.approx(900)
    assert seen[0]["value"] / made.scales["value"] == pytest.approx(1, abs=0.1), "a new critic says 0"
    told = trainer("ppo", alarm_limits={"value": 0.5})
    told.inspect({"value": 449.0, "value scale": 900.0})
    told.inspect({"value": 449.0, "value scale": 1.0})
    with pytest.raises(StepRefused, match="squared error is 0.501 times the largest mean square"):
        told.inspect({"value": 451.0, "value scale": 1.0})
    assert told.scales == {"value": 900.0}
    small = trainer("ppo", alarm_limits={"value": 0.5})
    small.inspect({"value": 0.4, "value scale": 1e-6})
    safe = trainer("safe ppo", alarm_limits={"value": 5.0})
    with pytest.raises(StepRefused, match="squared error is nan times"):
        safe.inspect({"value": 1.0, "value scale": 1.0, "cost_value": math.nan, "cost_value scale": 1.0})


def test_a_critic_gone_wild_stops_the_run(trainer, run):
    """Its head's weights times a million, between two batches."""
    made = trainer("ppo")

    def spoil():
        if made.step == 2:
            with torch.no_grad():
                for p in made.policy.heads.parameters():
                    p.mul_(1e6).add_(1e3)

    step = made.after_step
    made.after_step = lambda: (step(), spoil())
    with pytest.raises(StepRefused, match="step 3 is not taken: .*a critic's mean squared error is"):
        run(made)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alarms": "ring"}, "alarms is 'ring'; choose one of stop, warn, off"),
        ({"alarm_limits": {"kls": 1.0}}, "alarm_limits has no 'kls'; did you mean kl?"),
        ({"alarm_limits": {"ratio": 0.5}}, "alarm_limits: ratio is 0.5; it must be above 1"),
        ({"alarm_limits": {"value": 0.0}}, "alarm_limits: value is 0; it must be above 0"),
    ],
    ids=str,
)
def test_alarms_that_cannot_be_are_refused_by_name(values, message):
    with pytest.raises(UserError, match=message):
        PPOConfig(**values)
