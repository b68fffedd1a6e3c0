"""The records that travel between data, rollouts, models, losses and trainers.

Examples are stored one per sequence and packed only when a micro-batch meets the model: (N,) tokens and ``cu_seqlens``,
no padding anywhere. Neighbours that answer the same prompt (the group of GRPO, the pair of DPO, a ranking) store and
compute it once: [prompt, response 1, .., response G]. Every per-token entry t concerns token t: its log-probability, its
reward, the value of the state before it.
"""

from __future__ import annotations

import itertools
import math
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
    where: str | None = field(default=None, compare=False)  # the row that it came from, as ``train.jsonl, line 17``

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class Prompt:
    """One prompt to respond to; ``columns`` are what reward functions receive besides it."""

    input_ids: list[int]  # (P,)
    prompt: Any  # as the data set gave it: a string, or a list of messages
    columns: dict[str, Any] = field(default_factory=dict)
    where: str | None = field(default=None, compare=False)  # the row that it came from


@dataclass
class Preference:
    """Two or more responses to one prompt, best first. A pair is (chosen, rejected)."""

    responses: list[Example]  # K >= 2
    margin: float | None = None  # how much better the first is, for pairs only
    ref_logprobs: list[float] | None = None  # K summed log-probabilities under the reference, once computed
    # where a pair's loss depends on the other pairs of its step: this pair's part of the loss, and the slopes in its K sums
    coupling: list[float] | None = None  # 1 + K
    safe: list[bool] | None = None  # K, whether each response is safe, where a cost is learned and somebody said so
    head_weights: list[float] | None = None  # of this row in the loss of each head of an ensemble; None: all 1

    def __len__(self) -> int:
        return sum(map(len, self.responses))

    @property
    def weight(self) -> float:
        """Weight of the row in the loss."""
        return self.responses[0].weight


@dataclass
class Labelled:
    """One response that was found good or bad, and another prompt's response to the same prompt."""

    example: Example
    label: bool  # desirable
    mismatched: Example  # the same prompt with a response to another: what the KL to the reference is estimated on
    ref_logprobs: list[float] | None = None  # summed under the reference, of both, once computed
    kl: float = 0.0  # estimate of KL(policy || reference) for the step, nats per response

    def __len__(self) -> int:
        return len(self.example)


@dataclass(frozen=True)
class Span:
    """Rows ``[start, start + length)`` of a packed batch, which see, causally, the prefix rows and themselves."""

    start: int
    length: int  # at least 1
    prefix_start: int = 0
    prefix_length: int = 0  # 0: they see themselves only


@dataclass
class TokenBatch:
    """B sequences in N rows, end to end. The rows of sequence i are ``[cu_seqlens[i], cu_seqlens[i + 1])``.

    Where neighbours share a prompt, it lies once, in front of the first of them: sequence i then begins with token
    ``shared[i]`` of its example, and what comes before lies among the rows of an earlier sequence. Shared rows hold no
    response token and every sequence keeps its last token, so a loss over ``cu_seqlens`` and ``response_mask`` and a score
    at the last row are what they are without sharing. What precedes a token is in ``predictor_rows`` and ``spans``, not
    always in the row before.

    Host-side lengths are kept so that nobody reads them back from the device.
    """

    input_ids: Tensor  # (N,) long
    position_ids: Tensor  # (N,) long, of each token in its example
    response_mask: Tensor  # (N,) bool, False on the first token of every example
    response_rows: Tensor  # (R,) long, the rows where response_mask is True
    predictor_rows: Tensor  # (R,) long, the row of the token before: its hidden state predicts the response token
    cu_seqlens: Tensor  # (B + 1,) int32
    lengths: list[int]  # B, rows of each sequence
    shared: list[int]  # B, leading tokens of each example that lie among the rows of an earlier one
    spans: list[Span]  # what attends to what, in the order of the rows
    weights: Tensor | None = None  # (N,) float32 loss weight of each token; None means 1
    attention: Any = field(default=None, repr=False)  # what models.attention derives from spans, once per batch

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_response_tokens(self) -> int:
        return self.response_rows.numel()

    @classmethod
    def pack(
        cls, examples: Sequence[Example], device: torch.device | str = "cpu", *, shared_prefix: bool = True
    ) -> TokenBatch:
        """Lay ``examples`` end to end on ``device``; a prompt that neighbours share once, where that pays."""
        spans, shared = _lay_out(examples, shared_prefix)
        lengths = [len(e) - s for e, s in zip(examples, shared)]
        starts = [0, *itertools.accumulate(lengths)]
        mask = torch.tensor([m for e, s in zip(examples, shared) for m in e.response_mask[s:]], dtype=torch.bool)
        # nothing precedes an example's first token, so nothing predicts it
        mask[[start for start, length, s in zip(starts, lengths, shared) if length and not s]] = False
        before = torch.arange(-1, starts[-1] - 1)
        for span in spans:
            if span.prefix_length:
                before[span.start] = span.prefix_start + span.prefix_length - 1
        rows = mask.nonzero().squeeze(1)
        weights = None
        if any(e.weight != 1.0 for e in examples):
            weights = torch.tensor([e.weight for e in examples]).repeat_interleave(torch.tensor(lengths)).to(device)
        ids, positions, rows, predictors, cu_seqlens = to_device(
            [
                torch.tensor([t for e, s in zip(examples, shared) for t in e.input_ids[s:]], dtype=torch.long),
                torch.tensor(
                    [p for x in spans for p in range(x.prefix_length, x.prefix_length + x.length)], dtype=torch.long
                ),
                rows,
                before[rows],
                torch.tensor(starts),
            ],
            device,
        )
        return cls(
            input_ids=ids,
            position_ids=positions,
            response_mask=torch.zeros(len(ids), dtype=torch.bool, device=ids.device).index_fill_(0, rows, True),
            response_rows=rows,
            predictor_rows=predictors,
            cu_seqlens=cu_seqlens.int(),
            lengths=lengths,
            shared=shared,
            spans=spans,
            weights=weights,
        )


