"""Checkpoints of other versions: one that lacks what can be known goes on, any other is refused in one sentence."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from rlhf_fast.data.batch import Example, Experience
from rlhf_fast.errors import UserError
from rlhf_fast.run.checkpoint import load_checkpoint, save_checkpoint
from rlhf_fast.trainers.resume import state_of
from rlhf_fast.trainers.upgrade import FORMAT
from tests.trainers.test_resume import KINDS, rows, vowels

# of format 2. Whoever changes them raises FORMAT in trainers/upgrade.py, and says there what a checkpoint without them meant
STATE = """base best callbacks data extra format frozen micro_batch_tokens optimizer ranks rolls_back rows_drawn sampler scheduler
skipped step stopped version weights"""
RANK = "metrics plan records rng tokens"
EXTRA = {
    "dpo": "rewards",
    "ppo": "kl_coef scores",
    "safe ppo": "kl_coef lagrangian scores",
    "grpo dynamic": "lagrangian",
}
EXPERIENCE = """advantages cost cost_returns cost_values example finished held_out old_logprobs ref_logprobs returns reward
rollout_logprobs score values"""
EXAMPLE = "input_ids response_mask weight where"


@pytest.fixture
def make(make_model, tokenizer, settings):
    """make(name, **more): a trainer of ``KINDS`` on all weights of the same fresh model."""

    def made(name, **more):
        kind, config, options = KINDS[name]
        samples = config.__name__.startswith(("GRPO", "PPO", "SafePPO"))
        given = {"reward_funcs": vowels} if samples else {}
        args = config(**settings(**{"learning_rate": 1e-2, "save_total_limit": 9, **options, **more}))
        return kind(make_model(), args=args, train_dataset=rows(kind), processing_class=tokenizer, **given)

    return made


def fields_of(kind):
    return {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize("name", KINDS)
def test_the_fields_of_a_checkpoint_are_those_of_its_format(name, make):
    state = state_of(make(name))
    assert FORMAT == 2
    assert state.keys() == set(STATE.split())
    assert state["ranks"][0].keys() == set(RANK.split())
    assert state["extra"].keys() == set(EXTRA.get(name, "").split())
    assert fields_of(Experience) == set(EXPERIENCE.split())
    assert fields_of(Example) == set(EXAMPLE.split())


@pytest.fixture
def saved(make, run, tmp_path):
    """saved(name, change) -> (folder of a checkpoint at step 3 of 4 that ``change`` was done to, the whole run's end)."""

    def made(name, change):
        whole = make(name, max_steps=4, save_steps=1)
        end = run(whole)
        state = load_checkpoint(Path(whole.args.output_dir, "checkpoints/step-00000003"))
        change(state)
        return save_checkpoint(tmp_path / "changed", 3, state, keep=1), end

    return made


def without(*names):
    """Take fields out of a state, as if it were of format 1."""

    def change(state):
        for name in ("format", "version", *names):
            *path, last = name.split(".")
            part = state
            for key in path:
                part = part[int(key) if isinstance(part, list) else key]
            del part[last]

    return change


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_a_checkpoint_that_lacks_what_can_be_known_goes_on_to_the_same_end(name, saved, make, run, caplog):
    """As rlhf_fast wrote them before evaluations, callbacks, guards and hashes of the data."""
    absent = ("best", "callbacks", "stopped", "rolls_back", "skipped", "data", "frozen", "micro_batch_tokens")
    folder, end = saved(name, without(*absent, "ranks.0.metrics", "ranks.0.tokens"))
    again = run(make(name, max_steps=4), resume_from_checkpoint=str(folder))
    assert all(torch.equal(again.weights[n], w) for n, w in end.weights.items())
    assert "does not say which rows and reference and reward models and micro-batches its run had" in caplog.text


def test_a_head_that_was_a_vector_goes_on_to_the_same_end(saved, make, run):
    """Its moments in the optimizer too."""

    def squeezed(state):
        without()(state)
        heads = [name for name in state["weights"] if name.startswith("heads.")]
        assert heads
        sizes = {state["weights"][name].shape for name in heads}
        state["weights"] |= {name: state["weights"][name].squeeze(0) for name in heads}
        for kept in state["optimizer"]["state"].values():
            kept.update({n: x.squeeze(0) for n, x in kept.items() if n != "step" and x.shape in sizes})

    folder, end = saved("ppo", squeezed)
    again = run(make("ppo", max_steps=4), resume_from_checkpoint=str(folder))
    assert all(torch.equal(again.weights[n], w) for n, w in end.weights.items())


def other_field(state):
    without()(state)
    state["ranks"][0]["records"][0]["surprise"] = 1.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("rows_drawn", "sampler"), "lacks sampler, rows_drawn, without which"),
        (without("extra.kl_coef"), "lacks extra.kl_coef, without"),
        (without("ranks.0.plan"), "lacks ranks.plan, without"),
        (without("ranks"), "lacks ranks, without"),
        (without("scheduler.last_epoch", "sampler.cursor"), r"its fields are others \(KeyError: 'cursor'\), without"),
        (other_field, "its fields are others .*unexpected keyword argument 'surprise'"),
    ],
    ids=["data order", "price of KL", "plan", "ranks", "cursor", "another field"],
)
def test_one_that_lacks_more_is_refused_with_what_to_do(change, said, saved, make):
    folder, _ = saved("ppo", change)
    with pytest.raises(UserError, match=f"written by an earlier rlhf_fast and {said}.*finish it with the version that"):
        make("ppo", max_steps=4).train(resume_from_checkpoint=str(folder))


def test_other_weights_may_be_the_versions_fault_and_are_said_to(saved, make):
    def other(state):
        without()(state)
        state["weights"].pop("heads.value.weight")

    folder, _ = saved("ppo", other)
    with pytest.raises(
        UserError, match="heads.value.weight is missing there .*earlier rlhf_fast: .*finish its run with that"
    ):
        make("ppo", max_steps=4).train(resume_from_checkpoint=str(folder))


def test_one_of_a_newer_version_is_refused(saved, make):
    folder, _ = saved("sft", lambda state: state.update(format=FORMAT + 1, version="9.9"))
    with pytest.raises(UserError, match=f"a newer rlhf_fast .9.9; its format is {FORMAT + 1}, .*: update rlhf_fast"):
        make("sft", max_steps=4).train(resume_from_checkpoint=str(folder))
