"""How much memory a run takes, part by part, and which settings make it fit. Arithmetic only: no torch, no model.

``rlhf-fast plan`` asks before anything is loaded, a trainer asks once it has its model and compares the answer with what the
GPU measured. Each formula stands once, in :func:`resident`, :func:`saved_per_token`, :func:`passes` or :func:`rollout`.
Bytes everywhere; a GB is 10^9 of them. The optimizer step needs less than any pass: AdamW runs in one kernel over all
tensors, in place.

What is alive when (a plan's ``peaks``)::

    backward of the last layer     always + inputs + update + layer (+ gradients, after an earlier micro-batch)
    backward of the first layer    always + gradients + update + layer
    loss                           always + inputs + update + head (+ gradients, after an earlier micro-batch)
    rollout                        always + rollout

``inputs`` are the checkpointed inputs of the layers, gone one by one in the backward pass; ``layer`` is what one layer needs
while it goes backward, ``head`` what the loss needs, ``update`` what is there from the start of a forward pass to the end of
its backward pass. ``outside`` is what tensors do not account for.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_fast.errors import UserError

METHODS = ("sft", "reward", "dpo", "ppo", "grpo")
GB = 10**9
WHENS = ("always", "gradients", "inputs", "update", "head", "layer", "rollout", "outside")

# what linear_logprobs makes at a time on a GPU: float32 logits and 16-bit gradient rows (tested against the kernel's own)
HEAD_CHUNK_BYTES = 1_060_000_000
CPU_HEAD_CHUNK_BYTES, CPU_HEAD_MIN_ROWS = 48 << 20, 256
CONTEXT_BYTES = 600_000_000  # CUDA context, cuBLAS workspaces, loaded kernels
SLACK = 0.04  # of the peak: rounding and fragments in the caching allocator
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # 4 bits; an 8-bit constant per 64 of them, a float32 per 256 constants
_8BIT = 2 * (1 + 4 / 256)  # two moments, each with a float32 constant per 256 numbers
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": _8BIT, "paged_adamw_8bit": _8BIT}
SEQUENCES = (32, 8)  # sampled at a time: what a plan wants, and what it takes; fewer leave a GPU idle


# GiB that torch reports, less than on the box: error correction and the driver take their part
GPUS = {
    "rtx3090": 23.6,
    "rtx4090": 23.5,
    "a100-40": 39.4,
    "l40s": 44.4,
    "a6000": 47.4,
    "a100": 79.1,
    "h100": 79.1,
    "h200": 139.8,
}


def gpu_bytes(name: str) -> int:
    """Bytes of a GPU by name, or of a size: ``24`` is 24 * 10^9, what a 24 GB card surely has.

    Raises:
        UserError: neither.
    """
    word = name.lower().removesuffix("gb").strip()
    if word in GPUS:
        return int(GPUS[word] * 2**30)
    try:
        size = float(word)
    except ValueError:
        size = 0.0
    if not 0 < size < math.inf:
        raise UserError(f"--gpu {name}: give a size in GB, as 24, or one of {', '.join(GPUS)}")
    return int(size * GB)


# ---------------------------------------------------------------------------------------------------------------- shapes


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
    def linears(self) -> list[tuple[str, int, int]]:
        """(name, inputs, outputs) of every linear of a layer."""
        d, i, q, kv = self.hidden, self.intermediate, self.q_width, self.kv_width
        if not self.traits.gated:
            return [("c_attn", d, q + 2 * kv), ("c_proj", q, d), ("c_fc", d, i), ("c_proj", i, d)]
        if self.traits.fused:
            return [("qkv_proj", d, q + 2 * kv), ("o_proj", q, d), ("gate_up_proj", d, 2 * i), ("down_proj", i, d)]
        attention = [("q_proj", d, q), ("k_proj", d, kv), ("v_proj", d, kv), ("o_proj", q, d)]
        return [*attention, ("gate_proj", d, i), ("up_proj", d, i), ("down_proj", i, d)]

    def parameters(self) -> dict[str, int]:
        """Numbers of parameters: ``embeddings``, ``head`` (0 when tied), ``linears`` of the layers, ``rest``."""
        t, d = self.traits, self.hidden
        linears = self.layers * sum(a * b for _, a, b in self.linears)
        outputs = [b for _, _, b in self.linears]
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

    def adapter_parameters(self, rank: int, targets: str | Sequence[str] = "all-linear") -> int:
        """Parameters of a LoRA adapter on the linears of the layers that ``targets`` names."""
        chosen = [(a, b) for n, a, b in self.linears if targets == "all-linear" or n in targets]
        return self.layers * rank * sum(a + b for a, b in chosen)


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


# ------------------------------------------------------------------------------------------------------------------ jobs


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training run, as far as memory is concerned."""

    shape: Shape
    method: str = "sft"
    length: int = 2048  # tokens of the longest sequence: prompt and response
    record_tokens: int | None = (
        None  # of the largest record; None: one sequence, or the pair that a preference compares
    )
    window_tokens: int | None = None  # of the largest optimizer step: no micro-batch is larger; None: no limit
    prompt_length: int | None = None  # of which prompt, when sampling; None is a quarter
    full: bool = False  # all weights rather than an adapter
    base: str = "bf16"  # of the frozen weights: bf16, nf4, or fp32; of the passes, in full fine-tuning
    lora_r: int = 16
    lora_targets: str | tuple[str, ...] = "all-linear"
    optimizer: str = "adamw"
    kernels: str = "fused"  # whose activations: fused, or PEFT's and transformers' own layers
    micro_batch_tokens: int | None = None  # None: one longest record
    checkpointing: bool = True
    offload: bool = False
    rollout_batch_size: int = 128  # sequences sampled at a time
    num_generations: int = 8  # of which so many share a prompt, in GRPO
    reward_model: bool = True  # PPO scores with a reward model
    reference: bool = False  # an adapter of its own is the reference: the policy continues a trained one
    device: str = "cuda"

    @property
    def samples(self) -> bool:
        return self.method in ("ppo", "grpo")

    @property
    def unit(self) -> int:
        """Tokens of the smallest micro-batch, one record."""
        return self.record_tokens or self.length * (2 if self.method in ("dpo", "reward") else 1)

    @property
    def tokens(self) -> int:
        """Tokens of the largest micro-batch."""
        return max(self.unit, min(self.micro_batch_tokens or 0, self.window_tokens or math.inf))

    @property
    def one_micro_batch(self) -> bool:
        """Each window is one micro-batch, and its gradients start from nothing."""
        return self.method != "ppo" and self.tokens >= (self.window_tokens or math.inf)

    @property
    def width(self) -> int:
        """Bytes of a number in the passes."""
        return 4 if self.base == "fp32" else 2

    @property
    def stream_width(self) -> int:
        """Bytes of a number between layers: the embeddings' dtype, float32 in full fine-tuning, which autocast leaves alone."""
        return 4 if self.full else self.width


