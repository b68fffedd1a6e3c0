"""Fused modules equal PEFT's and transformers' own, in every family, and what cannot be fused runs as it always did."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlhf_fast.data.batch import Example, TokenBatch
from rlhf_fast.models import Policy, fusion, load
from rlhf_fast.models.adapters import lora_config
from rlhf_fast.models.attention import Segments
from rlhf_fast.models.fusion import describe, fuse, unfuse

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# config, and the norms of a model: two a layer and a last one; queries and keys have their own in Qwen 3 and Gemma 3
FAMILIES = {
    "qwen2": (hf.Qwen2Config(**SIZES), 5),
    "qwen3": (hf.Qwen3Config(**SIZES), 9),
    "llama": (hf.LlamaConfig(**SIZES, mlp_bias=True, attention_bias=True), 5),
    "mistral": (hf.MistralConfig(**SIZES), 5),
    "gemma": (hf.GemmaConfig(**SIZES), 5),
    "gemma2": (hf.Gemma2Config(**SIZES), 9),
    "gemma3": (hf.Gemma3TextConfig(**SIZES), 13),
    "gpt2": (hf.GPT2Config(**GPT2), 0),
}


@pytest.fixture(autouse=True)
def nothing_told_yet(monkeypatch):
    monkeypatch.setattr(fusion, "_told", set())


@pytest.fixture
def make():
    """make(family) -> a model whose adapter "default" does something, for training, unfused."""

    def make(family="qwen2", dtype=torch.float32, **lora):
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(FAMILIES[family][0]).to(dtype).train()
        options = {"r": 4, "target_modules": "all-linear", "fan_in_fan_out": family == "gpt2"}
        peft = get_peft_model(model, LoraConfig(**options | lora, task_type="CAUSAL_LM"))
        return perturb(peft).base_model.model

    return make


def perturb(model: nn.Module) -> nn.Module:
    """Give every norm and every B entries of their own."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "norm" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
    return model


def outcome(model: nn.Module) -> dict[str, torch.Tensor]:
    """Logits, and the gradients of the embeddings that came in and of every parameter that has one."""
    model.zero_grad()
    ids = torch.arange(18).view(2, 9) * 7 % 64
    # of a size at which norms and activations are anything but linear
    inputs = (model.get_input_embeddings()(ids).detach() * 5).requires_grad_()
    logits = model(inputs_embeds=inputs, use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "inputs": inputs.grad, **grads}


