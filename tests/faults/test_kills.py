"""``kill -9``, then ``--resume``: the end is that of a run nobody touched, bit for bit, wherever it was killed.

12 kills by default, one of each kind of run, which take turns at full weights, LoRA and QLoRA; ``-m slow`` makes 300 over all
of them, and one at every micro-step of a buffer. ``RLHF_FAST_SEED`` draws others.
"""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest

from rlhf_fast.cli import COMMANDS
from tests.faults.conftest import KINDS, WEIGHTS

SEED = int(os.environ.get("RLHF_FAST_SEED", "0"))
RUNS = [(kind, weights) for kind in KINDS for weights in WEIGHTS]
# one of each kind; another seed moves all to the next weights
TURNS = [(kind, list(WEIGHTS)[(number + SEED) % len(WEIGHTS)]) for number, kind in enumerate(KINDS)]
IN_A_SAVE = 0.4  # share of the kills


def kill_and_resume(server, whole, out, kind, moment, **settings):
    """One kill, one ``--resume``; raises unless all of the end is the same."""
    reference, _ = whole(kind, **settings)
    killed = server.run(kind, out, fault=(*moment, "SIGKILL"), **settings)
    assert killed["signal"] == 9, (moment, server.log(out))
    resumed = server.run(kind, out, "--resume", **settings)
    assert (resumed["signal"], resumed["code"]) == (0, 0), (moment, server.log(out))
    assert server.digest(out) == server.digest(reference), moment
    assert "Traceback" not in server.log(out)


def draw(rng, ticks, in_a_save):
    """A moment of a run: within a save, or any other one that it has."""
    name = "save.op" if in_a_save else rng.choice(sorted(set(ticks) - {"save.op"}))
    return name, rng.randint(1, ticks[name])


@pytest.mark.parametrize("number", range(len(TURNS)), ids=[" ".join(turn) for turn in TURNS])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(number, server, whole, tmp_path):
    kind, weights = TURNS[number]
    rng = random.Random(f"{SEED} {number}")
    in_a_save = (number + number // 3) % 3 == 0  # of a third of the runs, whose weights differ
    moment = draw(rng, whole(kind, **WEIGHTS[weights])[1], in_a_save)
    kill_and_resume(server, whole, tmp_path / "run", kind, moment, **WEIGHTS[weights])


def test_every_command_that_trains_is_killed():
    assert {settings.get("method", kind) for kind, settings in KINDS.items()} == {
        name for name, command in COMMANDS.items() if command.group == "train"
    }


def test_a_run_without_a_checkpoint_begins_again(server, whole, tmp_path):
    kill_and_resume(server, whole, tmp_path / "run", "sft", ("micro", 2), use_peft=False)
    assert "has no checkpoint yet: it begins again" in server.log(tmp_path / "run")


def buffers():
    """(kind, settings, micro-steps of the first buffer)."""
    for count in (1, 2, 3, 4):
        yield "grpo", {"num_iterations": count, "max_steps": count + 1}, 2 * count
        # two mini-batches of two micro-batches each, a policy and a value pass in each
        yield "ppo", {"num_ppo_epochs": count, "max_steps": 2 * count + 1}, 8 * count
    # and one of the costs' values
    yield "safe-ppo functions", {"num_ppo_epochs": 2, "max_steps": 5}, 24


@pytest.mark.slow
def test_300_random_kills(server, whole, tmp_path):
    rng, places = random.Random(SEED), Counter()
    for number in range(300):
        kind, weights = RUNS[number % len(RUNS)]
        moment = draw(rng, whole(kind, **WEIGHTS[weights])[1], rng.random() < IN_A_SAVE)
        kill_and_resume(server, whole, tmp_path / str(number), kind, moment, **WEIGHTS[weights])
        places[moment[0]] += 1
        print(number + 1, kind, weights, *moment, "same", flush=True)
    print(places, f"{places['save.op'] / 300:.0%} inside a save")
    assert places["save.op"] >= 90


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "settings", "micro_steps"), list(buffers()), ids=str)
def test_a_kill_at_every_micro_step_of_a_buffer(kind, settings, micro_steps, server, whole, tmp_path):
    assert whole(kind, use_peft=True, **settings)[1]["micro"] >= micro_steps
    for number in range(1, micro_steps + 1):
        kill_and_resume(server, whole, tmp_path / str(number), kind, ("backward", number), use_peft=True, **settings)
        print(kind, settings, number, "of", micro_steps, "same", flush=True)
