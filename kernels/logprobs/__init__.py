"""Log-probabilities of labels from logits, and their sums over sequences."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_fast.kernels.dispatch import choose, implementation, kernel
from rlhf_fast.kernels.registry import register
from rlhf_fast.kernels.segments import check_devices, check_tokens, debugging, promote, select, sequence_sum

__all__ = ["sequence_logprobs", "token_logprobs"]


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool | str = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Log-softmax gathered at the label, and optionally the entropy, in one pass over the logits.

    Equals ``log_softmax(z, -1).gather(-1, labels)`` and ``-(p * log p).sum(-1)`` in float32 with

    .. math:: z = \frac{c\,\tanh(\text{logits} / c)}{\text{temperature}}

    (no tanh without a softcap c), where a logit of -inf has p log p = 0.

    Args:
        logits: (..., V) float of any strides.
        labels: (...) integers in [0, V), or ``ignore_index``.
        temperature: what the logits are divided by, > 0.
        softcap: bound of the logits (Gemma 2, arXiv:2408.00118), > 0.
        ignore_index: label of rows to skip: both results are 0 there, their logits are never read.
        entropy: return it too; differentiable, or without gradient if ``"detached"``.
        inplace_backward: the gradient may overwrite ``logits`` (eager mode, rows that do not share memory), saving a
            tensor of their size. Nothing else may need them in its backward pass; autograd raises if it does.
    Returns:
        logprobs (...), or logprobs and entropy; float32 (float64 for float64 logits).
    Raises:
        IndexError: on the CPU, or anywhere with RLHF_FAST_DEBUG=1, a label is out of range. Otherwise its row is NaN.
        ValueError: the shapes differ, or temperature or softcap is not positive.
    """
    if logits.dim() < 1 or logits.shape[:-1] != labels.shape or logits.shape[-1] < 1:
        raise ValueError(f"logits must be (*labels.shape, V): got {tuple(logits.shape)} and {tuple(labels.shape)}")
    check_options(temperature, softcap, entropy)
    check_devices(logits, labels=labels)
    rows = rows_of(logits, labels.numel())
    flat = labels.reshape(-1).long().contiguous()
    if torch.is_grad_enabled() and logits.requires_grad:
        result = _TokenLogprobs.apply(rows, flat, temperature, softcap, ignore_index, entropy is True, inplace_backward)
    else:
        result = _forward(rows, flat, temperature, softcap, ignore_index)[:2]
    logprobs = result[0].view(labels.shape)
    return (logprobs, result[1].view(labels.shape)) if entropy else logprobs


def sequence_logprobs(
    logprobs: Tensor, mask: Tensor, *, average: bool = False, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Sum (or average) the unmasked log-probabilities of each sequence; differentiable.

    Args:
        logprobs: (B, T), or packed (N,) with ``cu_seqlens``, float. Masked entries are never read.
        mask: True on the tokens that count. Same shape, bool.
        average: divide by their number; a sequence without any gives 0.
        cu_seqlens: (B + 1,) int32 boundaries of packed sequences.
    Returns:
        (B,) float32 (float64 for float64).
    Raises:
        ValueError: the shapes differ, or cu_seqlens does not end at N.
    """
    check_tokens(mask, cu_seqlens, logprobs=logprobs)
    backend = choose("logprobs", "sequence_logprobs", logprobs)
    if backend != "reference" and (cu_seqlens is not None or mask.dim() == 2):
        boundaries = None if cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous()
        return _SequenceLogprobs.apply(logprobs.float(), mask.contiguous(), boundaries, average, backend)
    x = select(logprobs, mask)
    total = sequence_sum(x, cu_seqlens)
    return total / sequence_sum(mask.to(x.dtype), cu_seqlens).clamp(min=1) if average else total


class _SequenceLogprobs(torch.autograd.Function):
    """One launch each way: nothing but the mask and the counts is kept."""

    @staticmethod
    def forward(ctx, logprobs, mask, cu_seqlens, average, backend):
        result, counts = _sequence_logprobs(logprobs.contiguous(), mask, cu_seqlens, average, backend)
        ctx.save_for_backward(mask, cu_seqlens, counts)
        ctx.average, ctx.backend = average, backend
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _sequence_logprobs_backward(grad.contiguous(), *ctx.saved_tensors, ctx.average, ctx.backend), *[None] * 4


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, temperature, softcap, ignore_index, entropy, inplace):
        logprobs, row_entropy, lse = _forward(logits, labels, temperature, softcap, ignore_index)
        ctx.save_for_backward(logits, labels, lse, row_entropy)
        ctx.options, ctx.entropy = (temperature, softcap, ignore_index), entropy
        ctx.inplace = inplace and not torch.compiler.is_compiling() and not _rows_overlap(logits)
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(row_entropy)
        return logprobs, row_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        logits, labels, lse, row_entropy = ctx.saved_tensors
        # a compiled graph fills in zeros even for what was marked as not differentiable
        grad_entropy = grad_entropy if ctx.entropy else None
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 7
        grad_logprobs = torch.zeros_like(row_entropy) if grad_logprobs is None else grad_logprobs.contiguous()
        grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
        arguments = (logits, labels, lse, row_entropy, grad_logprobs, grad_entropy, *ctx.options)
        if ctx.inplace:
            _backward_(*arguments)
            return logits, *(None,) * 6
        return _backward(*arguments), *(None,) * 6


def check_options(temperature: float, softcap: float | None, entropy: bool | str, logit_scale: float = 1.0) -> None:
    """Raise ValueError if an option shared by the logits' and the hidden states' form is out of range."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}; greedy decoding has no log-probabilities")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if not logit_scale > 0:
        raise ValueError(f"logit_scale must be positive, got {logit_scale}; negate the head instead")
    if entropy not in (True, False, "detached"):
        raise ValueError(f"entropy must be True, False or 'detached', got {entropy!r}")