def equal(got: dict, want: dict, tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, expected in want.items():
        assert (got[name] - expected).norm() <= tolerance * expected.norm(), name


def set_checkpointing(model: nn.Module) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_peft(make, family):
    """Outputs, every gradient and the input's, with and without checkpointing; everything that fits took our path."""
    model = make(family)
    want = outcome(model)
    report = fuse(model)
    norms = FAMILIES[family][1]
    if family == "gpt2":
        assert report.fused == {} and report.plain == {("LoRA layers", "the base is a Conv1D"): 8}
    else:
        assert report.fused == {"LoRA layers": 14, "MLPs": 2, "norms": norms} and not report.plain
    equal(outcome(model), want, 1e-6)
    set_checkpointing(model)
    equal(outcome(model), want, 1e-6)
    unfuse(model)
    assert describe(model).fused == {}


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_in_bfloat16_the_error_is_at_most_twice_that_of_peft(make, family):
    """bfloat16 base, float32 adapters; measured against the same weights in float64, gradient by gradient."""
    model = make(family, torch.bfloat16)
    exact = outcome(copy.deepcopy(model).double())
    theirs = outcome(model)
    fuse(model)
    ours = outcome(model)
    assert ours.keys() == exact.keys()
    adapters = [name for name in exact if "lora" in name]
    assert all(ours[name].dtype == torch.float32 for name in adapters)

    def error(found, names):
        return sum((found[name].double() - exact[name]).norm() / exact[name].norm() for name in names)

    for names in (["logits"], ["inputs"], adapters):
        assert error(ours, names) <= 2 * error(theirs, names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [LlamaRMSNorm, GemmaRMSNorm])
def test_norms_have_the_bits_of_transformers(cls, dtype):
    norm = cls(40, eps=1e-5).to(dtype)
    norm.weight.data.normal_()
    x = (torch.randn(3, 7, 40) * 3).to(dtype)
    want = norm(x)
    fuse(norm)
    assert hasattr(type(norm), "_unfused") and torch.equal(norm(x), want)


def test_a_pass_moves_the_adapter_that_is_active_and_the_base_runs_alone_bit_for_bit(model, tokenizer, examples):
    base = load(model, tokenizer=tokenizer)
    base.unfuse()
    batch = TokenBatch.pack(examples)
    want = base.logprobs(batch).detach()
    policy = load(model, tokenizer=tokenizer, peft_config=lora_config(r=4)).train()
    assert policy.fusion.fused == {"LoRA layers": 14, "MLPs": 2, "norms": 5} and not policy.fusion.plain
    policy.add_role("value", trainable=True, head=True)
    perturb(policy)
    want = policy.logprobs(batch, role="reference").detach()
    policy.unfuse()
    assert torch.equal(policy.logprobs(batch, role="reference"), want)
    policy.fused = True
    policy._fuse()
    for role, run in (("policy", policy.logprobs), ("value", policy.values)):
        policy.zero_grad()
        run(batch).sum().backward()
        moved = {n for n in policy.adapters.names for p in policy.adapters.parameters(n).values() if p.grad is not None}
        assert moved == {role}


def reasons(model: nn.Module) -> dict[str, int]:
    return {f"{kind}: {reason}": count for (kind, reason), count in describe(model).plain.items()}


def test_dropout_takes_pefts_path_while_it_drops_and_ours_otherwise(make, caplog):
    model = make(lora_dropout=0.3)
    fuse(model)
    assert reasons(model) == {"LoRA layers: the adapter has dropout": 14, "MLPs: the adapter has dropout": 2}
    torch.manual_seed(5)
    got = outcome(model)
    assert len([r for r in caplog.records if "dropout" in r.message]) == 2  # a line a kind, however many calls
    unfuse(model)
    torch.manual_seed(5)
    equal(got, outcome(model), 1e-6)
    fuse(model.eval())
    assert not describe(model).plain


def lora_layers(model):
    return [m for m in model.modules() if hasattr(m, "lora_A")]


CASES = {
    "dora": ({"use_dora": True}, None, "the adapter is a variant of LoRA (DoraLinearVariant)", 16),
    "adapter bias": ({"lora_bias": True}, None, "the adapter has a bias", 16),
    "trained base bias": ({"bias": "all"}, None, "the base is trained too", 6),
    "merged": ({}, lambda model: [m.merge() for m in lora_layers(model)], "an adapter is merged into the base", 16),
    "hook": (
        {},
        lambda model: model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None),
        "hooks are attached inside",
        1,
    ),
    "base hook": (
        {},
        lambda model: model.model.layers[0].mlp.up_proj.base_layer.register_forward_hook(lambda *_: None),
        "hooks are attached inside",
        2,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_we_do_not_compute_runs_as_it_always_did(make, case, caplog):
    lora, change, reason, count = CASES[case]
    model = make("qwen2", **lora)
    if change:
        change(model)
    want = outcome(model)
    with caplog.at_level(logging.WARNING):
        fuse(model)
    found = describe(model)
    assert {why for _, why in found.plain} == {reason} and sum(found.plain.values()) == count
    assert len(caplog.records) == len(found.plain) and reason in caplog.text
    equal(outcome(model), want, 1e-5)  # the norms are fused, and the bias of a key hardly has a gradient


def test_rank_stabilised_scaling_and_adapters_on_some_layers_only(make):
    """rsLoRA is a number; an MLP with an adapter on one of its layers keeps plain layers for the others."""
    model = make("llama", use_rslora=True, target_modules=["q_proj", "gate_proj"])
    want = outcome(model)
    assert fuse(model).fused == {"LoRA layers": 4, "MLPs": 2, "norms": 5}
    equal(outcome(model), want, 1e-6)
    attention_only = make("llama", target_modules=["q_proj"])
    assert fuse(attention_only).fused == {"LoRA layers": 2, "norms": 5}


def test_modules_that_only_look_like_ours_are_left_alone(make):
    """Another forward under the same name, another activation, a forward that somebody else put there."""
    model = make("qwen2")
    first, second = model.model.layers

    class Qwen2MLP(type(first.mlp)):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    first.mlp.__class__ = Qwen2MLP
    second.mlp.act_fn = nn.GELU()
    model.model.norm.forward = model.model.norm.forward
    want = outcome(model)
    fuse(model)
    assert reasons(model) == {
        "MLPs: the forward of Qwen2MLP is not the one of Llama and its relatives": 1,
        "MLPs: its activation is GELU, not silu or gelu by tanh": 1,
        "norms: its forward was replaced by somebody else": 1,
    }
    equal(outcome(model), want, 1e-6)


def test_several_active_adapters_run_as_they_always_did(make):
    model = make("qwen2")
    perturb(inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "up_proj"]), model, "second"))
    for layer in lora_layers(model):
        layer._active_adapter = ["default", "second"]
    want = outcome(model)
    fuse(model)
    assert {reason for _, reason in describe(model).plain} == {"several adapters are active at once"}
    assert not describe(model).fused.keys() & {"LoRA layers", "MLPs"}
    equal(outcome(model), want, 1e-6)


