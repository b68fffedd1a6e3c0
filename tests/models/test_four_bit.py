"""A base in NF4: every family loads, adapters on it are exact, and what leaves it is in 16 bit or an adapter."""

from __future__ import annotations

import json
import logging
import sys

import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from rlhf_fast.data.batch import TokenBatch
from rlhf_fast.errors import UserError
from rlhf_fast.models import attach, load
from rlhf_fast.models.adapters import base_weight, is_4bit, lora_config
from rlhf_fast.models.fingerprint import difference, fingerprint
from rlhf_fast.models.load import weight_bytes

bitsandbytes = pytest.importorskip("bitsandbytes")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": 64,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "eos_token_id": 1,
    "bos_token_id": 0,
}
GPT2 |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
FAMILIES = {
    "Qwen2": SIZES,
    "Qwen3": {**SIZES, "head_dim": 16},
    "Llama": SIZES,
    "Mistral": SIZES,
    "Gemma": {**SIZES, "head_dim": 16},
    "Gemma2": {**SIZES, "head_dim": 16, "attn_logit_softcapping": None},
    "Gemma3Text": {**SIZES, "head_dim": 16},
    "GPT2": GPT2,
}
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def folder(tokenizer, tmp_path):
    """folder(family) -> a folder with a tiny model of the family and the tokenizer."""

    def make(family="Llama", name="base", seed=0):
        torch.manual_seed(seed)
        config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def perturb(policy, role="policy"):
    torch.manual_seed(5)
    for parameter in policy.adapters.parameters(role).values():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)


def trained(base, role="policy", **options):
    policy = load(base, peft_config=lora_config(r=4), role=role, load_in_4bit=True, **options)
    if role == "reward":
        policy.add_head("reward")
        policy.heads["reward"].bias.data.fill_(0.3)
    perturb(policy, role)
    return policy


# ---- loading


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_layers_are_packed_and_all_else_keeps_its_dtype(family, dtype, folder):
    """Embeddings, norms and head are in the compute dtype, not in fp32, and nothing is trainable."""
    policy = load(folder(family), load_in_4bit=True, dtype=dtype)
    head = policy.model.get_output_embeddings()
    packed = {n: m for n, m in policy.model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert len(packed) == {"GPT2": 8}.get(family, 14)
    assert not [
        n for n, m in policy.model.named_modules() if isinstance(m, nn.Linear) and n not in packed and m is not head
    ]
    for layer in packed.values():
        assert layer.weight.dtype == torch.uint8 and layer.weight.quant_state.nested
        assert layer.weight.quant_type == "nf4" and layer.compute_dtype == dtype
        assert layer.weight.numel() == layer.in_features * layer.out_features // 2
    others = {p.dtype for p in policy.model.parameters() if p.dtype != torch.uint8}
    assert others == {dtype} and type(head) is nn.Linear
    assert not any(p.requires_grad for p in policy.model.parameters())


@families
def test_its_passes_are_those_of_the_dequantized_model(family, folder, examples):
    """Against a plain model of the family, in fp64, whose weights are what NF4 stands for."""
    base = folder(family)
    policy = load(base, load_in_4bit=True)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    with torch.no_grad():
        for name, layer in policy.model.named_modules():
            if isinstance(layer, bitsandbytes.nn.Linear4bit):
                weight = base_weight(layer)()
                assert weight.shape == (layer.out_features, layer.in_features)
                plain.get_submodule(name).weight.copy_(weight.T if family == "GPT2" else weight)
    got = policy.logprobs(TokenBatch.pack(examples))
    want = load(plain, tokenizer=policy.tokenizer).logprobs(TokenBatch.pack(examples))
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=3e-6)


def test_loading_says_what_it_did(folder, caplog):
    caplog.set_level(logging.INFO, logger="rlhf_fast.models.load")
    base = folder()
    policy = load(base, load_in_4bit=True, dtype=torch.bfloat16)
    assert policy.loaded.startswith(
        f"loaded {base}: NF4, computing in bfloat16, embeddings, norms and head in bfloat16, "
    )
    assert policy.loaded in caplog.messages
    assert "fused experts" not in policy.loaded
    assert load(base).loaded.startswith(f"loaded {base}: float32, 0.00 GB on cpu in ")


