"""Activation checkpointing, and keeping in host memory what it keeps.

A checkpointed layer keeps its input and recomputes the rest in the backward pass (Chen et al. 2016, arXiv:1604.06174). Over
L layers of N tokens that is L * N * D numbers, at long sequences most of what is left. :class:`HostInputs` moves them to
pinned host memory. Each copy runs on a stream of its own beside the next layer's forward pass and comes back one layer
ahead of the backward pass; the compute stream waits for an event, never for the host. (transformers' own ``offload``
copies on the compute stream.)
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


def checkpoint_layers(model: PreTrainedModel, store: HostInputs | None = None) -> None:
    """Recompute the activations of every layer of ``model`` in the backward pass; layers' inputs wait in ``store``."""
    # transformers 5.20 renamed it and warns about the old name
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    if store is None:
        return
    for module in model.modules():
        if getattr(module, "_gradient_checkpointing_func", None) is not None:
            module._gradient_checkpointing_func = partial(store.checkpoint, use_reentrant=False)


class HostInputs:
    """Host copies of the inputs of checkpointed layers, and the buffers that they reuse from step to step.

    On a CPU the same code runs without streams. Two of the inputs are on the device at a time: the one in use, and the one
    before it on its way.
    """

    def __init__(self) -> None:
        self.free: list[Tensor] = []  # flat byte buffers that no input occupies
        self.total_bytes = 0  # of all buffers ever made
        self.moved_bytes = 0  # to the host, since the start
        self._last: Callable[[], _Kept | None] = lambda: None  # what was put last, while it lives
        self._stream: torch.cuda.Stream | None = None

    def checkpoint(self, function: Callable, *args: Any, **options: Any) -> Any:
        """``torch.utils.checkpoint.checkpoint``, its first argument, a layer's hidden states, kept on the host."""
        # where the input lies rather than the input itself: the hooks live as long as the graph
        place = (args[0].data_ptr(), args[0].shape)

        # a non-reentrant checkpoint saves its own arguments only: what the function saves goes to checkpoint's own hooks
        def pack(x: Tensor) -> Any:
            return self.put(x) if (x.data_ptr(), x.shape) == place else x

        def unpack(kept: Any) -> Tensor:
            return kept if isinstance(kept, Tensor) else self.get(kept)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return checkpoint(function, *args, **options)

    def put(self, x: Tensor) -> _Kept:
        """Start copying ``x`` to the host. The copy's buffer is free again once what is returned is forgotten."""
        x = x.detach()
        buffer = self._take(x.nbytes, pinned=x.is_cuda)
        host = buffer[: x.nbytes].view(x.dtype).view(x.shape)
        with self._beside(x):
            host.copy_(x, non_blocking=True)
        self.moved_bytes += x.nbytes
        kept = _Kept(self, buffer, host, x.device, self._last)
        self._last = weakref.ref(kept)
        return kept

    def get(self, kept: _Kept) -> Tensor:
        """The input itself, on its device; and the one that was put before it starts on its way back."""
        if kept.returning is None:
            self._fetch(kept)
        x, kept.returning = kept.returning, None
        if x.is_cuda:
            torch.cuda.current_stream(x.device).wait_event(kept.arrived)
        if (before := kept.before()) is not None and before.returning is None:
            self._fetch(before)
        return x

    def _fetch(self, kept: _Kept) -> None:
        # its memory may still be read by what the compute stream has queued, which the copy waits for; that is the
        # backward pass of the layer above, so it runs beside the next one
        x = torch.empty_like(kept.host, device=kept.device, pin_memory=False)
        with self._beside(x) as stream:
            x.copy_(kept.host, non_blocking=True)
        if stream is not None:
            kept.arrived = stream.record_event()
        kept.returning = x

    @contextlib.contextmanager
    def _beside(self, x: Tensor):
        """Run the block on the copy stream, after all that is queued now; ``x`` is not reused before it is done."""
        if not x.is_cuda:
            yield None
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(x.device)
        self._stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._stream):
            yield self._stream
        x.record_stream(self._stream)

    def _take(self, size: int, pinned: bool) -> Tensor:
        """The smallest free buffer that holds ``size`` bytes, or a new one.

        The largest micro-batch of a step comes first, so the later ones find theirs. A buffer whose last copy may still be
        under way is safe to take: the next one runs on the same stream, behind it.
        """
        fitting = [i for i, buffer in enumerate(self.free) if buffer.numel() >= size]
        if fitting:
            return self.free.pop(min(fitting, key=lambda i: self.free[i].numel()))
        if self.free:  # all too small: one of them makes room
            self.total_bytes -= self.free.pop(max(range(len(self.free)), key=lambda i: self.free[i].numel())).numel()
        self.total_bytes += size
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)


class _Kept:
    """One input on the host. Held by the graph; when that is gone its buffer goes back."""

    def __init__(self, store: HostInputs, buffer: Tensor, host: Tensor, device: torch.device, before: Callable):
        self.store, self.buffer, self.host, self.device, self.before = store, buffer, host, device, before
        self.returning: Tensor | None = None  # the copy on the device, while on its way
        self.arrived: torch.cuda.Event | None = None

    def __del__(self) -> None:
        self.store.free.append(self.buffer)