def test_installing_and_removing_leaves_no_trace(make):
    model = make("gemma2")
    before = {name: (type(m), dict(vars(m))) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    fuse(model)
    fuse(model)
    assert list(model.state_dict()) == keys
    assert all(isinstance(m, before[name][0]) for name, m in model.named_modules())
    assert all(type(m).__name__ == before[name][0].__name__ for name, m in model.named_modules())
    unfuse(model)
    after = {name: (type(m), dict(vars(m))) for name, m in model.named_modules()}
    assert all(before[n][0] is after[n][0] and before[n][1].keys() == after[n][1].keys() for n in before)


def test_copies_and_pickles_are_fused_and_compute_with_their_own_weights(make):
    model = make("qwen2")
    fuse(model)
    want = outcome(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.model.layers[0].mlp))):
        assert describe(twin).fused.keys() >= {"LoRA layers", "MLPs"}
    twin = copy.deepcopy(model)
    equal(outcome(twin), want, 0)
    for parameter in twin.parameters():
        parameter.data.mul_(1.1)
    assert (outcome(twin)["logits"] - want["logits"]).norm() > 0.01 * want["logits"].norm()
    equal(outcome(model), want, 0)


def test_merging_generating_and_full_fine_tuning_work_on_a_fused_model(model, tokenizer, examples, tmp_path):
    batch = TokenBatch.pack(examples)
    policy = load(model, tokenizer=tokenizer, peft_config=lora_config(r=4))
    perturb(policy)
    want = policy.logprobs(batch).detach()
    policy.export(tmp_path / "merged")
    torch.testing.assert_close(load(tmp_path / "merged").logprobs(batch).detach(), want, rtol=0, atol=1e-5)
    ids = torch.tensor([[5, 6, 7]])
    tokens = []
    for _ in range(2):
        with policy.generation_model() as ready:
            tokens.append(ready.generate(ids, max_new_tokens=8, do_sample=False))
        policy.unfuse()
    assert torch.equal(*tokens)
    whole = load(tmp_path / "merged")
    assert whole.fusion.fused == {"norms": 5}
    whole.add_reference()
    whole.logprobs(batch).sum().backward()
    assert all(p.grad is not None for name, p in whole.model.named_parameters() if "norm" in name)
    assert torch.equal(whole.logprobs(batch, role="reference"), whole.logprobs(batch))


def test_layers_wrapped_later_are_fused_too(model, tokenizer):
    policy = load(model, tokenizer=tokenizer, peft_config=lora_config(r=4, target_modules=["q_proj"]))
    assert policy.fusion.fused == {"LoRA layers": 2, "norms": 5}
    policy.adapters.add("value", lora_config(r=4))
    assert policy.fusion.fused == {"LoRA layers": 14, "MLPs": 2, "norms": 5}
    policy.adapters.use("policy")  # which has no adapter on most of them: their base runs alone
    assert not policy.fusion.plain


# ---- 4-bit bases


