"""Attention of decoding (B, H, Hk, S, d): B slots with room for S tokens, filled to lengths between S / 16 and S."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.harness import FORWARD, Contender, Task, ours
from rlhf_fast.kernels import decode_attention

SHAPES = {
    # a small model on a CPU; one of 0.5B there; Qwen2.5-7B's on a GPU, in short and long rollouts
    "cpu": ((256, 6, 2, 512, 64), (32, 14, 2, 1024, 64)),
    "cuda": ((64, 28, 4, 1024, 128), (64, 28, 4, 8192, 128), (256, 28, 4, 1024, 128)),
    "dry": ((3, 4, 2, 20, 16),),
}


def make(shape, dtype, device):
    batch, heads, key_heads, places, width = shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    lengths = torch.randint(places // 16 + 1, places + 1, (batch,), generator=generator, device=device)
    lengths[0] = places
    keys, values = (normal(batch, key_heads, places, width) for _ in range(2))
    return {"query": normal(batch, heads, width), "keys": keys, "values": values, "lengths": lengths}


def seen(keys, lengths):
    return (torch.arange(keys.shape[2], device=keys.device) < lengths[:, None])[:, None, None]


def definition(query, keys, values, lengths):
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
    scores = (query[:, :, None] @ keys.transpose(2, 3)) * query.shape[-1] ** -0.5
    return (scores.masked_fill(~seen(keys, lengths), float("-inf")).softmax(-1) @ values)[:, :, 0]


def grouped(query, keys, values, lengths):
    """The heads that share a key head where several queries would stand: nothing is repeated."""
    queries = query.view(len(query), keys.shape[1], -1, query.shape[2])
    return scaled_dot_product_attention(queries, keys, values, attn_mask=seen(keys, lengths)).flatten(1, 2)


def repeated(query, keys, values, lengths):
    """As transformers' sdpa attention computes a step over a cache that is padded."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
    return scaled_dot_product_attention(query[:, :, None], keys, values, attn_mask=seen(keys, lengths))[:, :, 0]


def tasks(device):
    contenders = (
        *ours(decode_attention, "attention", "decode_attention", device),
        Contender("SDPA, grouped", grouped),
        Contender("SDPA, repeated", repeated),
        Contender("torch.compile", definition, compiled=True),
    )
    dtypes = ("bf16",) if device == "cuda" else ("fp32",)
    return [
        Task(
            *("decode_attention", "attention", make, definition, contenders, {FORWARD: ()}, SHAPES),
            dtypes=dtypes,
            # keys and values, of lengths whose mean is a little more than half of the room
            moved=lambda shape, size, _: 2 * shape[0] * shape[2] * shape[3] * shape[4] * size * 17 / 32,
        )
    ]
