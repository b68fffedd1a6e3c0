"""The compiled CPU kernel of generalized advantage estimation (csrc/cpu/gae.cpp)."""

from __future__ import annotations

# before _C: both use OpenMP, and the one libgomp of the process must be torch's
import torch
from torch import Tensor

try:
    from rlhf_fast import _C
except ImportError as error:
    _C, _WHY_NOT = None, f"the native module is not built ({error}); `pip install -e .` builds it"


def unsupported(op: str, *tensors: Tensor, **options) -> str | None:
    """Say why the kernel cannot run ``op`` on these tensors (rewards, values, mask), or return None."""
    if _C is None:
        return _WHY_NOT
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"it runs on CPU tensors, not on {tensor.device}"
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


def _run(kernel, rewards, values, mask, bootstrap, extent, gamma, lam) -> tuple[Tensor, Tensor]:
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    kernel(
        rewards.data_ptr(),
        values.data_ptr(),
        mask.data_ptr(),
        0 if bootstrap is None else bootstrap.data_ptr(),
        *extent,
        gamma,
        lam,
        advantages.data_ptr(),
        returns.data_ptr(),
        torch.get_num_threads(),
    )
    return advantages, returns
