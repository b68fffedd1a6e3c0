"""Checkpointed layers whose inputs wait in host memory compute what they compute without, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_fast.data.batch import TokenBatch
from rlhf_fast.models import Policy
from rlhf_fast.models.adapters import lora_config
from rlhf_fast.models.checkpointing import HostInputs

LAYERS, WIDTH = 2, 32  # of the model in conftest.py


@pytest.fixture
def gpt2():
    torch.manual_seed(0)
    sizes = {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": 4, "n_positions": 64, "vocab_size": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))


@pytest.fixture
def make(model, gpt2, tokenizer):
    """make(name, offload) -> a policy in training mode; the same weights every time. ``offload`` None keeps everything."""

    def build(name: str, offload: bool | None) -> Policy:
        policy = Policy(copy.deepcopy(gpt2 if name == "gpt2" else model), tokenizer)
        if name == "lora":
            policy.model.requires_grad_(False)
            policy.adapters.add("policy", lora_config(r=2, alpha=4))
            with torch.no_grad():
                for i, p in enumerate(policy.adapters.parameters("policy").values()):
                    p.normal_(std=0.1, generator=torch.Generator().manual_seed(i))
        if offload is not None:
            policy.checkpoint_activations(offload=offload)
        return policy.train()

    return build


def gradients(policy, batch):
    torch.manual_seed(3)  # of GPT-2's dropout
    policy.logprobs(batch).sum().backward()
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["full", "lora", "gpt2"])
def test_gradients_are_the_same_bits_with_inputs_on_the_host(name, make, examples):
    batch = TokenBatch.pack(examples)
    kept, plain, offloaded = (gradients(make(name, offload), batch) for offload in (None, False, True))
    assert plain.keys() == offloaded.keys() == kept.keys()
    assert len(plain) > 4
    for key, gradient in plain.items():
        assert torch.equal(offloaded[key], gradient), key
        torch.testing.assert_close(kept[key], gradient, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["full", "lora", "gpt2"])
def test_the_inputs_of_the_layers_move_and_nothing_else(name, make, examples):
    policy, batch = make(name, offload=True), TokenBatch.pack(examples)
    one = LAYERS * batch.input_ids.numel() * WIDTH * 4
    for passes in (1, 2, 3):
        gradients(policy, batch)
        assert policy.host_inputs.moved_bytes == passes * one
        assert policy.host_inputs.total_bytes == one, "buffers are reused"
        assert sum(b.numel() for b in policy.host_inputs.free) == one, "and all free again"


def test_smaller_micro_batches_find_the_buffers_of_larger_ones(make, examples):
    policy = make("full", offload=True)
    for part in (examples, examples[1:4], examples[2:3], examples[:2]):
        gradients(policy, TokenBatch.pack(part))
    assert policy.host_inputs.total_bytes == LAYERS * sum(map(len, examples)) * WIDTH * 4
    assert len(policy.host_inputs.free) == LAYERS


def test_growing_micro_batches_replace_the_buffers_that_became_too_small(make, examples):
    policy = make("full", offload=True)
    for count in (1, 3, 5):
        gradients(policy, TokenBatch.pack(examples[:count]))
    assert policy.host_inputs.total_bytes == LAYERS * sum(map(len, examples)) * WIDTH * 4
    assert len(policy.host_inputs.free) == LAYERS


def test_an_input_comes_back_one_layer_ahead_and_once():
    """Four layers: while the fourth is recomputed the third's input is on its way, and so on; never three on the device."""
    store, fetched, on_device = HostInputs(), [], []
    fetch = store._fetch

    def counted(kept):
        fetched.append(kept.number)
        fetch(kept)
        on_device.append(sum(k.returning is not None for k in inputs))

    store._fetch = counted
    inputs = []
    for number in range(4):
        inputs.append(store.put(torch.full((3,), float(number))))
        inputs[-1].number = number
    for number in (3, 2, 1, 0):
        assert torch.equal(store.get(inputs[number]), torch.full((3,), float(number)))
        assert fetched == [[3, 2], [3, 2, 1], [3, 2, 1, 0], [3, 2, 1, 0]][3 - number]
    assert max(on_device) == 1, "besides the one in use"


def test_a_graph_that_is_dropped_gives_its_buffers_back(make, examples):
    policy, batch = make("lora", offload=True), TokenBatch.pack(examples)
    loss = policy.logprobs(batch).sum()
    assert policy.host_inputs.free == []
    del loss
    assert len(policy.host_inputs.free) == LAYERS


def test_two_graphs_may_be_alive_at_once_and_go_backward_in_any_order(make, examples):
    parts = [TokenBatch.pack(examples[:2]), TokenBatch.pack(examples[2:])]
    grads = []
    for offload in (False, True):
        policy = make("full", offload)
        losses = [policy.logprobs(part).sum() for part in parts]
        for loss in losses:  # the first graph first: not the order in which the inputs left
            loss.backward()
        grads.append([p.grad for p in policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_a_pass_without_gradients_moves_nothing(make, examples):
    policy = make("full", offload=True)
    with torch.no_grad():
        policy.logprobs(TokenBatch.pack(examples))
    policy.eval()
    policy.logprobs(TokenBatch.pack(examples))  # transformers checkpoints in training mode only
    assert policy.host_inputs.moved_bytes == 0


def test_the_device_forgets_an_input_once_its_copy_is_made():
    """Without the store three inputs are alive after the forward pass; with it only the one that the caller holds."""
    alive = []
    for store in (None, HostInputs()):
        run = torch.utils.checkpoint.checkpoint if store is None else store.checkpoint
        x, storages = torch.ones(4, requires_grad=True), []
        for _ in range(3):
            x = x * 2
            storages.append(StorageWeakRef(x.untyped_storage()))
            x = run(torch.sin, x, use_reentrant=False)
        alive.append(sum(not s.expired() for s in storages))
    assert alive == [3, 0]