class Part(NamedTuple):
    """One line of a plan."""

    name: str
    bytes: float
    when: str  # one of WHENS


def resident(job: Job) -> list[Part]:
    """Weights, gradients and optimizer state: there from the first step to the last."""
    shape, counts = job.shape, job.shape.parameters()
    if job.full:
        copies = {"sft": 0, "reward": 0, "dpo": 1, "grpo": int(job.reference), "ppo": 1 + job.reward_model}[job.method]
        trained = sum(counts.values())
        parts = [Part("weights, float32", 4 * trained, "always"), *_trained(job, trained, "all weights")]
        if job.method == "ppo":
            parts += [Part("critic, a second model", 4 * trained, "always"), *_trained(job, trained, "the critic")]
        if copies:
            parts.append(Part(f"frozen models ({copies})", 4 * copies * trained, "always"))
    else:
        wide = 4 if job.base == "fp32" else 2
        linear = NF4_BYTES if job.base == "nf4" else wide
        parts = [
            Part(f"linear layers, {job.base}", linear * counts["linears"], "always"),
            Part("embeddings" + (", also the head" if shape.tied else ""), wide * counts["embeddings"], "always"),
        ]
        if counts["head"]:
            parts.append(Part("head", wide * counts["head"], "always"))
        parts.append(Part("norms and biases", wide * counts["rest"], "always"))
        adapter = shape.adapter_parameters(job.lora_r, job.lora_targets)
        trained = adapter * (2 if job.method == "ppo" else 1)
        frozen = int(job.reference) + (job.method == "ppo" and job.reward_model)
        names = "adapters: policy and critic" if job.method == "ppo" else "adapter"
        parts += [Part(f"{names}, float32", 4 * trained, "always"), *_trained(job, trained, names)]
        if frozen:
            parts.append(Part(f"frozen adapters ({frozen})", 4 * frozen * adapter, "always"))
    if job.method in ("ppo", "reward"):
        parts.append(Part("scalar heads", (2 if job.method == "ppo" else 1) * 16 * (shape.hidden + 1), "always"))
    return parts


