"""The bench of rollouts: who is timed, and what its files say."""

from __future__ import annotations

import argparse

import pytest

from bench import gpu_rollout, rollout
from bench.rollout import CONTENDERS, Work, build, check, climb, markdown, measure


@pytest.fixture(scope="module")
def policy():
    return build("cpu")


@pytest.mark.parametrize("name", ["slots", "GenerateEngine", "generate", "generate, static cache"])
def test_a_contender_is_right_and_writes_exactly_what_was_asked_for(policy, name):
    """Lengths of 8 to 12 tokens in batches of 4: ragged, so that a batch's longest is not everyone's."""
    work = Work.of(3, 2, 12, 4096)
    assert len(set(work.lengths)) > 1
    row = {"contender": name, "batch": 4, "times": [], "cpu": []}
    measure(row, policy, work, check(name, policy))
    assert row["status"] == "ok" and len(row["times"]) == 1


def test_a_contender_with_other_tokens_is_not_timed(policy, monkeypatch):
    def shifted(*args):
        return {i: [[(t + 1) % 4096 for t in ids] for ids in group] for i, group in slots(*args).items()}

    slots = CONTENDERS["slots"]
    monkeypatch.setitem(rollout.CONTENDERS, "slots", shifted)
    row = {"contender": "slots", "batch": 4, "times": [], "cpu": []}
    measure(row, policy, Work.of(1, 1, 12, 4096), check("slots", policy))
    assert row["status"].startswith("wrong: 0 of") and not row["times"]


@pytest.mark.parametrize(
    ("speeds", "best", "tried"),
    [
        ({8: 1, 16: 2, 32: 4, 64: 3, 128: 2}, 32, [64, 128, 32, 16]),
        ({32: 9, 64: 3, 128: 5, 256: 4}, 128, [64, 128, 256]),
        ({16: 1, 32: 2, 64: 3, 128: 2}, 64, [64, 128, 32]),
        ({64: 1, 128: 2, 256: 3}, 256, [64, 128, 256]),  # there are no more
        ({4: 7, 8: 6, 16: 5, 32: 4, 64: 3, 128: 2}, 4, [64, 128, 32, 16, 8, 4]),
    ],
    ids=["below", "above", "at the start", "all at once", "as few as there may be"],
)
def test_the_best_number_of_sequences_is_searched_until_it_gets_slower_on_both_sides(speeds, best, tried):
    seen = []
    assert climb(lambda batch: (seen.append(batch), speeds[batch])[1], 64, 4, 256) == best
    assert seen == tried


ROW = {"shape": "7b", "device": "cuda", "prompts": "64", "n": "4", "longest": "256", "batch": "64", "status": "ok"}
ROW |= {"tokens": "1000", "seconds": "1", "min_s": "1", "max_s": "1", "median_cpu_s": "1", "of_bandwidth": "0.65"}
ROW |= {"rounds": "1", "machine": "a GPU", "threads": "1", "date": "today", "versions": "torch=0"}
OURS = ROW | {"contender": "slots", "tokens_per_second": "1000"}
THEIRS = ROW | {"contender": "generate", "tokens_per_second": "400"}


def test_the_table_compares_with_our_best_batch_size():
    slower = OURS | {"batch": "32", "tokens_per_second": "500"}
    table = markdown([slower, OURS, THEIRS])
    assert "| slots (best) | 64 | 1000 | 1.00 |" in table and "| slots | 32 | 500 | 2.00 |" in table
    assert "| generate (best) | 64 | 400 | 2.50 |" in table


def test_one_thread_of_a_cpu_is_compared_by_its_own_seconds_and_memory_stands_beside_it():
    """Twice as long by the clock, as others took half of the core."""
    cpu = {"shape": "cpu", "device": "cpu", "of_bandwidth": "nan"}
    ours = OURS | cpu | {"median_cpu_s": "0.5", "tokens_per_second": "500"}
    theirs = THEIRS | cpu | {"median_cpu_s": "2", "tokens_per_second": "500"}
    memory = {"requests": "64", "samples": "256", "tokens": "1000", "peak_mb": "70.4", "cache_mb": "50"}
    table = markdown([ours, theirs], [memory | {"machine": "a CPU", "versions": "torch=0", "date": "today"}])
    assert "| slots (best) | 64 | 2000 | 1.00 | 500 |" in table
    assert "| generate (best) | 64 | 500 | 4.00 | 500 |" in table
    assert "| 64 | 256 | 1000 | 70 | 50 |" in table


def test_targets_are_met_missed_or_not_measured(tmp_path):
    rollout.write(tmp_path / "rollout-cuda.csv", [OURS, THEIRS])
    lines = gpu_rollout.targets(tmp_path, {}, dry=False).splitlines()
    assert "| share of the bandwidth limit, 64 sequences | 0.65 | ≥ 0.6 | met |" in lines
    assert "| speed over generate, 64 sequences | 2.5 | ≥ 3 | missed |" in lines
    assert "| speed over continuous batching, 64 sequences |  | ≥ 2 | not measured |" in lines


def test_known_sizes_are_the_fastest_of_the_same_conditions(policy, tmp_path):
    args = argparse.Namespace(shape="cpu", threads=1, prompts=3, n=2, longest=12, out=tmp_path, memory=True)
    args.contenders = ["slots"]
    bench = rollout.Bench(args, policy)
    assert bench.known("slots") is None
    row = OURS | {"shape": "cpu", "device": "cpu", "prompts": "3", "n": "2", "longest": "12"}
    for batch, seconds, change in (
        (4, 3.0, {}),
        (8, 2.0, {}),
        (16, 1.0, {"prompts": "64"}),
        (32, 0.5, {"status": "failed"}),
    ):
        rollout.write(bench.path, [row | {"batch": batch, "median_cpu_s": seconds} | change])
    assert bench.known("slots") == 8
