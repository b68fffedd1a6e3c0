"""An AI judge as the reward of an online run, before a server that follows a script."""

from __future__ import annotations

import re

import pytest

from bench.scripted import ScriptedServer
from rlhf_fast import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer

# response -> grade; "three" gets no verdict
SCRIPT = {"1+1=": ["2", "two", "three", "4"], "go ": ["left", "right", "up", "down"]}
GRADES = {"2": 10, "two": 7, "4": 1, "left": 4, "right": 10, "up": 1, "down": 1}


def grader(messages):
    return (
        f"[[{GRADES.get(re.search(r'<response>(.*?)</response>', messages[0]['content'], re.DOTALL)[1].strip(), '?')}]]"
    )


def comparer(messages):
    shown = re.findall(r"<response (.)>\n(.*?)\n</response", messages[0]["content"], re.DOTALL)
    return "[[" + " > ".join(label for label, text in sorted(shown, key=lambda item: -GRADES.get(item[1], 5))) + "]]"


def logged(reward, model, tokenizer, settings, scripted, run):
    args = GRPOConfig(**settings(num_generations=4, max_completion_length=16, max_steps=2), reward_funcs=reward)
    rows = [{"prompt": p} for p in SCRIPT]
    made = GRPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer, engine=scripted(SCRIPT))
    return run(made).steps


def test_grpo_is_scored_by_the_judge_and_a_missing_verdict_is_a_fault(model, tokenizer, settings, scripted, run):
    """Grades brought to 0..1; of eight responses one has none. The second step finds every verdict in memory."""
    with ScriptedServer(grader) as server:
        steps = logged([{"name": "judge", "url": server.url}], model, tokenizer, settings, scripted, run)
        assert len(server.calls) == 8
    scores = [(grade - 1) / 9 for grade in GRADES.values()]
    for step in steps:
        assert step["rewards/judge/mean"] == pytest.approx(sum(scores) / 7)
        assert step["rewards/judge/faults"] == 1


def test_grpo_is_scored_by_comparisons_within_each_group(model, tokenizer, settings, scripted, run):
    """Shares of the others beaten: 1, 2/3, 1/3 and 0, and in the second group a tie at the end: 1, 2/3, 1/6, 1/6."""
    reward = {"name": "judge", "mode": "group", "together": 4}
    with ScriptedServer(comparer) as server:
        steps = logged([{**reward, "url": server.url}], model, tokenizer, settings, scripted, run)
        assert len(server.calls) == 4
    assert steps[0]["rewards/judge/mean"] == pytest.approx(0.5)
    # over the eight: (1 + 2/3 + 1/3 + 0 + 1 + 2/3 + 1/6 + 1/6) / 8 is 1/2 again, as in any group; their spread is not
    scores = [1, 2 / 3, 1 / 3, 0, 1, 2 / 3, 1 / 6, 1 / 6]
    variance = sum((s - 0.5) ** 2 for s in scores) / 7
    assert steps[0]["rewards/judge/std"] == pytest.approx(variance**0.5, rel=1e-3)


def test_ppo_is_scored_by_the_judge(model, tokenizer, settings, scripted, run):
    """One response a prompt, grades 10 and 4: scores 1 and 1/3."""
    with ScriptedServer(grader) as server:
        reward = [{"name": "judge", "url": server.url}]
        args = PPOConfig(**settings(per_device_train_batch_size=2, max_steps=1), reward_funcs=reward)
        rows = [{"prompt": p} for p in SCRIPT]
        made = PPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer, engine=scripted(SCRIPT))
        (step,) = run(made).steps
    assert step["objective/scores"] == pytest.approx((1 + 1 / 3) / 2)