# Neighbours share their prompt's rows when that spares the linear layers this factor of tokens: for G responses of C tokens
# to a prompt of P it is G (P + C) / (P + G C). Below it, attention over two places and smaller matrices eat the gain.
SHARING_GAIN = 1.3


def shared_runs(examples: Sequence[Example]) -> list[tuple[int, int]]:
    """Cut ``examples`` into runs of neighbours that share a prompt, so that the fewest rows remain.

    Shared are the tokens with which all of a run begin and before which none of them has a response token: never a
    response token itself, and never the last token of an example. A run of G must satisfy ``SHARING_GAIN``.

    Returns:
        (examples in the run, tokens they share) of each run in order; (1, 0) is an example by itself.
    """
    prompts = [_prompt_length(e) for e in examples]
    common = [
        _common_prefix(a.input_ids, b.input_ids, min(p, q))
        for (a, p), (b, q) in itertools.pairwise(zip(examples, prompts))
    ]
    fewest, last_run = [0], []  # of the examples up to here: rows, and the run that ends here
    for end in range(1, len(examples) + 1):
        total, shared = len(examples[end - 1]), prompts[end - 1]
        best, run = fewest[end - 1] + total, (1, 0)
        for start in range(end - 2, -1, -1):
            shared = min(shared, common[start])
            if not shared:
                break
            total += len(examples[start])
            rows = total - (end - start - 1) * shared
            if fewest[start] + rows < best and total >= SHARING_GAIN * rows:
                best, run = fewest[start] + rows, (end - start, shared)
        fewest.append(best)
        last_run.append(run)
    runs, end = [], len(examples)
    while end:
        runs.append(last_run[end - 1])
        end -= runs[-1][0]
    return runs[::-1]


def packed_length(examples: Sequence[Example], shared_prefix: bool = True) -> int:
    """Rows that :meth:`TokenBatch.pack` gives ``examples``: their tokens, less the prompts that they share."""
    saved = sum((count - 1) * prefix for count, prefix in shared_runs(examples)) if shared_prefix else 0
    return sum(map(len, examples)) - saved


def to_device(parts: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Integer tensors on ``device``, as long, by one copy: from pinned memory where that lets it overlap."""
    whole = torch.cat([p.flatten().long() for p in parts])
    if torch.device(device).type == "cuda":
        whole = whole.pin_memory()
    pieces = whole.to(device, non_blocking=True).split([p.numel() for p in parts])
    return [piece.view(p.shape) for piece, p in zip(pieces, parts)]


def _lay_out(examples: Sequence[Example], shared_prefix: bool) -> tuple[list[Span], list[int]]:
    """The spans of all rows, and how many leading tokens of each example lie among the rows of an earlier one."""
    spans: list[Span] = []
    shared: list[int] = []
    row, members = 0, iter(examples)
    for count, prefix in shared_runs(examples) if shared_prefix else [(1, 0)] * len(examples):
        first = row
        if prefix:
            spans.append(Span(first, prefix))
            row += prefix
        for example in itertools.islice(members, count):
            if own := len(example) - prefix:
                spans.append(Span(row, own, first if prefix else 0, prefix))
            shared.append(prefix if row > first + prefix else 0)
            row += own
    return spans, shared


def _prompt_length(example: Example) -> int:
    """Tokens before the first response token, without the example's last one."""
    mask = example.response_mask
    return min(mask.index(True) if True in mask else len(mask), max(len(mask) - 1, 0))


def _common_prefix(a: list[int], b: list[int], limit: int) -> int:
    """How many of their first ``limit`` tokens ``a`` and ``b`` have in common."""
    if a[:limit] == b[:limit]:
        return limit
    return next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)


@dataclass
class Experience:
    """One sampled response with all that reinforcement learning knows about it.

    Per-token entries are (T,) float32, aligned with ``example.input_ids`` and 0 outside the response.
    """

    example: Example
    reward: float  # NaN when no reward function could score it
    score: float = math.nan  # its reward as it was given, before penalties and scaling
    held_out: float = math.nan  # a reward that nothing learns from, of a share of the responses
    cost: float = 0.0  # the harm it does, where costs are asked for
    finished: bool = True  # it ended by itself, not by the length limit
    rollout_logprobs: Tensor | None = None  # as the rollout engine reported them
    old_logprobs: Tensor | None = None  # under the policy at the start of the update
    ref_logprobs: Tensor | None = None  # under the frozen reference
    values: Tensor | None = None  # the critic's estimate of the state before each token
    advantages: Tensor | None = None
    returns: Tensor | None = None
    cost_values: Tensor | None = None  # as values and returns, of the cost
    cost_returns: Tensor | None = None


def packed(experiences: Sequence[Experience], name: str, batch: TokenBatch) -> Tensor | None:
    """The per-token entry ``name`` of all ``experiences`` in the rows of their ``batch``, (N,); None when it was not
    collected."""
    entries = [getattr(e, name) for e in experiences]
    return None if entries[0] is None else torch.cat([x[s:] for x, s in zip(entries, batch.shared)])


def unpack(experiences: Sequence[Experience], name: str, values: Tensor, batch: TokenBatch) -> None:
    """The inverse of :func:`packed`: give every experience its part of ``values`` (N,), 0 on a prompt shared with others."""
    for experience, part, shared in zip(experiences, values.split(batch.lengths), batch.shared):
        setattr(experience, name, torch.nn.functional.pad(part, (shared, 0)))
