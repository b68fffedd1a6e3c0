"""Evaluation against figures worked out by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from rlhf_fast.data.batch import Prompt
from rlhf_fast.errors import UserError
from rlhf_fast.rewards import evaluate_policy, pass_at_k
from rlhf_fast.rollout import GenerateEngine, Request, decode


@pytest.fixture
def prompts(tokenizer):
    texts = ["1+1=", "10+7=", "a", "sum of 2 and 3 is "]
    return [Prompt(tokenizer.encode(t, add_special_tokens=False), t, {"level": i}) for i, t in enumerate(texts)]


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    """All C(5, k) subsets counted one by one, for prompts with 0, 1, 3 and 5 right samples of 5."""
    correct = torch.tensor([[0] * 5, [1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1] * 5]).bool()
    for k in range(1, 6):
        by_hand = [[any(row[i] for i in c) for c in itertools.combinations(range(5), k)] for row in correct.tolist()]
        assert pass_at_k(correct, k) == pytest.approx(sum(sum(b) / len(b) for b in by_hand) / 4)


def test_greedy_evaluation_reports_what_the_policy_writes(make_policy, tokenizer, prompts):
    policy = make_policy()
    requests = [Request(p.input_ids, max_new_tokens=6, temperature=0.0) for p in prompts]
    samples = [group[0] for group in GenerateEngine(policy).generate(requests)]
    texts = decode(samples, tokenizer)
    right = [{**p.columns, "answer": t if i % 2 else t + "x"} for i, (p, t) in enumerate(zip(prompts, texts))]

    def by_level(level):
        return [None if x == 3 else x * 1.0 for x in level]

    held_out = [Prompt(p.input_ids, p.prompt, columns) for p, columns in zip(prompts, right)]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    result = evaluate_policy(policy, held_out, ["exact", by_level], max_new_tokens=6)
    assert torch.equal(state, torch.get_rng_state())
    assert result["rewards/exact/mean"] == 0.5
    # 0, 1, 0, 1: standard deviation sqrt(1/3), over sqrt(4)
    assert result["rewards/exact/stderr"] == pytest.approx(math.sqrt(1 / 3) / 2)
    assert result["rewards/by_level/mean"] == 1.0  # 0, 1, 2 and one not scored
    assert result["reward"] == pytest.approx((0 + 0 + 1 + 1 + 0 + 2 + 1) / 4)
    assert result["eos_rate"] == sum(s.finish_reason == "stop" for s in samples) / 4
    assert result["completions/mean_length"] == sum(len(s.ids) for s in samples) / 4
    assert [row["completion"] for row in result.samples] == texts
    assert result.samples[3]["rewards"] == {"exact": 1.0, "by_level": None}
    assert result.samples[1]["level"] == 1 and "prompt_ids" not in result.samples[0]


def test_several_samples_give_pass_at_k_and_an_error_over_prompts(make_policy, prompts):
    """Samples of a prompt are no independent evidence, so the error counts 4 prompts and not 16 samples."""

    def third(completion_ids):
        return [float(sum(ids) % 3 == 0) for ids in completion_ids]

    result = evaluate_policy(make_policy(), prompts, third, n=4, temperature=1.0, max_new_tokens=8)
    right = torch.tensor([row["rewards"]["third"] for row in result.samples]).view(4, 4)
    shares = right.mean(1)
    assert 0 < shares.mean() < 1 and shares.std() > 0  # not a test of nothing
    assert result["rewards/third/mean"] == pytest.approx(float(shares.mean()))
    assert result["rewards/third/stderr"] == pytest.approx(float(shares.std() / 2))
    assert result["rewards/third/pass@1"] == pytest.approx(float(shares.mean()))
    assert result["rewards/third/pass@4"] == float((right > 0).any(1).float().mean())
    assert result["num_completions"] == 16


def test_equal_prompts_get_different_samples_and_a_seed_repeats_them(make_policy, prompts):
    def texts(**options):
        result = evaluate_policy(make_policy(), [prompts[0]] * 3, [], temperature=1.0, max_new_tokens=8, **options)
        return [row["completion"] for row in result.samples]

    assert len(set(texts())) == 3
    assert texts() == texts(seed=0) != texts(seed=1)


def test_a_failing_reward_is_reported_and_does_not_stop_the_evaluation(make_policy, prompts):
    def boom(completions):
        raise RuntimeError("no licence")

    result = evaluate_policy(make_policy(), prompts, boom, max_new_tokens=2)
    assert math.isnan(result["reward"]) and result["rewards/boom/faults"] == 4
    assert "no licence" in result.messages[0]


def test_a_users_mistake_is_refused(make_policy, prompts):
    with pytest.raises(UserError, match="no prompts"):
        evaluate_policy(make_policy(), [], "answer")
    with pytest.raises(UserError, match="all the same"):
        evaluate_policy(make_policy(), prompts, [], n=2)
    with pytest.raises(UserError, match="needs a column 'answer'"):
        evaluate_policy(make_policy(), prompts, "answer")