def test_experts_that_cannot_be_packed_are_owned_up_to(tmp_path, tokenizer):
    """Fused experts are plain parameters to bitsandbytes: most of such a model stays as it was."""
    experts = {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16, "num_experts_per_tok": 2}
    model = AutoModelForCausalLM.from_config(transformers.Qwen3MoeConfig(**SIZES, **experts))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    report = load(tmp_path, load_in_4bit=True).loaded
    assert report.endswith("are in no linear layer (fused experts) and stay in float32")


def test_the_bytes_of_a_4bit_model_are_counted_with_their_scales(folder):
    model = load(folder(), load_in_4bit=True, dtype=torch.bfloat16).model
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    # half a byte an element, a byte per 64 elements, 4 per 256 blocks (at least one per layer)
    scales = linear // 64 + 14 * 4
    buffers = sum(b.nbytes for b in model.buffers())
    assert weight_bytes(model) - buffers == linear // 2 + scales + 2 * (2 * 64 * 64 + 5 * 64)


def test_without_bitsandbytes_or_where_it_cannot_the_error_says_what_to_do(folder, monkeypatch):
    base = folder()
    with pytest.raises(UserError, match="load_in_4bit: bitsandbytes .* has no NF4 of torch.float64 on cpu"):
        load(base, load_in_4bit=True, dtype=torch.float64)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"load_in_4bit needs bitsandbytes: pip install 'rlhf-fast\[qlora\]'"):
        load(base, load_in_4bit=True)


def test_a_model_object_is_not_quantized_after_the_fact_and_a_4bit_one_is_not_moved(folder, model, tokenizer):
    with pytest.raises(UserError, match="load_in_4bit quantizes while loading; pass the model's name"):
        load(model, tokenizer=tokenizer, load_in_4bit=True)
    packed = load(folder(), load_in_4bit=True).model
    assert load(packed, tokenizer=tokenizer).model is packed
    with pytest.raises(UserError, match="the 4-bit model is on cpu and is wanted on meta; load it there"):
        load(packed, tokenizer=tokenizer, device="meta")


# ---- adapters


@families
def test_with_its_adapter_off_it_is_a_fresh_base_bit_for_bit(family, folder, examples):
    """After training passes, in train and in eval mode: a CPU with AVX512-BF16 would repack the weights in eval mode."""
    base, batch = folder(family), TokenBatch.pack(examples)
    want = load(base, load_in_4bit=True).train().logprobs(batch)
    policy = trained(base).train()
    policy.logprobs(batch).sum().backward()
    assert torch.equal(policy.logprobs(batch, role="reference").detach(), want)
    policy.eval()
    with torch.no_grad():
        assert torch.equal(policy.logprobs(batch, role="reference"), want)
        assert not torch.equal(policy.logprobs(batch), want)
    assert torch.equal(policy.train().logprobs(batch, role="reference"), want)


@families
def test_adapters_are_fp32_on_a_bf16_base_and_so_are_their_gradients(family, folder, examples, tmp_path):
    base, batch = folder(family), TokenBatch.pack(examples)
    policy = trained(base, dtype=torch.bfloat16)
    policy.add_role("value", trainable=True, head=True)
    policy.save(tmp_path / "run")
    again = load(tmp_path / "run", dtype=torch.bfloat16).train()
    assert is_4bit(again.model)
    for one, role in ((policy, "policy"), (policy, "value"), (again, "policy")):
        parameters = one.adapters.parameters(role)
        assert parameters and {p.dtype for p in parameters.values()} == {torch.float32}
    again.logprobs(batch).sum().backward()
    gradients = {n: p.grad for n, p in again.adapters.parameters("policy").items()}
    assert all(g.dtype == torch.float32 and bool(g.any()) for g in gradients.values())
    assert torch.equal(again.logprobs(batch), policy.logprobs(batch))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pass_moves_its_own_adapter_only_and_a_switch_with_a_live_graph_is_refused(checkpointing, folder, examples):
    policy = trained(folder()).train()
    policy.add_role("value", trainable=True, head=True)
    if checkpointing:
        policy.checkpoint_activations()
    batch = TokenBatch.pack(examples)
    moved = lambda role: any(p.grad is not None for p in policy.adapters.parameters(role).values())
    waiting = policy.logprobs(batch)
    with pytest.raises(RuntimeError, match="graph built under policy has not been backpropagated"):
        policy.values(batch)
    waiting.sum().backward()
    assert moved("policy") and not moved("value")
    policy.zero_grad()
    policy.values(batch).sum().backward()
    assert moved("value") and not moved("policy")


