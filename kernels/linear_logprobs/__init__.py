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

A head with a low-rank adapter, W + B A, is never summed: its logits are a sum of two products, and x B^T costs r / D of
a GEMM. Where B is trained and W is not, the gradient of B needs onehot - softmax once g is known, as that of a trained
head does, but its product is r wide: one V-sized GEMM less than in the rows of the table that say "and head".
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
    low_rank: tuple[Tensor, Tensor] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    entropy: bool | str = False,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Log-probability of each label under an LM head, without ever holding the (N, V) logits.

    Equals :func:`token_logprobs` of

    .. math:: \text{logits} = (\text{hidden}\, W^T + x B^T + \text{bias}) \cdot \text{logit\_scale}

    with logits kept in float32 whatever the dtype of hidden and weight. Rows with ``ignore_index`` are dropped before
    the head on the CPU; on a GPU, where their number cannot be read without waiting, drop them beforehand.

    Args:
        hidden: (..., D) float.
        weight: (V, D), the same dtype. Needs no gradient when frozen, which saves a third of the work.
        labels: (...) integers in [0, V), or ``ignore_index``.
        bias: (V,).
        low_rank: x (..., r) and B (V, r), an adapter on the head (Hu et al. 2021, arXiv:2106.09685): x is
            scaling * hidden A^T, made by the caller, so that the gradients of A follow from x's. Both may be of a wider
            dtype than the head's: they are multiplied in the head's, and their gradients come unrounded in their own.
        temperature, softcap, ignore_index, entropy: as in :func:`token_logprobs`; ``entropy="detached"`` keeps a
            frozen head at two GEMMs.
        logit_scale: factor of the logits, before the softcap (Cohere, Granite), > 0.
        chunk_size: rows whose logits exist at a time; None chooses by device and shape.
    Returns:
        logprobs (...), or logprobs and entropy; float32 (float64 for float64), differentiable in hidden, weight, bias,
        x and B. Inside ``torch.autocast`` hidden and weight are cast to its dtype, as a linear layer would, and x and B are
        multiplied in it; a bias never is.
    Raises:
        IndexError: on the CPU, or anywhere with RLHF_FAST_DEBUG=1, a label is out of range. Otherwise its row is NaN.
        ValueError: shapes or dtypes differ, or an option is out of range.
    """
    check_options(temperature, softcap, entropy, logit_scale)
    inputs, matrices = _operands(hidden, weight, bias, low_rank, labels, chunk_size)
    flat, rows = _labelled(labels, len(weight), ignore_index)
    inputs = [_take(rows_of(x, labels.numel()), rows) for x in inputs]
    chunk_size = chunk_size or chunked.choose_chunk_size(inputs[0], matrices[0], entropy is True)
    options = (temperature, softcap, float(logit_scale), ignore_index, chunk_size)
    if torch.is_grad_enabled() and _any_needs_gradient(*inputs, *matrices, bias):
        results = _LinearLogprobs.apply(_take(flat, rows), bias, options, entropy is True, *inputs, *matrices)
    else:
        nothing = chunked.KEEP_NOTHING, [False] * len(inputs)
        results = chunked.forward(_take(flat, rows), inputs, matrices, bias, *options, *nothing)[:2]
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
    low_rank: tuple[Tensor, Tensor] | None = None,
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
        hidden, weight, labels, bias, low_rank, temperature, softcap, logit_scale, ignore_index, chunk_size: as in
            :func:`linear_logprobs`.
    Returns:
        a float32 scalar, or (...) float32 for ``"none"``; differentiable in hidden, weight, bias, x, B and weights.
    Raises:
        IndexError, ValueError: as in :func:`linear_logprobs`; or the reduction is unknown.
    """
    check_options(temperature, softcap, False, logit_scale)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"unknown reduction {reduction!r}; known: mean, sum, none")
    inputs, matrices = _operands(hidden, weight, bias, low_rank, labels, chunk_size)
    if weights is not None and weights.shape != labels.shape:
        raise ValueError(f"weights must have the labels' shape {tuple(labels.shape)}, got {tuple(weights.shape)}")
    check_devices(labels, weights=weights)
    factor = _token_weights(weights, labels, ignore_index, promote(inputs[0]).dtype)
    if reduction == "mean":
        total = factor.sum()
        factor = factor / torch.where(total == 0, 1.0, total)
    trains_head = torch.is_grad_enabled() and _any_needs_gradient(*matrices, bias)
    if reduction == "none" or not trains_head or factor.requires_grad:
        options = {
            "temperature": temperature,
            "softcap": softcap,
            "logit_scale": logit_scale,
            "ignore_index": ignore_index,
            "chunk_size": chunk_size,
        }
        logprobs = linear_logprobs(hidden, weight, labels, bias=bias, low_rank=low_rank, **options)
        return -factor * logprobs if reduction == "none" else -(factor * logprobs).sum()
    flat, rows = _labelled(labels, len(weight), ignore_index)
    inputs = [_take(rows_of(x, labels.numel()), rows) for x in inputs]
    factor = _take(factor.reshape(-1), rows)
    chunk_size = chunk_size or chunked.choose_chunk_size(inputs[0], matrices[0])
    values = (temperature, softcap, float(logit_scale), ignore_index, chunk_size)
    return _SummedCrossEntropy.apply(_take(flat, rows), bias, factor, values, *inputs, *matrices)


