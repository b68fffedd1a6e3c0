"""What autograd keeps of a layer: the plan's bytes are those counted on a real model of every architecture."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from rlhf_fast.data.batch import Example, TokenBatch
from rlhf_fast.models import Policy
from rlhf_fast.models.adapters import lora_config
from rlhf_fast.run.memory import ARCHITECTURES, Job, Shape, find_shape, plan, saved_per_token

TOKENS = 256
QUERIES_AND_VALUES, MLP_ONLY = ("q_proj", "v_proj"), ("gate_proj", "up_proj")


@pytest.fixture
def small(config_of):
    """small(kind, layers) -> the configuration of a small model without dropout and caps."""

    def make(kind: str, layers: int):
        if kind == "gpt2":
            sizes = {"n_embd": 256, "n_inner": 704, "n_layer": layers, "n_head": 4, "n_positions": TOKENS}
            return transformers.GPT2Config(**sizes, vocab_size=128, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)
        # heads narrower than the model together, but for Phi 3, which knows no other
        shape = Shape("", 256, 704, layers, 4, 1, 64 if kind == "phi3" else 48, 128, False, ARCHITECTURES[kind])
        more = {"attn_logit_softcapping": None} if kind == "gemma2" else {}
        return config_of(kind, shape, pad_token_id=0, **more)

    return make


def kept_by_autograd(configs, dtype, *, fused: bool, targets) -> float:
    """Bytes per token and layer that autograd saves: a model of three layers less one of two. ``targets``: of LoRA."""
    totals = []
    for config in configs:
        policy = Policy(AutoModelForCausalLM.from_config(config).to(dtype), None)
        if not fused:
            policy.unfuse()
        if targets:
            policy.model.requires_grad_(False)
            names = targets if isinstance(targets, str) else list(targets)
            policy.adapters.add("policy", lora_config(8, target_modules=names))
        seen, parameters = {}, {p.untyped_storage().data_ptr() for p in policy.parameters()}

        def pack(x, seen=seen, parameters=parameters):
            if x.untyped_storage().data_ptr() not in parameters:
                seen[x.untyped_storage().data_ptr()] = x  # held, so that no address comes twice
            return x

        batch = TokenBatch.pack([Example(list(range(128)), [False] + [True] * 127)] * 2)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            hidden = policy.train().hidden(batch, "policy")
        totals.append(sum(x.untyped_storage().nbytes() for x in seen.values()) / TOKENS)
        del hidden
    return totals[1] - totals[0]


def check(small, kind, dtype, kernels, targets):
    configs = [small(kind, layers) for layers in (2, 3)]
    shape = Shape.of(configs[0].to_dict())
    settings = {"base": "fp32" if dtype == torch.float32 else "bf16", "lora_r": 8, "kernels": kernels}
    if targets:
        settings["lora_targets"] = targets
    job = Job(shape=shape, full=not targets, **settings, device="cpu", length=TOKENS, checkpointing=False)
    planned = plan(job).total("inputs") / TOKENS / shape.layers
    counted = kept_by_autograd(configs, dtype, fused=kernels == "fused", targets=targets)
    # what is left are a few numbers a row, as the mean squares in Gemma's norms
    assert planned == pytest.approx(counted, rel=0.002)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernels", ["fused", "peft"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_saved_bytes_are_those_that_autograd_keeps_of_a_layer(kind, kernels, dtype, small):
    """With LoRA. Phi 3's MLP, and of GPT-2 all, runs transformers' own code though fused layers are on."""
    check(small, kind, dtype, kernels, "all-linear")


@pytest.mark.parametrize("kernels", ["fused", "peft"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_saved_bytes_of_a_layer_whose_weights_are_all_trained(kind, kernels, small):
    """In float32; "fused" are the norms. 16-bit weights are not trained, and under autocast linears keep casts."""
    check(small, kind, torch.float32, kernels, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernels", ["fused", "peft"])
@pytest.mark.parametrize("targets", [QUERIES_AND_VALUES, MLP_ONLY], ids=["attention only", "MLP only"])
def test_saved_bytes_of_a_layer_with_some_adapters(targets, kernels, dtype, small):
    """A frozen linear keeps no input, and an MLP without an adapter is not fused."""
    check(small, "llama", dtype, kernels, targets)


@pytest.mark.parametrize(
    ("name", "fused", "peft"), [("Qwen2.5-7B", 97, 314), ("Llama-3.1-8B", 84, 289)], ids=["qwen", "llama"]
)
def test_saved_bytes_of_a_7b_layer(name, fused, peft):
    """KiB per token and layer on a GPU, besides the layer's input; PEFT's were measured on real layers."""
    for kernels, kib in (("fused", fused), ("peft", peft)):
        saved = saved_per_token(Job(shape=find_shape(name), kernels=kernels))
        assert sum(saved.values()) / 1024 == pytest.approx(kib, abs=0.6)
