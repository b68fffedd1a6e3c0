"""Attention over packed sequences, registered with transformers under the name ``rlhf_fast``.

A packed batch is one row of N tokens. What sees what travels as the keyword ``segments`` through ``model(...)`` to every
attention layer; documents never see each other, and the responses to one prompt see it and themselves. Nothing in
transformers is patched: ``AttentionInterface`` and ``AttentionMaskInterface`` are its public extension points.

Three implementations of one definition, :data:`IMPLEMENTATIONS`. All attend from the rows of a span to the keys
[prefix; span], causal and aligned at the end; where the prefix is empty that is plain causal attention. For the fused
kernels the keys and values of a shared prompt are copied to each response, 2 G P Hk d numbers a layer. That is what they
measure unshared too, and little beside the rest (Qwen2.5-7B, P = 1024, G = 8: 17 MB beside some 340 MB of activations). Two
passes merged by their log-sum-exp would need no copy, but no public interface differentiates that sum.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from rlhf_fast.data.batch import Span, TokenBatch, to_device
from rlhf_fast.errors import UserError

logger = logging.getLogger(__name__)
NAME = "rlhf_fast"
# keywords every model passes and plain causal softmax attention may ignore; any other non-None keyword is refused
_HARMLESS = {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "is_causal"}


@dataclass(frozen=True)
class Bucket:
    """Spans that one dense call serves: their prefixes are equally long, their lengths round up to one power of two.

    Causal attention needs no mask over right padding, as a token never looks right.
    """

    queries: Tensor  # (b, t) long: row of every token; padding repeats the span's last row
    keys: Tensor  # (b, p + t) long: the prefix's rows, then those of ``queries``
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)  # by window

    @property
    def prefix(self) -> int:
        return self.keys.shape[1] - self.queries.shape[1]

    def mask(self, window: int | None) -> Tensor | None:
        """(t, p + t) bool, True where a query sees a key; None where plain causal attention is the same."""
        if window not in self.masks:
            t, p = self.queries.shape[1], self.prefix
            if p == 0 and (window is None or window >= t):
                mask = None
            else:
                mask = torch.ones(t, p + t, dtype=torch.bool, device=self.keys.device).tril(p)
                mask = mask if window is None else mask.triu(p - window + 1)
            self.masks[window] = mask
        return self.masks[window]


@dataclass(frozen=True)
class Ragged:
    """The spans as the fused kernels want them."""

    cu_q: Tensor  # (S + 1,) int32
    cu_k: Tensor  # (S + 1,) int32, of the keys of each span: prefix and span
    max_q: int
    max_k: int
    key_rows: Tensor | None  # (K,) long, the row of every key; None when the keys are the rows


class Segments:
    """What each row of a packed batch sees, made once per batch and only in the form that its implementation reads.

    Args:
        spans: in the order of the rows.
        device: of the batch.
        implementation: a name in ``IMPLEMENTATIONS``, or "auto".
    """

    def __init__(self, spans: Sequence[Span], device: torch.device, implementation: str = "auto"):
        self.spans, self.device, self.implementation = spans, device, implementation
        self.longest = max((s.prefix_length + s.length for s in spans), default=0)

    @classmethod
    def of(cls, batch: TokenBatch, implementation: str = "auto") -> Segments:
        """Those of ``batch``, kept there for its other passes."""
        if batch.attention is None or batch.attention.implementation != implementation:
            batch.attention = cls(batch.spans, batch.input_ids.device, implementation)
        return batch.attention

    @functools.cached_property
    def buckets(self) -> tuple[list[Bucket], Tensor]:
        """The buckets, and (N,) long: where each row ended up in their flattened, concatenated queries."""
        members: dict[tuple[int, int], list[Span]] = {}
        for span in self.spans:
            members.setdefault((span.prefix_length, (span.length - 1).bit_length()), []).append(span)
        tables, offset = [], 0
        restore = torch.empty(sum(s.length for s in self.spans), dtype=torch.long)
        for (prefix, _), spans in members.items():
            column = torch.arange(max(s.length for s in spans))
            start, length, before = torch.tensor([(s.start, s.length, s.prefix_start) for s in spans]).T[..., None]
            queries = start + torch.minimum(column, length - 1)
            real = column < length
            restore[queries[real]] = offset + real.flatten().nonzero().squeeze(1)
            offset += real.numel()
            tables += [queries, torch.cat([before + torch.arange(prefix), queries], 1)]
        *tables, restore = to_device([*tables, restore], self.device)
        return [Bucket(*pair) for pair in zip(tables[::2], tables[1::2])], restore

    @functools.cached_property
    def ragged(self) -> Ragged:
        """One entry per span."""
        queries = torch.tensor([0, *(s.length for s in self.spans)]).cumsum(0)
        keys = torch.tensor([0, *(s.prefix_length + s.length for s in self.spans)]).cumsum(0)
        rows = [torch.arange(a, a + n) for s in self.spans for a, n in _ranges(s)]
        shares = any(s.prefix_length for s in self.spans)
        cu_q, cu_k, *rows = to_device([queries, keys, *([torch.cat(rows)] if shares else [])], self.device)
        longest = max((s.length for s in self.spans), default=0)
        return Ragged(cu_q.int(), cu_k.int(), longest, self.longest, rows[0] if shares else None)


def _ranges(span: Span) -> tuple[tuple[int, int], tuple[int, int]]:
    """(first row, rows) of a span's prefix and of the span."""
    return (span.prefix_start, span.prefix_length), (span.start, span.length)


