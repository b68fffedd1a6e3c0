"""The compiled CUDA kernel of generalized advantage estimation (csrc/cuda/gae.cuh)."""

from __future__ import annotations

import warnings
from functools import cache

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
    if not _C.has_cuda:
        return "the native module was built without CUDA (RLHF_FAST_CUDA=ON with nvcc builds it)"
    for tensor in tensors:
        if tensor.device.type != "cuda":
            return f"it runs on CUDA tensors, not on {tensor.device}"
    for tensor in tensors[:2]:
        if tensor.dtype != torch.float32:
            return f"it takes float32 rewards and values, not {tensor.dtype}"
    # asked last, and only with a CUDA tensor at hand: a CUDA call before a fork breaks the child
    return _driver_problem() or (_architecture_problem(tensors[0].device) if tensors else None)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, (B, T) float32, 0 where masked, on the current stream.

    Args:
        rewards, values: (B, T) float32, contiguous.
        mask: (B, T) bool, contiguous.
        bootstrap: (B,) float32, the value after the last token, or None for 0.
    """
    num_sequences, length = rewards.shape
    return _run(rewards, values, mask, bootstrap, None, num_sequences, length, gamma, lam)


def gae_packed(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """The same over packed sequences: (N,) tokens, ``cu_seqlens`` (B + 1,) int32 on the same device, rising to N."""
    num_sequences = len(cu_seqlens) - 1
    # the mean length chooses the block size; the longest would have to be read back from the device
    length = len(rewards) // max(num_sequences, 1)
    return _run(rewards, values, mask, bootstrap, cu_seqlens, num_sequences, length, gamma, lam)


def _run(rewards, values, mask, bootstrap, cu_seqlens, num_sequences, length, gamma, lam) -> tuple[Tensor, Tensor]:
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    with torch.cuda.device(rewards.device):
        _C.cuda.gae(
            rewards.data_ptr(),
            values.data_ptr(),
            mask.data_ptr(),
            0 if bootstrap is None else bootstrap.data_ptr(),
            num_sequences,
            length,
            0 if cu_seqlens is None else cu_seqlens.data_ptr(),
            rewards.numel(),
            gamma,
            lam,
            advantages.data_ptr(),
            returns.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )
    return advantages, returns


@cache
def _driver_problem() -> str | None:
    """Why the CUDA runtime inside ``_C`` cannot use this driver; warns once, as Triton quietly takes over."""
    built, driver = _C.cuda.runtime_version(), _C.cuda.driver_version()
    # minor versions of one major version work together
    if driver // 1000 >= built // 1000:
        return None
    reason = f"it was built with CUDA {_version(built)}, but the driver supports {_version(driver)} at most"
    warnings.warn(f"rlhf_fast: the CUDA kernels are off: {reason}. Triton is used instead.", stacklevel=2)
    return reason


@cache
def _architecture_problem(device: torch.device) -> str | None:
    """Why the binary has no code for this device. Code runs within its major version, upwards; PTX on all after."""
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    for architecture in _C.cuda.architectures.split(","):
        number = int(architecture.partition("-")[0].rstrip("af"))
        has_ptx = not architecture.endswith("-real")
        if number <= capability and (has_ptx or number // 10 == major):
            return None
    return f"it was compiled for {_C.cuda.architectures}, which does not cover sm_{capability}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