@pytest.fixture
def four_bit(tmp_path):
    """four_bit(family, dtype) -> a model like make's, on an NF4 base that computes in ``dtype``."""
    pytest.importorskip("bitsandbytes")

    def make(family, dtype):
        torch.manual_seed(0)
        wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # bitsandbytes packs blocks of 64
        config = type(FAMILIES[family][0])(**SIZES | wide)
        hf.AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(tmp_path)
        nf4 = hf.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
        )
        model = hf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4, dtype=dtype)
        for layer in model.modules():  # see models/adapters.py: no other layout for passes in eval mode
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.support_avx512bf16_for_cpu = False
        options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        return perturb(get_peft_model(model.requires_grad_(False), LoraConfig(**options))).base_model.model.train()

    return make


@pytest.mark.parametrize("family", ["qwen2", "gemma"])
def test_a_4_bit_base_equals_peft_and_is_never_kept_expanded(four_bit, family):
    model = four_bit(family, torch.float32)
    want = outcome(model)
    assert fuse(model).fused == {"LoRA layers": 14, "MLPs": 2, "norms": 5} and not describe(model).plain
    equal(outcome(model), want, 2e-6)  # bitsandbytes multiplies in an order of its own
    set_checkpointing(model)
    equal(outcome(model), want, 2e-6)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        model.model.layers[0].mlp(torch.randn(3, 64, requires_grad=True))
    assert (128, 64) not in kept and (64, 128) not in kept
    # with the adapters off its base runs as bitsandbytes runs it
    for layer in lora_layers(model):
        layer._disable_adapters = True
    ids = torch.arange(9)[None]
    fused = model(ids, use_cache=False).logits
    unfuse(model)
    assert torch.equal(model(ids, use_cache=False).logits, fused)


def test_a_4_bit_base_that_computes_in_another_type_runs_as_it_always_did(four_bit, caplog):
    model = four_bit("qwen2", torch.float32)
    for layer in lora_layers(model):
        layer.base_layer.compute_dtype = torch.bfloat16
    want = outcome(model)
    fuse(model)
    equal(outcome(model), want, 1e-6)
    assert "the 4-bit base computes in torch.bfloat16, its input is torch.float32" in caplog.text


# ---- memory

ONE_LAYER = {"vocab_size": 8, "num_hidden_layers": 1}
SHAPES = {
    "Qwen2.5-7B": hf.Qwen2Config(
        **ONE_LAYER, hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4
    ),
    "Llama-3.1-8B": hf.LlamaConfig(
        **ONE_LAYER, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8
    ),
}
LENGTHS = (20, 12)


def saved_bytes(layer: nn.Module, inputs: dict, free: set[int]) -> int:
    """Bytes of all storages that a pass through ``layer`` keeps for its backward pass, each counted once."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in free:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = layer(**inputs)
    assert out.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(("shape", "limit"), [("Qwen2.5-7B", 112), ("Llama-3.1-8B", 101)])
def test_activations_kept_per_token_and_layer(shape, limit, tokenizer):
    """KiB, in bfloat16 with float32 adapters, packed attention and nothing recomputed but norms and activations.

    By hand for Qwen (D = 7 KiB, keys or values 1, F = 37): the layer's input, queries, keys and values after rotation, the
    attention's result as it leaves and as packed, the second norm's input, gate and up: 5 x 7 + 2 x 1 + 2 x 37 = 111.
    """
    config = SHAPES[shape]
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
    policy = Policy(model, tokenizer)
    policy.adapters.add("policy", lora_config(r=16))
    policy.train()
    assert {p.dtype for p in policy.adapters.parameters("policy").values()} == {torch.float32}
    batch = TokenBatch.pack([Example([2] * n, [True] * n) for n in LENGTHS])
    hidden = torch.randn(1, sum(LENGTHS), config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    rotation = model.model.rotary_emb(hidden, batch.position_ids[None])  # every layer's, once
    free = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *rotation)}
    inputs = {"hidden_states": hidden, "position_embeddings": rotation, "attention_mask": None}
    inputs["segments"] = Segments.of(batch)
    per_token = 1024 * sum(LENGTHS)
    ours = saved_bytes(model.model.layers[0], inputs, free) / per_token
    policy.unfuse()
    theirs = saved_bytes(model.model.layers[0], inputs, free) / per_token
    print(f"{shape}: {ours:.1f} KiB per token and layer, {theirs:.1f} with PEFT")
    assert ours <= limit <= 120
    assert theirs > 280
