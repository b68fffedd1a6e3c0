"""Make an operation known to PyTorch, so that ``torch.compile`` keeps it whole and fake tensors know its shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("rlhf_fast", "FRAGMENT")
IMPLEMENTATIONS: dict[str, Callable] = {}  # op name -> the Python function behind it


def register(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Register the decorated function as ``torch.ops.rlhf_fast.<name>`` and return that operator.

    The function runs on any device and picks its backend itself. It has no gradient: an autograd.Function on top
    gives one and is bypassed when none is needed, which costs half of what ``torch.library.custom_op`` does.

    Args:
        schema: ``name(Tensor x, float y) -> Tensor`` in the dispatcher's language.
        fake: the same signature; returns empty outputs of the right shape, dtype and device.
    """
    name = schema.partition("(")[0]

    def decorate(run: Callable) -> Callable:
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, _on_its_device(run), "CompositeExplicitAutograd")
        torch.library.register_fake(f"rlhf_fast::{name}", fake, lib=_LIBRARY)
        IMPLEMENTATIONS[name] = run
        return getattr(torch.ops.rlhf_fast, name).default

    return decorate


def _on_its_device(run: Callable) -> Callable:
    """Run on the GPU that holds the first tensor: Triton launches on the current one, whatever it is given."""

    @wraps(run)
    def guarded(x: Tensor, *rest):
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return run(x, *rest)
        with torch.cuda.device(x.device):
            return run(x, *rest)

    return guarded
