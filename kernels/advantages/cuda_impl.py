"""The compiled CUDA kernels of generalized advantage estimation (csrc/cuda/gae.cuh): one affine scan, two users."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.kernels import cuda_impl as cuda
from rlhf_fast.kernels.codes import ESTIMATOR_CODES, address

_C = cuda._C


def unsupported(op: str, *tensors: Tensor, **options) -> str | None:
    """Say why the kernel cannot run ``op`` on these tensors, or return None.

    ``gae`` is asked with what it is given (rewards, values, mask), ``kl_shaped_gae`` before its tensors become float32.
    """
    if op != "kl_shaped_gae":
        for tensor in tensors[:2]:
            if tensor.device.type == "cuda" and tensor.dtype != torch.float32:
                return f"it takes float32 rewards and values, not {tensor.dtype}"
    return cuda.unsupported(*tensors)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, (B, T) float32, 0 where masked, on the current stream.

    Args:
        rewards, values: (B, T) float32, contiguous.
        mask: (B, T) bool, contiguous.
        bootstrap: (B,) float32, the value after the last token, or None for 0.
    """
    return gae_packed(rewards, values, mask, bootstrap, None, gamma, lam)


def gae_packed(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """The same over packed sequences: (N,) tokens, ``cu_seqlens`` (B + 1,) int32 on the same device, rising to N."""
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    with cuda.launch_on(rewards.device) as stream:
        _C.cuda.gae(
            rewards.data_ptr(),
            values.data_ptr(),
            mask.data_ptr(),
            address(bootstrap),
            *cuda.extent(rewards, cu_seqlens),
            gamma,
            lam,
            advantages.data_ptr(),
            returns.data_ptr(),
            stream,
        )
    return advantages, returns


def kl_shaped_gae(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    kl_coef: float,
    estimator: str,
    clip: float | None,
    gamma: float,
    lam: float,
    whiten: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return advantages (whitened if ``whiten``), returns, rewards and KL, each like ``logprobs``, 0 where masked.

    One launch, a second one to whiten. The moments are merged in the order of the sequences: bitwise repeatable.

    Args:
        scores: (B,) float32, contiguous, as all tensors.
        logprobs, ref_logprobs, values: (B, T), or (N,) with ``cu_seqlens``, float32.
        mask: the same shape, bool.
        bootstrap: (B,) float32, the value after the last token, or None for 0.
        cu_seqlens: (B + 1,) int32 on the same device, rising to N, or None.
        clip: bound of the scores' magnitude, or None.
        eps: added to the variance.
    """
    advantages, returns, rewards, kl = results = tuple(torch.empty_like(logprobs) for _ in range(4))
    memory = cuda.workspace(_C.cuda.kl_shaped_gae_workspace(len(scores)), logprobs.device)
    with cuda.launch_on(logprobs.device) as stream:
        _C.cuda.kl_shaped_gae(
            scores.data_ptr(),
            logprobs.data_ptr(),
            ref_logprobs.data_ptr(),
            values.data_ptr(),
            mask.data_ptr(),
            address(bootstrap),
            *cuda.extent(logprobs, cu_seqlens),
            kl_coef,
            ESTIMATOR_CODES[estimator],
            float("inf") if clip is None else clip,
            gamma,
            lam,
            whiten,
            eps,
            advantages.data_ptr(),
            returns.data_ptr(),
            rewards.data_ptr(),
            kl.data_ptr(),
            memory.data_ptr(),
            stream,
        )
    return results
