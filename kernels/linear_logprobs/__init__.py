"""Log-probabilities and cross entropy straight from hidden states: the (N, V) logits exist one chunk at a time.

d logprob_t / d hidden_t = (onehot(y_t) - softmax_t) @ W does not depend on the loss, apart from the factor g_t that the
loss sends back to token t. So with a frozen head (every LoRA run) the forward pass makes this vector while the logits
of its chunk exist, and the backward pass is g_t times it: two V-sized GEMMs in all, nothing recomputed.

============================  =======================================================  =============
gradient for                  kept from the forward pass                               V-sized GEMMs
============================  =======================================================  =============
nothing                       nothing                                                  1
hidden                        the vector (N, D)                                        2
hidden, through entropy too   a second vector (N, D)                                   3
hidden and head               onehot - softmax (N, V), when it fits ``kept_bytes``     3
hidden and head, otherwise    nothing: the logits are made again                       4
a summed cross entropy        the gradients themselves, as g is known beforehand       3
                              (in the call, what fits ``kept_bytes`` of the rows)
============================  =======================================================  =============
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_fast.kernels.logprobs import check_labels, check_options, rows_of
from rlhf_fast.kernels.segments import check_devices, promote

from . import chunked

__all__ = ["linear_cross_entropy", "linear_logprobs"]


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    entropy: bool | str = False,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Log-probability of each label under an LM head, without ever holding the (N, V) logits.

    Equals :func:`token_logprobs` of

    .. math:: \text{logits} = (\text{hidden}\, W^T + \text{bias}) \cdot \text{logit\_scale}

    with logits kept in float32 whatever the dtype of hidden and weight. Rows with ``ignore_index`` are dropped before
    the head on the CPU; on a GPU, where their number cannot be read without waiting, drop them beforehand.

    Args:
        hidden: (..., D) float.
        weight: (V, D), the same dtype. Needs no gradient when frozen, which saves a third of the work.
        labels: (...) integers in [0, V), or ``ignore_index``.
        bias: (V,).
        temperature, softcap, ignore_index, entropy: as in :func:`token_logprobs`; ``entropy="detached"`` keeps a
            frozen head at two GEMMs.
        logit_scale: factor of the logits, before the softcap (Cohere, Granite), > 0.
        chunk_size: rows whose logits exist at a time; None chooses by device and shape.
    Returns:
        logprobs (...), or logprobs and entropy; float32 (float64 for float64), differentiable in hidden, weight, bias.
        Inside ``torch.autocast`` hidden and weight are cast to its dtype, as a linear layer would; a bias never is.
    Raises:
        IndexError: on the CPU, or anywhere with RLHF_FAST_DEBUG=1, a label is out of range. Otherwise its row is NaN.
        ValueError: shapes or dtypes differ, or an option is out of range.
    """
    check_options(temperature, softcap, entropy, logit_scale)
    hidden, weight, bias = _operands(hidden, weight, bias, labels, chunk_size)
    flat, rows = _labelled(labels, len(weight), ignore_index)
    x = _take(rows_of(hidden, labels.numel()), rows)
    chunk_size = chunk_size or chunked.choose_chunk_size(x, weight, entropy is True)
    options = (temperature, softcap, float(logit_scale), ignore_index, chunk_size)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        results = _LinearLogprobs.apply(x, weight, bias, _take(flat, rows), options, entropy is True)
    else:
        results = chunked.forward(x, weight, _take(flat, rows), bias, *options, chunked.KEEP_NOTHING)[:2]
    logprobs, row_entropy = (_put_back(r, rows, labels) for r in results)
    return (logprobs, row_entropy) if entropy else logprobs


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    reduction: str = "mean",
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    chunk_size: int | None = None,
) -> Tensor:
    """Cross entropy of an LM head, weighted per token, without ever holding the (N, V) logits.

    Args:
        weights: (...) float weight of each token's loss; None means 1. Never read at ignored labels.
        reduction: ``"mean"`` is sum(w * loss) / sum(w) over labelled tokens, 0 if there are none; ``"sum"``;
            ``"none"``: w * loss per token. For a window of micro-batches use "sum" and divide by the window's weight.
        hidden, weight, labels, bias, temperature, softcap, logit_scale, ignore_index, chunk_size: as in
            :func:`linear_logprobs`.
    Returns:
        a float32 scalar, or (...) float32 for ``"none"``; differentiable in hidden, weight, bias and weights.
    Raises:
        IndexError, ValueError: as in :func:`linear_logprobs`; or the reduction is unknown.
    """
    check_options(temperature, softcap, False, logit_scale)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"unknown reduction {reduction!r}; known: mean, sum, none")
    hidden, weight, bias = _operands(hidden, weight, bias, labels, chunk_size)
    if weights is not None and weights.shape != labels.shape:
        raise ValueError(f"weights must have the labels' shape {tuple(labels.shape)}, got {tuple(weights.shape)}")
    check_devices(labels, weights=weights)
    factor = _token_weights(weights, labels, ignore_index, promote(hidden).dtype)
    if reduction == "mean":
        total = factor.sum()
        factor = factor / torch.where(total == 0, 1.0, total)
    options = {
        "temperature": temperature,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "ignore_index": ignore_index,
    }
    trains_head = weight.requires_grad or (bias is not None and bias.requires_grad)
    if reduction == "none" or not (torch.is_grad_enabled() and trains_head) or factor.requires_grad:
        logprobs = linear_logprobs(hidden, weight, labels, bias=bias, chunk_size=chunk_size, **options)
        return -factor * logprobs if reduction == "none" else -(factor * logprobs).sum()
    flat, rows = _labelled(labels, len(weight), ignore_index)
    x = _take(rows_of(hidden, labels.numel()), rows)
    factor = _take(factor.reshape(-1), rows)
    chunk_size = chunk_size or chunked.choose_chunk_size(x, weight)
    values = (temperature, softcap, float(logit_scale), ignore_index, chunk_size)
    return _SummedCrossEntropy.apply(x, weight, bias, _take(flat, rows), factor, values)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, options, entropy):
        needs = ctx.needs_input_grad[:3]
        keep = _what_to_keep(hidden, weight, needs, entropy)
        logprobs, row_entropy, lse, *kept = chunked.forward(hidden, weight, labels, bias, *options, keep)
        if keep in (chunked.KEEP_VECTOR, chunked.KEEP_VECTORS):
            ctx.save_for_backward(labels, *kept[:2])
        elif keep == chunked.KEEP_ROWS:
            ctx.save_for_backward(labels, kept[2], hidden, weight)
        else:
            ctx.save_for_backward(labels, hidden, weight, bias, lse, row_entropy)
        ctx.keep, ctx.needs, ctx.options, ctx.entropy = keep, needs, options, entropy
        ctx.hidden_dtype = hidden.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(row_entropy)
        return logprobs, row_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        labels, *kept = ctx.saved_tensors
        # a compiled graph fills in zeros even for what was marked as not differentiable
        grad_entropy = grad_entropy if ctx.entropy else None
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 6
        ignore_index = ctx.options[3]
        grad_logprobs, grad_entropy = (_masked(g, labels, ignore_index) for g in (grad_logprobs, grad_entropy))
        if ctx.keep in (chunked.KEEP_VECTOR, chunked.KEEP_VECTORS):
            pairs = [(g[:, None], v) for g, v in zip((grad_logprobs, grad_entropy), kept) if g is not None]
            if len(pairs) == 1:
                # in float32, rounded as it is written: a float32 copy would be as large as two gradients
                return torch.mul(*pairs[0], out=torch.empty_like(pairs[0][1])), *(None,) * 5
            return sum(g * v for g, v in pairs).to(ctx.hidden_dtype), *(None,) * 5
        if ctx.keep == chunked.KEEP_ROWS:
            rows, hidden, weight = kept
            grads = chunked.backward_from_rows(rows, hidden, weight, labels, grad_logprobs, ignore_index, *ctx.needs)
        else:
            hidden, weight, bias, lse, row_entropy = kept
            if grad_logprobs is None:
                grad_logprobs = torch.zeros_like(grad_entropy)
            saved = (hidden, weight, labels, bias, lse, row_entropy, grad_logprobs, grad_entropy)
            grads = chunked.backward(*saved, *ctx.options, *ctx.needs)
        d_hidden, d_weight, d_bias = (g if need else None for g, need in zip(grads, ctx.needs))
        return d_hidden, d_weight, None if d_bias is None else d_bias.to(ctx.bias_dtype), None, None, None