def test_its_gradients_are_those_of_the_dequantized_model(folder, examples):
    base, batch = folder("Qwen2"), TokenBatch.pack(examples)
    policy = trained(base).train()
    plain = load(base, peft_config=lora_config(r=4))
    with torch.no_grad():
        for (name, layer), (_, packed) in zip(plain.model.named_modules(), policy.model.named_modules()):
            if isinstance(packed, bitsandbytes.nn.Linear4bit):
                assert name.endswith("base_layer")
                layer.weight.copy_(base_weight(packed)())
        for name, parameter in plain.adapters.parameters("policy").items():
            parameter.copy_(policy.adapters.parameters("policy")[name])
    policy.logprobs(batch).sum().backward()
    plain.logprobs(batch).sum().backward()
    for name, parameter in plain.adapters.parameters("policy").items():
        got = policy.adapters.parameters("policy")[name].grad
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=2e-5, msg=name)


def test_the_weight_under_an_adapter_is_found_with_and_without_4_bit(folder):
    base = folder()
    packed, plain = trained(base).model.model.layers[0].mlp.up_proj, load(base, peft_config=lora_config(r=4))
    assert torch.equal(base_weight(packed)(), base_weight(packed.get_base_layer())())
    layer = plain.model.model.layers[0].mlp.up_proj
    assert base_weight(layer) is layer.get_base_layer().weight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["embed_tokens"]}, "LoRA on model.embed_tokens .embeddings. is not supported"),
        ({"target_modules": ".*embed_tokens|.*lm_head"}, "LoRA on model.embed_tokens"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "sets modules_to_save"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [1]}, "sets trainable_token_indices"),
        ({"target_modules": ["q_proj"], "bias": "all"}, "bias='all', which changes the base under every other adapter"),
    ],
    ids=str,
)
@pytest.mark.parametrize("in_4bit", [False, True], ids=["plain", "nf4"])
def test_adapters_that_a_pass_would_ignore_are_refused(options, message, in_4bit, folder, tmp_path):
    with pytest.raises(UserError, match=message):
        load(folder(), peft_config=LoraConfig(r=2, **options), load_in_4bit=in_4bit)


def test_an_adapter_of_another_library_on_embeddings_is_refused_too(folder, tmp_path):
    policy = trained(folder())
    policy.save(tmp_path / "run")
    path = tmp_path / "run" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": ["q_proj", "embed_tokens"]}))
    with pytest.raises(UserError, match="LoRA on model.embed_tokens"):
        load(tmp_path / "run")


# ---- files


