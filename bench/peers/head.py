"""Log-probabilities and cross entropy from hidden states (N, D) and the head's weight (V, D); shapes are (N, D, V)."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy, linear

from bench.harness import BOTH, FORWARD, Contender, Task, needs, ours
from rlhf_fast.kernels import linear_cross_entropy, linear_logprobs

TRAINED = BOTH + ", trained head"
SHAPES = {
    "cpu": ((512, 896, 32000), (4096, 896, 32000), (512, 896, 151936)),
    "cuda": ((8192, 4096, 128256), (8192, 3584, 151936)),
    "dry": ((6, 8, 128),),
}


def make(shape, dtype, device):
    """Logits of spread 3, every eighth label a confident one."""
    n, width, vocab_size = shape
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(n, width, generator=generator, device=device)
    weight = torch.randn(vocab_size, width, generator=generator, device=device).mul_(3 * width**-0.5)
    labels = torch.randint(vocab_size, (n,), generator=generator, device=device)
    hidden[::8] += 3 * weight[labels[::8]]
    return {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "labels": labels}


def fused(hidden, weight, labels):
    return linear_logprobs(hidden, weight, labels)


def gemms(hidden, weight, labels):
    """The matrix products alone, over all rows at once: the floor, not an answer."""
    return _Products.apply(hidden, weight)


class _Products(torch.autograd.Function):
    """hidden @ weight^T forward; as many products of the same size backward as gradients are wanted."""

    @staticmethod
    def forward(ctx, hidden, weight):
        logits = hidden @ weight.t()
        ctx.save_for_backward(hidden, weight, logits)
        return logits[:, 0]

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, logits = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad
        return logits @ weight if need_hidden else None, logits.t() @ hidden if need_weight else None


def eager(hidden, weight, labels):
    log_p = linear(hidden, weight).float().log_softmax(-1)
    return log_p.gather(-1, labels[:, None])[:, 0]


def definition(hidden, weight, labels):
    return linear(hidden, weight).log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def trl(hidden, weight, labels):
    """As TRL 1.16's trainers call it, 32,768 words at a time; nothing but log-probabilities is asked for."""
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32768, None, 1.0, ())[0]


def liger(hidden, weight, labels):
    """Its per-token path: chunks of 512 tokens in PyTorch, or the kernels that it has for the device."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, labels)


def cce(hidden, weight, labels):
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, labels, reduction="none", impl="cce")


def cce_exact(hidden, weight, labels):
    """Without dropping small gradients."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, labels, reduction="none", filter_eps=None, impl="cce")


# the summed loss of SFT


def gemms_loss(hidden, weight, labels):
    return gemms(hidden, weight, labels)[0]


def fused_loss(hidden, weight, labels):
    return linear_cross_entropy(hidden, weight, labels, reduction="sum")


def eager_loss(hidden, weight, labels):
    return cross_entropy(linear(hidden, weight).float(), labels, reduction="sum")


def definition_loss(hidden, weight, labels):
    return cross_entropy(linear(hidden, weight), labels, reduction="sum")


def liger_loss(hidden, weight, labels):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="sum")


def cce_loss(hidden, weight, labels):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, labels, reduction="sum", impl="cce")


def cce_compiled_loss(hidden, weight, labels):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, labels, reduction="sum", impl="torch_compile")


def quack_loss(hidden, weight, labels):
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, labels, reduction="sum")


def whole_logits(copies):
    """Bytes of that many float32 (N, V) tensors."""
    return lambda shape: copies * 4 * shape[0] * shape[2]


def work(shape, passed):
    products = {FORWARD: 1, BOTH: 2, TRAINED: 3}[passed]
    return products * 2 * shape[0] * shape[1] * shape[2]


def tasks(device):
    dtypes = ("bf16",) if device == "cuda" else ("fp32",)
    common = {
        "family": "linear_logprobs",
        "make": make,
        "passes": {FORWARD: (), BOTH: ("hidden",), TRAINED: ("hidden", "weight")},
        "shapes": SHAPES,
        "dtypes": dtypes,
        "rows": ("hidden", "labels"),
        "flops": work,
    }
    bound = {"ceiling": True, "peak": whole_logits(1)}
    per_token = (
        *ours(fused, "linear_logprobs", "linear_logprobs", device),
        Contender("its GEMMs alone", gemms, **bound),
        Contender("torch eager", eager, peak=whole_logits(4)),
        Contender("torch.compile", eager, compiled=True, peak=whole_logits(4)),
        Contender("TRL", trl, needs("trl")),
        Contender("Liger", liger, needs("liger_kernel")),
        Contender("cut-cross-entropy", cce, needs("cut_cross_entropy", cuda=True)),
        Contender("cut-cross-entropy, exact", cce_exact, needs("cut_cross_entropy", cuda=True)),
    )
    summed = (
        *ours(fused_loss, "linear_logprobs", "linear_cross_entropy", device),
        Contender("its GEMMs alone", gemms_loss, **bound),
        Contender("torch eager", eager_loss, peak=whole_logits(4)),
        Contender("torch.compile", eager_loss, compiled=True, peak=whole_logits(4)),
        Contender("Liger", liger_loss, needs("liger_kernel", cuda=True)),
        Contender("cut-cross-entropy", cce_loss, needs("cut_cross_entropy", cuda=True)),
        Contender(
            "cut-cross-entropy, torch.compile", cce_compiled_loss, needs("cut_cross_entropy"), peak=whole_logits(4)
        ),
        Contender("quack", quack_loss, needs("quack", cuda=True)),
    )
    return [
        Task("linear_logprobs", definition=definition, contenders=per_token, **common),
        Task("linear_cross_entropy", definition=definition_loss, contenders=summed, **common),
    ]