class _SummedCrossEntropy(torch.autograd.Function):
    """sum(factor * cross entropy): the factor is known, so the gradients are made while the logits exist."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, factor, options):
        ctx.needs = ctx.needs_input_grad[:3]
        ctx.bias_dtype = None if bias is None else bias.dtype
        loss, *grads = chunked.summed_cross_entropy(hidden, weight, labels, bias, factor, *options, *ctx.needs)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        d_hidden, d_weight, d_bias = (
            _times(grad, g) if need else None for g, need in zip(ctx.saved_tensors, ctx.needs)
        )
        return d_hidden, d_weight, None if d_bias is None else d_bias.to(ctx.bias_dtype), None, None, None


def _times(grad: Tensor, x: Tensor) -> Tensor:
    """The scalar ``grad`` times ``x`` in x's dtype, not rounding ``grad`` to it: a loss scale of 2^16 is no float16."""
    out = torch.empty_like(x)
    if x.is_cuda:
        # (1,) beside (V, D) is multiplied in float32 and rounded as it is written: one launch, no float32 copy
        return torch.mul(grad.reshape(1), x, out=out)
    # by slabs, as a CPU makes the float32 product of a whole head, as large as the logits that were never made
    for slab, target in zip(x.split(8192), out.split(8192)):
        target.copy_(grad.reshape(1) * slab)
    return out


