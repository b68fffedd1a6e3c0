"""What a run holds, part by part: weights and optimizer state, activations, the loss, a rollout.

Each formula stands once, in :func:`resident`, :func:`passes` or :func:`rollout`, those of activations in :mod:`.activations`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from .activations import inner_gradients, keeps_inputs, saved_per_token
from .job import GB, Job, Part

# what linear_logprobs makes at a time on a GPU: float32 logits and 16-bit gradient rows (tested against the kernel's own)
HEAD_CHUNK_BYTES = 1_060_000_000
CPU_HEAD_CHUNK_BYTES, CPU_HEAD_MIN_ROWS, CPU_KEPT_BYTES = 48 << 20, 256, 1 << 30
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # 4 bits; an 8-bit constant per 64 of them, a float32 per 256 constants
_8BIT = 2 * (1 + 4 / 256)  # two moments, each with a float32 constant per 256 numbers
SAMPLING = ("prefill", "decode")
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": _8BIT, "paged_adamw_8bit": _8BIT}


def resident(job: Job) -> list[Part]:
    """Weights, gradients and optimizer state: there from the first step to the last."""
    shape, counts = job.shape, job.shape.parameters()
    frozen, critics = job.frozen, job.critics
    if job.full:
        trained = sum(counts.values())
        parts = [Part("weights, float32", 4 * trained, "always"), *_trained(job, trained, "all weights")]
        for name, place in zip(critics, ("second", "third")):
            parts += [Part(f"{name}, a {place} model", 4 * trained, "always"), *_trained(job, trained, f"the {name}")]
        if frozen:
            parts.append(Part(f"frozen models ({frozen})", 4 * frozen * trained, "always"))
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
        trained = adapter * (1 + len(critics))
        names = ("adapter", "both adapters", "three adapters")[len(critics)]
        parts += [Part(f"{names}, float32", 4 * trained, "always"), *_trained(job, trained, names)]
        if frozen:
            parts.append(Part(f"frozen adapters ({frozen})", 4 * frozen * adapter, "always"))
    if heads := 2 * len(critics) or int(job.method == "reward"):
        parts.append(Part("scalar heads", heads * 16 * (shape.hidden + 1), "always"))
    return parts


def _trained(job: Job, count: float, what: str) -> list[Part]:
    """What ``count`` trained float32 numbers bring besides themselves."""
    return [
        Part(f"gradients of {what}", 4 * count, "gradients"),
        Part(f"{job.optimizer} state of {what}", OPTIMIZER_BYTES[job.optimizer] * count, "always"),
    ]


def passes(job: Job, available: int | None = None) -> list[Part]:
    """What the largest micro-batch needs between the start of its forward and the end of its backward pass.

    Args:
        available: bytes of the device, of which a share bounds what is kept for a head that is trained.
    """
    s, n = job.shape, job.tokens
    saved, row = sum(saved_per_token(job).values()), n * s.hidden * job.stream_width
    parts = [
        Part("ids, positions, masks", 64 * n, "update"),
        Part("bfloat16 copies of the weights", _weight_copies(job), "update"),
    ]
    if not job.checkpointing:
        kept = row if keeps_inputs(job) else 0
        parts.append(Part("activations of all layers", s.layers * (kept + n * saved), "inputs"))
        live = 0.0
    else:
        # offloaded: one in use, one on its way, one leaving
        inputs = min(3, s.layers) if job.offload else s.layers
        parts.append(Part("inputs of the layers" + (", in flight" if job.offload else ""), inputs * row, "inputs"))
        live = n * saved
        if job.offload:
            parts.append(Part("inputs of the layers", s.layers * _pinned(row, job.device), "host"))
    parts += [
        Part("recomputed activations of a layer", live, "layer"),
        Part("gradients of a layer's ends", 2 * row, "layer"),
        _inside_mlp(job),
        Part("attention backward", 0 if job.device == "cpu" else 4 * n * (s.q_width + s.heads), "layer"),
    ]
    return [p for p in [*parts, *_head(job, available)] if p.bytes]


def _weight_copies(job: Job) -> int:
    """Bytes of what autocast keeps of float32 weights while a pass or a rollout goes on."""
    return 2 * sum(job.shape.parameters().values()) if job.full and job.width == 2 else 0


def _inside_mlp(job: Job) -> Part:
    """Gradients as wide as the MLP, as many as exist at once; or, later, two of them beside an expanded weight."""
    row = job.tokens * job.shape.intermediate
    gradients, weight = row * inner_gradients(job), expanded(job)
    if weight + 2 * row * job.width <= gradients or not weight:
        return Part("MLP's gradients", gradients, "layer")
    return Part("MLP's gradients, a weight expanded", weight + 2 * row * job.width, "layer")


def expanded(job: Job) -> int:
    """Bytes of the largest weight of a 4-bit base in the dtype of the pass: one at a time is multiplied with."""
    return job.width * max(x.inputs * x.outputs for x in job.shape.linears) if job.base == "nf4" else 0


def _pinned(size: float, device: str) -> float:
    """Bytes of a host buffer; torch rounds pinned ones up to a power of two."""
    return size if device == "cpu" else 2 ** math.ceil(math.log2(size))


def _head(job: Job, available: int | None) -> Iterator[Part]:
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
    if job.full or job.head_adapter:
        yield Part("gradient rows kept for the head", _kept_rows(job, available), "head")
    if job.full:
        yield Part("gradient of the head", 4 * s.vocab * s.hidden, "head")
    elif job.head_adapter:
        yield Part("low-rank inputs of the head, gradient", 2 * 4 * n * job.lora_r, "head")


def _kept_rows(job: Job, available: int | None) -> float:
    """Bytes of gradient rows, a vocabulary wide, that ``linear_logprobs`` holds where the head's gradient needs them.

    All of them if that is a small share of the device, else they are made again: no more than the share at a time.
    """
    share = CPU_KEPT_BYTES if job.device == "cpu" else (available or 32 * GB) // 32
    return min(job.tokens * 64 * math.ceil(job.shape.vocab / 64) * job.width, share)


def head_rows(tokens: int, vocab: int, device: str = "cuda") -> int:
    """Most tokens whose logits exist at a time, see ``kernels/linear_logprobs``."""
    if device == "cpu":
        limit = max(CPU_HEAD_MIN_ROWS, CPU_HEAD_CHUNK_BYTES // (4 * vocab))
        return math.ceil(tokens / math.ceil(tokens / limit))
    return 128 * min(max(HEAD_CHUNK_BYTES // ((4 + 2) * vocab) // 128, 1), max(math.ceil(tokens / 128), 1))


def rollout(job: Job, sequences: int) -> list[Part]:
    """What sampling ``sequences`` at a time needs, with either engine in process: for the prompts, and at the last token of all.

    Prompts are read at once, as rows as long as the longest, each once for all its samples.
    """
    s = job.shape
    prompt = job.prompt_length if job.prompt_length is not None else job.length // 4
    prompts = math.ceil(sequences / (job.num_generations if job.method == "grpo" else 1))
    room = min(prompt + max(32, prompt // 4), job.length)  # of a cache's buffers, which grow by a quarter
    cache = sequences * job.length * kv_per_token(job)
    sampling = _sampling(job, sequences)
    # a layer's buffers grow by copying them; logits of the step before are still there
    growing = cache / s.layers + sequences * s.vocab * 4
    return [
        Part("keys and values of the prompts", prompts * room * kv_per_token(job), "prefill"),
        Part("prompts in a layer", _prompts_in_a_layer(job, prompts * prompt), "prefill"),
        Part("mask of the prompts", prompts * prompt**2, "prefill"),
        Part(f"keys and values of {sequences} sequences", cache, "decode"),
        max(
            Part("sampling a token", sampling, "decode"),
            Part("a layer's keys and values again, logits", growing, "decode"),
            key=lambda part: part.bytes,
        ),
        *(Part("weights with the adapter in them", job.merged_bytes, x) for x in SAMPLING if job.merged_bytes),
        *(Part("weights in bfloat16 to multiply with", expanded(job) + _weight_copies(job), x) for x in SAMPLING),
    ]


def _sampling(job: Job, sequences: int) -> int:
    """Bytes of drawing a token for each: logits, log-probabilities and probabilities in float32; in float64 the latter again, and
    their running sums."""
    return sequences * job.shape.vocab * (3 * 4 + 2 * 8)


def _graphs(job: Job, sequences: int) -> int:
    """Bytes of the buffer that all graphs of a slot engine leave their logits in."""
    return 0 if job.device == "cpu" else sequences * job.shape.vocab * job.width


def _prompts_in_a_layer(job: Job, tokens: int) -> int:
    """Bytes of what a layer makes of prompts of so many tokens, before its last linear."""
    return tokens * job.width * (3 * job.shape.intermediate + 6 * job.shape.hidden)


def kv_tokens(job: Job, room: float, sequences: int, prefill: int) -> int:
    """How many tokens' keys and values fit into ``room`` bytes beside what a slot engine needs for anything else.

    Args:
        sequences: sampled at a time.
        prefill: most prompt tokens of a pass.
    """
    passing = max(_sampling(job, sequences), _prompts_in_a_layer(job, prefill)) + sequences * job.shape.vocab * 4
    left = room - passing - _graphs(job, sequences) - expanded(job) - _weight_copies(job)
    # a layer's buffers grow by copying them
    return max(0, int(left / (kv_per_token(job) * (1 + 1 / job.shape.layers))))


def rollout_peak(parts: Sequence[Part]) -> float:
    """Bytes at the worse of the two moments."""
    return max(sum(p.bytes for p in parts if p.when == when) for when in SAMPLING)


def kv_per_token(job: Job) -> int:
    """Bytes of a token's keys and values in all layers."""
    return 2 * job.shape.layers * job.shape.kv_width * job.width
