"""What a run holds: bytes as autograd and the kernels keep them, sums as worked by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from rlhf_fast.kernels.linear_logprobs import chunked
from rlhf_fast.run import memory
from rlhf_fast.run.memory import GB, Job, find_shape, parts, plan

LENGTHS = (2048, 8192, 32768)
QWEN, LLAMA = find_shape("Qwen2.5-7B"), find_shape("Llama-3.1-8B")


def test_the_chunk_of_logits_is_the_kernels_own():
    assert parts.HEAD_CHUNK_BYTES == chunked._CUDA_CHUNK_BYTES
    assert (parts.CPU_HEAD_CHUNK_BYTES, parts.CPU_HEAD_MIN_ROWS) == (chunked._CPU_CHUNK_BYTES, chunked._CPU_MIN_ROWS)
    for tokens, vocab in itertools.product((1, 100, 5000), (50, 5000, 152064)):
        hidden = torch.empty(tokens, 8, device="meta")
        weight = torch.empty(vocab, 8, device="meta")
        hidden.__class__ = weight.__class__ = torch.Tensor
        assert memory.head_rows(tokens, vocab, "cpu") == chunked.choose_chunk_size(hidden, weight)
        limit = chunked._CUDA_CHUNK_BYTES // (vocab * 6)
        chosen = [chunked.fill_processors(tokens, limit, 3584, processors) for processors in (108, 132, 142)]
        assert max(chosen) <= memory.head_rows(tokens, vocab)


def test_weights_and_states_are_those_worked_by_hand():
    """Base in bf16 and in 4 bit, an adapter of rank 16 with gradients and Adam, keys and values, layers' inputs."""
    for shape, bf16, nf4, kv, inputs in (
        (QWEN, 15.2, 5.5, 56, (0.4, 1.6, 6.6)),
        (LLAMA, 16.1, 5.7, 128, (0.5, 2.1, 8.6)),
    ):
        for base, size in (("bf16", bf16), ("nf4", nf4)):
            frozen = [p for p in memory.resident(Job(shape=shape, base=base)) if "adapter" not in p.name]
            assert sum(p.bytes for p in frozen) / GB == pytest.approx(size, abs=0.1)
        trained = [p for p in memory.resident(Job(shape=shape)) if "adapter" in p.name]
        assert sum(p.bytes for p in trained) / GB == pytest.approx(0.66, abs=0.02)
        assert memory.kv_per_token(Job(shape=shape)) == kv * 1024
        for length, size in zip(LENGTHS, inputs):
            parts = memory.passes(Job(shape=shape, length=length))
            assert sum(p.bytes for p in parts if p.when == "inputs") / GB == pytest.approx(size, abs=0.06)


@pytest.mark.parametrize(
    ("settings", "peaks"),
    [
        ({"base": "bf16"}, (19, 21, 31)),
        ({"base": "nf4"}, (9, 11, 22)),
        ({"base": "bf16", "offload": True}, (None, None, 25)),
        ({"base": "nf4", "offload": True}, (None, None, 15)),
    ],
)
def test_the_peaks_of_supervised_fine_tuning_are_those_estimated_by_hand(settings, peaks):
    """Qwen2.5-7B. Estimated to a GB, with and without what tensors do not account for: the plan has both."""
    for length, peak in zip(LENGTHS, peaks):
        made = plan(Job(shape=QWEN, length=length, **settings))
        assert peak is None or made.tensors / GB - 0.5 <= peak <= made.needed / GB + 0.5


def test_ppo_adds_a_critic_and_a_frozen_reward_adapter():
    """0.8 GB at most, not three more models."""
    more = [sum(p.bytes for p in memory.resident(Job(shape=QWEN, method=m))) for m in ("ppo", "sft")]
    assert 0.7 * GB < more[0] - more[1] < 0.85 * GB


HEAD = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


def test_an_adapter_on_the_head_is_weights_state_gradient_and_rows_that_are_kept():
    """Rank 16: 16 (3,584 + 152,064) = 2,490,368 numbers. Rows of 152,064 16-bit numbers, up to 1/32 of the device."""
    plain, headed = (Job(shape=QWEN, lora_targets=targets) for targets in ("all-linear", HEAD))
    for when, width in (("always", 4 + 8), ("gradients", 4)):
        sums = [sum(p.bytes for p in memory.resident(job) if p.when == when) for job in (headed, plain)]
        assert sums[0] - sums[1] == width * 2_490_368
    for tokens, kept in ((2048, 2048 * 152_064 * 2), (16384, 80 * GB / 32)):
        more = [plan(replace(job, length=tokens), 80 * GB).total("head") for job in (headed, plain)]
        assert more[0] - more[1] == kept + 2 * tokens * 16 * 4
    frozen = [
        sum(p.bytes for p in memory.resident(replace(j, method="ppo")) if "frozen a" in p.name) for j in (headed, plain)
    ]
    assert frozen[0] - frozen[1] == 4 * 2_490_368


def test_a_4bit_layer_is_expanded_to_be_multiplied_with():
    """18,944 x 3,584 numbers of 16 bit. On a few tokens that and two gradients; on many, three gradients are more."""
    parts = {}
    for base, tokens in (("bf16", 128), ("nf4", 128), ("nf4", 8192)):
        (inner,) = [p.bytes for p in memory.passes(Job(shape=QWEN, base=base, length=tokens)) if "MLP" in p.name]
        parts[base, tokens] = inner / (2 * 18_944)
    assert parts == {("bf16", 128): 3 * 128, ("nf4", 128): 3584 + 2 * 128, ("nf4", 8192): 3 * 8192}
    weights = [p for p in memory.rollout(Job(shape=QWEN, base="nf4"), 8) if "multiply with" in p.name]
    assert [p.bytes for p in weights] == [2 * 18_944 * 3584] * 2


def test_offloading_says_what_it_takes_of_the_host():
    """28 inputs of 8,192 x 3,584 16-bit numbers, 58.7 MB each in a buffer of 2^26; none of it is the GPU's."""
    job = Job(shape=QWEN, length=8192, micro_batch_tokens=8192)
    kept, offloaded = plan(job), plan(replace(job, offload=True))
    assert (kept.host, offloaded.host) == (0, 28 * 2**26)
    assert kept.total("inputs") - offloaded.total("inputs") == 25 * 8192 * 3584 * 2
    assert "1.9 GB of host memory" in offloaded.line()
    assert memory.as_dict(offloaded)["host"] == 28 * 2**26
