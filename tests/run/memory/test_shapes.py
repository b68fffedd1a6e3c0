"""Sizes of decoders: parameters as the real models have them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from rlhf_fast.errors import UserError
from rlhf_fast.models import Policy
from rlhf_fast.models.adapters import lora_config
from rlhf_fast.run import memory
from rlhf_fast.run.memory import Shape, find_shape

QWEN, LLAMA = find_shape("Qwen2.5-7B"), find_shape("meta-llama/Llama-3.1-8B-Instruct")


@pytest.fixture
def counts(monkeypatch):
    """counts(config) -> parameters of the real model, by what they are in; on the meta device, of no size."""
    # the device context knows torch.empty by identity, and conftest.py has put its own in place
    monkeypatch.setattr(torch, "empty", torch._C._VariableFunctions.empty)
    torch.utils._device._device_constructors.cache_clear()
    yield count_parameters
    torch.utils._device._device_constructors.cache_clear()


def count_parameters(config) -> dict[str, int]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    head = {model.get_output_embeddings().weight} - embeddings
    linears = {m.weight for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))} - embeddings - head
    rest = set(model.parameters()) - embeddings - head - linears
    groups = {"embeddings": embeddings, "head": head, "linears": linears, "rest": rest}
    return {name: sum(p.numel() for p in group) for name, group in groups.items()}


# each as it is, and the two most used the other way too
NAMES = [(name, find_shape(name).tied) for name in memory.PRESETS]
NAMES += [("Qwen/Qwen2.5-7B", True), ("meta-llama/Llama-3.1-8B", True), ("Qwen/Qwen3-0.6B", False)]


@pytest.mark.parametrize(("name", "tied"), NAMES)
def test_known_names_have_the_parameters_of_the_real_model(name, tied, config_of, counts):
    kind, shape = memory.PRESETS[name][0], replace(find_shape(name), tied=tied)
    assert shape.parameters() == counts(config_of(kind, shape))


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("qwen2", {}),
        ("qwen3", {"attention_bias": False}),
        ("llama", {}),
        ("mistral", {}),
        ("gemma", {}),
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("phi3", {"pad_token_id": 0}),
        ("gpt2", None),
    ],
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_config_files_give_the_parameters_of_the_real_model(kind, more, tied, tmp_path, config_of, counts):
    if more is None:
        sizes = {"n_layer": 3, "n_embd": 64, "n_head": 4, "n_positions": 96, "vocab_size": 200}
        config = transformers.GPT2Config(**sizes, tie_word_embeddings=tied)
    else:
        small = Shape("", 64, 160, 3, 4, 2, 32 if kind != "phi3" else 16, 200, tied, memory.Traits())
        config = config_of(kind, small, **more)
    config.save_pretrained(tmp_path)
    assert find_shape(str(tmp_path)).parameters() == counts(config)


def test_the_totals_are_those_of_the_model_cards():
    assert sum(QWEN.parameters().values()) == 7_615_616_512
    assert sum(LLAMA.parameters().values()) == 8_030_261_248


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj")], ids=str)
def test_adapter_parameters_are_those_that_peft_makes(targets, config_of):
    small = Shape("", 64, 160, 3, 4, 2, 16, 200, False, memory.Traits())
    model = AutoModelForCausalLM.from_config(config_of("llama", small))
    policy = Policy(model, None)
    policy.model.requires_grad_(False)
    policy.adapters.add(
        "policy", lora_config(r=4, target_modules=targets if isinstance(targets, str) else list(targets))
    )
    made = sum(p.numel() for p in policy.adapters.parameters("policy").values())
    assert small.adapter_parameters(4, targets) == made


def test_a_run_folder_is_planned_as_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen2.5-7B"}))
    assert find_shape(str(tmp_path)) == QWEN


def test_what_is_no_known_model_is_refused_by_name(tmp_path):
    with pytest.raises(
        UserError, match="Qwen2.5-8B: no folder with a config.json and no size known here; known are Qwen"
    ):
        find_shape("Qwen2.5-8B")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(UserError, match="no plan for model_type 'mamba'; known are llama"):
        find_shape(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 4}))
    with pytest.raises(UserError, match="has no num_attention_heads"):
        find_shape(str(tmp_path))
