"""The compiled CPU kernel (csrc/cpu/attention.cpp): reads each key and value that counts once, and nothing else."""

from __future__ import annotations

# before _C: both use OpenMP, and the one libgomp of the process must be torch's
import torch
from torch import Tensor

from rlhf_fast.kernels.codes import DTYPE_CODES

try:
    from rlhf_fast import _C
except ImportError as error:
    _C, _WHY_NOT = None, f"the native module is not built ({error}); `pip install -e .` builds it"

WIDEST = 512  # numbers of a head: what the kernel has room for on its stack


def unsupported(op: str, *tensors: Tensor, **options) -> str | None:
    """Say why the kernel cannot run ``op`` on these tensors (query, keys, values), or return None."""
    if _C is None:
        return _WHY_NOT
    if not hasattr(_C.cpu, "decode_attention"):
        return "the native module is older than this checkout; `pip install -e .` builds it anew"
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"it runs on CPU tensors, not on {tensor.device}"
        if tensor.dtype not in DTYPE_CODES:
            return f"it takes float32, bfloat16 or float16, not {tensor.dtype}"
        if tensor.shape[-1] > WIDEST:
            return f"heads are wider than {WIDEST}"
    return None


def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float, window: int, longest: int
) -> Tensor:
    """Return (B, H, dv) in the type of ``query``.

    Args:
        query: (B, H, d) float32, bfloat16 or float16, contiguous.
        keys, values: (R, Hk, S, d) and (R, Hk, S, dv) of the same type, their last dimension contiguous.
        lengths: (B,) integers.
        scale: of the scores.
        window, longest: at most S.
    Raises:
        ValueError: a length is negative or above ``longest``.
    """
    lengths = lengths.to(torch.int64).contiguous()
    out = query.new_empty(*query.shape[:2], values.shape[3])
    _C.cpu.decode_attention(
        query.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        lengths.data_ptr(),
        DTYPE_CODES[query.dtype],
        *query.shape,
        values.shape[3],
        keys.shape[1],
        *keys.stride()[:3],
        *values.stride()[:3],
        scale,
        window,
        longest,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
