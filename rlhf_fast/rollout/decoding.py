"""The decoding loop behind ``GenerateEngine``: sampling, exact log-probabilities, a cache that does not copy itself.

transformers' own loop keeps (B, V) scores of every step when asked for log-probabilities, draws V random numbers per
token, reallocates the whole KV cache at every token, prefills each prompt once per sample, and carries finished
sequences to the end. This one, given to ``model.generate(custom_generate=...)``, does none of that, while inputs,
masks and caches are still prepared by the model's own code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from rlhf_fast.rollout.sampling import Settings, sample


@dataclass
class Rows:
    """How to continue each of the R sequences of one batch. Tensors lie on the model's device."""

    prompt: Tensor  # (R,) long, which of the batch's prompts the row continues
    limit: Tensor  # (R,) long, most new tokens
    settings: Settings  # how to sample
    uniforms: Tensor  # (R, T) float64 in [0, 1), one random number per token
    stop: Sequence[Sequence[str]]  # R tuples of stop strings
    stop_ids: Sequence[Sequence[int]]  # R tuples of tokens that end the row
    eos: Tensor  # (E,) long, the tokens that end a sequence; may be empty


@dataclass
class Decoded:
    """What came out. Entries of row r at or after ``lengths[r]`` are meaningless."""

    tokens: Tensor  # (R, T) long
    logprobs: Tensor  # (R, T) float32
    filtered_logprobs: Tensor | None  # (R, T) float32, under the distribution sampled from; None without filters
    lengths: Tensor  # (R,) long
    stopped: Tensor  # (R,) bool, by an EOS token or a stop string


class GrowingLayer(DynamicLayer):
    """A layer's keys and values inside buffers with spare room, so that a new token costs one write.

    ``DynamicLayer`` concatenates, which copies the whole cache at every token.

    Args:
        limit: tokens of the longest sequence to come: room for more is never made.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.buffers = (key_states[:, :, :0], value_states[:, :, :0])
        self._view(0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, H, T, D) keys and values; returns all of them as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self.buffers[0].shape[-2]:
            self._rebuild(self.keys, self.values, capacity=max(end, min(end + max(32, end // 4), self.limit)))
        for buffer, new in zip(self.buffers, (key_states, value_states)):
            buffer[:, :, start:end] = new
        self._view(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep, drop or repeat sequences."""
        if (length := self.get_seq_length()) > 0:
            self._rebuild(self.keys[indices], self.values[indices], capacity=self.buffers[0].shape[-2])
            self._view(length)

    def _rebuild(self, *contents: Tensor, capacity: int) -> None:
        self.buffers = tuple(c.new_empty(*c.shape[:2], capacity, c.shape[3]) for c in contents)
        for buffer, content in zip(self.buffers, contents):
            buffer[:, :, : content.shape[-2]] = content

    def _view(self, length: int) -> None:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)