# ---- implementations: query (N, H, d), key and value (N, Hk, d) -> (N, H, d)


def _sdpa(query, key, value, segments: Segments, scale: float | None, window: int | None, dropout: float) -> Tensor:
    """``scaled_dot_product_attention`` on a few right-padded tables of spans: every device and dtype, and the oracle."""
    buckets, restore = segments.buckets
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for bucket in buckets:
        tables = ((query, bucket.queries), (key, bucket.keys), (value, bucket.keys))
        q, k, v = (_take(x, rows).transpose(1, 2) for x, rows in tables)
        mask = bucket.mask(window)
        # flash attention alone groups queries by itself, without mask and in 16 bit; the rest would write down every score
        repeat = groups > 1 and (mask is not None or q.dtype == torch.float32)
        if repeat:
            k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        grouped = groups > 1 and not repeat
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, dropout_p=dropout, enable_gqa=grouped
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[restore]


def _varlen(query, key, value, segments: Segments, scale: float | None, window: int | None, dropout: float) -> Tensor:
    """``torch.nn.attention.varlen``: flash attention as torch ships it."""
    from torch.nn.attention.varlen import varlen_attn

    ragged = segments.ragged
    key, value = _keys(key, value, ragged)
    # where there is no such argument, the kernel sees from the shapes that queries are grouped
    grouped = {"enable_gqa": True} if "enable_gqa" in _varlen_arguments() else {}
    bounds = (ragged.cu_q, ragged.cu_k, ragged.max_q, ragged.max_k)
    return varlen_attn(query, key, value, *bounds, scale=scale, window_size=_window(window), **grouped)


@functools.cache
def _varlen_arguments() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _flash(query, key, value, segments: Segments, scale: float | None, window: int | None, dropout: float) -> Tensor:
    """The flash-attn package, 2.1 or newer (before, causal attention was aligned at the beginning)."""
    from flash_attn import flash_attn_varlen_func

    ragged = segments.ragged
    key, value = _keys(key, value, ragged)
    # torch's own kernels see the mode themselves; this one adds up by atomics unless it is told
    repeats = {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}
    return flash_attn_varlen_func(
        *(query, key, value, ragged.cu_q, ragged.cu_k, ragged.max_q, ragged.max_k),
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,
        window_size=_window(window),
        **repeats,
    )


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"varlen": _varlen, "flash_attention_2": _flash, "sdpa": _sdpa}
AUTO = ("varlen", "sdpa")  # tried in this order
CHOICES = ("auto", *IMPLEMENTATIONS)


def _window(window: int | None) -> tuple[int, int]:
    """Keys to the left and right that a fused kernel lets a query see besides its own."""
    return (-1 if window is None else window - 1, 0)


