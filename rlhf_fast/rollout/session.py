"""The scheduler behind the slot engine and its server: requests come in at any time, each step gives live samples a token.

    with engine.session() as session:
        key = session.add(request)                  # any time between steps
        while not session.idle:
            for writing in session.step():          # every sample that just gained a token
                writing.key, writing.index          # which request, which of its n samples
                writing.sample.ids[-1], writing.sample.logprobs[-1]
                if writing.sample.finish_reason: ...  # "stop" or "length": complete; "" while it goes on
        session.cancel(key)                         # drops what has not finished, and frees its slots

One thread drives a session, and an engine has one session at a time. It holds the policy in generation mode, under the
role of the engine, until it is closed: weights may not change while it is open.

Live samples stand in slots 0 to B - 1 of the cache, always: a slot that becomes free takes over the last one's contents,
so that empty slots cost nothing. A prompt is prefilled once and kept aside until all its samples have had a slot.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.rollout.engine import Request, Sample
from rlhf_fast.rollout.graphs import POSITION, TOKEN, DecodeGraphs
from rlhf_fast.rollout.prompts import Prompt, PromptQueue
from rlhf_fast.rollout.sampling import Settings, draw_seed, random_stream, sample, settings_row
from rlhf_fast.rollout.slot_cache import SlotCache

BLOCK = 256  # most random numbers drawn for a sample at a time
COUNT = 2  # column of a session's integers, behind TOKEN and POSITION: tokens drawn


@dataclass(eq=False)
class Writing:
    """A sample being written in a slot."""

    key: Hashable
    index: int  # among the samples of its request
    sample: Sample  # grows by one token a step; its finish_reason is "" until it is complete
    prompt: Prompt
    stream: np.random.Generator = field(repr=False)

    @property
    def position(self) -> int:
        """Where the last token stands; its keys and values are written in the next step."""
        return self.prompt.length + len(self.sample.ids) - 1


class Session:
    """See the module. Made by ``SlotEngine.session``.

    Args:
        model: in generation mode, running the slots' attention.
        tokenizer: for stop strings.
        cache: where keys and values go; may be that of an earlier session.
        graphs: of the same model and cache, with room for as many slots; may be those of an earlier session.
        slots: most samples that are written at once.
        max_tokens: most tokens whose keys and values are held: in the slots, all samples at their longest, and of prompts that
            wait for a slot; None: no limit.
        prefill_tokens: most prompt tokens computed between two steps of the live samples.
        context: most tokens of the model, None where it sets no limit.
        eos_ids: tokens that end every sample.
        version: of the weights, for the samples.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        cache: SlotCache,
        graphs: DecodeGraphs,
        *,
        slots: int,
        max_tokens: int | None,
        prefill_tokens: int,
        context: int | None,
        eos_ids: list[int],
        version: int,
    ) -> None:
        self.model, self.tokenizer, self.cache, self.device = model, tokenizer, cache, model.device
        self.slots, self.prefill_tokens = slots, prefill_tokens
        self.limit = math.inf if max_tokens is None else max_tokens
        # what the slots leave to prompts, or each that comes would make the cache smaller
        self.reserve = min(prefill_tokens, self.limit / 8)
        self.context, self.eos, self.version = context, frozenset(eos_ids), version
        self.queue = PromptQueue(model, prefill_tokens)
        self.live: list[Writing] = []  # by slot
        self.graphs, self.integers = graphs, graphs.integers.zero_()
        self.values = torch.ones(slots, 5, device=self.device)
        self.uniforms = torch.zeros(slots, BLOCK, dtype=torch.float64, device=self.device)
        self.seen: Tensor | None = None  # (slots, V) bool, once a repetition penalty asks for it
        self.settings: Settings | None = None  # of the live slots; None when they have changed
        self._keys = 0

    @property
    def idle(self) -> bool:
        """Nothing to do."""
        return not (self.live or self.queue)

    def add(self, request: Request, *, key: Hashable = None, seed: int | None = None) -> Hashable:
        """Queue a request; returns its key, the next integer when None is given.

        Args:
            seed: of a request without one; drawn from torch's global generator when None.
        Raises:
            UserError: the prompt fills the model's context, or one sample would not fit into ``max_tokens``, beside the prompt that
                it begins as a copy of.
        """
        if key is None:
            key, self._keys = self._keys, self._keys + 1
        length, limit = len(request.prompt_ids), request.max_new_tokens
        if self.context is not None:
            if length >= self.context:
                raise UserError(
                    f"generation: prompt {key} has {length} tokens, and the slots write at most {self.context} with "
                    "this model, the prompt included. Shorten or drop it."
                )
            limit = min(limit, self.context - length)
        if 2 * length + limit > self.limit:
            raise UserError(
                f"generation: prompt {key} has {length} tokens, held twice when its sample begins, and up to {limit} new ones, "
                f"and the cache has room for {self.limit}. Lower max_new_tokens, or give more room."
            )
        seed = request.seed if request.seed is not None else draw_seed() if seed is None else seed
        self.queue.waiting.append(Prompt(key, request, seed, limit))
        return key

    def cancel(self, key: Hashable) -> None:
        """Forget what is left of a request. Nothing happens when it has finished."""
        self.queue.remove(key)
        self._leave([row for row, writing in enumerate(self.live) if writing.key == key])

    @torch.no_grad()
    def step(self) -> list[Writing]:
        """A token for every live sample; free slots are filled first, and prompts prefilled for them as far as allowed.

        Returns:
            The samples that gained a token; empty when a long prompt only came nearer.
        Raises:
            RuntimeError: the model's logits are not finite.
        """
        parts = [self._decode()] if self.live else []
        parts += self._start()
        if not parts:
            return []
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._record(logits)

    # ---- slots

    def _start(self) -> list[Tensor]:
        """Give free slots to samples; returns the logits (n, V) behind their prompts, in the order of their slots."""
        began, budget, queue = len(self.live), self.prefill_tokens, self.queue
        if not queue:
            return []
        held = queue.held  # until the slots are filled, whatever leaves the queue
        longest = max((w.prompt.longest for w in self.live), default=0)
        while True:
            while queue.ready and self._has_room(max(longest, queue.ready[0].longest), held):
                prompt = queue.ready[0]
                longest = max(longest, prompt.longest)
                self.live.append(self._begin(prompt))
                if prompt.started == prompt.request.n:
                    queue.ready.popleft()
            free = self.slots - len(self.live)
            if queue.ready or not queue.waiting or not free:
                break
            chosen = queue.choose(budget, free, functools.partial(self._may_hold, held, len(self.live) * longest))
            if not chosen:
                break
            held += sum(p.length for p in chosen if p.pack is None)
            self._leave_room(held)
            budget -= queue.prefill(chosen, budget)
        return self._fill_slots(began, held) if len(self.live) > began else []

    def _has_room(self, longest: int, held: int) -> bool:
        """Whether there is a slot for one more sample, none of all being longer than ``longest``."""
        count = len(self.live) + 1
        return count <= self.slots and count * longest <= self._room(count, held)

    def _may_hold(self, held: int, live: int, tokens: int, longest: int, more: bool) -> bool:
        """Whether ``tokens`` of prompts fit beside ``held`` ones and ``live`` ones in the slots, so that a sample of at most
        ``longest`` can begin once these have gone; ``more`` than one prompt only where no slot has to wait for it."""
        return held + tokens + max(live, longest) <= self.limit and (not more or held + tokens <= self.reserve)

    def _room(self, count: int, held: int) -> float:
        """Most tokens that ``count`` slots may have room for beside ``held`` ones of prompts."""
        return self.limit - (held if count == 1 else max(held, self.reserve))

    def _begin(self, prompt: Prompt) -> Writing:
        """The prompt's next sample."""
        index, request = prompt.started, prompt.request
        prompt.started += 1
        begun = Sample([], [], "", self.version, [] if request.filtered else None)
        return Writing(prompt.key, index, begun, prompt, random_stream(prompt.seed, index))

    def _fill_slots(self, began: int, held: int) -> list[Tensor]:
        """Bring the prompts of the samples from slot ``began`` on into their slots; returns the logits behind them."""
        new = self.live[began:]
        self._make_room(max(w.prompt.length for w in new), held)
        logits = []
        for pack, group in itertools.groupby(enumerate(new, began), key=lambda pair: pair[1].prompt.pack):
            places = [(slot, w.prompt.row, pack.starts[w.prompt.row], w.prompt.length) for slot, w in group]
            tokens = np.concatenate([np.arange(start, start + n) for _, _, start, n in places])
            slots = np.concatenate([np.full(n, slot) for slot, _, _, n in places])
            positions = np.concatenate([np.arange(n) for *_, n in places])
            self.cache.write(pack, *self._to_device(np.stack([tokens, slots, positions])))
            logits.append(pack.logits[self._to_device([row for _, row, *_ in places])])
        self.integers[began : len(self.live)] = self._to_device([[0, w.prompt.length - 1, 0] for w in new])
        self.values[began : len(self.live)] = self._to_device([settings_row(w.prompt.request) for w in new])
        width = min(BLOCK, max(w.prompt.limit for w in new))
        drawn = np.stack([w.stream.random(width) for w in new])
        self.uniforms[began : len(self.live), :width] = self._to_device(drawn)
        self.settings = None
        for writing in new:
            if writing.prompt.started == writing.prompt.request.n:
                writing.prompt.pack = None  # its memory goes with the last prompt that needs it
        if any(w.prompt.request.repetition_penalty != 1 for w in new):
            self._note_prompts(began, logits[0].shape[1])
        return logits

    def _note_prompts(self, began: int, vocabulary: int) -> None:
        """Mark the prompts' tokens as seen, for repetition penalties."""
        if self.seen is None:
            self.seen = torch.zeros(self.slots, vocabulary, dtype=torch.bool, device=self.device)
        self.seen[began : len(self.live)] = False
        for slot, writing in enumerate(self.live[began:], began):
            self.seen[slot, self._to_device(list(writing.prompt.request.prompt_ids))] = True

    def _make_room(self, length: int, held: int | None = None) -> None:
        """Let every live slot hold ``length`` tokens beside ``held`` ones of prompts (None: of those in the queue)."""
        if len(self.live) > self.cache.rows or length > self.cache.length:
            self._reshape(length, self.queue.held if held is None else held)

    def _leave_room(self, held: int) -> None:
        """Make the cache smaller where it and ``held`` tokens of prompts would be more than there may be."""
        if self.cache.rows * self.cache.length > self.limit - held:
            self.cache.resize(len(self.live), self.cache.length)
            if self.cache.rows * self.cache.length > self.limit - held:
                self._reshape(max((w.position for w in self.live), default=0), held)

    def _reshape(self, length: int, held: int) -> None:
        """Room for every live slot and ``length`` tokens, with some to spare, as growing copies, but within the limit."""
        cache, count = self.cache, len(self.live)
        longest, limit = max((w.prompt.longest for w in self.live), default=0), self._room(count, held)
        # on a GPU at once all that will be needed: captured graphs hold on to the addresses
        room = longest if self.device.type == "cuda" else min(length + max(32, length // 4), longest)
        # requests that come one by one must not copy the cache each time
        rows = min(self.slots, 1 << (count + self.queue.samples - 1).bit_length()) if count else 0
        rows = max(count, int(min(rows, limit / max(room, 1))))
        kept = max(rows, cache.rows), max(room, cache.length)
        # what was there is kept, unless another's length would be given to many slots, or its slots to a long one
        if kept[0] * kept[1] <= min(limit, 2 * rows * room):
            rows, room = kept
        cache.resize(rows, room)

    def _leave(self, gone: list[int]) -> None:
        """Empty some slots, and move the last live ones into them."""
        if not gone:
            return
        count = len(self.live) - len(gone)
        leaving = set(gone)
        targets = [slot for slot in gone if slot < count]
        sources = [slot for slot in range(count, len(self.live)) if slot not in leaving]
        if targets:
            to, source = self._to_device([targets, sources])
            self.cache.move(source, to, max(self.live[slot].position for slot in sources))
            for state in (self.integers, self.values, self.uniforms, self.seen):
                if state is not None:
                    state[to] = state[source]
            for target, slot in zip(targets, sources):
                self.live[target] = self.live[slot]
        del self.live[count:]
        self.settings = None

    def _to_device(self, values: Any) -> Tensor:
        return torch.as_tensor(values).to(self.device)

    # ---- tokens

    def _decode(self) -> Tensor:
        """(B, V) logits behind the last token of every live sample."""
        length = max(w.position for w in self.live) + 1
        self._make_room(length)
        # on a CPU a pass of exactly the live slots and their keys is the fastest
        decode = self.graphs if self.device.type == "cuda" else self.graphs.run
        return decode(len(self.live), length)

    def _record(self, logits: Tensor) -> list[Writing]:
        """Sample from (B, V) logits, note the tokens, and let finished samples leave."""
        live, count = list(self.live), len(self.live)
        if self.settings is None:
            self.settings = Settings.of([w.prompt.request for w in live], self.values[:count])
        rows = self.integers[:count]
        uniforms = self.uniforms[:count].gather(1, rows[:, COUNT, None] % BLOCK).squeeze(1)
        drawn = sample(logits, self.settings, uniforms, None if self.seen is None else self.seen[:count])
        rows[:, TOKEN] = drawn.token
        rows[:, POSITION:] += 1
        if self.settings.penalised:
            self.seen[:count].scatter_(1, drawn.token[:, None], True)
        # the one transfer of a step; float64 holds every id
        columns = torch.stack([x.double() for x in drawn if x is not None]).tolist()
        tokens, logprobs, filtered = *columns[:2], columns[2] if len(columns) > 2 else [0.0] * count
        if not all(map(math.isfinite, logprobs)):
            raise RuntimeError("generation: the model's logits are not finite, so its weights have diverged")
        for writing, token, logprob, other in zip(live, map(int, tokens), logprobs, filtered):
            text = writing.sample
            text.ids.append(token)
            text.logprobs.append(logprob)
            if text.filtered_logprobs is not None:
                text.filtered_logprobs.append(other)
        self._finish(live)
        return live

    def _finish(self, live: list[Writing]) -> None:
        """Say which samples are complete, and let them leave; the others get more random numbers when theirs run out."""
        gone = []
        hits = self._stop_strings(live)
        for slot, writing in enumerate(live):
            ids, request = writing.sample.ids, writing.prompt.request
            if ids[-1] in self.eos or ids[-1] in request.stop_ids or slot in hits:
                writing.sample.finish_reason = "stop"
            elif len(ids) == writing.prompt.limit:
                writing.sample.finish_reason = "length"
            elif len(ids) % BLOCK == 0:
                self.uniforms[slot] = self._to_device(writing.stream.random(BLOCK))
            if writing.sample.finish_reason:
                gone.append(slot)
        self._leave(gone)

    def _stop_strings(self, live: list[Writing]) -> set[int]:
        """Slots whose last token completed one of their stop strings."""
        slots = [slot for slot, writing in enumerate(live) if writing.prompt.request.stop]
        if not slots:
            return set()
        # a stop string of b bytes ends inside the last b tokens; one more shows what stands before it
        tails = [live[s].sample.ids[-1 - max(len(t.encode()) for t in live[s].prompt.request.stop) :] for s in slots]
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return {s for s, text in zip(slots, texts) if any(stop in text for stop in live[s].prompt.request.stop)}
