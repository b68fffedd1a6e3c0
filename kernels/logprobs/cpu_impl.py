"""The compiled CPU kernel (csrc/cpu/logprobs.cpp): AVX-512, AVX2 or baseline, chosen when the program starts."""

from __future__ import annotations

# before _C: both use OpenMP, and the one libgomp of the process must be torch's
import torch
from torch import Tensor

from rlhf_fast.kernels.codes import DTYPE_CODES, address, matrix_arguments

try:
    from rlhf_fast import _C
except ImportError as error:
    _C, _WHY_NOT = None, f"the native module is not built ({error}); `pip install -e .` builds it"


def unsupported(op: str, *tensors: Tensor, **options) -> str | None:
    """Say why the kernel cannot run ``op`` on these tensors (the first holds the logits), or return None."""
    if _C is None:
        return _WHY_NOT
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"it runs on CPU tensors, not on {tensor.device}"
    if tensors and tensors[0].dtype not in DTYPE_CODES:
        return f"it takes float32, bfloat16 or float16 logits, not {tensors[0].dtype}"
    return None


def token_logprobs_forward(
    logits: Tensor, labels: Tensor, temperature: float, softcap: float | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logprobs and entropy, (N,) float32, and the log-sum-exp, (N,) float64; all 0 at ignored labels.

    The log-sum-exp is what the backward pass subtracts: in float32 it would be off by 4e-6 at logits near 100, one
    percent of p - 1 for a token with p = 0.9996.

    Args:
        logits: (N, V) float32, bfloat16 or float16, last dimension contiguous, any row stride, 0 too.
        labels: (N,) int64 in [0, V) or ``ignore_index``.
    Raises:
        IndexError: a label is out of range; names the row.
    """
    rows = len(logits)
    labels = labels.contiguous()
    logprobs, entropy = torch.empty(rows), torch.empty(rows)
    lse = torch.empty(rows, dtype=torch.float64)
    _C.cpu.token_logprobs_forward(
        *matrix_arguments(logits),
        labels.data_ptr(),
        ignore_index,
        temperature,
        softcap or 0.0,
        logprobs.data_ptr(),
        entropy.data_ptr(),
        lse.data_ptr(),
        torch.get_num_threads(),
    )
    return logprobs, entropy, lse


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
        logits, labels, temperature, softcap, ignore_index: those of the forward pass.
        lse, entropy: as the forward pass returned them.
        grad_logprobs, grad_entropy: (N,) float32. Rows where both are 0 get zeros; their logits are not read.
        out: float32, bfloat16 or float16, last dimension contiguous.
        logit_scale: what the logits are multiplied by first (``linear_logprobs``).
    """
    # every converted tensor keeps a name until the kernel has run: it holds the memory
    labels, entropy, grad_logprobs = labels.contiguous(), entropy.contiguous(), grad_logprobs.contiguous()
    lse = lse.double().contiguous()
    grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
    _C.cpu.token_logprobs_backward(
        *matrix_arguments(logits),
        labels.data_ptr(),
        ignore_index,
        temperature,
        softcap or 0.0,
        lse.data_ptr(),
        entropy.data_ptr(),
        grad_logprobs.data_ptr(),
        address(grad_entropy),
        logit_scale,
        out.data_ptr(),
        DTYPE_CODES[out.dtype],
        out.stride(0),
        torch.get_num_threads(),
    )
