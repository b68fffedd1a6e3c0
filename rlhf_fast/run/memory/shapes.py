"""The sizes of a decoder, from its ``config.json`` or from its name, and the parameters that follow from them."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_fast.errors import UserError


class Traits(NamedTuple):
    """What two architectures with the same sizes differ in."""

    gated: bool = True  # act(gate(x)) * up(x) rather than act(up(x))
    norms: int = 2  # of the residual stream, in a layer
    norm_bias: bool = False
    qk_norm: bool = False
    fused: bool = False  # q, k, v are one linear, gate and up another
    qkv_bias: bool = False
    other_bias: bool = False  # of every other linear
    tied: bool = False  # the head is the embedding, where the config does not say


ARCHITECTURES = {
    "llama": Traits(),
    "mistral": Traits(),
    "qwen2": Traits(qkv_bias=True),
    "qwen3": Traits(qk_norm=True),
    "gemma": Traits(tied=True),
    "gemma2": Traits(tied=True, norms=4),
    "gemma3_text": Traits(tied=True, norms=4, qk_norm=True),
    "phi3": Traits(fused=True),
    "gpt2": Traits(gated=False, norm_bias=True, fused=True, qkv_bias=True, other_bias=True, tied=True),
}

# owner/name -> model_type, hidden, intermediate, layers, heads, key-value heads, head size, vocabulary, tied
PRESETS = {
    "Qwen/Qwen2.5-0.5B": ("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True),
    "Qwen/Qwen2.5-1.5B": ("qwen2", 1536, 8960, 28, 12, 2, 128, 151936, True),
    "Qwen/Qwen2.5-3B": ("qwen2", 2048, 11008, 36, 16, 2, 128, 151936, True),
    "Qwen/Qwen2.5-7B": ("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False),
    "Qwen/Qwen2.5-14B": ("qwen2", 5120, 13824, 48, 40, 8, 128, 152064, False),
    "Qwen/Qwen2.5-32B": ("qwen2", 5120, 27648, 64, 40, 8, 128, 152064, False),
    "Qwen/Qwen3-0.6B": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True),
    "Qwen/Qwen3-1.7B": ("qwen3", 2048, 6144, 28, 16, 8, 128, 151936, True),
    "Qwen/Qwen3-4B": ("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, True),
    "Qwen/Qwen3-8B": ("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False),
    "Qwen/Qwen3-14B": ("qwen3", 5120, 17408, 40, 40, 8, 128, 151936, False),
    "meta-llama/Llama-3.2-1B": ("llama", 2048, 8192, 16, 32, 8, 64, 128256, True),
    "meta-llama/Llama-3.2-3B": ("llama", 3072, 8192, 28, 24, 8, 128, 128256, True),
    "meta-llama/Llama-3.1-8B": ("llama", 4096, 14336, 32, 32, 8, 128, 128256, False),
    "mistralai/Mistral-7B-v0.3": ("mistral", 4096, 14336, 32, 32, 8, 128, 32768, False),
}


Targets = str | Sequence[str]  # which linears get an adapter, as ``lora_target_modules`` says


class Linear(NamedTuple):
    """A linear layer: weight (outputs, inputs)."""

    name: str  # its path inside of a layer
    inputs: int
    outputs: int
    reads: str  # what its input is: the result of a "norm", of "attention", the MLP's "product"; the "head" apart


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    traits: Traits
    positions: int = 0  # rows of a learned position embedding

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @classmethod
    def of(cls, config: dict[str, Any], name: str = "", strict: bool = True) -> Shape:
        """From the values of a ``config.json``. ``strict`` refuses an architecture whose parameters are not known here.

        Raises:
            UserError: no decoder's config, or an architecture that is not in ``ARCHITECTURES``.
        """
        config = config.get("text_config") or config
        kind = config.get("model_type", "")
        if strict and kind not in ARCHITECTURES:
            raise UserError(
                f"{name or 'config.json'}: no plan for model_type {kind!r}; known are {', '.join(ARCHITECTURES)}. A run "
                "plans its memory from the model itself"
            )
        traits = ARCHITECTURES.get(kind, Traits())
        get = _getter(config, name)
        hidden, heads = get("hidden_size", "n_embd"), get("num_attention_heads", "n_head")
        inner = config.get("intermediate_size") or config.get("n_inner") or 4 * hidden
        tied = config.get("tie_word_embeddings")
        biases = {"qkv_bias": bool(traits.qkv_bias or config.get("attention_bias"))}
        traits = traits._replace(**biases)
        return cls(
            name=name or kind,
            hidden=hidden,
            intermediate=inner,
            layers=get("num_hidden_layers", "n_layer"),
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocab=get("vocab_size"),
            tied=traits.tied if tied is None else bool(tied),
            traits=traits,
            positions=config.get("n_positions", 0) if kind == "gpt2" else 0,
        )

    @property
    def linears(self) -> list[Linear]:
        """Every linear of a layer, in the order in which they run."""
        d, i, q, kv = self.hidden, self.intermediate, self.q_width, self.kv_width
        if not self.traits.gated:
            rows = [("attn.c_attn", d, q + 2 * kv), ("attn.c_proj", q, d), ("mlp.c_fc", d, i), ("mlp.c_proj", i, d)]
            reads = ("norm", "attention", "norm", "product")
        elif self.traits.fused:
            rows = [("self_attn.qkv_proj", d, q + 2 * kv), ("self_attn.o_proj", q, d)]
            rows += [("mlp.gate_up_proj", d, 2 * i), ("mlp.down_proj", i, d)]
            reads = ("norm", "attention", "norm", "product")
        else:
            rows = [("self_attn.q_proj", d, q), ("self_attn.k_proj", d, kv), ("self_attn.v_proj", d, kv)]
            rows += [
                ("self_attn.o_proj", q, d),
                ("mlp.gate_proj", d, i),
                ("mlp.up_proj", d, i),
                ("mlp.down_proj", i, d),
            ]
            reads = ("norm", "norm", "norm", "attention", "norm", "norm", "product")
        return [Linear(*row, what) for row, what in zip(rows, reads)]

    def parameters(self) -> dict[str, int]:
        """Numbers of parameters: ``embeddings``, ``head`` (0 when tied), ``linears`` of the layers, ``rest``."""
        t, d = self.traits, self.hidden
        linears = self.layers * sum(x.inputs * x.outputs for x in self.linears)
        outputs = [x.outputs for x in self.linears]
        attention = 1 if t.fused else 3
        bias = t.qkv_bias * sum(outputs[:attention]) + t.other_bias * sum(outputs[attention:])
        norm = d * (1 + t.norm_bias)
        layer = bias + t.norms * norm + t.qk_norm * 2 * self.head_dim
        return {
            "embeddings": (self.vocab + self.positions) * d,
            "head": 0 if self.tied else self.vocab * d,
            "linears": linears,
            "rest": self.layers * layer + norm,
        }

    def adapted(self, targets: Targets = "all-linear") -> list[Linear]:
        """The linears of all layers, and the head, that PEFT gives an adapter: those whose path a pattern matches, or ends
        with one of several names. "all-linear" is all but the head."""
        return list(_adapted(self, targets if isinstance(targets, str) else tuple(targets)))

    def adapted_in_layer(self, targets: Targets = "all-linear") -> list[Linear]:
        """Those of a layer that have an adapter in any layer."""
        paths = tuple(x.name for x in self.adapted(targets))
        return [x for x in self.linears if any(path.endswith(f".{x.name}") for path in paths)]

    def adapter_parameters(self, rank: int, targets: Targets = "all-linear") -> int:
        """Parameters of a LoRA adapter."""
        return rank * sum(x.inputs + x.outputs for x in self.adapted(targets))


@functools.lru_cache(maxsize=64)
def _adapted(shape: Shape, targets: str | tuple[str, ...]) -> tuple[Linear, ...]:
    layers = "model.layers" if shape.traits.gated else "transformer.h"
    linears = [x._replace(name=f"{layers}.{i}.{x.name}") for i in range(shape.layers) for x in shape.linears]
    if targets == "all-linear":
        return tuple(linears)
    linears.append(Linear("lm_head", shape.hidden, shape.vocab, "head"))
    if isinstance(targets, str):
        return tuple(x for x in linears if re.fullmatch(targets, x.name))
    return tuple(x for x in linears if f".{x.name}".endswith(tuple(f".{target}" for target in targets)))


def find_shape(model: str) -> Shape:
    """The shape of a model folder (its ``config.json``, or its base's for an adapter folder) or of a known name.

    Raises:
        UserError: neither; lists the names that are known.
    """
    folder = Path(model)
    if (adapter := folder / "adapter_config.json").is_file():
        return find_shape(json.loads(adapter.read_text())["base_model_name_or_path"])
    if (path := folder / "config.json").is_file():
        return Shape.of(json.loads(path.read_text()), name=model)
    for name, (kind, *sizes) in PRESETS.items():
        if _plain(model) in (_plain(name), _plain(name.partition("/")[2])):
            traits = ARCHITECTURES[kind]
            return Shape(name, *sizes, traits=traits)
    raise UserError(
        f"{model}: no folder with a config.json and no size known here; known are {', '.join(PRESETS)}, with or without "
        "owner and -Instruct"
    )


def _plain(name: str) -> str:
    return name.lower().removesuffix("-instruct").removesuffix("-base")


def _getter(config: dict[str, Any], name: str) -> Callable[..., int]:
    def get(*keys: str) -> int:
        found = next((config[k] for k in keys if config.get(k)), None)
        if found is None:
            raise UserError(f"{name or 'config.json'} has no {keys[0]}; it is not the config of a decoder")
        return int(found)

    return get
