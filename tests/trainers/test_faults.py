"""Gradients that are not finite: the step is left out, the weights stay, three in a row end the run."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_fast import SFTConfig, SFTTrainer
from rlhf_fast.errors import UserError

ROWS = [{"prompt": f"{i} ", "completion": w} for i, w in enumerate(["a", "hello", "to be", "x+y=z"])]


@pytest.fixture
def poisoned(make_model, tokenizer, settings):
    """poisoned(steps, value, **more): a trainer whose loss is multiplied by ``value`` in these steps."""

    def make(steps, value, **more):
        args = SFTConfig(**settings(learning_rate=1e-2, max_steps=6, **more))
        made = SFTTrainer(make_model(), args, train_dataset=ROWS, processing_class=tokenizer)
        losses, made.after = made.losses, []

        def spoiled(records, window):
            for loss, metrics, weight in losses(records, window):
                yield loss * (value if made.step + 1 in steps else 1.0), metrics, weight

        made.losses = spoiled
        made.after_step = lambda: made.after.append([p.detach().clone() for p in made.parameters])
        return made

    return make


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_without_a_finite_gradient_is_skipped(value, poisoned, run, caplog):
    made = poisoned({3}, value)
    result = run(made)
    after = made.after
    assert same(after[1], after[2])
    assert not same(after[2], after[3])
    assert "step 3 skipped: the gradient norm is" in caplog.text
    assert not math.isfinite(result.steps[2]["loss"])
    assert all(math.isfinite(s["loss"]) for s in result.steps[3:])
    assert all(torch.isfinite(w).all() for w in result.weights.values())


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_two_in_a_row_are_survived_and_counted_anew(poisoned, run):
    made = poisoned({1, 2, 4, 5}, math.nan)
    assert len(run(made).steps) == 6
    assert made.step == 6


def test_three_in_a_row_end_the_run_with_what_to_do(poisoned, run):
    made = poisoned({2, 3, 4}, math.nan)
    with pytest.raises(
        UserError, match="3 steps in a row had non-finite gradients, the last at step 4; lower the learning"
    ):
        run(made)
    assert same(made.after[0], [p.detach() for p in made.parameters])


def test_the_count_survives_a_checkpoint(poisoned, run):
    first = poisoned({2, 3}, math.nan, save_steps=3)
    first.args.max_steps = 3
    run(first)
    again = poisoned({4}, math.nan)
    with pytest.raises(UserError, match="the last at step 4"):
        again.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoints/step-00000003")
