"""The records that travel between data, rollouts, models, losses and trainers.

Examples are stored one per sequence and packed only when a micro-batch meets the model: (N,) tokens and ``cu_seqlens``,
no padding anywhere. Every per-token entry t concerns token t: its log-probability, its reward, the value of the state
before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Example:
    """One tokenized sequence and the tokens of it that are trained or scored."""

    input_ids: list[int]  # (T,) prompt and response
    response_mask: list[bool]  # (T,) True on the tokens the model is responsible for; never the first of a sequence
    weight: float = 1.0  # weight of this example's tokens in a weighted loss

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class Prompt:
    """One prompt to respond to; ``columns`` are what reward functions receive besides it."""

    input_ids: list[int]  # (P,)
    prompt: Any  # as the data set gave it: a string, or a list of messages
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass
class Preference:
    """Two or more responses to one prompt, best first. A pair is (chosen, rejected)."""

    responses: list[Example]  # K >= 2
    margin: float | None = None  # how much better the first is, for pairs only
    ref_logprobs: list[float] | None = None  # K summed log-probabilities under the reference, once computed

    def __len__(self) -> int:
        return sum(map(len, self.responses))


@dataclass
class TokenBatch:
    """B sequences of N tokens in all, end to end. Sequence i is ``[cu_seqlens[i], cu_seqlens[i + 1])``.

    Host-side lengths are kept so that nobody reads them back from the device.
    """

    input_ids: Tensor  # (N,) long
    position_ids: Tensor  # (N,) long, restarts at 0 with every sequence
    response_mask: Tensor  # (N,) bool, False on the first token of every sequence
    response_rows: Tensor  # (R,) long, the positions where response_mask is True
    cu_seqlens: Tensor  # (B + 1,) int32
    lengths: list[int]  # B sequence lengths
    weights: Tensor | None = None  # (N,) float32 loss weight of each token; None means 1

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_response_tokens(self) -> int:
        return self.response_rows.numel()

    @classmethod
    def pack(cls, examples: Sequence[Example], device: torch.device | str = "cpu") -> TokenBatch:
        """Lay ``examples`` end to end on ``device``."""
        lengths = [len(e) for e in examples]
        starts = [0, *itertools.accumulate(lengths)]
        mask = torch.tensor([m for e in examples for m in e.response_mask], dtype=torch.bool)
        # nothing precedes a sequence's first token, so nothing predicts it
        mask[[start for start, length in zip(starts, lengths) if length]] = False
        weights = None
        if any(e.weight != 1.0 for e in examples):
            weights = torch.tensor([e.weight for e in examples for _ in e.input_ids])
        return cls(
            input_ids=torch.tensor([t for e in examples for t in e.input_ids], dtype=torch.long).to(device),
            position_ids=torch.tensor([p for n in lengths for p in range(n)], dtype=torch.long).to(device),
            response_mask=mask.to(device),
            response_rows=mask.nonzero().squeeze(1).to(device),
            cu_seqlens=torch.tensor(starts, dtype=torch.int32).to(device),
            lengths=lengths,
            weights=weights.to(device) if weights is not None else None,
        )


@dataclass
class Experience:
    """One sampled response with all that reinforcement learning knows about it.

    Per-token entries are (T,) float32, aligned with ``example.input_ids`` and 0 outside the response.
    """

    example: Example
    reward: float  # NaN when no reward function could score it
    finished: bool = True  # it ended by itself, not by the length limit
    rollout_logprobs: Tensor | None = None  # as the rollout engine reported them
    old_logprobs: Tensor | None = None  # under the policy at the start of the update
    ref_logprobs: Tensor | None = None  # under the frozen reference
    values: Tensor | None = None  # the critic's estimate of the state before each token
    advantages: Tensor | None = None
    returns: Tensor | None = None


def packed(experiences: Sequence[Experience], name: str) -> Tensor | None:
    """The per-token entry ``name`` of all ``experiences`` as one (N,) tensor; None when it was not collected."""
    entries = [getattr(e, name) for e in experiences]
    return None if entries[0] is None else torch.cat(entries)


def unpack(experiences: Sequence[Experience], name: str, values: Tensor) -> None:
    """The inverse of :func:`packed`: give every experience its part of ``values`` (N,)."""
    for experience, part in zip(experiences, values.split([len(e.example) for e in experiences])):
        setattr(experience, name, part)
