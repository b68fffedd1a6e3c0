"""The default rollout engine: ``transformers.generate`` in this process, on the weights that are being trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from rlhf_fast.errors import UserError
from rlhf_fast.rollout.decoding import Decoded, DecodingLoop, Rows
from rlhf_fast.rollout.engine import Request, Sample
from rlhf_fast.rollout.sampling import Settings, draw_seed, random_stream, settings_row


class GenerateEngine:
    """Continue prompts with the policy itself; any Hugging Face decoder works.

    Samples are drawn by inverting the CDF with random numbers from a counter-based generator keyed by (seed, index of
    the sample): a seeded request gives the same tokens whatever else is in the batch, up to float rounding of the
    logits, and touches no global generator. Unseeded requests take their seed from torch's global generator.
    Sampling settings in the model's generation_config.json are ignored; its EOS ids are honoured.

    Args:
        policy: gives ``generation_model(role)``, a context manager with the Hugging Face model in eval mode.
        tokenizer: of the policy; needed for stop strings. None takes ``policy.tokenizer``.
        role: which weights of the policy write.
        max_batch_size: most sequences decoded at once (the samples of all requests together).
        progress: called with the number of sequences finished so far, after every batch.
    """

    capabilities = frozenset({"token_ids", "logprobs", "seed", "n", "stop"})

    def __init__(
        self,
        policy: Any,
        tokenizer: Any = None,
        *,
        role: str = "policy",
        max_batch_size: int = 128,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        if max_batch_size < 1:
            raise UserError(f"generation: max_batch_size must be at least 1, got {max_batch_size}.")
        self.policy, self.role, self.max_batch_size = policy, role, max_batch_size
        self.tokenizer = policy.tokenizer if tokenizer is None else tokenizer
        self.progress = progress
        self.version = 0

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """Continue every request; entry i holds the ``n`` samples of request i.

        A prompt and its samples never exceed the model's context: what does not fit ends as "length".

        Raises:
            UserError: a prompt fills the model's context.
            RuntimeError: the model's logits are not finite.
        """
        requests = list(requests)
        seeds = [draw_seed() if r.seed is None else r.seed for r in requests]
        samples: list[list[Sample | None]] = [[None] * r.n for r in requests]
        done = 0
        with self.policy.generation_model(self.role) as model, _own_generation_config(model):
            eos_ids = end_of_sequence_ids(model, self.tokenizer)
            room = [_room(model, i, r) for i, r in enumerate(requests)]
            for batch in _batches(requests, self.max_batch_size):
                decoded = self._decode(model, requests, seeds, room, batch, eos_ids)
                for (i, j), sample in zip(batch, self._samples(decoded, [requests[i].filtered for i, _ in batch])):
                    samples[i][j] = sample
                done += len(batch)
                if self.progress:
                    self.progress(done)
        return samples

    def update(self, adapter_dir: str | Path | None, version: int) -> None:
        """Note the version of the weights, which are the policy's own and need no copying."""
        if adapter_dir is not None:
            raise UserError(f"This engine writes with the policy's own weights and cannot load {adapter_dir}.")
        self.version = version

    def reset_cache(self) -> None:
        """Nothing to do: no keys or values outlive a call."""

    def sleep(self) -> None:
        """Nothing to do: no memory is held between calls."""

    def wake(self) -> None:
        """Nothing to do."""

    def _decode(
        self,
        model: Any,
        requests: list[Request],
        seeds: list[int],
        room: list[int],
        batch: list[tuple[int, int]],
        eos_ids: list[int],
    ) -> Decoded:
        """Run one batch of (request, sample) pairs."""
        device = model.device
        # request -> row of its prompt
        owners = {i: row for row, i in enumerate(dict.fromkeys(i for i, _ in batch))}
        input_ids, attention_mask = _pad_left([requests[i].prompt_ids for i in owners])
        of = [requests[i] for i, _ in batch]
        limits = [min(r.max_new_tokens, room[i]) for r, (i, _) in zip(of, batch)]
        rows = Rows(
            prompt=torch.tensor([owners[i] for i, _ in batch], device=device),
            limit=torch.tensor(limits, device=device),
            settings=Settings.of(of, torch.tensor([settings_row(r) for r in of], device=device)),
            uniforms=_uniforms([(seeds[i], j) for i, j in batch], max(limits)).to(device),
            stop=[r.stop for r in of],
            stop_ids=[r.stop_ids for r in of],
            eos=torch.tensor(eos_ids, dtype=torch.long, device=device),
        )
        # greedy and one beam, so that transformers prepares the plain case: sampling happens in our loop
        settings = GenerationConfig(
            max_new_tokens=max(limits), do_sample=False, num_beams=1, use_cache=True, pad_token_id=0
        )
        return model.generate(
            input_ids.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=settings,
            custom_generate=DecodingLoop(rows, self.tokenizer),
        )

    def _samples(self, decoded: Decoded, filtered: list[bool]) -> Iterator[Sample]:
        """The samples of a batch; ``filtered`` says which of them have filters or a penalty."""
        columns = (decoded.tokens, decoded.logprobs, decoded.lengths, decoded.stopped)
        others = [None] * len(filtered) if decoded.filtered_logprobs is None else decoded.filtered_logprobs.tolist()
        for tokens, logprobs, length, stopped, other, has in zip(*(c.tolist() for c in columns), others, filtered):
            logprobs = logprobs[:length]
            if not np.isfinite(logprobs).all():
                raise RuntimeError("generation: the model's logits are not finite, so its weights have diverged")
            other = other[:length] if has else None
            yield Sample(tokens[:length], logprobs, "stop" if stopped else "length", self.version, other)