@families
def test_an_export_is_the_dequantized_base_with_the_adapter_in_it(family, folder, tmp_path, examples):
    """Never quantized again: the merged model differs from the running one by rounding alone."""
    policy = trained(folder(family))
    batch = TokenBatch.pack(examples)
    want = policy.logprobs(batch)
    policy.export(tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    merged = load(tmp_path / "merged")
    assert not is_4bit(merged.model)
    torch.testing.assert_close(merged.logprobs(batch), want, rtol=0, atol=2e-5)
    assert torch.equal(policy.logprobs(batch), want)
    plain = load(tmp_path / "base")
    assert (plain.logprobs(batch) - want).abs().max() > 1e-3


def test_a_variant_of_lora_is_not_merged_with_a_4bit_base(folder, tmp_path):
    config = LoraConfig(r=2, target_modules="all-linear", use_dora=True)
    policy = load(folder(), peft_config=config, load_in_4bit=True)
    with pytest.raises(UserError, match="only plain LoRA can be merged with a 4-bit base"):
        policy.export(tmp_path / "merged")


def test_a_run_comes_back_in_the_format_it_was_trained_in(folder, tmp_path, examples, caplog):
    base, batch = folder(), TokenBatch.pack(examples)
    policy = trained(base)
    policy.save(tmp_path / "run")
    again = load(tmp_path / "run")
    assert is_4bit(again.model) and torch.equal(again.logprobs(batch), policy.logprobs(batch))
    assert not caplog.messages
    plain = load(tmp_path / "run", load_in_4bit=False)
    assert not is_4bit(plain.model) and not torch.equal(plain.logprobs(batch), policy.logprobs(batch))
    assert "was trained on a base in 4 bit and runs on one in full precision" in caplog.text


def test_a_reward_adapter_joins_a_4bit_base_and_another_base_is_refused(folder, tmp_path, examples):
    base, batch = folder(), TokenBatch.pack(examples)
    reward = trained(base, "reward")
    reward.save(tmp_path / "rm")
    policy = trained(base)
    assert attach(policy, "reward", tmp_path / "rm") is policy
    assert torch.equal(policy.scores(batch), reward.scores(batch))
    base.rename(tmp_path / "moved")  # the same base under another name
    policy = trained(tmp_path / "moved")
    assert attach(policy, "reward", tmp_path / "rm") is policy
    folder(seed=1)  # another base under the same name
    with pytest.raises(UserError, match="trained on another base than .*base is now .its weights are others"):
        attach(trained(base), "reward", tmp_path / "rm")
    with pytest.raises(UserError, match="trained on another base than"):
        load(tmp_path / "rm")


# ---- the fingerprint of a base


@pytest.mark.parametrize("in_4bit", [False, True], ids=["plain", "nf4"])
def test_a_fingerprint_knows_its_base_and_ignores_adapters_and_dtype(in_4bit, folder):
    base = folder()
    one = load(base, load_in_4bit=in_4bit)
    before = fingerprint(one.model)
    one.adapters.add("policy", lora_config(r=4))
    perturb(one)
    assert fingerprint(one.model) == before
    assert difference(before, fingerprint(load(base, load_in_4bit=not in_4bit).model)) is None
    if not in_4bit:
        assert fingerprint(load(base, dtype=torch.bfloat16).model) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.model.norm.weight.data.mul_(1.01), "its weights are others"),
        (lambda m: m.model.layers[1].mlp.up_proj.weight.data.mul_(1.01), "the weights of its linear layers are others"),
        (lambda m: setattr(m.config, "rms_norm_eps", 0.1), "its configuration is another"),
    ],
)
def test_a_fingerprint_tells_what_differs(change, words, folder):
    model = load(folder()).model
    before = fingerprint(model)
    change(model)
    assert difference(before, fingerprint(model)) == words


# ---- what is saved is read back


@pytest.mark.parametrize("in_4bit", [False, True], ids=["plain", "nf4"])
@pytest.mark.parametrize("role", ["policy", "reward"])
def test_saving_reads_back_and_leaves_everything_as_it_was(role, in_4bit, folder, tmp_path, examples):
    policy = load(folder(), peft_config=lora_config(r=4), role=role, load_in_4bit=in_4bit).train()
    policy.model.model.layers[0].eval()  # a mode that no module above has
    if role == "reward":
        policy.add_head("reward")
    policy.add_role("value", trainable=True, head=True)
    perturb(policy, role)
    names = {n: p.requires_grad for n, p in policy.named_parameters()}
    batch = TokenBatch.pack(examples)
    waiting = policy.values(batch)  # a graph that waits stays valid
    state, modes = torch.get_rng_state(), [m.training for m in policy.modules()]
    policy.save(tmp_path / "run")
    assert [m.training for m in policy.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: p.requires_grad for n, p in policy.named_parameters()} == names
    assert policy.adapters.active == "value" and policy.adapters.names == [role, "value"]
    waiting.sum().backward()
    assert all(p.grad is not None for p in policy.adapters.parameters("value").values())


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "heads.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("in_4bit", [False, True], ids=["plain", "nf4"])
def test_a_file_that_reads_back_otherwise_is_noticed(file, in_4bit, folder, tmp_path, monkeypatch):
    """One element, or the scale, altered between writing and reading back."""
    policy = load(folder(), peft_config=lora_config(r=4), role="reward", load_in_4bit=in_4bit)
    policy.add_head("reward")
    perturb(policy, "reward")
    path = tmp_path / "run" / file

    def corrupt():
        if path.suffix == ".json":
            path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 33}))
            return
        tensors = load_file(path)
        next(iter(tensors.values())).view(-1)[0] += 1e-4
        save_file(tensors, path)

    check = policy._check_saved
    monkeypatch.setattr(policy, "_check_saved", lambda *a: (corrupt(), check(*a)))
    named = "heads" if file.startswith("heads") else "adapter_model"
    with pytest.raises(OSError, match=f"run: {named}.safetensors read back other than what is in memory"):
        policy.save(tmp_path / "run")
    assert policy.adapters.names == ["reward"] and list(policy.heads) == ["reward"]
