"""What a run holds: bytes as autograd and the kernels keep them, sums as worked by hand."""

from __future__ import annotations

import itertools

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
