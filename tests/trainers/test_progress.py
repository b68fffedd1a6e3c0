"""How far a run is: its learning rate, its length, the tokens and seconds that its log tells."""

from __future__ import annotations

import math

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
from rlhf_fast.run import times
from rlhf_fast.trainers import memory
from rlhf_fast.trainers.algorithm import Algorithm
from rlhf_fast.trainers.progress import Schedule

WORDS = ["a", "hello", "to be", "no", "well, well"]
PAIRS = [{"prompt": f"{i} ", "chosen": w, "rejected": w[:1] + "?"} for i, w in enumerate(WORDS)]
COMPLETIONS = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in PAIRS]
LABELLED = [{**r, "label": i % 2 == 0} for i, r in enumerate(COMPLETIONS)]
PROMPTS = [{"prompt": r["prompt"]} for r in PAIRS]
SCRIPT = {r["prompt"]: ["ab", "abc!", "a", "abcd"] for r in PAIRS}
GRPO = {"num_generations": 4, "num_iterations": 2, "beta": 0.1}
KINDS = {
    "sft": (SFTTrainer, SFTConfig, {"packing": False}, COMPLETIONS),
    "reward": (RewardTrainer, RewardConfig, {}, PAIRS),
    "dpo": (DPOTrainer, DPOConfig, {}, PAIRS),
    "kto": (KTOTrainer, KTOConfig, {}, LABELLED),
    "ppo": (PPOTrainer, PPOConfig, {"num_ppo_epochs": 2}, PROMPTS),
    "grpo": (GRPOTrainer, GRPOConfig, GRPO, PROMPTS),
}


def letters(completions, **_):
    return [float(len(c)) for c in completions]


@pytest.fixture
def trainer(make_model, tokenizer, settings, scripted):
    def make(name, script=SCRIPT, reward=letters, **more):
        trainer_class, config, options, rows = KINDS[name]
        rows = [{"prompt": p} for p in script] if rows is PROMPTS else rows
        online = {"reward_funcs": reward, "engine": scripted(script)} if rows[0].keys() == {"prompt"} else {}
        args = config(**settings(**{"learning_rate": 0.01, "per_device_train_batch_size": 4, **options, **more}))
        return trainer_class(make_model(), args=args, train_dataset=rows, processing_class=tokenizer, **online)

    return make


# ---- the learning rate


def test_a_schedule_by_hand():
    """Five rows twice in rounds of four rows and two steps: 10 / 4 are 3 rounds, of which the last counts whole though it has
    two rows. Steps that wait do not lie behind; with ``max_steps`` nothing but steps counts."""
    plan = Schedule(rows=5, epochs=2, max_steps=-1, rows_per_round=4, steps_per_round=2)
    assert (plan.total_rows, plan.total_steps) == (10, 6)
    behind = [plan.position(9, drawn, waiting) for drawn, waiting in ((0, 0), (4, 1), (8, 0), (10, 1), (10, 0))]
    assert behind == [0, 1, 4, 5, 6]
    assert plan.position(9, 12, 0) == 6, "a few rows more fill the last windows"
    fixed = Schedule(rows=5, epochs=2, max_steps=7, rows_per_round=4, steps_per_round=2)
    assert (fixed.total_rows, fixed.total_steps, fixed.position(3, 99, 1)) == (math.inf, 7, 3)


def test_the_schedule_goes_on_where_ppo_drops_passes(trainer, run):
    """Ten passes are planned over each of three batches. The first starts where it sampled, the second sees that the
    policy moved, and the other eight are dropped: they lie behind, as if they had been made.
    """
    made = trainer(
        "ppo",
        num_ppo_epochs=10,
        target_kl=1e-5,
        num_train_epochs=3,
        per_device_train_batch_size=5,
        lr_scheduler_type="linear",
        warmup_ratio=0.0,
    )
    rates = [s["lr"] for s in run(made).steps]
    assert rates == pytest.approx([0.01 * (1 - at / 30) for at in (1, 10, 11, 20, 21, 30)])
    assert (made.total_steps, made.expected_steps, made.step) == (30, 6, 6)


def test_the_schedule_goes_on_where_prompts_are_replaced(trainer, run):
    """Two prompts a step, of which the second round replaces one: six rows are two rounds of 2 and 4 instead of three."""
    script = {p: ["a", "ab", "abc", "abcd"] for p in "abcdef"} | {"c": ["a"] * 4, "d": ["a"] * 4}
    made = trainer(
        "grpo",
        script,
        num_iterations=1,
        dynamic_sampling_rounds=1,
        per_device_train_batch_size=8,
        lr_scheduler_type="linear",
        warmup_ratio=0.0,
    )
    made.sampler.shuffle = False
    assert made.expected_steps == made.total_steps == 3
    rates = [s["lr"] for s in run(made).steps]
    assert rates == pytest.approx([0.01 * (1 - 1 / 3), 0.0])
    assert made.expected_steps == made.step == 2


def test_a_run_of_max_steps_makes_all_of_them(trainer, run):
    """Whatever is dropped, further batches make up for it."""
    made = trainer("ppo", num_ppo_epochs=10, target_kl=1e-5, max_steps=5, lr_scheduler_type="linear", warmup_ratio=0.0)
    rates = [s["lr"] for s in run(made).steps]
    assert rates == pytest.approx([0.01 * (1 - at / 5) for at in range(1, 6)])


