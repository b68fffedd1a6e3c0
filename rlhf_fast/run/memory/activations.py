"""What autograd keeps of a token in a layer, and the gradients that are there at once when the layer goes backward.

Which layers run fused is known by architecture (:class:`Runs`); what is kept was counted tensor by tensor on real models of
each (``tests/run/memory/test_activations.py``).
"""

from __future__ import annotations

from typing import NamedTuple

from .job import Job


class Runs(NamedTuple):
    """Which of a layer's modules run ours."""

    lora: bool
    mlp: bool
    norm: bool

    @classmethod
    def of(cls, job: Job) -> Runs:
        ours, t = job.kernels == "fused", job.shape.traits
        lora = ours and not job.full and t.gated  # GPT-2's linears are none of torch's
        adapted = any(x.name.startswith("mlp.") for x in job.adapted)
        return cls(lora, lora and adapted and not t.fused, ours and t.gated)


def saved_per_token(job: Job) -> dict[str, float]:
    """Bytes that autograd keeps of one token in one layer besides the layer's input, tensor by tensor.

    Fused: what the backward pass cannot recompute cheaply, in the dtype of the pass. PEFT: its adapters take a float32 copy of
    their input each, transformers' norm computes in float32, SwiGLU keeps every factor. In float32 the copies are none.
    """
    groups = (_residual_stream(job), _inputs_of_linears(job), _attention(job), _mlp(job))
    return {name: size for group in groups for name, size in group.items() if size}


def keeps_inputs(job: Job) -> bool:
    """Whether a layer that is not checkpointed keeps its input: transformers' RMSNorm keeps a float32 copy instead."""
    return job.full or job.width == 4 or Runs.of(job).norm or not job.shape.traits.gated


def _residual_stream(job: Job) -> dict[str, float]:
    """Inputs of the norms; the first one's is the layer's."""
    s, t = job.shape, job.shape.traits
    # qk_norm reads queries and keys in the dtype of the pass
    row, heads = t.norms * s.hidden, t.qk_norm * (s.q_width + s.kv_width)
    statistics = 4 * t.norms + 4 * t.qk_norm * (s.heads + s.kv_heads)
    if not keeps_inputs(job):
        return {"float32 residual stream": 4 * (row + heads), "norms' statistics": statistics}
    kept = {"residual stream": job.stream_width * (row - s.hidden), "norms' statistics": statistics}
    if not job.full:
        return {**kept, "queries, keys before their norm": job.width * heads}
    normalised = 0 if Runs.of(job).norm or not t.gated else row + heads
    return {**kept, "queries, keys before their norm": 4 * heads, "normalised": 4 * normalised}


def _inputs_of_linears(job: Job) -> dict[str, float]:
    """Of those that are trained or have an adapter, unless something else keeps the same tensor."""
    s, w, runs = job.shape, job.width, Runs.of(job)
    if job.full and w == 2:  # under autocast each casts its own
        return {"inputs of linears": w * sum(x.inputs for x in s.linears if x.reads == "norm") + w * s.intermediate}
    low_rank = 0 if runs.lora else 4 * job.lora_r * len(job.adapted)
    if not (job.full or runs.lora or w == 4):
        return {"float32 inputs of adapters": 4 * sum(x.inputs for x in job.adapted), "x A": low_rank}
    trained = s.linears if job.full else job.adapted
    reads = {x.reads for x in trained}
    # what an RMSNorm returns our layers make again from the residual stream; linears on the same norm share it
    normed = 0 if runs.lora and runs.norm else len({x.name.split(".")[0] for x in trained if x.reads == "norm"})
    inputs = {"normed inputs": w * s.hidden * normed, "x A": low_rank}
    if job.device == "cpu" and "attention" in reads:  # works in padded tables
        inputs["output in packed order"] = w * s.q_width
    if "product" in reads and not runs.mlp:
        inputs["product in the MLP"] = w * s.intermediate
    return inputs


def _attention(job: Job) -> dict[str, float]:
    s, w, t = job.shape, job.width, job.shape.traits
    cpu = job.device == "cpu"
    repeated = s.q_width if cpu and w == 4 else s.kv_width  # grouped heads, which our attention repeats there
    kept = {"queries, keys, values, output": w * (2 * s.q_width + 2 * repeated), "attention statistics": 4 * s.heads}
    if t.fused and t.gated and not cpu:  # values are a view of them all
        kept["queries, keys before their rotation"] = w * (s.q_width + s.kv_width)
    return kept


def _mlp(job: Job) -> dict[str, float]:
    """Inside of the MLP, the input of its last linear apart."""
    i, w = job.shape.intermediate, job.width
    if Runs.of(job).mlp:
        return {"gate and up": 2 * w * i}
    if job.shape.traits.gated:
        return {"gate, up, act(gate)": 3 * w * i}
    return {"x, x / 2, tanh, 1 + tanh of gelu": 4 * w * i}  # transformers' gelu_new, written out


def inner_gradients(job: Job) -> int:
    """Bytes per token and unit of the MLP's inner width, at the moment when the most of its gradients exist."""
    w, cpu, runs = job.width, job.device == "cpu", Runs.of(job)
    if job.full:
        return 2 * w  # through the weight, and that of one factor
    if runs.mlp:
        if cpu:  # plain PyTorch: the gradient, and in float32 the gate, its sigmoid, value and slope
            return w + (3 if w == 4 else 4) * 4
        return 3 * w  # the product again, gradients of gate and up
    if runs.lora:
        # of the product and its two factors, the product itself gone; a CPU multiplies a float32 copy of it
        return w + 4 if cpu and w == 2 else 2 * w
    # PEFT: of the product through the weight, and through the adapter in float32; its cast and the sum where it is gated
    return 2 * 4 if w == 4 else 2 + 4 + 2 * 2 * job.shape.traits.gated