def end_of_sequence_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a sequence: all of ``generation_config.eos_token_id``, and the tokenizer's own EOS."""
    ids: set[int] = set()
    configured = getattr(model, "generation_config", None) and model.generation_config.eos_token_id
    for source in (model.config.eos_token_id if configured is None else configured, tokenizer.eos_token_id):
        ids.update([source] if isinstance(source, int) else source or ())
    return sorted(ids)


def context_length(model: Any) -> int | None:
    """Most tokens of a prompt and its continuation; None where the model sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def decode(samples: Sequence[Sample], tokenizer: Any) -> list[str]:
    """The text of each sample, without special tokens: for rewards and for reading, never to be tokenized again."""
    return tokenizer.batch_decode(
        [s.ids for s in samples], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def completions_for(prompts: Sequence[Any], texts: Sequence[str]) -> list[Any]:
    """Completions in the form of their prompts: a message list answers a message list, a string a string."""
    return [t if isinstance(p, str) else [{"role": "assistant", "content": t}] for p, t in zip(prompts, texts)]


@contextmanager
def _own_generation_config(model: Any) -> Iterator[None]:
    """Hide the model's generation_config: transformers fills every unset field from it (penalties, top_k, lengths)."""
    kept = model.generation_config
    # what `end_of_sequence_ids` needs stays visible
    model.generation_config = GenerationConfig(eos_token_id=kept.eos_token_id if kept is not None else None)
    try:
        yield
    finally:
        model.generation_config = kept


def _room(model: Any, index: int, request: Request) -> int:
    """New tokens that fit behind the prompt."""
    context = context_length(model)
    if context is None:
        return request.max_new_tokens
    if len(request.prompt_ids) >= context:
        raise UserError(
            f"generation: prompt {index} has {len(request.prompt_ids)} tokens, which fills the model's context of "
            f"{context}. Shorten or drop it."
        )
    return context - len(request.prompt_ids)


def _batches(requests: list[Request], max_batch_size: int) -> Iterator[list[tuple[int, int]]]:
    """(request, sample) pairs in even batches of prompts of similar length, longest first: memory peaks at once."""
    longest_first = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids))
    pairs = [(i, j) for i in longest_first for j in range(requests[i].n)]
    count = -(-len(pairs) // max_batch_size)
    for k in range(count):
        yield pairs[k * len(pairs) // count : (k + 1) * len(pairs) // count]


def _pad_left(prompts: list[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(P, L) ids and attention mask; the padding's id does not matter, the mask comes from the lengths."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def _uniforms(keys: list[tuple[int, int]], steps: int) -> torch.Tensor:
    """(R, steps) float64 in [0, 1): one stream of random numbers for each (seed, sample)."""
    return torch.from_numpy(np.stack([random_stream(*key).random(steps) for key in keys]))