def _trained(job: Job, count: float, what: str) -> list[Part]:
    """What ``count`` trained float32 numbers bring besides themselves."""
    return [
        Part(f"gradients of {what}", 4 * count, "gradients"),
        Part(f"{job.optimizer} state of {what}", OPTIMIZER_BYTES[job.optimizer] * count, "always"),
    ]


def saved_per_token(job: Job) -> dict[str, float]:
    """Bytes that autograd keeps of one token in one layer besides the layer's input, tensor by tensor.

    Fused: what the backward pass cannot recompute cheaply, in the dtype of the pass. PEFT: its adapters take a float32 copy of
    their input each, transformers' norm computes in float32, SwiGLU keeps every factor. In float32 the copies are none.
    """
    s, w = job.shape, job.width
    d, i, q, kv = s.hidden, s.intermediate, s.q_width, s.kv_width
    # our attention on a CPU works in padded tables, and in float32 repeats grouped heads
    cpu, fused = job.device == "cpu", job.kernels == "fused" and not job.full
    repeated = q if cpu and w == 4 else kv
    attention = {"queries, keys, values, output": w * (2 * q + 2 * repeated), "row statistics": 4 * s.heads + 8}
    if cpu and (w == 4 or fused):
        attention["output in packed order"] = w * q
    gates = 2 if s.traits.gated else 1
    if job.full:
        # norms keep x and, unless they are ours, its normalised form; linears the input they cast
        casts = 1 if w == 4 else 3 + 2
        norms = {
            "residual stream": 4 * d,
            "normalised": 2 * 4 * d if job.kernels == "peft" else 0,
            "inputs of linears": w * d * (2 if w == 4 else casts),
        }
        return {**norms, **attention, "gate, up, their products": w * i * (gates + 2)}
    if fused:
        # what an RMSNorm returns is made again from the residual stream; other norms are not ours
        normed = 0 if s.traits.gated else 2 * w * d
        inputs = {"residual stream": w * d, "normed inputs": normed}
        return {**inputs, **attention, "gate and up": w * i * gates}
    low_rank = 4 * job.lora_r * len(s.linears)
    if w == 4:
        inputs = {"residual stream": w * d, "normed inputs": 2 * w * d}
        return {**inputs, **attention, "gate, up, their products": w * i * (gates + 2), "x A": low_rank}
    copies = {"float32 inputs of adapters": 4 * sum(a for _, a, _ in s.linears), "float32 residual stream": 2 * 4 * d}
    return {**copies, **attention, "gate, up, act(gate)": w * i * (gates + 1), "x A": low_rank}


