"""Requests on their way into the slots: waiting, prefilled in chunks or side by side, then kept until every sample has begun."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_fast.rollout.engine import Request
from rlhf_fast.rollout.slot_cache import Chunk, Pack

LOOKAHEAD = 512  # prompt tokens prefilled together even when fewer slots are free: one pass over the weights for all


@dataclass(eq=False)
class Prompt:
    """A request on its way into slots."""

    key: Hashable
    request: Request
    seed: int
    limit: int  # most new tokens, within the model's context
    started: int = 0  # samples that have had a slot
    pack: Pack | None = None  # its keys and values, once prefilled
    row: int = 0  # in the pack
    prefilled: int = 0  # tokens, of a prompt that is prefilled in chunks

    @property
    def length(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def longest(self) -> int:
        """Tokens that a sample takes at most."""
        return self.length + self.limit


class PromptQueue:
    """The prompts of a session, first come first served.

    Args:
        model: in generation mode, running the slots' attention.
        prefill_tokens: longer prompts are prefilled in chunks.
    """

    def __init__(self, model: Any, prefill_tokens: int) -> None:
        self.model, self.device, self.prefill_tokens = model, model.device, prefill_tokens
        self.waiting: deque[Prompt] = deque()  # not prefilled, or the first of them in part
        self.ready: deque[Prompt] = deque()  # prefilled, with samples that have not begun

    def __bool__(self) -> bool:
        return bool(self.waiting or self.ready)

    @property
    def samples(self) -> int:
        """How many have not begun."""
        return sum(p.request.n - p.started for queue in (self.ready, self.waiting) for p in queue)

    @property
    def held(self) -> int:
        """Tokens whose keys and values are kept here. Those of prompts prefilled together go together."""
        packs = {id(p.pack): p.pack for p in (*self.ready, *itertools.islice(self.waiting, 1)) if p.pack is not None}
        return sum(sum(pack.lengths) for pack in packs.values())

    def remove(self, key: Hashable) -> None:
        """Forget the requests of that key."""
        for queue in (self.waiting, self.ready):
            for prompt in [p for p in queue if p.key == key]:
                queue.remove(prompt)

    def choose(self, budget: int, free: int, fits: Callable[[int, int, bool], bool]) -> list[Prompt]:
        """The first waiting prompts that are to be prefilled now; a long one is alone and comes in chunks.

        Args:
            budget: most tokens to compute.
            free: slots that wait for them.
            fits: (tokens to hold besides what is held, tokens that one of their samples takes at most, more than one prompt)
                -> is there room?
        """
        first = self.waiting[0]
        if first.length > self.prefill_tokens:
            coming = first.length if first.pack is None else 0
            return [first] if budget > 0 and fits(coming, first.longest, False) else []
        chosen, tokens, samples, longest = [], 0, 0, 0
        for prompt in self.waiting:
            total, longest = tokens + prompt.length, max(longest, prompt.longest)
            if total > budget or (samples >= free and total > LOOKAHEAD) or not fits(total, longest, bool(chosen)):
                break
            chosen.append(prompt)
            tokens, samples = total, samples + prompt.request.n
        return chosen

    def prefill(self, chosen: Sequence[Prompt], budget: int) -> int:
        """Compute the prompts ``chosen``, or a chunk of one; returns its tokens, at most ``budget``."""
        if chosen[0].length > self.prefill_tokens:
            return self._prefill_chunk(chosen[0], budget)
        pack = Pack([p.length for p in chosen], self.device)
        ids = np.concatenate([np.asarray(p.request.prompt_ids) for p in chosen])
        positions = np.concatenate([np.arange(p.length) for p in chosen])
        last = [start + length - 1 for start, length in zip(pack.starts, pack.lengths)]
        pack.logits = self._forward(pack, ids, positions, last)
        for row, prompt in enumerate(chosen):
            self.waiting.popleft()
            prompt.pack, prompt.row = pack, row
            self.ready.append(prompt)
        return len(ids)

    def _prefill_chunk(self, prompt: Prompt, budget: int) -> int:
        count = min(budget, prompt.length - prompt.prefilled)
        prompt.pack = prompt.pack or Pack([prompt.length], self.device)
        chunk = Chunk(prompt.pack, prompt.prefilled, count)
        ids = np.asarray(prompt.request.prompt_ids[chunk.start : chunk.end])
        logits = self._forward(chunk, ids, np.arange(chunk.start, chunk.end), [count - 1])
        prompt.prefilled = chunk.end
        if chunk.end == prompt.length:
            prompt.pack.logits = logits
            self.ready.append(self.waiting.popleft())
        return count

    def _forward(self, work: Any, ids: np.ndarray, positions: np.ndarray, last: list[int]) -> Tensor:
        """The logits (len(last), V) of one row of tokens at the places ``last``."""
        both = torch.from_numpy(np.stack([ids, positions]).astype(np.int64)).to(self.device)
        keep = torch.tensor(last, device=self.device)
        return self.model(
            input_ids=both[:1], position_ids=both[1:], use_cache=False, logits_to_keep=keep, work=work
        ).logits[0]
