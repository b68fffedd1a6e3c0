"""The guard: each sign of hacking by hand-made responses, what it does then, and that healthy runs do not trip it."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf_fast import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer
from rlhf_fast.data.batch import Example, Experience
from rlhf_fast.errors import UserError
from rlhf_fast.trainers.guard import LIMITS, WINDOW, Guard, measure, sums

N = WINDOW


def batch(said=lambda i: [10 + i, 11, 12, 13], score=1.0, held_out=0.5, nats=40.0, kl=1.0, groups=N // 4, doubt=1.0):
    """A window of responses to ``groups`` prompts; scores of 0 and 1 that average to what is asked."""
    rows = []
    for i in range(N):
        ids = [1000 + i % groups, *said(i)]
        length = torch.full((len(ids),), -nats / len(said(i)))
        length[0] = 0.0
        wave = 0.1 if i % 2 else -0.1
        reward = score(i) if callable(score) else score + wave
        e = Experience(Example(ids, [False] + [True] * (len(ids) - 1)), reward, score=reward)
        e.held_out = float(i % groups < held_out * groups)
        e.rollout_logprobs, e.ref_logprobs = length, length - kl / len(ids)
        rows.append(e)
    return sums(measure(rows), [doubt] * N)


START = batch()
SIGNS = {
    "held_out": (
        batch(score=2.0, held_out=0.0625),
        "the reward rises (1 -> 2) and the held-out reward falls (0.5 -> 0.0625, 6.",
    ),
    "kl": (batch(kl=130.0), "130 nats from the reference, budget 100"),
    "length": (
        batch(lambda i: [10 + i, *range(20, 20 + (12 if i >= N // 2 else 4))], score=lambda i: float(i >= N // 2)),
        "responses grow (4 -> 9 tokens) and the reward goes with their length (correlation 1.00)",
    ),
    "repeat": (
        batch(lambda i: [10 + i, 7, 8, 7, 8, 7, 8, 9]),
        "75% of a response is one piece repeated back to back (0%",
    ),
    "distinct": (batch(lambda i: [i, *[5, 6, 5] * 6]), "responses repeat themselves: 0."),
    "entropy": (batch(nats=2.0), "hardly a choice left: 2 nats per response, 40 at the start"),
    "diversity": (batch(lambda i: [1, 2, 3, 4]), "all alike: 0.25 of them differ, 1 at the start"),
    "disagreement": (batch(doubt=5.0), "disagree 5.0 times as much"),
}


@pytest.mark.parametrize("kind", SIGNS)
def test_each_sign_is_found_and_said(kind):
    guard = Guard("warn", {})
    guard.watch(START)
    assert guard.findings() == {}
    window, sentence = SIGNS[kind]
    guard.watch(window)
    assert sentence in guard.findings()[kind]


@pytest.mark.parametrize("kind", SIGNS)
def test_a_limit_of_ones_own_moves_each_sign(kind):
    """Beyond what any of these windows shows."""
    far = {"entropy": 0.0, "distinct": 0.0, "diversity": 0.0, "length": 2.0, "repeat": 2.0}.get(kind, 1e6)
    guard = Guard("warn", {kind: far})
    guard.watch(START)
    guard.watch(SIGNS[kind][0])
    assert kind not in guard.findings()
    assert SIGNS.keys() == LIMITS.keys()


def test_short_answers_may_become_certain_and_a_rising_reward_with_a_rising_held_out_one_is_fine():
    guard = Guard("warn", {})
    guard.watch(batch(nats=3.0))
    guard.watch(batch(lambda i: [i % 64, 2, 3, 4], nats=0.1, score=2.0, held_out=0.9))
    assert guard.findings() == {}
    guard.watch(batch(nats=0.1, score=1.8, held_out=0.6))
    assert guard.findings() == {}, "both fell"


def test_nothing_is_compared_before_there_is_a_window():
    guard = Guard("warn", {})
    small = sums(measure([]) or [(math.nan,) * 10])
    guard.watch(small)
    assert not guard.full and guard.findings() == {}


def test_what_a_window_holds_is_the_last_responses_and_survives_a_checkpoint():
    guard = Guard("warn", {})
    for window in (START, SIGNS["kl"][0], SIGNS["repeat"][0]):
        guard.watch(window)
    assert guard.recent["kl"].mean == pytest.approx(SIGNS["repeat"][0]["kl"].mean)
    guard.tripped["kl"] = 3
    again = Guard("warn", {})
    again.load_state(guard.state())
    assert again.state() == guard.state() and again.findings() == guard.findings()


def evaluation(reward, held_out):
    return SimpleNamespace(judged={"reward": torch.tensor(reward), "held_out": torch.tensor(held_out)})


def test_evaluations_are_compared_prompt_by_prompt():
    """40 prompts, 20 right. 15 of those right go wrong while 20 earn more: 0.375 -+ 0.077, 4.9 standard errors. The same
    shares on other prompts would be 3.6, which is not enough."""
    said = []
    guard = Guard("warn", {})
    guard.trip = lambda trainer, kind, sentence: said.append((kind, sentence))
    right, paid = [1.0] * 20 + [0.0] * 20, [0.0] * 40
    guard.on_evaluate(evaluation(paid, [1.0] * 10 + [0.0] * 30), {})
    guard.on_evaluate(evaluation(paid, right), {})  # the best
    guard.on_evaluate(evaluation(paid, [1.0] * 5 + [0.0] * 35), {})
    assert said == [], "the reward did not rise"
    guard.on_evaluate(evaluation([1.0] * 20 + paid[20:], [1.0] * 16 + [0.0] * 24), {})
    assert said == [], "two standard errors are chance"
    guard.on_evaluate(evaluation([1.0] * 20 + paid[20:], [1.0] * 5 + [0.0] * 35), {})
    ((kind, sentence),) = said
    assert (
        kind == "held_out"
        and "(0 -> 0.5) and the held-out reward falls (0.5 -> 0.125, 4.9 standard errors)" in sentence
    )
    again = Guard("warn", {})
    again.load_state(guard.state())
    assert again.best_evaluation == guard.best_evaluation != {}


# ---- in runs


def vowels(completions, **_):
    return [float(sum(c.count(v) for v in "aeiou")) for c in completions]


def consonants(completions, **_):
    return [-float(sum(c.count(v) for v in "aeiou")) for c in completions]


@pytest.fixture
def trainer(make_model, tokenizer, settings, monkeypatch):
    monkeypatch.setattr("rlhf_fast.trainers.guard.WINDOW", 16)
    prompts = [{"prompt": p} for p in "abcdefgh"]

    def make(kind="grpo", **more):
        config, trainer_class = {"ppo": (PPOConfig, PPOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}[kind]
        options = {
            "per_device_train_batch_size": 32,
            "max_completion_length": 6,
            "max_steps": 12,
            "learning_rate": 3e-2,
        }
        options |= {"guard_reward": [consonants], "guard_share": 1.0, "guard_limits": {"held_out": 3.0}}
        args = config(**settings(**{**options, **more}))
        data = {"train_dataset": prompts, "eval_dataset": prompts if args.eval_steps else None}
        return trainer_class(make_model(), vowels, args, processing_class=tokenizer, **data)

    return make


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_a_policy_that_cheats_is_rolled_back_to_the_evaluation_that_the_held_out_reward_liked_best(kind, trainer, run):
    made = trainer(kind, guard="rollback", eval_steps=1)
    result = run(made)
    assert "guard: the reward rises" in made.stopped and made.step < 12
    evaluations = {s["step"]: s["eval_held_out"] for s in result.steps if "eval_held_out" in s}
    best = max(evaluations, key=evaluations.get)
    assert made.best.step == best < made.step
    assert made.evaluate()["eval_held_out"] == evaluations[best] > evaluations[made.step]
    assert {"guard/held_out", "guard/repeat", "guard/tripped/held_out"} <= set().union(*result.steps)


def test_by_default_it_only_warns_and_stop_ends_the_run_as_it_is(trainer, run, caplog):
    with caplog.at_level(logging.WARNING):
        warned = trainer()
        run(warned)
    said = [r.getMessage() for r in caplog.records if "guard at step" in r.getMessage()]
    assert warned.args.guard == "warn" and warned.step == 12 and warned.stopped is None
    assert sum("the reward rises" in line for line in said) == 1
    stopped = trainer(guard="stop")
    run(stopped)
    assert stopped.step < 12 and not stopped.rolls_back
    off = trainer(guard="off")
    assert not any("guard/" in key for step in run(off).steps for key in step)


def test_its_windows_go_on_after_a_resume(trainer, run):
    whole = trainer(guard="stop", save_steps=1, save_total_limit=99)
    end = run(whole)
    path = Path(whole.args.output_dir) / "checkpoints" / "step-00000002"
    again = trainer(guard="stop")
    resumed = run(again, resume_from_checkpoint=str(path))
    assert again.stopped == whole.stopped and again.step == whole.step
    assert [s for s in end.steps if s["step"] > 2] == [s for s in resumed.steps if s["step"] > 2]


def test_a_held_out_reward_scores_its_share_of_prompts_and_teaches_nothing(trainer):
    asked = []

    def count(prompts, completions, **_):
        asked.append(len(set(prompts)))
        return [1.0] * len(completions)

    made = trainer(guard_reward=[count], guard_share=0.5)
    experiences = made.collect(made.train_records[:4])
    assert asked == [2]
    assert [math.isnan(e.held_out) for e in experiences] == [False] * 16 + [True] * 16
    assert made.metrics.read()["held_out/count/mean"] == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"guard": "wran"}, "guard is 'wran'; choose one of warn, stop, rollback, off"),
        ({"guard": "rollback", "eval_steps": 1}, "rollback needs to know which evaluation was the best"),
        ({"guard": "rollback", "guard_reward": ["answer"]}, "set eval_steps"),
        ({"guard_share": 0.0}, "guard_share is 0; it is a share"),
        ({"guard_limits": {"repeats": 1.0}}, "guard_limits has no 'repeats'; did you mean repeat?"),
    ],
    ids=str,
)
def test_a_guard_that_cannot_be_is_refused_by_name(values, message):
    with pytest.raises(UserError, match=message):
        GRPOConfig(**values)
