"""The compiled CUDA kernels of the logits (csrc/cuda/logprobs.cuh): a block per row, read once, no warm-up."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.kernels import cuda_impl as cuda
from rlhf_fast.kernels.codes import DTYPE_CODES, address, matrix_arguments

_C = cuda._C


def unsupported(op: str, *tensors: Tensor, **options) -> str | None:
    """Say why the kernel cannot run ``op`` on these tensors (the first holds the logits), or return None."""
    if tensors and tensors[0].is_cuda and tensors[0].dtype not in DTYPE_CODES:
        return f"it takes float32, bfloat16 or float16 logits, not {tensors[0].dtype}"
    return cuda.unsupported(*tensors)


def token_logprobs_forward(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logprobs and entropy, (N,) float32, and the log-sum-exp, (N,) float64; all 0 at ignored labels.

    Args:
        logits: (N, V) float32, bfloat16 or float16, last dimension contiguous, any row stride, 0 too.
        labels: (N,) int64; the logprob of one that is neither in [0, V) nor ``ignore_index`` is NaN.
        logit_scale: what the logits are multiplied by first (``linear_logprobs``).
    """
    labels = labels.contiguous()
    logprobs, entropy, lse = results = empty_results(logits)
    with cuda.launch_on(logits.device) as stream:
        _C.cuda.token_logprobs_forward(
            *matrix_arguments(logits),
            labels.data_ptr(),
            ignore_index,
            logit_scale,
            temperature,
            softcap or 0.0,
            logprobs.data_ptr(),
            entropy.data_ptr(),
            lse.data_ptr(),
            stream,
        )
    return results


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
    """Write d loss / d logits, (N, V), into ``out``, which may be ``logits`` itself if the dtypes agree.

    Args:
        logits, labels, temperature, softcap, ignore_index, logit_scale: those of the forward pass.
        lse, entropy: as the forward pass returned them.
        grad_logprobs, grad_entropy: (N,) float32. Rows where both are 0 get zeros; their logits are not read.
        out: of the logits' dtype, or any if they are float32; last dimension contiguous.
    """
    # every converted tensor keeps a name until the kernel is launched: it holds the memory
    labels, entropy, lse = labels.contiguous(), entropy.contiguous(), lse.double().contiguous()
    grad_logprobs = grad_logprobs.contiguous()
    grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
    with cuda.launch_on(logits.device) as stream:
        _C.cuda.token_logprobs_backward(
            *matrix_arguments(logits),
            labels.data_ptr(),
            ignore_index,
            logit_scale,
            temperature,
            softcap or 0.0,
            lse.data_ptr(),
            entropy.data_ptr(),
            grad_logprobs.data_ptr(),
            address(grad_entropy),
            out.data_ptr(),
            DTYPE_CODES[out.dtype],
            out.stride(0),
            stream,
        )


def empty_results(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logprobs and entropy in float32, log-sum-exp in float64, (N,) each."""
    dtypes = (torch.float32, torch.float32, torch.float64)
    return tuple(torch.empty(len(logits), dtype=dtype, device=logits.device) for dtype in dtypes)
