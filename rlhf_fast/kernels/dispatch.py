"""Choose who computes an operation: the CPU, Triton or CUDA kernel of its family, or the plain PyTorch reference.

Only operations with something to choose from are listed in ``OPS``; the others are plain PyTorch and ask nobody.
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

# What `auto` tries, in this order, unless the operation is listed below. On a CPU by bench/results/ops-cpu-*.csv: the
# compiled kernels replace several passes of eager PyTorch. On a GPU reasoned, not measured: Triton reads long rows in
# tiles that keep every processor busy.
AUTO = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
# Reasoned, not measured: these take microseconds on the device, less than the tens that Triton's launcher takes on the
# host, and the first call of every combination of options would compile for a second. Once bench/results holds
# ops-cuda*.csv, tests/kernels/test_dispatch.py demands that their medians agree with both tables.
PREFERRED = {
    "cuda": dict.fromkeys(
        ("gae", "gae_packed", "kl_shaped_gae", "policy_loss", "value_loss", "dpo_loss"), ("cuda", "triton", "reference")
    )
}

OPS = {
    "logprobs": ("token_logprobs_forward", "token_logprobs_backward", "sequence_logprobs"),
    "linear_logprobs": ("head_rows",),
    "advantages": ("gae", "gae_packed", "kl_shaped_gae", "shaped_rewards", "whiten", "group_advantages"),
    "kl": ("kl_penalty",),
    "policy": ("policy_loss", "value_loss"),
    "preference": ("dpo_loss",),
    "reward": ("pairwise_reward_loss",),
    "attention": ("decode_attention",),
    "norm": ("rms_norm_forward", "rms_norm_backward"),
    "lora": ("gated_forward", "gated_backward"),
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
        name: a name of ``BACKENDS``, a comma-separated order of preference, or ``"auto"``. The backward pass of
            ``token_logprobs`` and ``linear_logprobs`` follows the choice in force when it runs, others that of the forward pass.
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


def choose(family: str, op: str, *tensors: Tensor, **options) -> str:
    """Return the backend that will run ``op`` on these tensors.

    Operations whose reference is differentiable PyTorch ask before they enter their autograd.Function: "reference"
    means no function, no kernel. Inside ``torch.compile`` the answer is fixed when the graph is made.

    Raises:
        ValueError: ``RLHF_FAST_BACKEND`` holds an unknown name.
        RuntimeError: the backends named by the user have a kernel for ``op``, but it cannot run here; says why.
    """
    if torch.compiler.is_compiling():
        dtypes = tuple(tensor.dtype for tensor in tensors)
        return _choose_for_graph(family, op, tensors[0].device.type, dtypes)
    return _choose(family, op, *tensors, **options)


def _choose_for_graph(family: str, op: str, device: str, dtypes: tuple[torch.dtype, ...]) -> str:
    return _choose(family, op, *(torch.empty(0, device=device, dtype=dtype) for dtype in dtypes))


# torch.compiler.assume_constant_result, without its import of the whole compiler (and Triton) by everyone
_choose_for_graph._dynamo_marked_constant = True


def _choose(family: str, op: str, *tensors: Tensor, **options) -> str:
    refused = {}
    for backend in order_of(op, tensors[0].device.type):
        reason = available(family, backend, op, *tensors, **options)
        if reason is None:
            return backend
        if _has_kernel(family, backend, op):
            refused[backend] = reason
    if not refused:
        # naming a backend means its kernels: what it has no kernel for is plain PyTorch, as under `auto`
        return "reference"
    reasons = "; ".join(f"{backend}: {reason}" for backend, reason in refused.items())
    raise RuntimeError(f"no backend named by RLHF_FAST_BACKEND or use_backend() can run {op} here ({reasons})")


def kernel(family: str, backend: str) -> ModuleType:
    """Return the module of ``kernels/<family>/`` that holds a backend chosen before."""
    return _load(family, backend)


def implementation(family: str, op: str, *tensors: Tensor, **options) -> ModuleType:
    """Return the module of ``kernels/<family>/`` that will run ``op`` on these tensors; raises as :func:`choose`."""
    return _load(family, choose(family, op, *tensors, **options))


def available(family: str, backend: str, op: str, *tensors: Tensor, **options) -> str | None:
    """Return None if ``backend`` can run ``op`` on these tensors, else the reason it cannot."""
    if backend == "reference":
        return None
    if not _has_kernel(family, backend, op):
        return f"there is no {backend} kernel for {op}"
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
                refused = {backend: reason for backend, reason in answers.items() if reason is not None}
                try:
                    chosen = choose(family, op, probe)
                except RuntimeError:
                    chosen = "none"
                rows.append(BackendRow(op, device, chosen, refused))
    return rows


def order_of(op: str, device: str) -> tuple[str, ...]:
    """The backends to try for ``op`` on a type of device, the user's order before ours."""
    name = _override or os.environ.get("RLHF_FAST_BACKEND") or "auto"
    return _preference(name) or PREFERRED.get(device, {}).get(op) or AUTO.get(device, ("reference",))


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


def _has_kernel(family: str, backend: str, op: str) -> bool:
    """Whether ``backend`` has a kernel for ``op``, able to run or not. A module that fails to import counts as able."""
    module = _load(family, backend)
    return module is not None and (isinstance(module, str) or hasattr(module, op))


@cache
def _load(family: str, backend: str) -> ModuleType | str | None:
    """The backend's module; why it cannot be imported; or None if there is none. Cached, as failures repeat slowly."""
    name = f"rlhf_fast.kernels.{family}." + ("reference" if backend == "reference" else f"{backend}_impl")
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return f"cannot be imported: {error}"