def passes(job: Job) -> list[Part]:
    """What the largest micro-batch needs between the start of its forward and the end of its backward pass."""
    s, n, w = job.shape, job.tokens, job.width
    saved, row = sum(saved_per_token(job).values()), n * s.hidden * job.stream_width
    parts = [Part("ids, positions, masks", 64 * n, "update")]
    if job.full and w == 2:
        parts.append(Part("bfloat16 copies of the weights", 2 * sum(s.parameters().values()), "update"))
    if not job.checkpointing:
        # PEFT's path keeps a float32 copy of a 16-bit input instead of the input
        kept = 0 if job.kernels == "peft" and w == 2 and not job.full else row
        parts.append(Part("activations of all layers", s.layers * (kept + n * saved), "inputs"))
        live = 0.0
    else:
        # offloaded: one in use, one on its way, one leaving
        inputs = min(3, s.layers) if job.offload else s.layers
        parts.append(Part("inputs of the layers" + (", in flight" if job.offload else ""), inputs * row, "inputs"))
        live = n * saved
    # the gradient of the layer's output, and of the MLP's inner ones as many as exist before the first is consumed
    flight = 2 * row + n * s.intermediate * _inner_gradients(job)
    parts += [
        Part("recomputed activations of a layer", live, "layer"),
        Part("gradients inside a layer", flight, "layer"),
        Part("attention backward", 0 if job.device == "cpu" else 4 * n * (s.q_width + s.heads), "layer"),
    ]
    return [p for p in [*parts, *_head(job)] if p.bytes]


def _inner_gradients(job: Job) -> int:
    """Bytes per token and unit of the MLP's inner width, at the moment when the gradient of its product is complete."""
    if job.full:
        return 2 * job.width  # through the weight, and that of one factor
    if job.kernels == "fused":
        if job.device == "cpu":  # plain PyTorch: the gradient, and in float32 the gate, its sigmoid, value and slope
            return job.width + (3 if job.width == 4 else 4) * 4
        return 3 * job.width  # the product again, gradients of gate and up
    return (
        2 * 4 if job.width == 4 else 4 + 3 * 2
    )  # PEFT: through the adapter in float32, cast; through the weight; their sum


def _head(job: Job) -> Iterator[Part]:
    """The final norm and the loss; at worst every token of the micro-batch is a response token."""
    s, n, w = job.shape, job.tokens, job.width
    yield Part("final hidden states, norm", n * s.hidden * (2 * job.stream_width + (4 if w == 2 else 0)), "head")
    if job.method == "reward":
        return
    yield Part("response rows, gradient", 2 * n * s.hidden * w, "head")
    rows = head_rows(n, s.vocab, job.device)
    cuda = job.device != "cpu"
    logits = Part(
        f"logits of {rows:,} tokens" + (", gradient" if cuda else ""),
        rows * ((4 + 2 * cuda) * s.vocab + 4 * s.hidden),
        "head",
    )
    yield logits
    if job.full:
        kept = 2 * n * s.vocab  # kept when small, made again otherwise; and the float32 gradient of the head
        yield Part("gradient of the head", 4 * s.vocab * s.hidden + min(kept, GB), "head")


