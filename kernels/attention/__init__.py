"""Attention of decoding: one query a sequence, over a cache of keys and values that sequences fill to different lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.kernels.dispatch import implementation
from rlhf_fast.kernels.registry import register
from rlhf_fast.kernels.segments import check_devices

__all__ = ["decode_attention"]


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    longest: int | None = None,
) -> Tensor:
    r"""Softmax attention of each sequence's newest token (Vaswani et al. 2017, arXiv:1706.03762, eq. 1), over its own keys only.

    .. math:: o_h = \sum_{j < n} \frac{e^{s_j}}{\sum_{i < n} e^{s_i}}\, v_j, \qquad s_j = \frac{q_h \cdot k_j}{\sqrt d}

    The softmax is computed online (Milakov & Gimelshein 2018, arXiv:1805.02867) in float32, block of keys by block, and the
    query heads that share a key head read it together (arXiv:2305.13245). Places past a sequence's length are not read:
    they may hold anything, NaN too.

    Args:
        query: of the newest token, (B, H, d) float.
        keys, values: of the first B of R >= B sequences, (R, Hk, S, d) and (R, Hk, S, dv) of the query's type, Hk a divisor
            of H.
        lengths: how many keys each sequence has, that of the newest token included. (B,) integers in [0, S].
        scale: of the scores; None is 1 / sqrt(d).
        window: a query sees this many of the last keys at most; None is all.
        longest: a number that no length exceeds, known without asking the device; None is S. A smaller one costs less.
    Returns:
        (B, H, dv), of the query's type, without gradient; 0 for a sequence without keys.
    Raises:
        ValueError: shapes, types, ``window`` or ``longest`` do not fit.
    """
    _check(query, keys, values, lengths, window, longest)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    places = keys.shape[2]
    longest = places if longest is None else min(longest, places)
    window = places if window is None else min(window, places)
    # kernels read rows of numbers that lie side by side, wherever the rows lie
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys.detach(), values.detach()))
    query = query.detach().contiguous()
    return _decode_attention(query, keys, values, lengths, scale, window, longest)


def _check(query, keys, values, lengths, window, longest) -> None:
    if query.dim() != 3 or keys.dim() != 4 or keys.shape[:3] != values.shape[:3]:
        shapes = [tuple(x.shape) for x in (query, keys, values)]
        raise ValueError(
            f"query must be (B, H, d), keys (R, Hk, S, d), values (R, Hk, S, dv), got {', '.join(map(str, shapes))}"
        )
    (batch, heads, width), (rows, key_heads, _, key_width) = query.shape, keys.shape
    if rows < batch or width != key_width or not width or not values.shape[3] or key_heads < 1 or heads % key_heads:
        raise ValueError(
            f"a query of {batch} sequences, {heads} heads and {width} numbers does not fit keys of {rows} sequences, "
            f"{key_heads} heads (a divisor is expected) and {key_width} numbers"
        )
    if lengths.shape != (batch,) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be {batch} integers, got {tuple(lengths.shape)} {lengths.dtype}")
    if not query.is_floating_point() or keys.dtype != query.dtype or values.dtype != query.dtype:
        raise ValueError(
            f"query, keys and values must share a float type, got {query.dtype}, {keys.dtype}, {values.dtype}"
        )
    for name, number in (("window", window), ("longest", longest)):
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1")
    check_devices(query, keys=keys, values=values, lengths=lengths)


def _fake(query, keys, values, lengths, scale, window, longest):
    return query.new_empty(*query.shape[:2], values.shape[3])


@register(
    "decode_attention(Tensor query, Tensor keys, Tensor values, Tensor lengths, float scale, int window, int longest) "
    "-> Tensor",
    _fake,
)
def _decode_attention(query, keys, values, lengths, scale, window, longest):
    chosen = implementation("attention", "decode_attention", query, keys, values)
    return chosen.decode_attention(query, keys, values, lengths, scale, window, longest)