def _keys(key: Tensor, value: Tensor, ragged: Ragged) -> tuple[Tensor, Tensor]:
    """Keys and values span after span, a shared prompt's copied to each span that sees it."""
    if ragged.key_rows is None:
        return key, value
    return _take(key, ragged.key_rows), _take(value, ragged.key_rows)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]``; the gradients of a row that several spans see are added up in float32."""
    return _Take.apply(x, rows)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.length = x.shape[0]
        return x.index_select(0, rows.flatten()).view(*rows.shape, *x.shape[1:])

    @staticmethod
    def backward(ctx, grad: Tensor):
        (rows,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros(ctx.length, *grad.shape[rows.ndim :], dtype=wide)
        return total.index_add_(0, rows.flatten(), grad.flatten(0, rows.ndim - 1).to(wide)).to(grad.dtype), None


# ---- which one


def check_implementation(name: str, device: torch.device) -> None:
    """Raise UserError when the implementation that the user named can never run on ``device``."""
    if name not in ("auto", "sdpa") and (reason := _absence(name, device.type)):
        raise UserError(f"attn_implementation is {name}, but {reason}; leave it at auto")


def _choose(asked: str, query: Tensor, key: Tensor, dtype: torch.dtype, dropout: float) -> Callable[..., Tensor]:
    """The first implementation that can run this call.

    Raises:
        UserError: the one that was asked for cannot.
    """
    shape = (query.device, dtype, query.shape[1], key.shape[1], query.shape[2], dropout > 0)
    shape = (*shape, torch.are_deterministic_algorithms_enabled())
    for name in AUTO if asked == "auto" else (asked,):
        reason = refusal(name, *shape)
        if reason is None:
            return IMPLEMENTATIONS[name]
        if asked != "auto":
            raise UserError(f"attn_implementation is {name}, but {reason}; leave it at auto")
    raise AssertionError("sdpa runs everything")


@functools.cache
def refusal(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    key_heads: int,
    head_dim: int,
    drops: bool,
    repeats: bool = False,
) -> str | None:
    """Why an implementation cannot run a shape, or repeat its bits; None when it can, which a small problem has shown."""
    if name == "sdpa":
        return None
    reason = _absence(name, device.type)
    if reason is None and dtype not in (torch.bfloat16, torch.float16):
        reason = f"it needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if reason is None and drops and name == "varlen":
        reason = "it has no dropout"
    if reason is None:
        reason = _misfit(IMPLEMENTATIONS[name], device, dtype, heads, key_heads, head_dim)
    if reason is not None and device.type == "cuda":
        logger.warning("attention runs without %s: %s", name, reason)
    return reason


@functools.cache
def _absence(name: str, device_type: str) -> str | None:
    """Why an implementation is not there at all."""
    if device_type != "cuda":
        return f"it runs on CUDA only, and this is {device_type}"
    try:
        if name == "flash_attention_2":
            from flash_attn import flash_attn_varlen_func  # noqa: F401
        elif "window_size" not in _varlen_arguments():
            return f"torch {torch.__version__} has an older interface; it needs 2.11 or newer"
    except ImportError as error:
        return f"it cannot be imported ({error})"
    return None


def _misfit(
    run: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, head_dim: int
) -> str | None:
    """What goes wrong when ``run`` computes a prompt of 5 tokens with two responses, windowed and not; None if nothing does.

    Interfaces and their alignment of causal masks have changed between versions: better to measure than to believe them.
    """
    segments = Segments([Span(0, 5), Span(5, 3, 0, 5), Span(8, 4, 0, 5), Span(12, 7)], device)
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (
        torch.randn(19, h, head_dim, generator=generator).to(device, dtype)
        for h in (heads, key_heads, key_heads, heads)
    )
    for window in (None, 4):
        results = []
        for function, wide in ((_sdpa, torch.float32), (run, dtype)):
            inputs = [x.to(wide).requires_grad_() for x in (q, k, v)]
            try:
                # hooks of its own: a checkpointed layer counts what it saves, and this happens in its first run only
                hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
                with hooks, torch.enable_grad(), torch.autocast(device.type, enabled=False):
                    out = function(*inputs, segments, None, window, 0.0)
                    results.append([out.detach(), *torch.autograd.grad(out, inputs, g.to(wide))])
            except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
                return f"it failed on a small problem ({(str(error).splitlines() or [type(error).__name__])[0]})"
        for name, want, got in zip(("output", "query", "key", "value"), *results):
            if not float((got.float() - want).norm()) <= 0.05 * float(want.norm()):
                return f"on a small problem its {name} differs from scaled_dot_product_attention's (window {window})"
    return None


# ---- the registered function


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
    **other: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each span and its prefix; query (1, H, N, d), key and value (1, Hk, N, d) -> (1, N, H, d).

    Args:
        sliding_window: a query sees itself and at most this many keys less one before it.
    Raises:
        UserError: a keyword that changes attention (a soft cap, sinks) is not implemented here; silently ignoring it
            would train a different model. Or the implementation that the user named cannot run.
    """
    if segments is None or attention_mask is not None:
        raise UserError("rlhf_fast's attention runs packed batches only: pass segments and no attention mask")
    unknown = sorted(name for name, x in other.items() if x is not None and name not in _HARMLESS)
    if other.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        unknown.append("no causal mask")
    if unknown:
        raise UserError(
            f"{type(module).__name__} asks for attention with {', '.join(unknown)}, which packed training does not "
            "implement; use a model without it"
        )
    if sliding_window is not None and sliding_window >= segments.longest:
        sliding_window = None  # the window covers every span: it changes nothing
    dtype, device = query.dtype, query.device.type
    if torch.is_autocast_enabled(device):  # autocast does not know the fused kernels
        dtype = torch.get_autocast_dtype(device)
    run = _choose(segments.implementation, query, key, dtype, dropout)
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # (N, heads, d)
    return run(q, k, v, segments, scaling, sliding_window, dropout)[None], None


def _no_mask(*args: Any, **kwargs: Any) -> None:
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
