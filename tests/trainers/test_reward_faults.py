"""Reward functions of the user's own that raise, hang, die or return nonsense: their samples teach nothing, the run goes on."""

from __future__ import annotations

import os
import sys
import time

import pytest
import torch

from rlhf_fast import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer
from rlhf_fast.rewards import resolve, score

MODULE = """
import os, random, sys, time
calls = 0

def good(completions, **_):
    return [float("a" in c) for c in completions]

def raises(completions, **_):
    raise ValueError("no such column")

def hangs(completions, **_):
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
hangs.timeout = 0.5

def dies(completions, **_):
    os._exit(3)

def nan(completions, **_):
    return [float("nan")] * len(completions)

def infinite(completions, **_):
    return [float("inf")] * len(completions)

def nothing(completions, **_):
    return None

def nones(completions, **_):
    return [None] * len(completions)

def short(completions, **_):
    return [1.0]

def words(completions, **_):
    return ["good"] * len(completions)

def one(completions, **_):
    return 1.0

def chatty(completions, **_):
    print("x" * 300_000)
    print("y" * 300_000, file=sys.stderr)
    return good(completions)

async def later(completions, **_):
    return good(completions)

def drawn(completions, **_):
    return [random.random() for _ in completions]

def counted(completions, **_):
    global calls
    calls += 1
    return [float(calls)] * len(completions)

def where(completions, **_):
    return [float(os.getpid())] * len(completions)

def here(completions, **_):
    return [float(os.getpid())] * len(completions)
here.in_process = True

def sometimes(completions, **_):
    return [float("a" in c) if "b" not in c else float("nan") for c in completions]
"""
FAULTS = {
    "raises": "raised ValueError: no such column",
    "hangs": "gave no answer in",
    "dies": "died",
    "nan": "returned nan as a score",
    "infinite": "returned inf as a score",
    "nothing": "returned NoneType where a list is due",
    "short": "returned 1 scores for 4 samples",
    "words": "returned str 'good' as a score",
    "one": "returned float where a list is due",
}


@pytest.fixture
def module(tmp_path, monkeypatch):
    name = f"rewards_{os.getpid()}_{time.monotonic_ns()}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


@pytest.fixture
def ask(module):
    """ask(function) -> the table of four samples."""
    made = {}

    def asked(name, completions=("a", "b", "ab", "")):
        function = made.setdefault(name, resolve(f"{module}:{name}"))
        count = len(completions)
        return score([function], [name], ["p"] * count, list(completions), [[1]] * count)

    yield asked
    for function in made.values():
        getattr(function, "close", lambda: None)()


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_told_and_scores_nothing(name, ask):
    table = ask(name)
    assert table.total().isnan().all()
    assert table.faults == {name: 4}
    assert f"reward '{name}' {FAULTS[name]}" in table.messages[0]
    again = ask(name)  # in a new process where the old one is gone
    assert again.faults == {name: 4}


def test_what_is_no_fault_is_none(ask):
    assert ask("nones").faults == {}
    assert ask("nones").total().isnan().all()
    for name in ("good", "chatty", "later"):
        assert ask(name).total().tolist() == [1.0, 0.0, 1.0, 0.0]


def test_it_runs_in_another_process_which_keeps_its_state(ask):
    assert ask("where").total()[0] != torch.tensor(float(os.getpid()))
    assert ask("here").total()[0] == torch.tensor(float(os.getpid()))
    assert [ask("counted").total()[0].item() for _ in range(3)] == [1.0, 2.0, 3.0]


def test_the_same_samples_get_the_same_random_numbers_in_any_process(ask, module):
    first, other = ask("drawn").total(), ask("drawn", ["a", "b", "ab", "c"]).total()
    assert not torch.equal(first, other)
    fresh = resolve(f"{module}:drawn")
    table = score([fresh], ["drawn"], ["p"] * 4, ["a", "b", "ab", ""], [[1]] * 4)
    fresh.close()
    assert torch.equal(table.total(), first)


@pytest.mark.parametrize("fault", [*FAULTS, "sometimes"])
@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_training_goes_on_with_finite_advantages(kind, fault, module, make_model, tokenizer, settings, scripted, run):
    trainer, config = {"grpo": (GRPOTrainer, GRPOConfig), "ppo": (PPOTrainer, PPOConfig)}[kind]
    options = {"num_generations": 2} if kind == "grpo" else {"num_ppo_epochs": 1}
    args = config(**settings(per_device_train_batch_size=4, max_steps=2, max_completion_length=4, **options))
    engine = scripted({f"{i} ": ["ab", "a!", "b"] for i in range(4)})
    given = {"train_dataset": [{"prompt": f"{i} "} for i in range(4)], "processing_class": tokenizer}
    made = trainer(make_model(), [f"{module}:{fault}"], args, engine=engine, **given)
    seen, collect = [], made.collect

    def noted(prompts):
        records = collect(prompts)
        seen.extend(e.advantages for e in records)
        return records

    made.collect = noted
    result = run(made)
    made.functions[0].close()
    assert made.step == 2
    assert seen
    assert all(torch.isfinite(a).all() for a in seen)
    assert all(torch.isfinite(w).all() for w in result.weights.values())
    assert result.steps[0][f"rewards/{fault}/faults"] > 0
