"""Attention over packed sequences, registered with transformers under the name ``rlhf_fast``.

A packed batch is one row of N tokens. The boundaries travel as the keyword ``segments`` through ``model(...)`` to every
attention layer; documents never see each other. Nothing in transformers is patched: ``AttentionInterface`` and
``AttentionMaskInterface`` are its public extension points.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from rlhf_fast.data.batch import TokenBatch
from rlhf_fast.errors import UserError

NAME = "rlhf_fast"
# keywords every model passes and plain causal softmax attention may ignore; any other non-None keyword is refused
_HARMLESS = {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "is_causal"}


@dataclass(frozen=True)
class Segments:
    """Where the sequences of a packed row lie, as right-padded tables of rows for the attention alone.

    Causal attention needs no mask over right padding (a token never looks right), so a few dense calls serve all
    sequences. Sequences share a table when their lengths round up to the same power of two, which bounds the padding.
    """

    longest: int
    tables: tuple[Tensor, ...]  # each (b, t) long: row of every token; padding repeats the sequence's last row
    restore: Tensor  # (N,) long: where each row ended up in the flattened, concatenated tables

    @classmethod
    def of(cls, batch: TokenBatch) -> Segments:
        """The segments of ``batch``, on its device."""
        starts = batch_starts(batch.lengths)
        buckets: dict[int, list[int]] = {}
        for i, length in enumerate(batch.lengths):
            if length:
                buckets.setdefault((length - 1).bit_length(), []).append(i)
        tables, restore, offset = [], torch.empty(sum(batch.lengths), dtype=torch.long), 0
        for members in buckets.values():
            width = max(batch.lengths[i] for i in members)
            first = torch.tensor([starts[i] for i in members])
            length = torch.tensor([batch.lengths[i] for i in members])
            column = torch.arange(width)
            tables.append(first[:, None] + torch.minimum(column[None], length[:, None] - 1))
            real = column[None] < length[:, None]
            restore[tables[-1][real]] = offset + real.flatten().nonzero().squeeze(1)
            offset += real.numel()
        device = batch.input_ids.device
        return cls(max(batch.lengths, default=0), tuple(t.to(device) for t in tables), restore.to(device))


def batch_starts(lengths: list[int]) -> list[int]:
    """First row of every sequence."""
    starts, total = [], 0
    for length in lengths:
        starts.append(total)
        total += length
    return starts


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **other,
) -> tuple[Tensor, None]:
    """Causal attention within each segment; query (1, H, N, d), key and value (1, Hk, N, d) -> (1, N, H, d).

    Raises:
        UserError: a keyword that changes attention (a soft cap, sinks, a window shorter than a segment) is not
            implemented here; silently ignoring it would train a different model.
    """
    if segments is None or attention_mask is not None:
        raise UserError("rlhf_fast's attention runs packed batches only: pass segments and no attention mask")
    if sliding_window is not None and sliding_window >= segments.longest:
        sliding_window = None  # the window covers every segment: it changes nothing
    unknown = {name: x for name, x in other.items() if x is not None and name not in _HARMLESS}
    if sliding_window is not None or unknown:
        names = ", ".join(sorted({*unknown, *(["sliding_window"] if sliding_window is not None else [])}))
        raise UserError(
            f"{type(module).__name__} asks for attention with {names}, which packed training does not implement yet; "
            "use a model without it"
            + (f", or sequences of at most {sliding_window} tokens" if sliding_window is not None else "")
        )
    grouped = query.shape[1] != key.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, d)
    outputs = []
    for rows in segments.tables:
        q_, k_, v_ = (x[rows].transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q_, k_, v_, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=grouped
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[segments.restore][None], None


def _no_mask(*args, **kwargs) -> None:
    """The segments say it all; an N x N mask is never built."""


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _no_mask)


def use_packed_attention(model: PreTrainedModel) -> str:
    """Make every layer of ``model`` run :func:`packed_attention`; returns the name of what it ran before.

    Raises:
        UserError: the architecture does not go through transformers' attention interface.
    """
    config = model.config.get_text_config()
    odd = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if odd or getattr(model, "_is_stateful", False):
        raise UserError(
            f"{type(model).__name__} has layers that carry state past the end of a sequence or mask in their own way "
            f"({', '.join(sorted(odd)) or 'recurrent'}); packed training would mix sequences there, so choose a model with "
            "softmax attention throughout"
        )
    native = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise UserError(
            f"{type(model).__name__} does not use transformers' attention interface, so its sequences cannot be packed; "
            "choose a model that does (Llama, Qwen 2 and 3, Mistral, Phi, GPT-2 and most others)"
        )
    return native


@contextlib.contextmanager
def generation_attention(model: PreTrainedModel, native: str) -> Iterator[None]:
    """transformers' own attention (padding masks, KV cache) for the length of a rollout."""
    model.set_attn_implementation(native)
    try:
        yield
    finally:
        model.set_attn_implementation(NAME)
