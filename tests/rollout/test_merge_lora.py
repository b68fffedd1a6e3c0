"""Writing with the adapter merged into the base: the same tokens, and a base that comes back bit for bit."""

from __future__ import annotations

import logging

import pytest
import torch

from rlhf_fast.data.batch import Example, TokenBatch
from rlhf_fast.models import load
from rlhf_fast.models.adapters import is_lora, lora_config
from rlhf_fast.rollout import Request, SlotEngine
from rlhf_fast.rollout.budget import merging_fits

PROMPTS = [[5], [7, 9, 11], [30, 31, 32, 33, 34, 35, 36, 37, 38]]
GREEDY = [Request(p, max_new_tokens=16, temperature=0.0) for p in PROMPTS]
HEAD_TOO = ["q_proj", "v_proj", "down_proj", "lm_head"]


def stirred(policy):
    """Have every adapter change something."""
    draw = torch.Generator().manual_seed(3)
    for name in policy.adapters.names:
        for key, parameter in policy.adapters.parameters(name).items():
            if "lora_B" in key:
                parameter.data.normal_(0, 0.2, generator=draw)
    return policy


def on_disk(make_policy, folder, **options):
    """The qwen2 policy with its base read from ``folder``, as ``options`` of models.load say."""
    make_policy().save(folder)
    return load(folder, device="cpu", peft_config=lora_config(r=4, alpha=8), **options)


def held(policy):
    """What the policy holds: of every parameter itself, its memory, its version and a copy."""
    return [(p, p.data_ptr(), p._version, p.detach().clone()) for p in policy.parameters()]


def check_held(policy, before):
    for parameter, (same, address, version, copy) in zip(policy.parameters(), before, strict=True):
        assert parameter is same and (parameter.data_ptr(), parameter._version) == (address, version)
        assert torch.equal(parameter, copy)


def lora_calls(policy):
    """Counts the products with an adapter's matrices from now on, where layers are not fused."""
    calls = []
    for layer in filter(is_lora, policy.model.modules()):
        layer.lora_A["policy"].register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("target", ["all-linear", HEAD_TOO], ids=["all-linear", "head too"])
@pytest.mark.parametrize("architecture", ["qwen2", "llama", "phi3", "mistral"])
def test_merged_rollouts_are_the_unmerged_ones_and_the_weights_come_back(make_policy, architecture, target):
    """In float64, where the merged weight is as good as its parts, so that what is left is the rounding of a float32
    log-probability; windows, one linear for q, k and v, an adapter on the head. Phi-3's projections have names of their own."""
    target = ["qkv_proj", "lm_head"] if architecture == "phi3" and target != "all-linear" else target
    policy = stirred(make_policy(architecture, peft_config=lora_config(r=4, target_modules=target)))
    policy.model.double()
    sampled = [Request(p, n=3, max_new_tokens=12, temperature=0.8, seed=i) for i, p in enumerate(PROMPTS)]
    before = held(policy)
    plain, merged = SlotEngine(policy, slots=3), SlotEngine(policy, slots=3, merge_lora=True)
    for requests in (GREEDY, sampled):
        for group, others in zip(plain.generate(requests), merged.generate(requests), strict=True):
            assert [s.ids for s in group] == [s.ids for s in others]
            for one, other in zip(group, others):
                assert one.logprobs == pytest.approx(other.logprobs, abs=1e-6)
    check_held(policy, before)
    assert policy.adapters.active == "policy"


def test_inside_a_session_the_base_holds_the_product_and_no_adapter_runs(make_policy, tmp_path):
    """Each weight against W + scaling B A in float64; nothing is multiplied by A."""
    policy = stirred(on_disk(make_policy, tmp_path, dtype="bfloat16"))
    policy.unfuse()
    calls = lora_calls(policy)
    layers = [m for m in policy.model.modules() if is_lora(m)]
    exact = []
    for layer in layers:
        a, b = (x["policy"].weight.detach().double() for x in (layer.lora_A, layer.lora_B))
        exact.append(layer.get_base_layer().weight.detach().double() + 8 / 4 * b @ a)
    with SlotEngine(policy, merge_lora=True).session() as session:
        for layer, weight in zip(layers, exact, strict=True):
            merged = layer.get_base_layer().weight
            assert merged.dtype == torch.bfloat16
            # no farther away than the nearest bfloat16, but for float32's own error
            least = (weight.bfloat16().double() - weight).abs()
            assert ((merged.detach().double() - weight).abs() <= least + 1e-6).all()
        session.add(GREEDY[1])
        while not session.idle:
            session.step()
    assert not calls
    SlotEngine(policy).generate(GREEDY[:1])
    assert calls


def test_logprobs_inside_are_those_of_the_merged_weights_the_head_included(make_policy):
    policy = stirred(make_policy(peft_config=lora_config(r=4, target_modules=HEAD_TOO)))
    batch = TokenBatch.pack([Example(PROMPTS[2], [False] * 3 + [True] * 6)])
    with torch.no_grad():
        outside = policy.logprobs(batch)
        with policy.generation_model(merge_lora=True):
            torch.testing.assert_close(policy.logprobs(batch), outside, atol=1e-5, rtol=0)


