"""Log-probabilities from logits (N, V) and labels (N,)."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from bench.harness import BACKWARD, BOTH, FORWARD, Contender, Task, needs, ours
from rlhf_fast.kernels import sequence_logprobs, token_logprobs

LOGITS = {
    "cpu": ((512, 32000), (512, 151936)),
    "cuda": ((8192, 128256), (4096, 151936)),
    "dry": ((5, 83),),
}


def make_logits(shape, dtype, device):
    """Random logits, every eighth label a confident one (p > 0.999)."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(shape, generator=generator, device=device).mul_(3).to(dtype)
    labels = torch.randint(shape[1], shape[:1], generator=generator, device=device)
    logits[::8].scatter_(1, labels[::8, None], 32.0)
    return {"logits": logits, "labels": labels}


def fused(logits, labels):
    return token_logprobs(logits, labels, entropy=True)


def fused_in_place(logits, labels):
    return token_logprobs(logits, labels, entropy=True, inplace_backward=True)


def eager(logits, labels):
    log_p = logits.float().log_softmax(-1)
    logprobs = log_p.gather(-1, labels[:, None])[:, 0]
    return logprobs, -(log_p.exp() * log_p).sum(-1)


def eager_narrow(logits, labels):
    """In the logits' own dtype: less work in 16 bits, and a log-probability that is off by up to 0.03."""
    log_p = logits.log_softmax(-1)
    logprobs = log_p.gather(-1, labels[:, None])[:, 0]
    return logprobs, -(log_p.exp() * log_p).sum(-1)


def eager_logsumexp(logits, labels):
    """Without a tensor of log-probabilities: entropy = logsumexp - sum(p * logits), as verl writes it."""
    logits = logits.float()
    lse = logits.logsumexp(-1)
    logprobs = logits.gather(-1, labels[:, None])[:, 0] - lse
    return logprobs, lse - (logits.softmax(-1) * logits).sum(-1)


def trl(logits, labels):
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    return selective_log_softmax(logits, labels), entropy_from_logits(logits)


def trl_fused(logits, labels):
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(logits, labels)


# without entropy


def fused_alone(logits, labels):
    return token_logprobs(logits, labels)


def fused_alone_in_place(logits, labels):
    return token_logprobs(logits, labels, inplace_backward=True)


def eager_alone(logits, labels):
    return logits.float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def definition_alone(logits, labels):
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def eager_cross_entropy(logits, labels):
    return -cross_entropy(logits.float(), labels, reduction="none")


def trl_alone(logits, labels):
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(logits, labels)


def liger_alone(logits, labels):
    """Its forward pass writes the gradient over the logits."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    return -liger_cross_entropy(logits, labels, reduction="none")


def quack_alone(logits, labels):
    from quack.cross_entropy import cross_entropy

    return -cross_entropy(logits, labels, reduction="none")


# sums over sequences: logprobs, mask (B, T)


def make_sequences(shape, dtype, device):
    generator = torch.Generator(device).manual_seed(0)
    logprobs = torch.randn(shape, generator=generator, device=device).abs_().neg_().to(dtype)
    lengths = torch.randint(1, shape[1] + 1, shape[:1], generator=generator, device=device)
    return {"logprobs": logprobs, "mask": torch.arange(shape[1], device=device) < lengths[:, None]}


def summed(logprobs, mask):
    return sequence_logprobs(logprobs, mask)


def eager_summed(logprobs, mask):
    return (logprobs * mask).sum(-1)


def traffic(shape, size, passed):
    """Logits read once, written once as gradient (and read again for that)."""
    return shape[0] * shape[1] * size * {FORWARD: 1, BACKWARD: 2, BOTH: 3}[passed]


def tasks(device):
    def of(**more):
        wanted = {FORWARD: (), BOTH: ("logits",)} | ({BACKWARD: ("logits",)} if device == "cuda" else {})
        common = {"family": "logprobs", "make": make_logits, "passes": wanted, "shapes": LOGITS, "moved": traffic}
        return Task(
            "token_logprobs",
            dtypes=("bf16",) if device == "cuda" else ("fp32", "bf16"),
            rows=("logits", "labels"),
            **common,
            **more,
        )

    with_entropy = (
        *ours(fused, "logprobs", "token_logprobs", device),
        Contender("rlhf_fast, in place", fused_in_place, passes=(BOTH, BACKWARD), ours=True, spoils=True),
        Contender("torch eager", eager),
        Contender("torch eager, logits' dtype", eager_narrow),
        Contender("torch eager, logsumexp", eager_logsumexp),
        Contender("torch.compile", eager, compiled=True),
        Contender("torch.compile, logsumexp", eager_logsumexp, compiled=True),
        Contender("TRL", trl, needs("trl")),
        Contender("TRL, one pass", trl_fused, needs("trl")),
    )
    alone = (
        *ours(fused_alone, "logprobs", "token_logprobs", device),
        Contender("rlhf_fast, in place", fused_alone_in_place, passes=(BOTH, BACKWARD), ours=True, spoils=True),
        Contender("torch eager", eager_alone),
        Contender("torch eager, cross_entropy", eager_cross_entropy),
        Contender("torch.compile", eager_alone, compiled=True),
        Contender("TRL", trl_alone, needs("trl")),
        # its gradient is ready after the forward pass, so a backward pass alone says nothing
        Contender("Liger", liger_alone, needs("liger_kernel", cuda=True), passes=(FORWARD, BOTH), spoils=True),
        Contender("quack", quack_alone, needs("quack", cuda=True)),
    )
    sums = Task(
        "sequence_logprobs",
        "logprobs",
        make_sequences,
        eager_summed,
        (
            *ours(summed, "logprobs", "sequence_logprobs", device),
            Contender("torch eager", eager_summed),
            Contender("torch.compile", eager_summed, compiled=True),
        ),
        {FORWARD: (), BOTH: ("logprobs",)},
        {"cpu": ((512, 1024),), "cuda": ((2048, 1024),), "dry": ((3, 7),)},
    )
    return [
        of(variant="with entropy", definition=eager_narrow, contenders=with_entropy),
        of(variant="logprobs only", definition=definition_alone, contenders=alone),
        sums,
    ]
