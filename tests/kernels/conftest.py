"""Every test that asks for ``backend`` runs once per backend, and is skipped, with the reason, where one cannot run.

Tests that make CPU tensors ask for ``everywhere`` instead, which brings them to the backend's device and back.
"""

from __future__ import annotations

import functools
import os
from importlib import metadata

import pytest
import torch

from rlhf_fast import kernels
from rlhf_fast.kernels import BACKENDS, available, use_backend
from rlhf_fast.kernels.dispatch import OPS


def _mend_interpreter_of_triton_3_6() -> None:
    """Its interpreter takes int() of an array of one element, which numpy 2.4 refuses."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    interpreter._patch_lang_tensor = patched


if os.environ.get("TRITON_INTERPRET") == "1" and metadata.version("triton").startswith("3.6."):
    _mend_interpreter_of_triton_3_6()


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test on one backend that has kernels for the ``FAMILY`` of the test module."""
    family = request.module.FAMILY
    probe = torch.zeros(1, 1, device=device_of(request.param))
    reasons = [available(family, request.param, op, probe) for op in OPS[family]]
    if None not in reasons:
        pytest.skip(f"{request.param}: {reasons[0]}")
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def device(backend) -> str:
    """Where the backend's tensors live."""
    return device_of(backend)


def device_of(backend: str) -> str:
    return "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"


@pytest.fixture
def everywhere(request, monkeypatch, backend):
    """Run a module's tests of CPU tensors on every backend: its operations take and give them where that runs.

    What the backend declines, float64 for one, runs on the reference.
    """
    device = device_of(backend)
    for name in set(kernels.__all__) & set(vars(request.module)):
        operation = getattr(request.module, name)
        if getattr(operation, "__module__", "").startswith("rlhf_fast.kernels.") and name != "use_backend":
            monkeypatch.setattr(request.module, name, _brought(operation, device))
    with use_backend(f"{backend},reference"):
        yield backend


def _brought(operation, device: str):
    @functools.wraps(operation)
    def brought(*args, **kwargs):
        return moved(operation(*moved(args, device), **moved(kwargs, device)), "cpu")

    return brought


def moved(x, device: str):
    """Tensors to the device, also inside tuples and dicts; autograd brings their gradients back."""
    if isinstance(x, torch.Tensor):
        return x.to(device)
    if isinstance(x, tuple):
        return tuple(moved(y, device) for y in x)
    return {name: moved(y, device) for name, y in x.items()} if isinstance(x, dict) else x


@pytest.fixture
def no_worse():
    """Assert that a result errs at most twice as much as plain PyTorch in the same dtype does, plus 2 ulp."""

    def check(actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
        assert actual.shape == exact.shape
        assert actual.dtype == plain.dtype
        ulp = torch.finfo(actual.dtype).eps
        actual, plain, exact = (x.detach().cpu().double() for x in (actual, plain, exact))
        finite = exact.isfinite()
        torch.testing.assert_close(actual[~finite], exact[~finite], rtol=0, atol=0, equal_nan=True)
        if finite.any():
            actual, plain, exact = actual[finite], plain[finite], exact[finite]
            # 1e-30: what is exactly 0 may come out as the smallest of exponentials
            allowed = 2 * (plain - exact).abs().max() + 2 * ulp * exact.abs().max() + 1e-30
            assert (actual - exact).abs().max() <= allowed

    return check
