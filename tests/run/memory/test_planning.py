"""Plans: settings that make sense, and advice that was tried."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.run import memory
from rlhf_fast.run.memory import FREE, GB, METHODS, Job, Part, attempts, choose, find_shape, plan

LENGTHS, SIZES = (2048, 8192, 32768), (24, 48, 80, 141)
QWEN, LLAMA = find_shape("Qwen2.5-7B"), find_shape("Llama-3.1-8B")


def test_sizes_of_gpus():
    assert memory.gpu_bytes("24") == memory.gpu_bytes("24GB") == 24 * GB
    assert memory.gpu_bytes("h100") == int(79.1 * 2**30)
    with pytest.raises(UserError, match="--gpu big: give a size in GB"):
        memory.gpu_bytes("big")


@pytest.mark.parametrize("shape", [QWEN, LLAMA], ids=["qwen", "llama"])
@pytest.mark.parametrize("method", METHODS)
def test_a_larger_gpu_never_gets_worse_settings_nor_longer_sequences_better_ones(shape, method):
    ranks = {}
    for length, size in itertools.product(LENGTHS, SIZES):
        made = choose(Job(shape=shape, method=method, length=length), size * GB)
        ranks[length, size] = made.rank
        assert made.fits or made.changes, "says what to change"
        assert not made.fits or made.needed <= size * GB
        assert not made.fits or made.job.tokens >= length
    for length in LENGTHS:
        by_size = [ranks[length, size] for size in SIZES]
        assert by_size == sorted(by_size, reverse=True)
    assert choose(Job(shape=shape, method=method, length=2048), 24 * GB).fits


@pytest.mark.parametrize("shape", [QWEN, LLAMA], ids=["qwen", "llama"])
@pytest.mark.parametrize("method", METHODS)
def test_more_of_anything_never_needs_less(shape, method):
    job = Job(shape=shape, method=method, length=2048, micro_batch_tokens=8192)
    for base, checkpointing, offload in itertools.product(("bf16", "nf4"), (True, False), (True, False)):
        fixed = replace(job, base=base, checkpointing=checkpointing, offload=offload and checkpointing)
        for name, values in {
            "length": (256, 2048, 8192, 32768),
            "micro_batch_tokens": (1024, 8192, 8193, 65536),
            "lora_r": (1, 16, 256),
            "rollout_batch_size": (8, 16, 128),
        }.items():
            needs = [plan(replace(fixed, **{name: value})).needed for value in values]
            assert needs == sorted(needs), name
    assert plan(replace(job, offload=True)).needed < plan(job).needed or job.samples
    assert plan(job).total("inputs", "layer") < plan(replace(job, checkpointing=False)).total("inputs", "layer")


def test_settings_that_are_given_stay():
    fixed = Job(shape=QWEN, offload=True, micro_batch_tokens=5000)
    made = choose(fixed, 141 * GB, free=("base", "checkpointing"))
    assert (made.job.offload, made.job.tokens, made.job.checkpointing) == (True, 5000, True)
    assert {j.base for j in attempts(fixed, ("checkpointing",))} == {"bf16"}
    assert {j.base for j in attempts(fixed)} == {"bf16", "nf4"}


def test_micro_batches_are_no_larger_than_a_window():
    made = choose(Job(shape=QWEN, length=512, window_tokens=3000), 80 * GB)
    assert made.job.tokens == 3000
    assert made.job.one_micro_batch


def test_weights_that_were_counted_replace_those_of_the_shape():
    made = plan(Job(shape=QWEN), weights=[Part("all", 123.0, "always")])
    assert made.total("always") == 123.0


def counted(shape, share: float) -> list[Part]:
    """The parts of an adapter on a base that holds ``share`` of the weights that the shape says."""
    base = share * 2 * sum(shape.parameters().values())
    trained = shape.adapter_parameters(16)
    parts = [Part("frozen weights", base, "always"), Part("trained weights", 4 * trained, "always")]
    return [*parts, Part("gradients", 4 * trained, "gradients"), Part("adamw state", 8 * trained, "always")]


def test_advice_goes_by_the_weights_that_were_counted():
    """A base of twice the shape's size, 30 GB: on 30 GB neither shorter sequences nor the optimizer's state help."""
    job, free = Job(shape=QWEN, length=2048), ("checkpointing", "offload", "micro_batch_tokens")
    made = choose(job, 30 * GB, counted(QWEN, 2), free)
    assert made.changes == (
        "load_in_4bit: true, the frozen base in 4 bit (weights by the config's sizes, not counted)",
        "a GPU of 48 GB",
    )
    assert choose(job, 30 * GB, free=free).fits, "by the shape it would"
    # with a quarter of a GB of Adam's moments too much
    room = plan(replace(job, offload=True), weights=counted(QWEN, 2)).needed - 0.2 * GB
    made = choose(job, int(room), counted(QWEN, 2), free)
    assert "optim: adamw_8bit, two bytes of optimizer state a weight instead of eight" in made.changes
    assert choose(job, int(room) + GB, counted(QWEN, 2), free).fits


def test_advice_is_tried_before_it_is_given():
    made = choose(Job(shape=QWEN, method="sft", full=True), 80 * GB)
    assert not made.fits
    assert made.changes[0].startswith("use_peft: true")
    assert choose(Job(shape=QWEN, method="sft"), 80 * GB).fits
    long = choose(Job(shape=QWEN, method="dpo", length=32768), 24 * GB)
    advice = "; ".join(long.changes)
    assert "sequences of at most 16,384 tokens" in advice
    assert "a GPU of 48 GB" in advice
    assert choose(replace(long.job, length=16384), 24 * GB).fits
    assert choose(replace(long.job, length=32768), 48 * GB).fits
    stubborn = choose(Job(shape=QWEN, length=8192, checkpointing=False), 24 * GB, free=())
    assert any(change.startswith("leave it to the plan: micro_batch_tokens") for change in stubborn.changes)
    assert set(FREE) == {"base", "checkpointing", "offload", "micro_batch_tokens"}
