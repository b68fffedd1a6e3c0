"""The cap of an engine that was given none: what is free, in tokens, and what that does to requests."""

from __future__ import annotations

import logging
import multiprocessing

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench import host
from rlhf_fast.errors import UserError
from rlhf_fast.models import load
from rlhf_fast.rollout import Request, SlotEngine, budget

# of the tiny model: 2 layers of 2 heads of 8 numbers, keys and values, in float32
TOKEN = 2 * 2 * 2 * 8 * 4
# 4 slots: 28 bytes of each of 47 words to draw a token, less than a pass of 64 prompt tokens; and 4 of logits
BESIDE = 64 * 4 * (3 * 48 + 6 * 32) + 4 * 47 * 4


def engine_with(policy, monkeypatch, tokens, **options):
    """An engine on a machine whose free memory holds exactly so many tokens; a layer of two is there twice while it grows."""
    free = 2 * (BESIDE + int(tokens * TOKEN * 1.5))
    monkeypatch.setattr(budget, "host_free", lambda: free)
    return SlotEngine(policy, slots=4, prefill_tokens=64, **options)


def test_half_of_the_free_host_memory_is_the_cap_in_tokens(policy, monkeypatch, caplog):
    engine = engine_with(policy, monkeypatch, 1000)
    with caplog.at_level(logging.INFO, "rlhf_fast.rollout"):
        for _ in range(2):
            with engine.session() as session:
                assert session.limit == 1000
    (line,) = [r.message for r in caplog.records]
    assert "at most 1,000 tokens (0.25 KiB each)" in line and "50% of the" in line and "free in host memory" in line
    with engine_with(policy, monkeypatch, 1000, max_tokens=7).session() as session:
        assert session.limit == 7


def test_a_request_that_the_free_memory_cannot_hold_is_refused_and_others_take_turns(policy, monkeypatch):
    requests = [Request([5 + i, 6], n=2, max_new_tokens=20, seed=i) for i in range(3)]
    engine = engine_with(policy, monkeypatch, 50)
    groups, others = engine.generate(requests), SlotEngine(policy, max_tokens=1000).generate(requests)
    assert [[s.ids for s in group] for group in groups] == [[s.ids for s in group] for group in others]
    assert engine.cache.rows * engine.cache.length <= 50
    with pytest.raises(UserError, match="up to 47 new ones, and the cache has room for 50"):
        engine_with(policy, monkeypatch, 50).generate([Request([5, 6], max_new_tokens=47)])
    with pytest.raises(UserError, match=r"50% of the .* hold no token's keys and values"):
        engine_with(policy, monkeypatch, -1).generate(requests)


def test_what_an_earlier_session_left_counts_as_free(policy, monkeypatch):
    engine = engine_with(policy, monkeypatch, 1000)
    engine.generate([Request([5, 6], n=4, max_new_tokens=30, seed=1)])
    assert engine.cache.nbytes
    with engine.session() as session:
        assert session.limit == pytest.approx(1000 + engine.cache.nbytes / 2 / (1.5 * TOKEN), abs=1)


def test_keys_and_values_are_counted_in_the_dtype_that_is_computed_with(policy, monkeypatch):
    engine = engine_with(policy, monkeypatch, 100_000)
    policy.compute_dtype = torch.bfloat16
    with engine.session() as session:
        assert session.limit == pytest.approx(200_000, rel=0.01)


def test_on_a_gpu_it_is_nine_tenths_of_what_nobody_uses(policy, monkeypatch):
    """10,000 free, and 700 that this process has cached and 300 that it uses."""
    monkeypatch.setattr(type(policy.model), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**8, 10**9))
    made = budget.default_budget(policy, 4, 64)
    assert made.free == 10**8 + 400 and made.share == 0.9
    graphs = 4 * 47 * 4  # leave their logits in a buffer of their own
    assert made.tokens == int((0.9 * (10**8 + 400) - BESIDE - graphs) / (1.5 * TOKEN))


def test_free_host_memory_is_the_kernels_number_within_the_control_groups_limit(tmp_path):
    assert budget.host_free(tmp_path) == 8 * 10**9  # a system that says nothing
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 900 kB\nMemAvailable:  500 kB\n")
    assert budget.host_free(tmp_path) == 500 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("1000\n")
    (group / "memory.max").write_text("max\n")
    assert budget.host_free(tmp_path) == 500 * 1024
    (group / "memory.max").write_text("5000\n")
    assert budget.host_free(tmp_path) == 4000
    (group / "memory").mkdir()
    (group / "memory/memory.limit_in_bytes").write_text("3000\n")
    (group / "memory/memory.usage_in_bytes").write_text("3500\n")
    assert budget.host_free(tmp_path) == 0


def measured(tokenizer, free: int) -> tuple[int, int, int]:
    """Of a process of its own: the cap in tokens, the rise of resident memory while far more is asked for, the samples written."""
    torch.set_num_threads(1)
    # 32 KiB of keys and values a token, and hardly anything to compute
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=8, head_dim=256, vocab_size=len(tokenizer)))
    policy = load(model, tokenizer=tokenizer)
    budget.host_free = lambda root=None: free
    engine = SlotEngine(policy, slots=32, prefill_tokens=64)
    # libraries are loaded, every buffer has been there once
    engine.generate([Request([5] * 20, n=16, max_new_tokens=3, seed=i) for i in range(3)])
    engine.sleep()
    requests = [Request([5] * 20, n=16, max_new_tokens=10 * i, stop_ids=(), seed=i) for i in range(1, 21)]
    host.forget_peak()
    before = host.memory()["VmRSS"]
    groups = engine.generate(requests)
    with engine.session() as session:
        return session.limit, host.memory()["VmHWM"] - before, sum(map(len, groups))


def test_the_cap_is_what_memory_is_measured_to_hold(tokenizer):
    """Half of 200 MB: 320 samples that would take 1.2 GB together are written within it, and most of it is put to use."""
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        tokens, rise, samples = fresh.apply(measured, (tokenizer, 200 * 10**6))
    assert samples == 320
    assert 1_500 < tokens < 100e6 / 32768
    assert 0.4 * 100e6 < rise <= 1.02 * 100e6
