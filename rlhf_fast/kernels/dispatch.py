"""Choose who computes an operation: the CPU, Triton or CUDA kernel of its family, or the plain PyTorch reference.

Only operations with something to choose from are listed in ``OPS``; the losses are plain PyTorch and ask nobody.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

BACKENDS = ("cpu", "triton", "cuda", "reference")

# What `auto` tries, in this order. The orders follow from what each backend is, no measurement decides them yet:
# the compiled CPU kernels replace several passes of eager PyTorch, and Triton needs no compiled extension.
AUTO = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}

OPS = {
    "logprobs": ("token_logprobs_forward", "token_logprobs_backward"),
    "linear_logprobs": ("head_rows",),
    "advantages": ("gae", "gae_packed"),
}

# A plain global, not a context variable: autograd runs CUDA backward passes in a thread of its own.
_override: str | None = None


class BackendRow(NamedTuple):
    """One line of ``rlhf-fast env``: what runs ``op`` on ``device``, and why the other backends do not."""

    op: str
    device: str
    backend: str  # the backend that will run, or "none" if those named by the user all refuse
    refused: dict[str, str]  # backend -> its reason


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operations inside the block on one backend: ``with use_backend("reference"): ...``.

    Args:
        name: a name of ``BACKENDS``, a comma-separated order of preference, or ``"auto"``. The backward pass follows
            the choice in force when ``backward()`` runs.
    Raises:
        ValueError: a name is unknown.
    """
    global _override
    _preference(name)
    previous, _override = _override, name
    try:
        yield
    finally:
        _override = previous


def implementation(family: str, op: str, *tensors: Tensor, **options) -> ModuleType:
    """Return the module of ``kernels/<family>/`` that will run ``op`` on these tensors.

    Raises:
        ValueError: ``RLHF_FAST_BACKEND`` holds an unknown name.
        RuntimeError: no backend named by the user can run the call; the message says why.
    """
    refused = {}
    for backend in _order(tensors[0].device.type):
        reason = available(family, backend, op, *tensors, **options)
        if reason is None:
            return _load(family, backend)
        refused[backend] = reason
    reasons = "; ".join(f"{backend}: {reason}" for backend, reason in refused.items())
    raise RuntimeError(f"no backend named by RLHF_FAST_BACKEND or use_backend() can run {op} here ({reasons})")


def available(family: str, backend: str, op: str, *tensors: Tensor, **options) -> str | None:
    """Return None if ``backend`` can run ``op`` on these tensors, else the reason it cannot."""
    module = _load(family, backend)
    return module if isinstance(module, str) else module.unsupported(op, *tensors, **options)


def backend_report() -> list[BackendRow]:
    """Say which backend each dispatched operation uses on each device of this machine, and why others do not."""
    rows = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        probe = torch.zeros(1, 1, device=device)
        for family, ops in OPS.items():
            for op in ops:
                answers = {backend: available(family, backend, op, probe) for backend in BACKENDS}
                chosen = next((backend for backend in _order(device) if answers[backend] is None), "none")
                refused = {backend: reason for backend, reason in answers.items() if reason is not None}
                rows.append(BackendRow(op, device, chosen, refused))
    return rows


def _order(device: str) -> tuple[str, ...]:
    name = _override or os.environ.get("RLHF_FAST_BACKEND") or "auto"
    return _preference(name) or AUTO.get(device, ("reference",))


@cache
def _preference(name: str) -> tuple[str, ...]:
    """The backends in a user's list, () for ``auto``."""
    if name.strip() == "auto":
        return ()
    names = tuple(part.strip() for part in name.split(","))
    unknown = [part for part in names if part not in BACKENDS]
    if unknown:
        raise ValueError(f"unknown backend {unknown[0]!r}; choose among {', '.join(BACKENDS)}, or 'auto'")
    return names


@cache
def _load(family: str, backend: str) -> ModuleType | str:
    """The backend's module, or why it cannot be imported; cached either way, as a failed import is slow to repeat."""
    name = f"rlhf_fast.kernels.{family}." + ("reference" if backend == "reference" else f"{backend}_impl")
    if importlib.util.find_spec(name) is None:
        return f"{family} has no {backend} kernel"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return f"cannot be imported: {error}"