def head_rows(tokens: int, vocab: int, device: str = "cuda") -> int:
    """Most tokens whose logits exist at a time, see ``kernels/linear_logprobs``."""
    if device == "cpu":
        limit = max(CPU_HEAD_MIN_ROWS, CPU_HEAD_CHUNK_BYTES // (4 * vocab))
        return math.ceil(tokens / math.ceil(tokens / limit))
    return 128 * min(max(HEAD_CHUNK_BYTES // ((4 + 2) * vocab) // 128, 1), max(math.ceil(tokens / 128), 1))


def rollout(job: Job, sequences: int) -> list[Part]:
    """What sampling ``sequences`` at a time needs."""
    s, w = job.shape, job.width
    prompt = job.prompt_length if job.prompt_length is not None else job.length // 4
    prompts = math.ceil(sequences / (job.num_generations if job.method == "grpo" else 1))
    return [
        Part(f"keys and values of {sequences} sequences", sequences * job.length * kv_per_token(job), "rollout"),
        # a layer's buffers grow by copying them
        Part("a layer's keys and values, again", sequences * job.length * kv_per_token(job) / s.layers, "rollout"),
        Part(
            "prompts in a layer",
            prompts * prompt * w * (3 * s.intermediate + 4 * s.hidden),
            "rollout",
        ),
        Part("logits of a step", sequences * s.vocab * (w + 3 * 4), "rollout"),
    ]


def kv_per_token(job: Job) -> int:
    """Bytes of a token's keys and values in all layers."""
    return 2 * job.shape.layers * job.shape.kv_width * job.width


# ------------------------------------------------------------------------------------------------------------------ plans


@dataclass(frozen=True)
class Plan:
    """A job with its settings, what it needs and whether that is there."""

    job: Job
    parts: tuple[Part, ...]
    available: int | None  # bytes of the device; None: nobody asked
    rank: int = 0  # which of the attempts it is: 0 asks the least of the user
    changes: tuple[str, ...] = ()  # what would make it fit, one line each

    def total(self, *whens: str) -> float:
        return sum(p.bytes for p in self.parts if p.when in whens)

    @property
    def peaks(self) -> dict[str, float]:
        """Bytes of tensors at the moments that can be the worst."""
        always, update, layer = self.total("always"), self.total("update"), self.total("layer")
        gradients = self.total("gradients")
        begun = always + update + self.total("inputs") + (0 if self.job.one_micro_batch else gradients)
        return {
            "backward of the last layer": begun + layer,
            "backward of the first layer": always + gradients + update + layer,
            "loss": begun + self.total("head"),
            "rollout": always + self.total("rollout"),
        }

    @property
    def tensors(self) -> float:
        """Peak bytes of tensors, what ``torch.cuda.max_memory_allocated`` measures."""
        return max(self.peaks.values())

    @property
    def needed(self) -> float:
        """With what tensors do not account for."""
        return self.tensors + self.total("outside")

    @property
    def fits(self) -> bool:
        return self.available is None or self.needed <= self.available

    @property
    def settings(self) -> dict[str, Any]:
        """What a config would say."""
        chosen = {
            "micro_batch_tokens": self.job.tokens,
            "gradient_checkpointing": self.job.checkpointing,
            "offload_activations": self.job.offload,
        }
        return chosen | ({"rollout_batch_size": self.job.rollout_batch_size} if self.job.samples else {})

    def line(self) -> str:
        """The plan in one line."""
        chosen = ", ".join(f"{k} {_word(v)}" for k, v in self.settings.items())
        of = "" if self.available is None else f" of {self.available / GB:.1f} GB"
        return f"memory: {self.tensors / GB:.1f} GB planned{of}: {chosen}"


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:,}" if isinstance(value, int) else str(value)


def plan(
    job: Job, available: int | None = None, weights: Sequence[Part] | None = None, sequences: int = SEQUENCES[-1]
) -> Plan:
    """What ``job`` takes with exactly its settings.

    Args:
        available: bytes of the device. Sampling is then cut to what fits, but not below ``sequences`` at a time.
        weights: the "always" parts, counted on a real model; from the shape when None.
    """
    always = list(weights if weights is not None else resident(job))
    if job.samples and available is not None:
        room = available / (1 + SLACK) - CONTEXT_BYTES - sum(p.bytes for p in always)
        group = 8 * job.num_generations  # prompts are shared: count whole groups
        most = int(room / (sum(p.bytes for p in rollout(job, group)) / group)) if room > 0 else 0
        least = min(sequences, job.rollout_batch_size)
        job = replace(job, rollout_batch_size=max(min(job.rollout_batch_size, most), least))
    parts = [*always, *passes(job), *(rollout(job, job.rollout_batch_size) if job.samples else [])]
    made = Plan(job, tuple(p for p in parts if p.bytes), available)
    if job.device == "cpu":
        return made
    outside = [Part("CUDA context", CONTEXT_BYTES, "outside"), Part("allocator slack", SLACK * made.tensors, "outside")]
    return replace(made, parts=(*made.parts, *outside))


FREE = ("base", "checkpointing", "offload", "micro_batch_tokens")


def attempts(job: Job, free: Collection[str] = FREE) -> list[Job]:
    """``job`` with the settings in ``free`` varied, the fastest first; a setting that is not in ``free`` stays as it is."""
    big, small = (32768, 16384, 8192), (4096, 2048, 1024, 0)
    rows = [("bf16", False, False, n) for n in big[1:]]
    rows += [("bf16", True, False, n) for n in big]
    rows += [("nf4", False, False, 8192)]
    rows += [("nf4", True, False, n) for n in big[1:]]
    rows += [(base, True, True, 8192) for base in ("bf16", "nf4")]
    rows += [(base, True, offload, n) for offload in (False, True) for n in small for base in ("bf16", "nf4")]
    jobs = {}
    for row in rows:
        values = dict(zip(FREE, row))
        values["micro_batch_tokens"] = max(job.unit, values["micro_batch_tokens"])
        if job.full and values.pop("base") == "nf4":
            continue
        option = replace(job, **{name: value for name, value in values.items() if name in free})
        if option.checkpointing or not option.offload:
            jobs[option] = None
    return list(jobs)


def choose(job: Job, available: int, weights: Sequence[Part] | None = None, free: Collection[str] = FREE) -> Plan:
    """The first of :func:`attempts` that fits into ``available`` bytes; the thriftiest one, with advice, if none does."""
    options = attempts(job, free)
    wanted = SEQUENCES if job.samples else SEQUENCES[-1:]
    thriftiest = None
    for rank, (sequences, option) in enumerate(itertools.product(wanted, options)):
        made = replace(plan(option, available, weights, sequences), rank=rank)
        if made.fits:
            return made
        if thriftiest is None or made.needed < thriftiest.needed:
            thriftiest = made
    return replace(thriftiest, rank=len(wanted) * len(options), changes=tuple(_changes(job, available, free)))


def _changes(job: Job, available: int, free: Collection[str]) -> Iterator[str]:
    """What to change about a job that does not fit, each line tried."""

    def best(opened: Collection[str] = FREE[1:], size: int = available, **values: Any) -> Plan:
        options = [plan(o, size) for o in attempts(replace(job, **values), {*free, *opened})]
        return min(options, key=lambda made: made.needed)

    if (made := best()).fits:
        yield "leave it to the plan: " + ", ".join(f"{k}: {_word(v)}" for k, v in made.settings.items())
        return
    lora = "use_peft: true, " if job.full else ""
    if job.full and best(full=False, base="bf16").fits:
        yield lora + "an adapter on frozen weights instead of training them all"
    elif job.base != "nf4" and "base" not in free and best(full=False, base="nf4").fits:
        yield lora + "load_in_4bit: true, the frozen base in 4 bit"
    if job.optimizer == "adamw" and best(optimizer="adamw_8bit").fits:
        yield "optim: adamw_8bit, two bytes of optimizer state a weight instead of eight"
    if job.kernels != "fused" and best(kernels="fused").fits:
        yield "fused kernels: activations without PEFT's copies"
    length = job.length
    while length > 256:
        length //= 2
        if best(length=length, prompt_length=None).fits:
            yield f"sequences of at most {length:,} tokens"
            break
    size = next((size for size in (24, 48, 80, 141) if best(size=size * GB).fits), None)
    yield f"a GPU of {size} GB" if size else "a smaller model: no GPU of up to 141 GB holds this one"


def as_dict(made: Plan) -> dict[str, Any]:
    """For ``--json``: plain values, bytes."""
    return {
        "model": made.job.shape.name,
        "method": made.job.method,
        "length": made.job.length,
        "base": made.job.base,
        "parameters": made.job.shape.parameters(),
        "parts": [{"name": p.name, "bytes": round(p.bytes), "when": p.when} for p in made.parts],
        "peaks": {name: round(value) for name, value in made.peaks.items()},
        "tensors": round(made.tensors),
        "needed": round(made.needed),
        "available": made.available,
        "fits": made.fits,
        "settings": made.settings,
        "changes": list(made.changes),
        "saved_per_token_and_layer": {k: round(v) for k, v in saved_per_token(made.job).items()},
    }