@pytest.mark.parametrize("where", ["in the session", "while merging"])
def test_weights_come_back_after_an_exception(make_policy, where, monkeypatch):
    policy = stirred(make_policy(peft_config=lora_config(r=4)))
    engine, before = SlotEngine(policy, merge_lora=True), held(policy)
    want = SlotEngine(policy).generate(GREEDY)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        if where == "while merging":
            last = [m for m in policy.model.modules() if is_lora(m)][-1]
            patch.setattr(last, "get_delta_weight", lambda name: 1 / 0)
        with engine.session() as session:
            session.add(GREEDY[0])
            session.step()
            raise ZeroDivisionError
    check_held(policy, before)
    assert SlotEngine(policy).generate(GREEDY) == want
    assert [s[0].ids for s in engine.generate(GREEDY)] == [s[0].ids for s in want]


def test_a_graph_built_before_is_backpropagated_as_if_nothing_had_happened(make_policy):
    policy = stirred(make_policy(peft_config=lora_config(r=4)))
    batch = TokenBatch.pack([Example(PROMPTS[2], [False] * 3 + [True] * 6)])
    grads = []
    for between in (lambda: None, lambda: SlotEngine(policy, merge_lora=True).generate(GREEDY)):
        loss = policy.logprobs(batch).sum()
        between()
        policy.zero_grad()
        loss.backward()
        grads.append([p.grad.clone() for p in policy.adapters.parameters("policy").values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_no_other_adapter_runs_on_a_base_that_holds_one(make_policy, tmp_path):
    policy = stirred(make_policy(peft_config=lora_config(r=4)))
    policy.add_role("value", trainable=True)
    policy.adapters.use("policy")
    policy.adapters.save("policy", tmp_path)
    batch, adapters = TokenBatch.pack([Example([5, 6], [False, True])]), policy.adapters
    for act in (
        lambda: policy.logprobs(batch, role="reference"),
        lambda: adapters.use("value"),
        lambda: adapters.add("more", lora_config(r=4)),
        lambda: adapters.load("more", tmp_path),
        lambda: adapters.remove("value"),
        lambda: adapters.merged("policy"),
        lambda: adapters.aside().__enter__(),
        lambda: policy.generation_model(merge_lora=True).__enter__(),
    ):
        with (
            policy.generation_model(merge_lora=True),
            pytest.raises(RuntimeError, match="'policy' is merged into the base"),
        ):
            act()
    assert adapters.names == ["policy", "value"] and adapters.active == "policy"


def nf4(make_policy, folder):
    pytest.importorskip("bitsandbytes")
    return on_disk(make_policy, folder, load_in_4bit=True)


def tied_head(make_policy, folder):
    return make_policy("gemma", peft_config=lora_config(r=4, target_modules=["q_proj", "lm_head"]))


def dora(make_policy, folder):
    config = lora_config(r=4)
    config.use_dora = True
    return make_policy(peft_config=config)


REFUSED = {
    nf4: "the base has layers of the class Linear4bit",
    tied_head: "the adapter is on a layer that shares its weight with another",
    dora: "the adapter is a variant of LoRA",
    (lambda make_policy, folder: make_policy("gpt2", peft_config=lora_config(r=4))): "layers of the class Conv1D",
    (lambda make_policy, folder: make_policy()): "it has no adapter",
}


@pytest.mark.parametrize("make", REFUSED, ids=["nf4", "tied head", "dora", "conv1d", "no adapter"])
def test_what_cannot_be_merged_is_left_beside_the_base_and_one_line_says_why(make, make_policy, tmp_path, caplog):
    policy = stirred(make(make_policy, tmp_path))
    want = SlotEngine(policy, slots=3).generate(GREEDY)

    def said():
        return [r.message for r in caplog.records if r.name == "rlhf_fast.rollout.slots"]

    with caplog.at_level(logging.WARNING, "rlhf_fast.rollout"):
        SlotEngine(policy, slots=3, merge_lora=None).generate(GREEDY)
        assert not said()  # nobody asked for it
        engine = SlotEngine(policy, slots=3, merge_lora=True)
        assert engine.generate(GREEDY) == want == engine.generate(GREEDY)
    (line,) = said()
    assert "not merged" in line and REFUSED[make] in line


def test_left_to_itself_it_merges_on_a_gpu_with_room_only(make_policy, tmp_path, monkeypatch):
    """A GPU as a policy on the CPU sees it: its memory by the allocator's numbers. Keys and values of 1,000 tokens: 2 layers,
    2 heads of 8 numbers in 2 bytes, twice."""
    policy = on_disk(make_policy, tmp_path, dtype="bfloat16")
    assert not merging_fits(policy, "policy", 1000)
    copies = sum(m.get_base_layer().weight.numel() * 2 for m in policy.model.modules() if is_lora(m))
    needed = 2 * copies + 1000 * 2 * 2 * 2 * 8 * 2
    monkeypatch.setattr(type(policy.model), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    for free, fits in ((needed - 400, True), (needed - 401, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2 * needed))
        assert merging_fits(policy, "policy", 1000) is fits
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**12, 10**12))
    assert merging_fits(policy, "policy", 1000) and not merging_fits(policy, "policy", None)
    policy.model.float()
    assert not merging_fits(policy, "policy", 1000)
