"""Every test that asks for ``backend`` runs once per backend, and is skipped, with the reason, where one cannot run."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast.kernels import BACKENDS, available, use_backend
from rlhf_fast.kernels.dispatch import OPS


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test on one backend. The test module names the dispatched operations it needs in ``FAMILY``."""
    family = request.module.FAMILY
    probe = torch.zeros(1, 1, device=device_of(request.param))
    for op in OPS[family]:
        reason = available(family, request.param, op, probe)
        if reason is not None:
            pytest.skip(f"{request.param}: {reason}")
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def device(backend) -> str:
    """Where the backend's tensors live."""
    return device_of(backend)


def device_of(backend: str) -> str:
    return "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"
