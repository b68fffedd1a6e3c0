"""The compiled CPU kernels of generalized advantage estimation (csrc/cpu/gae.cpp)."""

from __future__ import annotations

# before _C: both use OpenMP, and the one libgomp of the process must be torch's
import torch
from torch import Tensor

from rlhf_fast.kernels.codes import ESTIMATOR_CODES, address

try:
    from rlhf_fast import _C
except ImportError as error:
    _C, _WHY_NOT = None, f"the native module is not built ({error}); `pip install -e .` builds it"


def unsupported(op: str, *tensors: Tensor, **options) -> str | None:
    """Say why the kernel cannot run ``op`` on these tensors, or return None.

    ``gae`` is asked with what it is given (rewards, values, mask), ``kl_shaped_gae`` before its tensors become float32.
    """
    if _C is None:
        return _WHY_NOT
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"it runs on CPU tensors, not on {tensor.device}"
    if op == "kl_shaped_gae":
        double = any(tensor.dtype == torch.float64 for tensor in tensors)
        return "float64 runs on the reference only" if double else None
    for tensor in tensors[:2]:
        if tensor.dtype != torch.float32:
            return f"it takes float32 rewards and values, not {tensor.dtype}"
    return None


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, (B, T) float32, 0 where masked.

    Args:
        rewards, values: (B, T) float32, contiguous.
        mask: (B, T) bool, contiguous.
        bootstrap: (B,) float32, the value after the last token, or None for 0.
    """
    return _run(_C.cpu.gae, rewards, values, mask, bootstrap, rewards.shape, gamma, lam)


def gae_packed(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """The same over packed sequences: (N,) tokens, ``cu_seqlens`` (B + 1,) int32 contiguous.

    Raises:
        ValueError: ``cu_seqlens`` does not rise from 0 to N.
    """
    extent = (len(rewards), cu_seqlens.data_ptr(), len(cu_seqlens) - 1)
    return _run(_C.cpu.gae_packed, rewards, values, mask, bootstrap, extent, gamma, lam)


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

    Args:
        scores: (B,) float32, contiguous, as all tensors.
        logprobs, ref_logprobs, values: (B, T), or (N,) with ``cu_seqlens``, float32.
        mask: the same shape, bool.
        bootstrap: (B,) float32, the value after the last token, or None for 0.
        cu_seqlens: (B + 1,) int32 or None.
        clip: bound of the scores' magnitude, or None.
        eps: added to the variance.
    Raises:
        ValueError: ``cu_seqlens`` does not rise from 0 to N.
    """
    advantages, returns, rewards, kl = results = tuple(torch.empty_like(logprobs) for _ in range(4))
    _C.cpu.kl_shaped_gae(
        scores.data_ptr(),
        logprobs.data_ptr(),
        ref_logprobs.data_ptr(),
        values.data_ptr(),
        mask.data_ptr(),
        address(bootstrap),
        logprobs.numel(),
        len(scores),
        logprobs.shape[1] if cu_seqlens is None else 0,
        address(cu_seqlens),
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
        torch.get_num_threads(),
    )
    return results


def _run(kernel, rewards, values, mask, bootstrap, extent, gamma, lam) -> tuple[Tensor, Tensor]:
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    kernel(
        rewards.data_ptr(),
        values.data_ptr(),
        mask.data_ptr(),
        address(bootstrap),
        *extent,
        gamma,
        lam,
        advantages.data_ptr(),
        returns.data_ptr(),
        torch.get_num_threads(),
    )
    return advantages, returns
