"""What PPO and GRPO share: evaluation in the loop, its completions and its KL; soft overlong punishment."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from rlhf_fast import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer
from rlhf_fast.models.adapters import lora_config
from rlhf_fast.rollout import GenerateEngine, Request

PROMPTS = [{"prompt": p, "answer": p} for p in "abcde"]


def letters(completions, **_):
    return [float(len(set(c))) for c in completions]


@pytest.fixture
def trainer(make_model, tokenizer, settings):
    def make(kind, lora=False, **more):
        config, trainer_class = {"ppo": (PPOConfig, PPOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}[kind]
        options = {"max_completion_length": 5, "max_steps": 4, "eval_steps": 2, "learning_rate": 1e-2, "save_steps": 2}
        return trainer_class(
            make_model(),
            letters,
            config(**settings(**{**options, **more})),
            train_dataset=PROMPTS,
            eval_dataset=PROMPTS,
            processing_class=tokenizer,
            peft_config=lora_config(r=4, alpha=8) if lora else None,
        )

    return make


def completions(made):
    path = Path(made.args.output_dir) / "completions.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_what_the_policy_wrote_at_each_evaluation_is_in_a_file_and_shown(kind, trainer, capsys, run):
    """Four rows of three prompts: the mean of their rewards is the evaluation's."""
    made = trainer(kind, num_eval_prompts=3, num_completions_to_print=2, quiet=False)
    steps = run(made).steps
    rows = completions(made)
    assert [(r["step"], r["prompt"], r["answer"]) for r in rows] == [(s, p, p) for s in (2, 4) for p in "abc"]
    for step in (2, 4):
        scores = [r["rewards"]["letters"] for r in rows if r["step"] == step]
        assert scores == [float(len(set(r["completion"]))) for r in rows if r["step"] == step]
        (reward,) = [s["eval_reward"] for s in steps if s["step"] == step and "eval_reward" in s]
        assert reward == pytest.approx(sum(scores) / 3)
    said = capsys.readouterr().out
    table = said[said.index("step 4: completions") :]
    assert all(" ".join(r["completion"].split()) in table for r in rows[3:5])
    assert table.count("letters ") == 2


def test_a_resumed_run_has_each_evaluations_completions_once(trainer):
    """Those past the checkpoint are written again, a line that a kill cut is dropped, those of another run put aside."""
    whole = trainer("grpo", num_completions_to_print=0)
    whole.train()
    path = Path(whole.args.output_dir) / "completions.jsonl"
    want = path.read_text()
    path.write_text(want + '{"step": 4, "prom')
    again = trainer("grpo", output_dir=whole.args.output_dir)
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoints/step-00000002")
    assert path.read_text() == want
    trainer("grpo", output_dir=whole.args.output_dir, max_steps=2).train()
    assert path.with_name("completions-1.jsonl").read_text() == want
    assert {row["step"] for row in completions(whole)} == {2}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_held_out_kl_is_that_of_the_policys_own_samples(lora, temperature, trainer, plain, make_model):
    """Log-probabilities of both models by transformers alone. The policy is its start plus noise."""
    made = trainer("ppo", lora, temperature=temperature)
    assert made.evaluate()["eval_kl"] == pytest.approx(0.0, abs=1e-6)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.policy.named_parameters():
            if "value" not in name and parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    figures = made.evaluate()
    requests = [
        Request(p.input_ids, max_new_tokens=5, temperature=temperature, seed=made.args.seed * 2**32 + i)
        for i, p in enumerate(made.eval_records)
    ]
    samples = [group[0].ids for group in GenerateEngine(made.policy).generate(requests)]
    made.policy.model_for("policy")
    policy, kl = copy.deepcopy(made.policy.model), 0.0
    for prompt, response in zip(made.eval_records, samples):
        new, old = (plain(m, prompt.input_ids, response, temperature) for m in (policy, make_model()))
        kl += float((new - old).detach().sum())
    assert figures["eval_kl"] == pytest.approx(kl / len(samples), abs=1e-4)
    assert abs(figures["eval_kl"]) > 0.05


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_merged_rollouts_train_as_unmerged_ones_do_and_leave_the_base_as_it_was(kind, trainer, run):
    """rollout_merge_lora, in float32, where merging changes nothing else. By default a CPU does not merge."""
    ends, losses = [], []
    options = {"eval_steps": None, "temperature": 0.7} | ({"num_ppo_epochs": 1} if kind == "ppo" else {})
    for merge in (None, False, True):
        made = trainer(kind, lora=True, rollout_merge_lora=merge, **options)
        base = made.policy.model.model.layers[0].self_attn.q_proj.get_base_layer().weight
        before, merged = base.detach().clone(), {True: [], False: []}  # by whether a pass has a graph

        def look(*_, base=base, before=before, merged=merged):
            merged[torch.is_grad_enabled()].append(not torch.equal(base, before))

        made.policy.model.get_input_embeddings().register_forward_hook(look)
        result = run(made)
        assert any(merged[False]) is (merge is True) and not any(merged[True])
        assert torch.equal(base, before) and not made.corrects
        assert max(s.get("sampling/sampling_logp_difference/max", 0.0) for s in result.steps) < 1e-4
        ends.append(result.weights)
        losses.append(result.losses)
    assert losses[0] == losses[1] == pytest.approx(losses[2], abs=1e-5)
    for name, weight in ends[1].items():
        torch.testing.assert_close(ends[2][name], weight, atol=1e-4, rtol=1e-3)


def test_without_a_reference_there_is_no_kl(trainer):
    """A whole model needs a copy for it, which GRPO makes only where its price is asked for; an adapter can be left off."""
    assert "eval_kl" not in trainer("grpo").evaluate()
    assert "eval_kl" in trainer("grpo", beta=0.1).evaluate()
    assert "eval_kl" in trainer("grpo", lora=True).evaluate()


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_soft_overlong_punishment_follows_equation_13(kind, make_model, tokenizer, settings, scripted):
    """Limit 8, cache 4: nothing up to 4 tokens, then a quarter a token. Lengths count the end of the text."""
    answers = {"abc": 0.0, "abcd": 0.25, "abcdefg": 1.0, "abcdefgh!": 1.0}
    script = {"q": list(answers)} if kind == "grpo" else {p: [r] for p, r in zip("wxyz", answers)}
    config, trainer_class = {"ppo": (PPOConfig, PPOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}[kind]
    more = {"num_generations": 4} if kind == "grpo" else {}
    made = trainer_class(
        make_model(),
        lambda completions, **_: [2.0] * len(completions),
        config(**settings(per_device_train_batch_size=4, max_completion_length=8, soft_overlong_cache=4, **more)),
        train_dataset=[{"prompt": p} for p in script],
        processing_class=tokenizer,
        engine=scripted(script),
    )
    rewards = [e.reward for e in made.collect(made.train_records)]
    assert sorted(rewards) == sorted(2.0 - penalty for penalty in answers.values())
