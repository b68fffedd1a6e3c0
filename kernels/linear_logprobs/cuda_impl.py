"""The compiled CUDA kernel between the two matrix products (csrc/cuda/logprobs.cuh)."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.kernels import cuda_impl as cuda
from rlhf_fast.kernels.codes import DTYPE_CODES
from rlhf_fast.kernels.logprobs.cuda_impl import (
    empty_results,
    token_logprobs_forward,
)

_C = cuda._C

__all__ = ["head_rows", "unsupported"]


def unsupported(op: str, *tensors: Tensor, **options) -> str | None:
    """Say why the kernel cannot run ``op`` on these tensors (the first holds the raw logits), or return None."""
    if tensors and tensors[0].is_cuda and tensors[0].dtype != torch.float32:
        return f"it takes float32 logits, not {tensors[0].dtype}"
    return cuda.unsupported(*tensors)


def head_rows(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    logit_scale: float,
    out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logprobs and entropy, (n,) float32, and the log-sum-exp, (n,) float64, of a chunk of raw logits.

    Args:
        logits: (n, V) float32, the matrix product (and bias) before any scaling.
        labels: (n,) int64; one that is neither in [0, V) nor ``ignore_index`` gives a row of NaN.
        out: None, or (n, V) float32, bfloat16 or float16 that takes U = d logprob / d raw logits; may be ``logits``.
            The label's p - 1 is formed before rounding. Rows of ignored labels are 0.
    """
    if out is None:
        return token_logprobs_forward(logits, labels, temperature, softcap, ignore_index, logit_scale)
    labels = labels.contiguous()
    logprobs, entropy, lse = results = empty_results(logits)
    with cuda.launch_on(logits.device) as stream:
        _C.cuda.head_rows(
            logits.data_ptr(),
            *logits.shape,
            logits.stride(0),
            labels.data_ptr(),
            ignore_index,
            logit_scale,
            temperature,
            softcap or 0.0,
            logprobs.data_ptr(),
            entropy.data_ptr(),
            lse.data_ptr(),
            out.data_ptr(),
            DTYPE_CODES[out.dtype],
            out.stride(0),
            stream,
        )
    return results
