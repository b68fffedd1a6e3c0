"""What the compiled CUDA kernels of every family share: whether they can run here, and where they are launched."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

# before _C: both use OpenMP, and the one libgomp of the process must be torch's
import torch
from torch import Tensor

try:
    from rlhf_fast import _C
except ImportError as error:
    _C, _WHY_NOT = None, f"the native module is not built ({error}); `pip install -e .` builds it"


def unsupported(*tensors: Tensor) -> str | None:
    """Say why no CUDA kernel can run on these tensors, or return None."""
    if _C is None:
        return _WHY_NOT
    if not _C.has_cuda:
        return "the native module was built without CUDA (RLHF_FAST_CUDA=ON with nvcc builds it)"
    for tensor in tensors:
        if tensor.device.type != "cuda":
            return f"it runs on CUDA tensors, not on {tensor.device}"
        if tensor.dtype == torch.float64:
            return "float64 runs on the reference only"
    # asked last, and only with a CUDA tensor at hand: a CUDA call before a fork breaks the child
    return _driver_problem() or (_architecture_problem(tensors[0].device) if tensors else None)


@contextmanager
def launch_on(device: torch.device) -> Iterator[int]:
    """Make ``device`` the current one, and hand out its current stream as the native functions take it."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream


def extent(x: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, int]:
    """Number of sequences, their length if padded, the address of their boundaries if packed, and number of tokens."""
    if cu_seqlens is None:
        return x.shape[0], x.shape[1], 0, x.numel()
    return len(cu_seqlens) - 1, 0, cu_seqlens.data_ptr(), len(x)


def workspace(num_bytes: int, device: torch.device) -> Tensor:
    """Memory of one launch. PyTorch hands it to the next kernel on the same stream only, and graphs keep their own."""
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


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
