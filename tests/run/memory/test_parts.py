"""What a run holds: bytes as autograd and the kernels keep them, sums as worked by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_fast.data.batch import Example, TokenBatch
from rlhf_fast.kernels.linear_logprobs import chunked
from rlhf_fast.models import Policy
from rlhf_fast.models.adapters import lora_config
from rlhf_fast.run import memory
from rlhf_fast.run.memory import GB, Job, Shape, find_shape, parts, plan

LENGTHS = (2048, 8192, 32768)
QWEN, LLAMA = find_shape("Qwen2.5-7B"), find_shape("Llama-3.1-8B")


def kept_by_autograd(config_of, dtype, *, lora: bool, fused: bool) -> float:
    """Bytes per token and layer that autograd saves besides the layer's input: a model of three layers less one of two."""
    totals = []
    for layers in (2, 3):
        shape = Shape("", 256, 704, layers, 4, 1, 48, 128, False, memory.ARCHITECTURES["qwen2"])
        policy = Policy(AutoModelForCausalLM.from_config(config_of("qwen2", shape)).to(dtype), None)
        if not fused:
            policy.unfuse()
        if lora:
            policy.model.requires_grad_(False)
            policy.adapters.add("policy", lora_config(8))
        seen, parameters = {}, {p.untyped_storage().data_ptr() for p in policy.parameters()}

        def pack(x, seen=seen, parameters=parameters):
            if x.untyped_storage().data_ptr() not in parameters:
                seen[x.untyped_storage().data_ptr()] = x  # held, so that no address comes twice
            return x

        batch = TokenBatch.pack([Example(list(range(128)), [False] + [True] * 127)] * 2)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            hidden = policy.train().hidden(batch, "policy")
        totals.append(sum(x.untyped_storage().nbytes() for x in seen.values()) / 256)
        del hidden
    return totals[1] - totals[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernels", ["fused", "peft", "all weights", "all weights, fused norms"])
def test_saved_bytes_are_those_that_autograd_keeps_of_a_layer(dtype, kernels, config_of):
    if kernels.startswith("all weights") and dtype == torch.bfloat16:
        pytest.skip("16-bit weights are not trained; under autocast linears keep casts")
    lora, fused = not kernels.startswith("all weights"), "fused" in kernels
    shape = Shape("", 256, 704, 2, 4, 1, 48, 128, False, memory.ARCHITECTURES["qwen2"])
    base = "fp32" if dtype == torch.float32 else "bf16"
    job = Job(shape=shape, full=not lora, base=base, lora_r=8, kernels="fused" if fused else "peft", device="cpu")
    made = plan(replace(job, length=256, checkpointing=False))
    planned = made.total("inputs") / 256 / shape.layers
    assert planned == pytest.approx(kept_by_autograd(config_of, dtype, lora=lora, fused=fused), rel=0.02)


@pytest.mark.parametrize(("shape", "fused", "peft"), [(QWEN, 97, 314), (LLAMA, 84, 289)], ids=["qwen", "llama"])
def test_saved_bytes_of_a_7b_layer(shape, fused, peft):
    """KiB per token and layer on a GPU, besides the layer's input; PEFT's were measured on real layers."""
    for kernels, kib in (("fused", fused), ("peft", peft)):
        assert sum(memory.saved_per_token(Job(shape=shape, kernels=kernels)).values()) / 1024 == pytest.approx(
            kib, abs=0.6
        )


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