def test_a_skipped_step_is_one_of_the_schedule(trainer, run):
    made = trainer("sft", max_steps=4, lr_scheduler_type="linear", warmup_ratio=0.0)
    losses = made.losses

    def spoilt(records, window):
        for loss, figures, weight in losses(records, window):
            yield loss * (float("nan") if made.step == 1 else 1.0), figures, weight

    made.losses = spoilt
    assert [s["lr"] for s in run(made).steps] == pytest.approx([0.0075, 0.005, 0.0025, 0.0])


# ---- tokens and seconds

# characters of prompt and response and the end of each response, all rows
LENGTHS = {
    "sft": sum(2 + len(w) + 1 for w in WORDS),
    "reward": sum(2 * 2 + len(w) + 1 + 2 + 1 for w in WORDS),
    "grpo": 5 * (4 * 2 + 3 + 3 + 2 + 5),  # four responses to each prompt, one of them cut before its end
    "ppo": 5 * (2 + 3),  # the first of the four
}
LENGTHS |= {"dpo": LENGTHS["reward"], "kto": LENGTHS["sft"]}


@pytest.mark.parametrize("name", KINDS)
def test_tokens_and_seconds_are_those_of_training(name, trainer, monkeypatch):
    """Each sequence counts whenever a step learns from it: in PPO and GRPO twice here.

    The clock moves by a second at each pass with a gradient, by 3 where rewards are computed, 5 where responses are
    sampled, 10 where a checkpoint is written and 100 in an evaluation. The last two of these come after the log line.
    """
    now = [0.0]
    monkeypatch.setattr(times.time, "perf_counter", lambda: now[0])

    def slow(function, seconds):
        def late(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)

        return late

    made = trainer(name, reward=slow(letters, 3.0), logging_steps=100, save_steps=1, eval_steps=1)
    made.eval_records = made.train_records
    made.losses, made.extra_state = slow(made.losses, 1.0), slow(made.extra_state, 10.0)
    made.evaluate = slow(lambda: {"eval_loss": 0.0}, 100.0)
    if name in ("ppo", "grpo"):
        made.engine.generate = slow(made.engine.generate, 5.0)
        made.completions = []
    figures = made.train()
    repeats = 2 if name in ("ppo", "grpo") else 1
    rounds = made.step / repeats
    assert figures["num_tokens"] == made.num_tokens == repeats * LENGTHS[name]
    spent = {k.removeprefix("time/"): v for k, v in figures.items() if k.startswith("time/") and v}
    online = {"generate": 5.0 * rounds, "reward": 3.0 * rounds} if repeats == 2 else {}
    assert spent == {"train": made.step, "evaluate": 100.0 * (made.step - 1), "save": 10.0 * (made.step - 1), **online}
    learning = made.step + sum(online.values())
    assert figures["tokens_per_second"] == pytest.approx(figures["num_tokens"] / learning)


def test_tokens_are_counted_on_from_a_checkpoint(trainer, run):
    """The whole run's, in a resumed one too."""
    whole = trainer("dpo", save_steps=1)
    steps = run(whole).steps
    assert [s["num_tokens"] for s in steps][-1] == LENGTHS["dpo"] > steps[0]["num_tokens"] > 0
    again = trainer("dpo", output_dir=whole.args.output_dir + "-again")
    run(again, resume_from_checkpoint=f"{whole.args.output_dir}/checkpoints/step-00000001")
    assert again.num_tokens == LENGTHS["dpo"]


# ---- the names

EVERYWHERE = {"loss", "grad_norm", "lr", "epoch", "num_tokens", "tokens_per_second", "time/train"}
ONLINE = {"time/generate", "time/reward", "rewards/letters/mean", "rewards/letters/std", "entropy", "kl"}
ONLINE |= {"completions/mean_length", "completions/clipped_ratio"}
NAMES = {
    "sft": {"entropy", "mean_token_accuracy"},
    "reward": {"accuracy", "margin", "min_reward", "mean_reward", "max_reward"},
    "dpo": {f"rewards/{what}" for what in ("chosen", "rejected", "accuracies", "margins")}
    | {"logps/chosen", "logps/rejected"},
    "kto": {"kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"},
    "ppo": {f"objective/{what}" for what in ("kl", "entropy", "scores", "non_score_reward", "rlhf_reward", "kl_coef")}
    | {"policy/approxkl_avg", "policy/clipfrac_avg", "loss/policy_avg", "loss/value_avg", "val/ratio"}
    | {"val/explained_variance"},
    "grpo": {
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        *(f"clip_ratio/{x}_mean" for x in ("low", "high", "region")),
    },
}


@pytest.mark.parametrize("name", KINDS)
def test_a_log_line_has_the_figures_that_users_of_trl_look_for(name, trainer):
    """The names of TRL. A GPU adds its memory's peak."""
    online = {"ppo": ONLINE - {"entropy", "kl"}, "grpo": ONLINE}.get(name, set())
    figures = trainer(name, max_steps=1).train()
    assert EVERYWHERE | online | NAMES[name] <= figures.keys()
    assert all(math.isfinite(value) for value in figures.values())


def test_a_log_line_on_a_gpu_has_the_peak_of_its_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * memory.GB)
    assert memory.figures(None) == {"memory/peak_gb": 3.0}


def test_no_attribute_of_a_trainer_hides_what_an_algorithm_says(trainer):
    """A counter once took the place of the method that counts a micro-batch's tokens, and budgets broke."""
    said = {name for name, value in vars(Algorithm).items() if callable(value)}
    assert not said & vars(trainer("sft")).keys()
