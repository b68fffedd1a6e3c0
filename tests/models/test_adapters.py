"""One base, many adapters: a pass touches its own adapter only, and a switch never corrupts a waiting backward."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast.data.batch import TokenBatch
from rlhf_fast.models import load
from rlhf_fast.models.adapters import lora_config


@pytest.fixture
def policy(model, tokenizer):
    policy = load(model, tokenizer=tokenizer, peft_config=lora_config(r=4)).train()
    policy.add_role("value", trainable=True, head=True)
    torch.manual_seed(3)
    for name in ("policy", "value"):
        for parameter in policy.adapters.parameters(name).values():
            parameter.data.normal_(0, 0.05)
    return policy


def grad_norms(policy):
    return {
        name: sum(float(p.grad.norm()) for p in policy.adapters.parameters(name).values() if p.grad is not None)
        for name in policy.adapters.names
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_pass_moves_its_own_adapter_only(policy, examples, checkpointing):
    if checkpointing:
        policy.checkpoint_activations()
    batch = TokenBatch.pack(examples)
    policy.logprobs(batch).sum().backward()
    norms = grad_norms(policy)
    assert norms["policy"] > 0 and norms["value"] == 0
    policy.zero_grad()
    policy.values(batch).sum().backward()
    norms = grad_norms(policy)
    assert norms["policy"] == 0 and norms["value"] > 0


def test_checkpointed_gradients_equal_plain_ones(policy, examples):
    batch = TokenBatch.pack(examples)
    policy.logprobs(batch).sum().backward()
    plain = {n: p.grad.clone() for n, p in policy.adapters.parameters("policy").items()}
    policy.zero_grad()
    policy.checkpoint_activations()
    policy.logprobs(batch).sum().backward()
    for name, parameter in policy.adapters.parameters("policy").items():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-5, atol=1e-6)


def test_a_switch_is_refused_while_a_graph_waits_and_allowed_once_it_ran_or_was_dropped(policy, examples):
    batch = TokenBatch.pack(examples)
    waiting = policy.logprobs(batch)
    with pytest.raises(RuntimeError, match="graph built under policy has not been backpropagated"):
        policy.values(batch)
    with pytest.raises(RuntimeError, match="cannot switch"), torch.no_grad():
        policy.logprobs(batch, role="reference")
    waiting.sum().backward()
    dropped = policy.values(batch)
    del dropped
    policy.logprobs(batch)


def test_the_reference_of_a_fresh_adapter_is_the_base_bit_for_bit(model, tokenizer, examples):
    batch = TokenBatch.pack(examples)
    want = load(model, tokenizer=tokenizer).logprobs(batch).detach()
    policy = load(model, tokenizer=tokenizer, peft_config=lora_config(r=4))
    policy.add_reference()
    assert policy.adapters.names == ["policy"]
    assert torch.equal(policy.logprobs(batch).detach(), want)  # a fresh adapter changes nothing
    for parameter in policy.adapters.parameters("policy").values():
        parameter.data.normal_(0, 0.05)
    assert torch.equal(policy.logprobs(batch, role="reference"), want)
    assert not torch.equal(policy.logprobs(batch), want)


def test_the_reference_of_a_continued_adapter_is_that_adapter_frozen(model, tokenizer, examples, tmp_path):
    batch = TokenBatch.pack(examples)
    load(model, tokenizer=tokenizer).save(tmp_path / "base")
    trained = load(tmp_path / "base", peft_config=lora_config(r=4))
    for parameter in trained.adapters.parameters("policy").values():
        parameter.data.normal_(0, 0.05)
    trained.save(tmp_path / "sft")
    policy = load(tmp_path / "sft")
    policy.add_reference()
    start = policy.logprobs(batch).detach()
    for parameter in policy.adapters.parameters("policy").values():
        parameter.data.add_(0.05)
    assert torch.equal(policy.logprobs(batch, role="reference"), start)
    assert not torch.equal(policy.logprobs(batch), start)
    assert not any(p.requires_grad for p in policy.adapters.parameters("reference").values())


def test_full_fine_tuning_keeps_a_frozen_copy_as_reference(model, tokenizer, examples):
    batch = TokenBatch.pack(examples)
    policy = load(model, tokenizer=tokenizer)
    start = policy.logprobs(batch).detach()
    policy.add_reference()
    for parameter in policy.model.parameters():
        parameter.data.mul_(1.1)
    assert torch.equal(policy.logprobs(batch, role="reference"), start)
    assert not any(p.requires_grad for p in policy.copies["reference"].parameters())
