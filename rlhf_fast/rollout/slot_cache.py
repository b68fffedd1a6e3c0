"""Keys and values of the slot engine, and the attention that reads and writes them.

The attention is registered with transformers under a name of its own. What it has to do travels as the keyword ``work``
through ``model(...)`` to every layer, as ``segments`` do in training: transformers' caches and masks take no part. There
are three kinds of work: whole prompts side by side, the next chunk of a long prompt, and one token for every live slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from rlhf_fast.data.batch import Span
from rlhf_fast.errors import UserError
from rlhf_fast.kernels import decode_attention
from rlhf_fast.models.attention import Segments, packed_attention

ATTENTION = "rlhf_fast_slots"  # its name in transformers
PIECE = 8192  # tokens copied into slots at a time
# keywords every model passes and causal softmax attention may ignore; any other non-None keyword is refused
_HARMLESS = {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "is_causal"}


class Work(Protocol):
    """What one forward pass does in every layer."""

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None):
        """Keep the new keys and values (B, Hk, T, d), return what the queries (B, H, T, d) see: (B, T, H, d)."""


class SlotCache:
    """R slots with room for the keys and values of S tokens each, in every layer (R, Hk, S, d).

    Layers are made when they are first written, in the dtype and shape of what they get.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.rows = self.length = 0
        self.moves = 0  # how often a layer got another address

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for pair in self.layers.values() for x in pair)

    def resize(self, rows: int, length: int) -> None:
        """Make or give back room, one layer after the other; what is in slots and places that remain is kept.

        When there is not enough memory for it, nothing is kept, and the error goes on.
        """
        self.rows, self.length = rows, length
        self.moves += 1
        try:
            for index in list(self.layers):  # not the items: old layers must go one by one
                self.layers[index] = tuple(self._resized(x) for x in self.layers.pop(index))
        except BaseException:  # half of it would be written out of bounds
            self.layers.clear()
            self.rows = self.length = 0
            raise

    def layer(self, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer whose new ones are ``k`` and ``v`` (B, Hk, T, d)."""
        if index not in self.layers:
            self.moves += 1
            self.layers[index] = tuple(self._resized(x[:0, :, :0]) for x in (k, v))
        return self.layers[index]

    def write(self, pack: Pack, tokens: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Copy prompt tokens of a ``pack`` to places: all (M,) long."""
        # in pieces, as picking tokens copies them
        for part in zip(*(x.split(PIECE) for x in (tokens, slots, positions))):
            for index, new in pack.layers.items():
                for buffer, x in zip(self.layer(index, *new), new):
                    buffer[part[1], :, part[2]] = x[0, :, part[0]].transpose(0, 1)

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copy the first ``length`` tokens of slots ``sources`` over those of slots ``targets``, (M,) long."""
        for pair in self.layers.values():
            for buffer in pair:
                buffer[targets, :, :length] = buffer[sources, :, :length]

    def _resized(self, old: Tensor) -> Tensor:
        new = old.new_empty(self.rows, old.shape[1], self.length, old.shape[3])
        kept = old[: self.rows, :, : self.length]
        new[: kept.shape[0], :, : kept.shape[2]] = kept
        return new


class Pack:
    """Prompts prefilled in one pass side by side, with their keys and values until every sample has its slot.

    Args:
        lengths: tokens of each prompt.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        self.starts, self.lengths = starts, list(lengths)
        self.segments = Segments([Span(a, n) for a, n in zip(starts, lengths)], device)
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # (1, Hk, N, d) each
        self.logits: Tensor | None = None  # (P, V), behind each prompt's last token

    def attend(self, module, q, k, v, scale, window):
        self.layers[module.layer_idx] = (k, v)
        return packed_attention(module, q, k, v, None, segments=self.segments, scaling=scale, sliding_window=window)[0]


class Chunk:
    """The next ``count`` tokens of a long prompt, prefilled alone; ``pack`` holds room for all of its tokens."""

    def __init__(self, pack: Pack, start: int, count: int) -> None:
        self.pack, self.start, self.end = pack, start, start + count
        self.masks: dict[int | None, Tensor] = {}

    def attend(self, module, q, k, v, scale, window):
        layers, index, length = self.pack.layers, module.layer_idx, self.pack.lengths[0]
        if index not in layers:
            layers[index] = tuple(x.new_zeros(1, x.shape[1], length, x.shape[3]) for x in (k, v))
        for buffer, new in zip(layers[index], (k, v)):
            buffer[:, :, self.start : self.end] = new
        if window not in self.masks:
            mask = torch.ones(self.end - self.start, self.end, dtype=torch.bool, device=q.device).tril(self.start)
            self.masks[window] = mask if window is None else mask.triu(self.start - window + 1)
        keys, values = (x[0, :, None, : self.end] for x in layers[index])
        # (Hk, G, T, d): the heads that share a key head are a dimension, along which the keys are repeated by stride
        q = q.view(keys.shape[0], -1, *q.shape[2:])
        keys, values = (x.expand(-1, q.shape[1], -1, -1) for x in (keys, values))
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=self.masks[window], scale=scale)
        return out.flatten(0, 1).transpose(0, 1)[None]


class Decode:
    """One token for each of the first B slots.

    Args:
        positions: (B,) long, where each new token stands, on the device.
        length: keys that are looked at, at least the largest position + 1.
    """

    def __init__(self, cache: SlotCache, positions: Tensor, length: int) -> None:
        self.cache, self.positions, self.length = cache, positions, length
        self.slots, self.lengths = torch.arange(len(positions), device=positions.device), positions + 1

    def attend(self, module, q, k, v, scale, window):
        keys, values = self.cache.layer(module.layer_idx, k, v)
        for buffer, new in ((keys, k), (values, v)):
            buffer[self.slots, :, self.positions] = new[:, :, 0]
        options = {"scale": scale, "window": window, "longest": self.length}
        return decode_attention(q[:, :, 0], keys, values, self.lengths, **options)[:, None]


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    work: Work | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Causal attention of the pass that ``work`` describes; query (B, H, T, d), key and value (B, Hk, T, d) -> (B, T, H, d).

    Raises:
        UserError: a keyword that changes attention (a soft cap, sinks) is not implemented here.
    """
    unknown = sorted(name for name, x in other.items() if x is not None and name not in _HARMLESS)
    if other.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        unknown.append("no causal mask")
    if work is None or attention_mask is not None or dropout:
        unknown.append("masks or dropout of its own")
    if unknown:
        raise UserError(f"{type(module).__name__} asks for attention with {', '.join(unknown)}")
    if torch.is_autocast_enabled(query.device.type):  # the cache holds what is computed with
        query, key, value = (x.to(torch.get_autocast_dtype(x.device.type)) for x in (query, key, value))
    return work.attend(module, query, key, value, scaling, sliding_window), None


# no mask function goes with it: transformers then makes no mask, and reads nothing back from the device to find out
AttentionInterface.register(ATTENTION, slot_attention)
