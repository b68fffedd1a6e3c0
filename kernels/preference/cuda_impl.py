"""The compiled CUDA kernel of the preference losses (csrc/cuda/preference.cuh): everything of a pair in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.kernels import cuda_impl as cuda

from .reference import KINDS

_C = cuda._C
# the order of the enum of csrc/ops.h is that of the reference's table
CODES = {kind: code for code, kind in enumerate(KINDS)}


def unsupported(op: str, *tensors: Tensor, **options) -> str | None:
    """Say why the kernel cannot run ``op`` on these tensors, or return None. 16-bit ones come to it in float32."""
    return cuda.unsupported(*tensors)


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    kind: str,
    label_smoothing: float,
    need_slopes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the losses, both rewards, and d loss / d chosen and rejected as (2, ...), or (0,) if not needed.

    Args:
        chosen, rejected, ref_chosen, ref_rejected: float32, contiguous, of one shape.
    """
    losses, chosen_rewards, rejected_rewards = results = tuple(torch.empty_like(chosen) for _ in range(3))
    slopes = chosen.new_empty((2, *chosen.shape) if need_slopes else (0,))
    with cuda.launch_on(chosen.device) as stream:
        _C.cuda.dpo_loss(
            chosen.data_ptr(),
            rejected.data_ptr(),
            ref_chosen.data_ptr(),
            ref_rejected.data_ptr(),
            chosen.numel(),
            beta,
            label_smoothing,
            CODES[kind],
            losses.data_ptr(),
            chosen_rewards.data_ptr(),
            rejected_rewards.data_ptr(),
            slopes.data_ptr(),
            stream,
        )
    return *results, slopes
