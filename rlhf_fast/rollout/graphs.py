"""Decoding passes as CUDA graphs: launching some thousand kernels one by one takes longer than running them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.rollout.budget import out_of_memory
from rlhf_fast.rollout.slot_cache import Decode, SlotCache

logger = logging.getLogger(__name__)
TOKEN, POSITION = 0, 1  # columns of a session's integers
KEPT = 4  # roles whose graphs are kept


class DecodeGraphs:
    """One graph for each pair of (slots, keys) that comes up, captured then; both are rounded up so that few do.

    A graph reads tokens and positions from the engine's own buffer and writes keys and values into the cache, at the
    addresses that these had: all graphs are dropped when the cache has moved. Slots between the live ones and the rounded
    number compute something that nobody reads, and write it to places that a prompt or a later token overwrites before
    anybody reads them. Weights are read where they are, whatever they have become. All graphs share one pool of memory, as they
    run one after the other, and leave their logits in one buffer. Not run on a GPU so far.

    Args:
        model: in generation mode, running the slots' attention.
        cache: of the engine.
        integers: (slots, 3) long, the engine's buffer of tokens, positions and counts.
    """

    def __init__(self, model: Any, cache: SlotCache, integers: Tensor) -> None:
        self.model, self.cache, self.integers = model, cache, integers
        self.graphs: dict[tuple[int, int], Callable[[], Tensor]] = {}
        self.moves = 0  # of the cache, when the graphs were captured
        self.pool: Any = None  # of memory
        self.logits: Tensor | None = None  # (slots, V), where every graph leaves its own
        self.refusal: str | None = None  # why this model is not captured
        self.starved = False  # for want of memory, which another session may have

    def __call__(self, count: int, length: int) -> Tensor:
        """(count, V) logits behind the tokens of the first ``count`` slots, none of which is longer than ``length``; valid until
        the next call."""
        if self.refusal is not None:
            return self.run(count, length)
        if self.cache.moves != self.moves:  # not the shape, to which it may have come back at other addresses
            self.graphs.clear()
            self.pool = None  # it lives as long as its graphs
        key = (min(rounded_slots(count), self.cache.rows), min(rounded_keys(length), self.cache.length))
        if key not in self.graphs:
            try:
                self.graphs[key] = self.capture(*key)
                self.moves = self.cache.moves  # warming up may have made layers
            except RuntimeError as error:
                self._give_up(error)
                return self.run(count, length)
        return self.graphs[key]()[:count]

    def run(self, slots: int, keys: int) -> Tensor:
        """(slots, V) logits by an ordinary pass over the first ``slots``, which looks at ``keys`` keys."""
        rows = self.integers[:slots]
        positions = rows[:, POSITION].clamp(max=keys - 1)  # a slot that is not live may say anything
        work = Decode(self.cache, positions, keys)
        return self.model(
            input_ids=rows[:, TOKEN, None], position_ids=positions[:, None], use_cache=False, work=work
        ).logits[:, -1]

    def capture(self, slots: int, keys: int) -> Callable[[], Tensor]:
        """The same pass as a graph; calling it replays it and returns its logits, in the one buffer of all graphs."""
        # warmed up beside the main stream, as capturing demands: workspaces and layers of the cache are made here. What the
        # passes write is what the replay will write again.
        side, main = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(2):
                logits = self.run(slots, keys)
        main.wait_stream(side)
        if self.logits is None:
            self.logits = logits.new_empty(len(self.integers), logits.shape[1])
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph, out = torch.cuda.CUDAGraph(), self.logits[:slots]
        # what another thread allocates meanwhile, for a reward model say, is its own
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            out.copy_(self.run(slots, keys))

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    def _give_up(self, error: RuntimeError) -> None:
        """Say why passes run one by one from here on. Where memory ran out, the graphs give theirs back: a pass that does not even
        fit without them says so itself."""
        self.starved = out_of_memory(error)
        line = (str(error).splitlines() or [type(error).__name__])[0]
        self.refusal = f"not enough memory for graphs ({line})" if self.starved else line
        logger.warning("decoding runs without CUDA graphs: %s", self.refusal)
        if self.starved:
            self.graphs.clear()
            self.logits = self.pool = None
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()


class KeptGraphs:
    """An engine's graphs, from session to session for as long as all that they hold on to lies where it did.

    Args:
        slots: of the engine.
    """

    def __init__(self, slots: int) -> None:
        self.slots, self.integers = slots, None
        self.kept: dict[Hashable, tuple[Any, DecodeGraphs]] = {}

    def of(self, model: Any, cache: SlotCache, role: Hashable) -> DecodeGraphs:
        """Those for a session that writes with ``model`` as it is now, in a ``role``: earlier ones where nothing has moved."""
        if self.integers is None or self.integers.device != model.device:
            self.clear()
            self.integers = torch.zeros(self.slots, 3, dtype=torch.long, device=model.device)
        before, graphs = self.kept.pop(role, (None, None))
        held = addresses(model)
        if before != held or graphs.cache is not cache or graphs.starved:
            graphs = DecodeGraphs(model, cache, self.integers)
        # what autocast has cast is gone when the session ends
        if not torch.is_autocast_enabled(model.device.type):
            self.kept[role] = held, graphs
        if len(self.kept) > KEPT:
            del self.kept[next(iter(self.kept))]
        return graphs

    def clear(self) -> None:
        self.kept.clear()


def addresses(model: Any) -> tuple[int, ...]:
    """Where the model's weights, buffers and constants of quantization lie."""
    found = []
    for tensor in (*model.parameters(), *model.buffers()):
        found.append(tensor.data_ptr())
        if (state := getattr(tensor, "quant_state", None)) is not None:
            found.append(state.absmax.data_ptr())
    return tuple(found)


def rounded_slots(count: int) -> int:
    """1, 2, 4, 8, then multiples of 8, from 64 on of 32: a step's time hardly depends on fewer."""
    if count <= 8:
        return 1 << (count - 1).bit_length()
    step = 8 if count <= 64 else 32
    return -(-count // step) * step


def rounded_keys(length: int) -> int:
    """Multiples of 256: beside the weights of a large model few keys cost little."""
    return -(-length // 256) * 256