def check_labels(labels: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Raise IndexError naming the first label out of range; on a GPU only with RLHF_FAST_DEBUG=1, as it must wait."""
    if labels.device.type != "cpu" and not debugging():
        return
    bad = ((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise IndexError(
            f"label {int(labels[row])} in row {row} is outside the vocabulary [0, {vocab_size}); "
            f"rows to skip are labelled {ignore_index}"
        )


def rows_of(x: Tensor, num_rows: int) -> Tensor:
    """View ``x`` (..., V) as (num_rows, V) rows, each contiguous; rows may share memory. Copies only when it must."""
    rows = x.reshape(num_rows, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def _rows_overlap(rows: Tensor) -> bool:
    return len(rows) > 1 and rows.stride(0) < rows.shape[1]


_OPTIONS = "float temperature, float? softcap, int ignore_index"


def _fake_forward(logits, labels, *_):
    work = promote(logits[:0]).dtype
    return tuple(torch.empty(labels.shape, dtype=t, device=logits.device) for t in (work, work, torch.float64))


@register(
    f"token_logprobs_forward(Tensor logits, Tensor labels, {_OPTIONS}) -> (Tensor, Tensor, Tensor)", _fake_forward
)
def _forward(logits, labels, temperature, softcap, ignore_index):
    check_labels(labels, logits.shape[1], ignore_index)
    chosen = implementation("logprobs", "token_logprobs_forward", logits, labels)
    return chosen.token_logprobs_forward(logits, labels, temperature, softcap, ignore_index)


_SAVED = "Tensor labels, Tensor lse, Tensor entropy, Tensor grad_logprobs, Tensor? grad_entropy"


def _fake_backward(logits, *_):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@register(f"token_logprobs_backward(Tensor logits, {_SAVED}, {_OPTIONS}) -> Tensor", _fake_backward)
def _backward(logits, *arguments):
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _write_gradient(logits, *arguments, out)
    return out


@register(f"token_logprobs_backward_(Tensor(a!) logits, {_SAVED}, {_OPTIONS}) -> ()", lambda *_: None)
def _backward_(logits, *arguments):
    _write_gradient(logits, *arguments, logits)
    # a second backward pass, or another operation's, must find out that the logits are gone
    torch.autograd.graph.increment_version(logits)


def _write_gradient(logits, *arguments_and_out):
    chosen = implementation("logprobs", "token_logprobs_backward", logits)
    chosen.token_logprobs_backward(logits, *arguments_and_out)


def _fake_sequence_logprobs(logprobs, mask, cu_seqlens, *_):
    rows = mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return logprobs.new_empty(rows), logprobs.new_empty(rows)


@register(
    "sequence_logprobs(Tensor logprobs, Tensor mask, Tensor? cu_seqlens, bool average, str backend) -> "
    "(Tensor, Tensor)",
    _fake_sequence_logprobs,
)
def _sequence_logprobs(logprobs, mask, cu_seqlens, average, backend):
    """The sums or averages, and how many tokens each is made of (float32)."""
    return kernel("logprobs", backend).sequence_logprobs(logprobs, mask, cu_seqlens, average)


@register(
    "sequence_logprobs_backward(Tensor grad, Tensor mask, Tensor? cu_seqlens, Tensor counts, bool average, "
    "str backend) -> Tensor",
    lambda grad, mask, *_: grad.new_empty(mask.shape),
)
def _sequence_logprobs_backward(grad, mask, cu_seqlens, counts, average, backend):
    return kernel("logprobs", backend).sequence_logprobs_backward(grad, mask, cu_seqlens, counts, average)