class DecodingLoop:
    """Continue a batch of prompts; call it through ``model.generate(custom_generate=loop)``.

    Every step normalises the float32 logits once, samples from exactly that distribution, and keeps one
    log-probability per sequence. A prompt is prefilled once for all its samples, and finished sequences leave the batch.
    """

    def __init__(self, rows: Rows, tokenizer: Any) -> None:
        self.rows, self.tokenizer = rows, tokenizer
        count, steps = rows.uniforms.shape
        self.tokens = torch.zeros(count, steps, dtype=torch.long, device=rows.prompt.device)
        self.logprobs = torch.zeros(count, steps, device=rows.prompt.device)
        self.lengths = torch.zeros_like(rows.prompt)
        self.stopped = torch.zeros_like(rows.prompt, dtype=torch.bool)
        self.going = torch.ones_like(self.stopped)  # False once a row has ended, even while it is still in the batch
        self.filtered_logprobs = torch.zeros_like(self.logprobs) if rows.settings.filtered else None
        self.seen: Tensor | None = None  # (R, V) bool, for repetition penalties
        # a stop string of b bytes ends inside the last b tokens; one more shows what stands before it
        self.tail = 1 + max((len(s.encode()) for strings in rows.stop for s in strings), default=0)

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> Decoded:
        """transformers' contract for a custom loop. ``input_ids`` are (P, L) prompts, padded on the left."""
        cache = cache_of(model_kwargs)
        if type(cache) is DynamicCache:
            limit = input_ids.shape[1] + self.tokens.shape[1]
            cache.layers = [GrowingLayer(limit) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        selectable = can_select(cache)
        live = torch.arange(len(self.rows.prompt), device=input_ids.device)
        if not selectable:
            input_ids, model_kwargs = select(self.rows.prompt, input_ids, model_kwargs)

        for step in range(self.tokens.shape[1]):
            first = step == 0
            inputs = model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=None if first else 1, is_first_iteration=first, **model_kwargs
            )
            outputs = model(**inputs, return_dict=True)
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
            logits = outputs.logits[:, -1].float()
            # the prefill's logits may be large, and the name would keep them alive through the next step
            del outputs, inputs
            if first and selectable:
                input_ids, model_kwargs = select(self.rows.prompt, input_ids, model_kwargs)
                logits = logits[self.rows.prompt]

            if first and self.rows.settings.penalised:
                self._note_prompts(input_ids, model_kwargs.get("attention_mask"), logits.shape[1])
            token = self._sample(logits, live, step)
            input_ids = torch.cat([input_ids, token[:, None]], dim=1)
            going = self._finish(token, live, step)
            remaining = int(going.sum())
            if remaining == 0:
                break
            # dropping rows copies the cache, so wait until it saves a quarter of the work
            if selectable and remaining <= 0.75 * len(live):
                kept = going.nonzero().squeeze(1)
                live = live[kept]
                input_ids, model_kwargs = select(kept, input_ids, model_kwargs)
        return Decoded(self.tokens, self.logprobs, self.filtered_logprobs, self.lengths, self.stopped)

    def _note_prompts(self, input_ids: Tensor, attention_mask: Tensor | None, vocabulary: int) -> None:
        """Mark the prompts' tokens as seen; (R, L) each, padded on the left. transformers drops a mask that hides nothing."""
        self.seen = torch.zeros(len(input_ids), vocabulary, dtype=torch.bool, device=input_ids.device)
        shown = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, : input_ids.shape[1]]
        rows, columns = shown.nonzero(as_tuple=True)
        self.seen[rows, input_ids[rows, columns]] = True

    def _sample(self, logits: Tensor, live: Tensor, step: int) -> Tensor:
        """Choose and record a token for each live row; logits are (R_live, V) float32."""
        seen = None if self.seen is None else self.seen[live]
        drawn = sample(logits, self.rows.settings.rows(live), self.rows.uniforms[live, step], seen)
        self.tokens[live, step] = drawn.token
        self.logprobs[live, step] = drawn.logprob
        if self.filtered_logprobs is not None:
            self.filtered_logprobs[live, step] = drawn.filtered_logprob.float()
        if self.seen is not None:
            self.seen[live, drawn.token] = True
        return drawn.token

    def _finish(self, token: Tensor, live: Tensor, step: int) -> Tensor:
        """Note which rows ended with ``token``; returns (R_live,) bool, True where a row goes on."""
        was_going = self.going[live]
        ended = torch.isin(token, self.rows.eos)
        if any(self.rows.stop_ids):
            pairs = zip(live.tolist(), token.tolist())
            ended |= torch.tensor([t in self.rows.stop_ids[row] for row, t in pairs], device=token.device)
        if self.tail > 1:
            ended |= self._hits_stop_string(live, step)
        going = was_going & ~ended & (step + 1 < self.rows.limit[live])
        self.lengths[live] += was_going
        self.stopped[live] |= was_going & ended
        self.going[live] = going
        return going

    def _hits_stop_string(self, live: Tensor, step: int) -> Tensor:
        recent = self.tokens[live, max(0, step + 1 - self.tail) : step + 1].tolist()
        texts = self.tokenizer.batch_decode(recent, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        hits = [any(s in text for s in self.rows.stop[row]) for row, text in zip(live.tolist(), texts)]
        return torch.tensor(hits, device=live.device)


def cache_of(model_kwargs: dict[str, Any]) -> Any:
    """The keys and values of a generation; transformers 5.24 renamed the argument."""
    return model_kwargs.get("cache", model_kwargs.get("past_key_values"))


def can_select(cache: Any) -> bool:
    """Whether sequences can be dropped from and repeated in the cache."""
    return isinstance(cache, DynamicCache) and all(hasattr(layer, "batch_select_indices") for layer in cache.layers)


def select(indices: Tensor, input_ids: Tensor, model_kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Keep the sequences at ``indices`` (which may repeat) of the ids, of every per-sequence tensor and of the cache."""
    count, picked = len(input_ids), {}
    for name, value in model_kwargs.items():
        per_sequence = isinstance(value, Tensor) and value.ndim > 0 and len(value) == count
        picked[name] = value[indices] if per_sequence else value
    cache = cache_of(model_kwargs)
    if cache is not None and cache.get_seq_length() > 0:
        cache.batch_select_indices(indices)
    return input_ids[indices], picked
