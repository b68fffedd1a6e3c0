"""Gradients that are not finite: the step is left out, the weights stay, three in a row end the run. Memory that runs out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rlhf_fast import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    PPOConfig,
    PPOTrainer,
    SFTConfig,
    SFTTrainer,
)
from rlhf_fast.errors import UserError
from rlhf_fast.trainers import loop

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
    again = poisoned({4}, math.nan, output_dir=made.args.output_dir)  # saved as it was before the last of them
    with pytest.raises(UserError, match="at step 4; .*saved at step 3; continue with --resume"):
        again.train(resume_from_checkpoint=True)
    well = poisoned({}, math.nan, output_dir=made.args.output_dir)
    well.train(resume_from_checkpoint=True)
    assert well.step == 6


def test_the_count_survives_a_checkpoint(poisoned, run):
    first = poisoned({2, 3}, math.nan, save_steps=3)
    first.args.max_steps = 3
    run(first)
    again = poisoned({4}, math.nan)
    with pytest.raises(UserError, match="the last at step 4"):
        again.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoints/step-00000003")


# ---- who is at fault


def dumped(made, step):
    text = Path(made.args.output_dir, f"skipped/step-{step:08d}.jsonl").read_text()
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def test_the_row_at_fault_is_named_and_the_batch_is_in_a_file(make_model, tokenizer, settings, run, caplog, tmp_path):
    """A NaN in the last hidden states, and so in the logits, of one row of four; it comes in every epoch."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    args = SFTConfig(**settings(max_steps=2, packing=False, per_device_train_batch_size=2))
    made = SFTTrainer(make_model(), args, train_dataset=str(path), processing_class=tokenizer)
    spoiled = tokenizer("h")["input_ids"][0]
    seen = []

    def note(module, inputs):
        seen[:] = [inputs[0]]

    def poison(module, inputs, output):
        return torch.where((seen[0] == spoiled).reshape(*output.shape[:-1], 1), torch.nan, output)

    made.policy.model.get_input_embeddings().register_forward_pre_hook(note)
    made.policy.model.model.norm.register_forward_hook(poison)
    run(made)
    (skipped,) = list(Path(args.output_dir, "skipped").iterdir())
    step = int(skipped.stem.removeprefix("step-"))
    assert f"rows at fault: {path}, line 2 (loss nan, gradient norm nan); the batch is in {skipped}" in caplog.text
    bad = [line for line in dumped(made, step) if line["loss"] == "nan"]
    assert [line["where"] for line in bad] == [f"{path}, line 2"]
    assert bad[0]["texts"] == ["1 hello<eos>"]
    assert len(dumped(made, step)) == 2
    good = next(line for line in dumped(made, step) if line["loss"] != "nan")
    assert math.isfinite(good["gradient_norm"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_spoiled_once_blames_no_row(value, make_model, tokenizer, settings, run, caplog):
    """As a flipped bit on its way would: computed again, every row is well."""
    args = SFTConfig(**settings(max_steps=2))
    made = SFTTrainer(make_model(), args, train_dataset=ROWS, processing_class=tokenizer)
    before = [p.detach().clone() for p in made.parameters]
    once = iter([value])
    made.parameters[0].register_hook(lambda gradient: gradient * next(once, 1.0))
    after = []
    made.after_step = lambda: after.append([p.detach().clone() for p in made.parameters])
    run(made)
    assert same(before, after[0])
    assert not same(after[0], after[1])
    assert "no row is at fault by itself; the batch is in" in caplog.text


def test_sampled_responses_at_fault_are_named_by_their_prompt(make_model, tokenizer, settings, run, caplog, scripted):
    rows = [{"prompt": f"{i} "} for i in range(2)]
    args = GRPOConfig(**settings(num_generations=2, per_device_train_batch_size=4, max_steps=1))
    engine = scripted({"0 ": ["ab", "no"], "1 ": ["be", "hi"]})
    given = {"train_dataset": rows, "processing_class": tokenizer, "engine": engine}
    made = GRPOTrainer(make_model(), lambda completions, **_: [float("a" in c) for c in completions], args, **given)
    losses = made.losses

    def spoiled(records, window):
        nan = any(e.example.where == "the data, row 1" and e.reward == 0 for e in records)
        for loss, metrics, weight in losses(records, window):
            yield loss * (math.nan if nan else 1.0), metrics, weight

    made.losses = spoiled
    run(made)
    assert "rows at fault: the data, row 1 (loss nan" in caplog.text
    assert "row 2 (" not in caplog.text
    line = next(line for line in dumped(made, 1) if line["loss"] == "nan")
    assert (line["texts"], line["records"][0]["reward"]) == (["0 no<eos>"], 0.0)


# ---- memory that runs out on the way


def hold(made, tokens):
    """Let the device run out of memory in any training pass of more than ``tokens`` tokens."""

    def check(module, args):
        if torch.is_grad_enabled() and args[0].numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more")

    made.policy.model.get_input_embeddings().register_forward_pre_hook(check)


def gradients_of(made, run, monkeypatch):
    """Of each step, before it is taken."""
    seen, apply = [], loop.apply

    def noted(*args):
        seen.append([p.new_zeros(()) if p.grad is None else p.grad.detach().clone() for p in made.parameters])
        apply(*args)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "apply", noted)
        return seen, run(made)


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo", "ppo"])
def test_memory_that_runs_out_halves_the_micro_batch_and_changes_no_gradient(
    kind, make_model, tokenizer, settings, run, caplog, sgd, monkeypatch
):
    """The first micro-batch goes through, so that there are gradients and figures to take back. Plain descent, so that the
    second step has the same gradients too.
    """
    trainers = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}
    trainers |= {"grpo": (GRPOTrainer, GRPOConfig), "ppo": (PPOTrainer, PPOConfig)}
    trainer, config = trainers[kind]
    rows = [{"prompt": f"{i} ", "completion": "ab" * (i + 1)} for i in range(6)]
    options = {"per_device_train_batch_size": 6, "max_steps": 2, "learning_rate": 1e-3}
    options |= {"packing": False} if kind == "sft" else {"shared_prefix": False}
    given = {}
    if kind == "dpo":
        rows = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "no"} for r in rows]
    if kind in ("grpo", "ppo"):
        rows, given = (
            [{"prompt": r["prompt"]} for r in rows],
            {"reward_funcs": lambda completions, **_: map_vowels(completions)},
        )
        options |= (
            {"max_completion_length": 6, "num_generations": 2} if kind == "grpo" else {"max_completion_length": 6}
        )
    ends = []
    for limit in (10_000, 24):
        args = config(**settings(**options))
        made = trainer(make_model(), args=args, train_dataset=rows, processing_class=tokenizer, **given)
        hold(made, limit)
        ends.append((*gradients_of(made, run, monkeypatch), made.micro_batch_tokens))
    (whole, all_steps, free), (halved, other_steps, budget) = ends
    assert free is None
    assert budget <= 24
    assert "out of memory at step 1, in a micro-batch of" in caplog.text
    assert "begins again with micro_batch_tokens" in caplog.text
    for step, (a, b) in enumerate(zip(whole, halved, strict=True)):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5, msg=f"step {step + 1}")
    for a, b in zip(all_steps.steps, other_steps.steps, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def map_vowels(completions):
    return [sum(c.count(v) for v in "aeiou") / 4 for c in completions]


def test_a_single_row_that_does_not_fit_is_said_with_what_to_change(make_model, tokenizer, settings, run):
    args = SFTConfig(**settings(max_steps=1, packing=False))
    made = SFTTrainer(make_model(), args, train_dataset=ROWS, processing_class=tokenizer)
    hold(made, 3)
    with pytest.raises(
        UserError, match="out of memory at step 1, in a micro-batch of .* one record; set gradient_check"
    ):
        run(made)
