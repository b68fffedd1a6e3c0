"""The definitions, in plain PyTorch: what the tests trust and what runs when no kernel applies."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.kernels.segments import promote


def unsupported(op: str, *tensors: Tensor, **options) -> str | None:
    return None


def transform(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """Return what the softmax is taken of, in working precision."""
    z = promote(logits)
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


def transform_slope(logits: Tensor, temperature: float, softcap: float | None) -> Tensor | float:
    """Return d transform / d logits."""
    if softcap is None:
        return 1.0 / temperature
    return (1.0 - torch.tanh(promote(logits) / softcap).square()) / temperature


def _normalise(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return log softmax (N, V) and logsumexp (N,), the latter in float64."""
    peak = z.amax(-1)
    # all -inf: any finite offset keeps the sum at 0 instead of NaN
    offset = torch.where(peak == float("-inf"), 0.0, peak)
    # in float64: beside the 1 of a token that is almost certain, a float32 sum loses the others
    log_sum = (z - offset[:, None]).exp().sum(-1, dtype=torch.float64).log()
    return (z - offset[:, None]) - log_sum.to(z.dtype)[:, None], offset.double() + log_sum


def log_softmax(z: Tensor, lse: Tensor) -> Tensor:
    """z - lse with the float64 lse subtracted in two parts, so that nothing of its precision is lost."""
    high = lse.to(z.dtype)
    return (z - high[:, None]) - (lse - high).to(z.dtype)[:, None]


def token_logprobs_forward(
    logits: Tensor, labels: Tensor, temperature: float, softcap: float | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logprobs, entropy and logsumexp of each row, (N,) each; the logsumexp in float64.

    In float32 it would be off by 4e-6 at logits near 100: 1% of p - 1 for a token with p = 0.9996.
    """
    z = transform(logits, temperature, softcap)
    log_p, lse = _normalise(z)
    keep, inside = labels != ignore_index, (labels >= 0) & (labels < z.shape[1])
    picked = log_p.gather(1, torch.where(inside, labels, 0)[:, None])[:, 0]
    logprobs = torch.where(keep, torch.where(inside, picked, float("nan")), 0.0)
    p = log_p.exp()
    # p log p is 0 at p = 0, where log p may be -inf
    entropy = -torch.where(p == 0, 0.0, p * log_p).sum(-1)
    return logprobs, torch.where(keep, entropy, 0.0), lse


def token_logprobs_backward(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    out: Tensor,
    logit_scale: float = 1.0,
) -> None:
    """Write d loss / d logits into ``out``, which may be ``logits`` itself; they are multiplied by logit_scale first."""
    if logit_scale != 1.0:
        logits, grad_logprobs = logits * logit_scale, grad_logprobs * logit_scale
        grad_entropy = None if grad_entropy is None else grad_entropy * logit_scale
    keep, inside = labels != ignore_index, (labels >= 0) & (labels < logits.shape[1])
    grad = torch.where(inside, grad_logprobs, float("nan"))[:, None]
    z = transform(logits, temperature, softcap)
    # of logits as large as the lowest finite number, adding log(sum) leaves nothing: it is formed again
    log_p = torch.where(lse.abs()[:, None] > 1e7, _normalise(z)[0], log_softmax(z, lse))
    p = log_p.exp()
    d_z = -grad * p
    d_z.scatter_add_(1, torch.where(inside, labels, 0)[:, None], grad)
    if grad_entropy is not None:
        d_z -= grad_entropy[:, None] * torch.where(p == 0, 0.0, p * (log_p + entropy[:, None]))
    d_z *= transform_slope(logits, temperature, softcap)
    out.copy_(torch.where(keep[:, None], d_z, 0.0))