def _operands(hidden, weight, bias, labels, chunk_size):
    """Check shapes and dtypes; follow autocast."""
    vocab_size, width = weight.shape if weight.dim() == 2 else (0, -1)
    if hidden.dim() < 1 or hidden.shape != (*labels.shape, width) or vocab_size < 1:
        raise ValueError(
            f"hidden must be (*labels.shape, D) and weight (V, D): got hidden {tuple(hidden.shape)}, labels "
            f"{tuple(labels.shape)}, weight {tuple(weight.shape)}"
        )
    check_devices(hidden, weight=weight, labels=labels, bias=bias)
    if bias is not None and bias.shape != (vocab_size,):
        raise ValueError(f"bias must be ({vocab_size},), got {tuple(bias.shape)}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}; cast one, or use torch.autocast as for a linear layer"
        )
    return hidden, weight, bias


def _labelled(labels: Tensor, vocab_size: int, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """Return flat labels, and the rows to keep, or None for all (also where reading their number would wait)."""
    flat = labels.reshape(-1).long().contiguous()
    if flat.device.type != "cpu" or torch.compiler.is_compiling():
        return flat, None
    # before rows are dropped, so that the error names the caller's row
    check_labels(flat, vocab_size, ignore_index)
    keep = flat != ignore_index
    return flat, None if keep.all() else keep.nonzero()[:, 0]


def _take(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def _put_back(x: Tensor, rows: Tensor | None, labels: Tensor) -> Tensor:
    """The reverse of ``_take``, with 0 in the rows that were dropped, in the labels' shape."""
    full = x if rows is None else x.new_zeros(labels.numel()).index_copy(0, rows, x)
    return full.view(labels.shape)


def _token_weights(weights: Tensor | None, labels: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    keep = labels != ignore_index
    return keep.to(dtype) if weights is None else torch.where(keep, weights.to(dtype), 0.0)


def _what_to_keep(hidden: Tensor, weight: Tensor, needs: tuple[bool, ...], entropy: bool) -> int:
    if not (needs[1] or needs[2]):
        return chunked.KEEP_VECTORS if entropy else chunked.KEEP_VECTOR
    size = len(hidden) * len(weight) * hidden.element_size()
    if not entropy and size <= chunked.kept_bytes(hidden.device):
        return chunked.KEEP_ROWS
    return chunked.KEEP_NOTHING


def _masked(grad: Tensor | None, labels: Tensor, ignore_index: int) -> Tensor | None:
    return None if grad is None else torch.where(labels == ignore_index, 0.0, grad)
