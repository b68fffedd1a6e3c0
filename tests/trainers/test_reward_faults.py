"""Reward functions of the user's own that raise, hang, die or return nonsense: their samples teach nothing, the run goes on."""

from __future__ import annotations

import os
import sys
import time

import pytest
import torch

from rlhf_fast import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer
from rlhf_fast.errors import RolloutError
from rlhf_fast.rewards import import_callable, resolve, score

MODULE = """
import asyncio, ctypes, os, random, re, signal, subprocess, sys, time
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

def never(completions, **_):
    time.sleep(60)
never.timeout = 0.5

def backtracks(completions, **_):
    return [float(bool(re.match("(a+)+$", "a" * 40 + "b"))) for _ in completions]
backtracks.timeout = 0.5

async def never_comes(completions, **_):
    await asyncio.sleep(60)
never_comes.timeout = 0.5

async def blocks(completions, **_):
    time.sleep(60)
blocks.timeout = 0.5

def holds_the_lock(completions, **_):
    ctypes.PyDLL(None).sleep(60)
holds_the_lock.timeout = 0.5

def ignores_signals(completions, **_):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    hangs(completions)
ignores_signals.timeout = 0.5

def stops_itself(completions, **_):
    os.kill(os.getpid(), signal.SIGSTOP)
stops_itself.timeout = 0.5

def leaves_a_child(completions, **_):
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
leaves_a_child.timeout = 0.5

def exits(completions, **_):
    sys.exit(0)

def interrupts(completions, **_):
    raise KeyboardInterrupt

class Odd(BaseException):
    def __str__(self):
        raise ValueError

def odd(completions, **_):
    raise Odd

def takes_all_memory(completions, **_):
    return [bytearray(1 << 62)]

def generator(completions, **_):
    return (1.0 for _ in completions)

def mapping(completions, **_):
    return {c: 1.0 for c in completions}

def text(completions, **_):
    return "1234"

def huge(completions, **_):
    return [10 ** 5000] * len(completions)

def table(completions, **_):
    import torch
    return torch.ones(len(completions), 2)

def imaginary(completions, **_):
    import numpy
    return numpy.ones(len(completions), dtype=complex)

class Unreadable(list):
    def __len__(self):
        raise KeyError("no length")

def unreadable(completions, **_):
    return Unreadable()

def tensor(completions, **_):
    import torch
    return torch.tensor(good(completions), requires_grad=True)

def array(completions, **_):
    import numpy
    return numpy.array(good(completions), dtype="float16")

def truths(completions, **_):
    return ["a" in c for c in completions]

def scalars(completions, **_):
    import numpy
    return [numpy.float32(x) for x in good(completions)]

def forks(completions, **_):
    subprocess.run(["true"])
    return good(completions)

def badness(completions, **_):
    return [float(open("/proc/self/oom_score_adj").read())] * len(completions)

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
# more of them, which training meets in the same way
LATE = {
    name: "gave no answer in 0.5 s"
    for name in ("never", "backtracks", "never_comes", "blocks", "holds_the_lock", "ignores_signals", "stops_itself")
} | {"leaves_a_child": "gave no answer in 0.5 s"}
ODD = {
    "exits": "raised SystemExit",
    "odd": ("raised Odd", "gave what cannot be read (ValueError)"),
    "takes_all_memory": "raised MemoryError",
    "generator": ("raised TypeError: cannot pickle 'generator' object", "returned generator where a list is due"),
    "mapping": "returned dict where a list is due",
    "text": "returned str where a list is due",
    "huge": "returned an integer of 16610 bits as a score",
    "table": "returned list [1.0, 1.0] as a score",
    "imaginary": "returned complex (1+0j) as a score",
    "unreadable": "gave what cannot be read (KeyError)",
}
GOOD = ("good", "chatty", "later", "array", "truths", "forks")


@pytest.fixture
def module(tmp_path, monkeypatch):
    name = f"rewards_{os.getpid()}_{time.monotonic_ns()}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


@pytest.fixture
def ask(module):
    """ask(function) -> the table of four samples; ``here``: of the function in this process."""
    made = {}

    def asked(name, completions=("a", "b", "ab", ""), here=False):
        spec = import_callable(f"{module}:{name}", "reward") if here else f"{module}:{name}"
        function = made.setdefault((name, here), resolve(spec))
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


@pytest.mark.parametrize("name", [*LATE, *(name for name in ODD if name != "table"), "interrupts"])
def test_more_faults_of_a_function_in_a_process_of_its_own(name, ask):
    """``-s`` prints by how much each missed its deadline."""
    began = time.monotonic()
    table = ask(name)
    print(f"{name}, own process: {time.monotonic() - began:.2f} s with its start")
    said = {**LATE, **ODD, "interrupts": "raised KeyboardInterrupt"}[name]
    assert f"reward '{name}' {said if isinstance(said, str) else said[0]}" in table.messages[0]
    assert table.faults == {name: 4}


@pytest.mark.parametrize("name", ODD)
def test_more_faults_of_a_function_in_this_process(name, ask):
    said = ODD[name] if isinstance(ODD[name], str) else ODD[name][1]
    assert f"reward '{name}' {said}" in ask(name, here=True).messages[0]


@pytest.mark.parametrize("name", ["never", "backtracks", "blocks"])
def test_a_function_in_this_process_is_interrupted_at_its_deadline(name, ask):
    """What it leaves half done nobody knows: the error ends the run, which saves."""
    began = time.monotonic()
    with pytest.raises(
        RolloutError, match=f"reward '{name}', which runs in this process, gave no answer in .*module:func"
    ):
        ask(name, here=True)
    print(f"{name}, this process: {time.monotonic() - began - 0.5:.2f} s past its deadline")
    assert ask("good", here=True).total().tolist() == [1.0, 0.0, 1.0, 0.0]


def test_an_async_function_that_waits_too_long_only_loses_its_scores(ask):
    assert "'never_comes' gave no answer in 0.5 s" in ask("never_comes", here=True).messages[0]


def test_ctrl_c_is_no_fault(ask):
    with pytest.raises(KeyboardInterrupt):
        ask("interrupts", here=True)


def test_what_is_no_fault_is_none(ask):
    assert ask("nones").faults == {}
    assert ask("nones").total().isnan().all()
    for name in GOOD:
        assert ask(name).total().tolist() == [1.0, 0.0, 1.0, 0.0]
    for name in (*GOOD, "tensor", "scalars"):
        assert ask(name, here=True).total().tolist() == [1.0, 0.0, 1.0, 0.0]


def test_it_is_the_first_to_go_when_memory_runs_out(ask):
    assert ask("badness").total()[0] == torch.tensor(1000.0)


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