class _LinearLogprobs(torch.autograd.Function):
    """``operands``: the inputs, then as many matrices, see :mod:`.chunked`."""

    @staticmethod
    def forward(ctx, labels, bias, options, entropy, *operands):
        inputs, matrices = _halves(operands)
        needs = _needs(ctx)
        keep = _what_to_keep(inputs[0], matrices[0], needs, entropy)
        results = chunked.forward(labels, inputs, matrices, bias, *options, keep, needs[0])
        logprobs, row_entropy, lse, vectors, entropy_vectors, rows = results
        if keep in (chunked.KEEP_VECTOR, chunked.KEEP_VECTORS):
            ctx.save_for_backward(labels, *vectors, *entropy_vectors)
        elif keep == chunked.KEEP_ROWS:
            ctx.save_for_backward(labels, rows, *operands)
        else:
            ctx.save_for_backward(labels, bias, lse, row_entropy, *operands)
        ctx.keep, ctx.needs, ctx.options, ctx.entropy = keep, needs, options, entropy
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(row_entropy)
        return logprobs, row_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        labels, *kept = ctx.saved_tensors
        need_inputs, need_matrices, _ = ctx.needs
        # a compiled graph fills in zeros even for what was marked as not differentiable
        grad_entropy = grad_entropy if ctx.entropy else None
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * (4 + 2 * len(need_inputs))
        ignore_index = ctx.options[3]
        grad_logprobs, grad_entropy = (_masked(g, labels, ignore_index) for g in (grad_logprobs, grad_entropy))
        if ctx.keep in (chunked.KEEP_VECTOR, chunked.KEEP_VECTORS):
            # vectors of the inputs for the logprobs, then for the entropy if it has a gradient
            kinds = zip((grad_logprobs, grad_entropy), (kept[: len(need_inputs)], kept[len(need_inputs) :]))
            kinds = [(g, vectors) for g, vectors in kinds if g is not None]
            d_inputs = [
                _weighted([(g[:, None], vectors[i]) for g, vectors in kinds]) if need else None
                for i, need in enumerate(need_inputs)
            ]
            return *(None,) * 4, *d_inputs, *(None for _ in need_matrices)
        if ctx.keep == chunked.KEEP_ROWS:
            rows, *operands = kept
            grads = chunked.backward_from_rows(
                labels, *_halves(operands), rows, grad_logprobs, ignore_index, *ctx.needs
            )
        else:
            bias, lse, row_entropy, *operands = kept
            if grad_logprobs is None:
                grad_logprobs = torch.zeros_like(grad_entropy)
            saved = (labels, *_halves(operands), bias, lse, row_entropy, grad_logprobs, grad_entropy)
            grads = chunked.backward(*saved, *ctx.options, *ctx.needs)
        return _wanted(grads, ctx.needs, ctx.bias_dtype)


