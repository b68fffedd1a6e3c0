"""Decoding passes as CUDA graphs: launching some thousand kernels one by one takes longer than running them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.rollout.slot_cache import Decode, SlotCache

logger = logging.getLogger(__name__)
TOKEN, POSITION = 0, 1  # columns of a session's integers


class DecodeGraphs:
    """One graph for each pair of (slots, keys) that comes up, captured then; both are rounded up so that few do.

    A graph reads tokens and positions from the session's own buffer and writes keys and values into the cache, at the
    addresses that these had: all graphs are dropped when the cache has moved. Slots between the live ones and the rounded
    number compute something that nobody reads, and write it to places that a prompt or a later token overwrites before
    anybody reads them. Weights are read where they are, so that graphs could outlive an update in place; they live as long
    as the session all the same, as does what autocast has cast. Not run on a GPU so far.

    Args:
        model: in generation mode, running the slots' attention.
        cache: of the session.
        integers: (slots, 3) long, the session's buffer of tokens, positions and counts.
    """

    def __init__(self, model: Any, cache: SlotCache, integers: Tensor) -> None:
        self.model, self.cache, self.integers = model, cache, integers
        self.graphs: dict[tuple[int, int], Callable[[], Tensor]] = {}
        self.moves = 0  # of the cache, when the graphs were captured
        self.pool: Any = None  # of memory, shared: graphs run one after the other
        self.refusal: str | None = None  # why this model is not captured

    def __call__(self, count: int, length: int) -> Tensor:
        """(count, V) logits behind the tokens of the first ``count`` slots, none of which is longer than ``length``; valid until
        the next call."""
        if self.refusal is not None:
            return self.run(count, length)
        if self.cache.moves != self.moves:  # not the shape, to which it may have come back at other addresses
            self.graphs.clear()
        key = (min(rounded_slots(count), self.cache.rows), min(rounded_keys(length), self.cache.length))
        if key not in self.graphs:
            try:
                self.graphs[key] = self.capture(*key)
                self.moves = self.cache.moves  # warming up may have made layers
            except RuntimeError as error:
                self.refusal = (str(error).splitlines() or [type(error).__name__])[0]
                logger.warning("decoding runs without CUDA graphs: %s", self.refusal)
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
        """The same pass as a graph; calling it replays it and returns its output, always the same tensor."""
        # warmed up beside the main stream, as capturing demands: workspaces and layers of the cache are made here. What the
        # passes write is what the replay will write again.
        side, main = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(2):
                self.run(slots, keys)
        main.wait_stream(side)
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            logits = self.run(slots, keys)

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay


def rounded_slots(count: int) -> int:
    """1, 2, 4, 8, then multiples of 8, from 64 on of 32: a step's time hardly depends on fewer."""
    if count <= 8:
        return 1 << (count - 1).bit_length()
    step = 8 if count <= 64 else 32
    return -(-count // step) * step


def rounded_keys(length: int) -> int:
    """Multiples of 256: beside the weights of a large model few keys cost little."""
    return -(-length // 256) * 256
