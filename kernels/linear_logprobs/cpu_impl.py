"""The compiled CPU kernel between the two matrix products (csrc/cpu/logprobs.cpp)."""

from __future__ import annotations

# before _C: both use OpenMP, and the one libgomp of the process must be torch's
import torch
from torch import Tensor

from rlhf_fast.kernels.codes import DTYPE_CODES
from rlhf_fast.kernels.logprobs.cpu_impl import unsupported

try:
    from rlhf_fast import _C
except ImportError:
    _C = None  # `unsupported` says why

__all__ = ["head_rows", "unsupported"]


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
        labels: (n,) int64.
        out: None, or (n, V) float32, bfloat16 or float16 that takes U = d logprob / d raw logits; may be ``logits``.
            The label's p - 1 is formed in float32, before rounding. Rows of ignored labels are 0.
    Raises:
        IndexError: a label is out of range; names the row.
    """
    rows, columns = logits.shape
    labels = labels.contiguous()
    logprobs, entropy = torch.empty(rows), torch.empty(rows)
    lse = torch.empty(rows, dtype=torch.float64)
    _C.cpu.head_rows(
        logits.data_ptr(),
        rows,
        columns,
        logits.stride(0),
        labels.data_ptr(),
        ignore_index,
        logit_scale,
        temperature,
        softcap or 0.0,
        logprobs.data_ptr(),
        entropy.data_ptr(),
        lse.data_ptr(),
        *((0, 0, 0) if out is None else (out.data_ptr(), DTYPE_CODES[out.dtype], out.stride(0))),
        torch.get_num_threads(),
    )
    return logprobs, entropy, lse