class _SummedCrossEntropy(torch.autograd.Function):
    """sum(factor * cross entropy): the factor is known, so the gradients are made while the logits exist."""

    @staticmethod
    def forward(ctx, labels, bias, factor, options, *operands):
        ctx.needs = _needs(ctx)
        ctx.bias_dtype = None if bias is None else bias.dtype
        loss, d_inputs, d_matrices, d_bias = chunked.summed_cross_entropy(
            labels, *_halves(operands), bias, factor, *options, *ctx.needs
        )
        ctx.save_for_backward(*d_inputs, *d_matrices, d_bias)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *kept, d_bias = ctx.saved_tensors
        grads = [_times(grad, g) if len(g) else g for g in (*kept, d_bias)]
        return _wanted((*_halves(grads[:-1]), grads[-1]), ctx.needs, ctx.bias_dtype)


def _halves(operands) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and matrices."""
    half = len(operands) // 2
    return list(operands[:half]), list(operands[half:])


def _needs(ctx) -> tuple[list[bool], list[bool], bool]:
    """Which of inputs, matrices and bias need a gradient."""
    _, bias, _, _, *operands = ctx.needs_input_grad
    return *_halves(operands), bias


def _wanted(grads, needs, bias_dtype) -> tuple[Tensor | None, ...]:
    """The gradients of a Function's arguments, None where nobody asked."""
    *of_operands, d_bias = grads
    need_bias = needs[2]
    flat = (g if need else None for some, which in zip(of_operands, needs) for g, need in zip(some, which))
    return None, d_bias.to(bias_dtype) if need_bias else None, None, None, *flat


def _weighted(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of g * v in v's dtype."""
    if len(pairs) == 1:
        # in float32, rounded as it is written: a float32 copy would be as large as two gradients
        return torch.mul(*pairs[0], out=torch.empty_like(pairs[0][1]))
    return sum(g * v for g, v in pairs).to(pairs[0][1].dtype)


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


def _operands(hidden, weight, bias, low_rank, labels, chunk_size) -> tuple[list[Tensor], list[Tensor]]:
    """Check shapes and dtypes, follow autocast; return the inputs and the matrices that they are multiplied by."""
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
    if low_rank is None:
        return [hidden], [weight]
    x, b = low_rank
    check_devices(hidden, x=x, B=b)
    rank = b.shape[-1] if b.dim() == 2 else -1
    if x.shape != (*labels.shape, rank) or b.shape != (vocab_size, rank):
        raise ValueError(
            f"low_rank must be x (*labels.shape, r) and B ({vocab_size}, r): got x {tuple(x.shape)}, labels "
            f"{tuple(labels.shape)}, B {tuple(b.shape)}"
        )
    return [hidden, x], [weight, b]


def _any_needs_gradient(*tensors: Tensor | None) -> bool:
    return any(x is not None and x.requires_grad for x in tensors)


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


def _what_to_keep(hidden: Tensor, weight: Tensor, needs: tuple[list[bool], list[bool], bool], entropy: bool) -> int:
    if not (any(needs[1]) or needs[2]):
        return chunked.KEEP_VECTORS if entropy else chunked.KEEP_VECTOR
    size = len(hidden) * len(weight) * hidden.element_size()
    if not entropy and size <= chunked.kept_bytes(hidden.device):
        return chunked.KEEP_ROWS
    return chunked.KEEP_NOTHING


def _masked(grad: Tensor | None, labels: Tensor, ignore_index: int) -> Tensor | None:
    return None if grad is None else torch.where(labels == ignore_index, 0.0, grad)
