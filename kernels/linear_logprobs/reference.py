"""The definitions, in plain PyTorch: what the tests trust and what runs when no kernel applies."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.kernels.logprobs import reference as logprobs


def unsupported(op: str, *tensors: Tensor, **options) -> str | None:
    return None


def head_rows(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    logit_scale: float,
    out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logprobs, entropy and logsumexp of rows of raw logits, (n,) each.

    ``out`` (n, V), which may be ``logits`` itself, receives d logprob / d logits. The label's 1 - p is computed in
    float32 and rounded once: rounding p first would leave nothing of it for confident tokens.
    """
    scaled = logits if logit_scale == 1.0 else logits * logit_scale
    results = logprobs.token_logprobs_forward(scaled, labels, temperature, softcap, ignore_index)
    if out is not None:
        _, entropy, lse = results
        ones, options = torch.ones_like(entropy), (temperature, softcap, ignore_index)
        logprobs.token_logprobs_backward(logits, labels, lse, entropy, ones, None, *options, out, logit_scale)
    return results
