"""Triton kernels of the policy and value losses: loss, metrics and gradient in one launch over the tokens.

A program takes a block of tokens, or a whole sequence where a sequence decides something: its mean, its ratio, or
which of its tokens belong together. It leaves one row of partial sums. The program that arrives last adds up all rows
in their order, whoever that is, so the results are the same bits every time, and writes loss and metrics.

A token costs what is read of it (mask 1 byte, 4 for each tensor given) and 4 bytes of gradient. Masked tokens are read
too, in vectors with their neighbours, and then left out by selection. Only a clipped ratio of the whole sequence reads more: its gradient is spread in another pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels.kl.triton_impl import (
    arrival_counter,
    arrives_last,
    expm1_and_k3,
    kl_estimate,
    span,
)
from rlhf_fast.kernels.logprobs.triton_impl import OPTIONS, clear_unclaimed, load_kept, unsupported

from .reference import MAX_LOG_RATIO
from .terms import FIGURES, VALUE_FIGURES, PolicyOptions, PolicyTokens, ValueTokens

__all__ = ["policy_loss", "scaled_gradient", "unsupported", "value_loss"]

BLOCK, WARPS = 1024, 4
# a program that walks a sequence has more to remember
SEQUENCE_BLOCK = 512
INFINITY = float("inf")
_MAX_LOG_RATIO = tl.constexpr(MAX_LOG_RATIO)

# A program's row holds the figures in their order, with the loss in place of the scale, then the numbers of tokens and
# of sequences. These are its columns.
_LOSS = tl.constexpr(0)
_CLIP_LOW, _CLIP_HIGH, _CLIP_REGION, _APPROX_KL, _RATIO_MEAN, _RATIO_MAX, _KL, _ENTROPY, _IS_MEAN, _IS_MAX, _GAP = (
    tl.constexpr(i) for i in range(1, len(FIGURES))
)
_CLIP_FRACTION, _VALUE_MEAN, _RETURN_MEAN = (tl.constexpr(i) for i in range(1, len(VALUE_FIGURES)))


def row_of(figures: tuple[str, ...]) -> dict[str, int]:
    """What the kernels know of a row. MAXIMA has the bits of the columns that are not sums; the last program adds LANES
    rows at a time, 16 numbers a thread."""
    width = triton.next_power_of_2(len(figures) + 2)
    maxima = sum(1 << i for i, name in enumerate(figures) if name.endswith("_max"))
    return {"NUM_FIGURES": len(figures), "ROW": width, "MAXIMA": maxima, "LANES": 512 * WARPS // width}


POLICY_ROW, VALUE_ROW = row_of(FIGURES), row_of(VALUE_FIGURES)


@triton.jit
def total_at(column, index, x, keep):
    """A row that is 0 but for the sum of x over the tokens that count, in one column."""
    return tl.where(column == index, tl.sum(tl.where(keep, x.to(tl.float32), 0.0), 0), 0.0)


@triton.jit
def largest_at(column, index, x, keep):
    return tl.where(column == index, tl.max(tl.where(keep, x, 0.0), 0), 0.0)


@triton.jit
def maxima_of(column, MAXIMA: tl.constexpr):
    return ((tl.full(column.shape, MAXIMA, tl.int32) >> column) & 1) != 0


@triton.jit
def pick(row, column, index):
    return tl.sum(tl.where(column == index, row, 0.0), 0)


@triton.jit
def store_row(partials_ptr, row, column, share, NUM_FIGURES: tl.constexpr, ROW: tl.constexpr):
    """The loss is weighted only here; a sequence counts if it has tokens."""
    row = tl.where(column == _LOSS, row * share, row)
    row = tl.where(column == NUM_FIGURES + 1, tl.where(pick(row, column, NUM_FIGURES) > 0.0, 1.0, 0.0), row)
    tl.store(partials_ptr + tl.program_id(0).to(tl.int64) * ROW + column, row)


@triton.jit
def finish(
    partials_ptr,
    arrived_ptr,
    denominator_ptr,
    divisor,
    loss_ptr,
    figures_ptr,
    HAS_DENOMINATOR: tl.constexpr,
    MEAN_OF_MEANS: tl.constexpr,
    NUM_FIGURES: tl.constexpr,
    ROW: tl.constexpr,
    MAXIMA: tl.constexpr,
    LANES: tl.constexpr,
):
    """The loss and the figures from the rows of all programs, in the program that arrives last."""
    if arrives_last(arrived_ptr):
        column = tl.arange(0, ROW)
        is_maximum = maxima_of(column, MAXIMA)
        totals = tl.zeros([LANES, ROW], tl.float32)
        for start in range(0, tl.num_programs(0), LANES):
            program = (start + tl.arange(0, LANES))[:, None]
            at = partials_ptr + program.to(tl.int64) * ROW + column[None, :]
            # past the L1 cache, which does not see what other processors write
            rows = tl.load(at, mask=program < tl.num_programs(0), other=0.0, cache_modifier=".cg")
            totals = tl.where(is_maximum[None, :], tl.maximum(totals, rows), totals + rows)
        row = tl.where(is_maximum, tl.max(totals, 0), tl.sum(totals, 0))
        tokens = tl.maximum(pick(row, column, NUM_FIGURES), 1.0)
        denominator = tokens
        if MEAN_OF_MEANS:
            denominator = tl.maximum(pick(row, column, NUM_FIGURES + 1), 1.0)
        denominator = tl.where(divisor > 0.0, divisor, denominator)
        if HAS_DENOMINATOR:
            denominator = tl.load(denominator_ptr)
        figures = tl.where(is_maximum, row, row / tokens)
        # maxima pass over NaN, the mean in the column before does not
        mean_before = tl.sum(tl.where(column[None, :] + 1 == column[:, None], figures[None, :], 0.0), 1)
        figures = tl.where(is_maximum & ~(mean_before <= float("inf")), mean_before, figures)
        tl.store(loss_ptr, pick(row, column, _LOSS) / denominator)
        tl.store(figures_ptr + column, tl.where(column == 0, 1.0 / denominator, figures), mask=column < NUM_FIGURES)


@triton.jit
def load_ratio(logprobs_ptr, old_ptr, mask_ptr, at, inside, HAS_OLD: tl.constexpr):
    """Of each token: whether it counts, its log-probability now and before."""
    keep = tl.load(mask_ptr + at, mask=inside, other=0) != 0
    logprob = load_kept(logprobs_ptr, at, inside, keep)
    old = logprob
    if HAS_OLD:
        old = load_kept(old_ptr, at, inside, keep)
    return keep, logprob, old


@triton.jit
def load_advantage(
    advantages_ptr, at, first, token, inside, keep, width, PER_TOKEN: tl.constexpr, LAYOUT: tl.constexpr
):
    if PER_TOKEN:
        row = at
    elif LAYOUT == "flat":
        # one 64-bit division for the block, 32-bit ones for its tokens
        first_row = first // width
        row = first_row + ((first - first_row * width).to(tl.int32) + token) // width
    else:
        row = tl.program_id(0) + tl.zeros_like(token)
    return load_kept(advantages_ptr, row, inside, keep)


@triton.jit
def sequence_means(logprobs_ptr, old_ptr, mask_ptr, first, length, lane, HAS_OLD: tl.constexpr, BLOCK: tl.constexpr):
    """The number of tokens of the sequence, at least 1, and their mean log-ratio."""
    tokens = 0.0
    log_ratio = 0.0
    for start in range(0, length, BLOCK):
        tensors = logprobs_ptr, old_ptr, mask_ptr
        keep, logprob, old = load_ratio(*tensors, first + start + lane, start + lane < length, HAS_OLD)
        tokens += tl.sum(keep.to(tl.float32), 0)
        log_ratio += tl.sum(logprob - old, 0)
    tokens = tl.maximum(tokens, 1.0)
    return tokens, log_ratio / tokens


@triton.jit
def surrogate(logprob, log_ratio, advantage, lower, upper, dual_clip, KIND: tl.constexpr):
    """Of each token: the ratio, the loss, d loss / d log-ratio, d loss / d logprob beside it, clipped below, above."""
    too_large = log_ratio > _MAX_LOG_RATIO
    ratio = tl.exp(tl.where(too_large, _MAX_LOG_RATIO, log_ratio))
    through = tl.zeros_like(ratio)
    low = through > 0.0
    high = low
    if KIND == "clip":
        unclipped = ratio * advantage
        clipped = tl.where(ratio < lower, lower, tl.where(ratio > upper, upper, ratio)) * advantage
        loss = -tl.where(clipped < unclipped, clipped, unclipped)
        # no bound is infinity, which times 0 would be NaN
        bound = -dual_clip * tl.where(advantage < 0.0, advantage, -1.0)
        dual = (advantage < 0.0) & (loss > bound)
        through = tl.where((clipped < unclipped) | too_large | dual, 0.0, -unclipped)
        loss = tl.where(dual, bound, loss)
        direct = tl.zeros_like(ratio)
        low = (ratio < lower) & (advantage < 0.0)
        high = (ratio > upper) & (advantage > 0.0)
    elif KIND == "cispo":
        direct = -tl.where(ratio > upper, upper, ratio) * advantage
        loss = direct * logprob
        high = (ratio > upper) & (advantage > 0.0)
    else:
        tl.static_assert(KIND == "reinforce")
        direct = -advantage
        loss = direct * logprob
    return ratio, loss, through, direct, low, high


@triton.jit
def ratio_figures(column, log_ratio, ratio, low, high, keep):
    """``log_ratio`` is the token's own, ``ratio`` that of its level."""
    _, k3 = expm1_and_k3(log_ratio)
    row = total_at(column, _CLIP_LOW, low, keep) + total_at(column, _CLIP_HIGH, high, keep)
    # nothing is clipped on both sides
    row += tl.where(column == _CLIP_REGION, tl.sum(row, 0), 0.0)
    row += total_at(column, _APPROX_KL, k3, keep) + total_at(column, _RATIO_MEAN, ratio, keep)
    return row + largest_at(column, _RATIO_MAX, ratio, keep)


@triton.jit
def rollout_figures(column, gap, keep):
    """The importance ratio of old against rollout, before truncation, and what is measured of it."""
    ratio = tl.exp(tl.where(gap > _MAX_LOG_RATIO, _MAX_LOG_RATIO, gap))
    row = total_at(column, _IS_MEAN, ratio, keep) + largest_at(column, _IS_MAX, ratio, keep)
    return ratio, row + total_at(column, _GAP, tl.abs(gap), keep)


@triton.jit
def spread(gradient_ptr, mask_ptr, slope, first, length, lane, BLOCK: tl.constexpr):
    """Add a number to the gradient of every token that counts."""
    # the same threads wrote it, but how a loop is laid out is the compiler's choice
    tl.debug_barrier()
    for start in range(0, length, BLOCK):
        at = first + start + lane
        inside = start + lane < length
        keep = tl.load(mask_ptr + at, mask=inside, other=0) != 0
        gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0)
        tl.store(gradient_ptr + at, tl.where(keep, gradient + slope, 0.0), mask=inside)


@triton.jit
def policy_kernel(
    logprobs_ptr,
    old_ptr,
    advantages_ptr,
    mask_ptr,
    ref_ptr,
    rollout_ptr,
    entropy_ptr,
    cu_seqlens_ptr,
    denominator_ptr,
    loss_ptr,
    figures_ptr,
    gradient_ptr,
    entropy_gradient_ptr,
    partials_ptr,
    arrived_ptr,
    num_tokens,
    width,
    divisor,
    lower,
    upper,
    dual_clip,
    is_clip,
    kl_coef,
    entropy_coef,
    KIND: tl.constexpr,
    LEVEL: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    MEAN_OF_MEANS: tl.constexpr,
    CORRECTED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_ROLLOUT: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_DENOMINATOR: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    HAS_ENTROPY_GRADIENT: tl.constexpr,
    LAYOUT: tl.constexpr,
    NUM_FIGURES: tl.constexpr,
    ROW: tl.constexpr,
    MAXIMA: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first, length = span(cu_seqlens_ptr, num_tokens, width, LAYOUT, BLOCK)
    lane, column = tl.arange(0, BLOCK), tl.arange(0, ROW)
    row = tl.zeros([ROW], tl.float32)
    share = 1.0
    through_sum = 0.0
    if LEVEL != "token" or MEAN_OF_MEANS:
        where = logprobs_ptr, old_ptr, mask_ptr, first, length, lane
        tokens, mean_log_ratio = sequence_means(*where, HAS_OLD, BLOCK)
        if MEAN_OF_MEANS:
            share = 1.0 / tokens
    for start in range(0, length, BLOCK):
        token = start + lane
        at = first + start + lane
        inside = token < length
        keep, logprob, old = load_ratio(logprobs_ptr, old_ptr, mask_ptr, at, inside, HAS_OLD)
        advantage = load_advantage(advantages_ptr, at, first, token, inside, keep, width, PER_TOKEN, LAYOUT)
        log_ratio = logprob - old
        if LEVEL != "token":
            log_ratio = tl.where(keep, mean_log_ratio, 0.0)
        options = lower, upper, dual_clip
        ratio, loss, through, direct, low, high = surrogate(logprob, log_ratio, advantage, *options, KIND)
        figures = ratio_figures(column, logprob - old, ratio, low, high, keep)
        figures += tl.where(column == NUM_FIGURES, tl.sum(keep.to(tl.float32), 0), 0.0)
        if HAS_ROLLOUT:
            gap = old - load_kept(rollout_ptr, at, inside, keep)
            is_ratio, of_rollout = rollout_figures(column, gap, keep)
            figures += of_rollout
            if CORRECTED:
                weight = tl.where(is_ratio > is_clip, is_clip, is_ratio)
                loss, through, direct = loss * weight, through * weight, direct * weight
        # coefficients of 0 are selected: times an infinite estimate they would be NaN
        if HAS_REF:
            kl, slope = kl_estimate(load_kept(ref_ptr, at, inside, keep) - logprob, ESTIMATOR)
            figures += total_at(column, _KL, kl, keep)
            loss += tl.where(kl_coef == 0.0, 0.0, kl_coef * kl)
            direct += tl.where(kl_coef == 0.0, 0.0, kl_coef * slope)
        if HAS_ENTROPY:
            entropy = load_kept(entropy_ptr, at, inside, keep)
            figures += total_at(column, _ENTROPY, entropy, keep)
            loss -= tl.where(entropy_coef == 0.0, 0.0, entropy_coef * entropy)
            if HAS_ENTROPY_GRADIENT:
                tl.store(entropy_gradient_ptr + at, tl.where(keep, -entropy_coef * share, 0.0), mask=inside)
        figures += total_at(column, _LOSS, loss, keep)
        row = tl.where(maxima_of(column, MAXIMA), tl.maximum(row, figures), row + figures)
        if LEVEL == "sequence":
            through_sum += tl.sum(tl.where(keep, through, 0.0), 0)
        else:
            direct += through
        if HAS_GRADIENT:
            tl.store(gradient_ptr + at, tl.where(keep, direct * share, 0.0), mask=inside)
    if HAS_GRADIENT and LEVEL == "sequence" and KIND == "clip":
        # the ratio of the sequence moves with the mean of its tokens
        spread(gradient_ptr, mask_ptr, through_sum * share / tokens, first, length, lane, BLOCK)
    if HAS_GRADIENT:
        clear_unclaimed(gradient_ptr, cu_seqlens_ptr, width, LAYOUT == "packed", BLOCK)
    if HAS_ENTROPY_GRADIENT:
        clear_unclaimed(entropy_gradient_ptr, cu_seqlens_ptr, width, LAYOUT == "packed", BLOCK)
    store_row(partials_ptr, row, column, share, NUM_FIGURES, ROW)
    ends = partials_ptr, arrived_ptr, denominator_ptr, divisor, loss_ptr, figures_ptr
    finish(*ends, HAS_DENOMINATOR, MEAN_OF_MEANS, NUM_FIGURES, ROW, MAXIMA, LANES)


@triton.jit
def value_error(value, old, target, clip, HAS_CLIP: tl.constexpr):
    """Of each token: the loss, its slope in the value, and whether the clipped error is the larger one."""
    used = value - target
    slope = used
    clipped = tl.zeros_like(used) > 0.0
    if HAS_CLIP:
        moved = value - old
        # as a clamp of the difference: min and max of old +- clip would round twice
        other = old + tl.where(moved < -clip, -clip, tl.where(moved > clip, clip, moved)) - target
        # inside the bounds the two differ by rounding alone
        clipped = (tl.abs(moved) > clip) & (other * other > used * used)
        slope = tl.where(clipped, 0.0, used)
        used = tl.where(clipped, other, used)
    return 0.5 * used * used, slope, clipped


@triton.jit
def value_kernel(
    values_ptr,
    old_ptr,
    returns_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    denominator_ptr,
    loss_ptr,
    figures_ptr,
    gradient_ptr,
    partials_ptr,
    arrived_ptr,
    num_tokens,
    width,
    divisor,
    clip,
    HAS_CLIP: tl.constexpr,
    MEAN_OF_MEANS: tl.constexpr,
    HAS_DENOMINATOR: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    LAYOUT: tl.constexpr,
    NUM_FIGURES: tl.constexpr,
    ROW: tl.constexpr,
    MAXIMA: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first, length = span(cu_seqlens_ptr, num_tokens, width, LAYOUT, BLOCK)
    lane, column = tl.arange(0, BLOCK), tl.arange(0, ROW)
    row = tl.zeros([ROW], tl.float32)
    share = 1.0
    if MEAN_OF_MEANS:
        tokens, _ = sequence_means(values_ptr, values_ptr, mask_ptr, first, length, lane, False, BLOCK)
        share = 1.0 / tokens
    for start in range(0, length, BLOCK):
        at = first + start + lane
        inside = start + lane < length
        keep, value, old = load_ratio(values_ptr, old_ptr, mask_ptr, at, inside, HAS_CLIP)
        target = load_kept(returns_ptr, at, inside, keep)
        loss, slope, clipped = value_error(value, old, target, clip, HAS_CLIP)
        row += total_at(column, _LOSS, loss, keep) + total_at(column, _CLIP_FRACTION, clipped, keep)
        row += total_at(column, _VALUE_MEAN, value, keep) + total_at(column, _RETURN_MEAN, target, keep)
        row += tl.where(column == NUM_FIGURES, tl.sum(keep.to(tl.float32), 0), 0.0)
        if HAS_GRADIENT:
            tl.store(gradient_ptr + at, tl.where(keep, slope * share, 0.0), mask=inside)
    if HAS_GRADIENT:
        clear_unclaimed(gradient_ptr, cu_seqlens_ptr, width, LAYOUT == "packed", BLOCK)
    store_row(partials_ptr, row, column, share, NUM_FIGURES, ROW)
    ends = partials_ptr, arrived_ptr, denominator_ptr, divisor, loss_ptr, figures_ptr
    finish(*ends, HAS_DENOMINATOR, MEAN_OF_MEANS, NUM_FIGURES, ROW, MAXIMA, LANES)


@triton.jit
def scale_kernel(gradient_ptr, grad_ptr, figures_ptr, out_ptr, num_tokens, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(grad_ptr) * tl.load(figures_ptr)
    tl.store(out_ptr + at, tl.load(gradient_ptr + at, mask=at < num_tokens) * scale, mask=at < num_tokens)


def policy_loss(
    tokens: PolicyTokens,
    options: PolicyOptions,
    denominator: Tensor | None,
    divisor: float,
    need_gradient: bool,
    need_entropy_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logprobs, mask, cu_seqlens, o = tokens.logprobs, tokens.mask, tokens.cu_seqlens, options
    per_token = tokens.advantages.shape == mask.shape
    whole = o.aggregate == "sequence" or o.level != "token" or (cu_seqlens is not None and not per_token)
    programs, width, layout = _layout(mask, cu_seqlens, whole)
    loss, figures, partials = _outputs(logprobs, programs, POLICY_ROW)
    gradient = logprobs.new_empty(logprobs.shape if need_gradient else (0,))
    entropy_gradient = logprobs.new_empty(logprobs.shape if need_entropy_gradient else (0,))
    given = (tokens.ref_logprobs, tokens.rollout_logprobs, tokens.entropy, cu_seqlens, denominator)
    policy_kernel[(programs,)](
        logprobs,
        logprobs if tokens.old_logprobs is None else tokens.old_logprobs,
        tokens.advantages,
        mask.view(torch.uint8),
        *(logprobs if x is None else x for x in given),
        loss,
        figures,
        gradient,
        entropy_gradient,
        partials,
        arrival_counter(logprobs.device),
        mask.numel(),
        width,
        _divisor(o.aggregate, divisor, mask),
        *o.bounds(),
        o.kl_coef,
        o.entropy_coef,
        KIND=o.kind,
        LEVEL=o.level,
        ESTIMATOR=o.kl_estimator,
        MEAN_OF_MEANS=o.aggregate == "sequence",
        CORRECTED=o.is_clip is not None,
        PER_TOKEN=per_token,
        HAS_OLD=tokens.old_logprobs is not None,
        HAS_REF=tokens.ref_logprobs is not None,
        HAS_ROLLOUT=tokens.rollout_logprobs is not None,
        HAS_ENTROPY=tokens.entropy is not None,
        HAS_DENOMINATOR=denominator is not None,
        HAS_GRADIENT=need_gradient,
        HAS_ENTROPY_GRADIENT=need_entropy_gradient,
        **POLICY_ROW,
        **layout,
        **OPTIONS,
    )
    return loss, figures, gradient, entropy_gradient


def value_loss(
    tokens: ValueTokens,
    clip: float | None,
    aggregate: str,
    denominator: Tensor | None,
    divisor: float,
    need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    values, mask, cu_seqlens = tokens.values, tokens.mask, tokens.cu_seqlens
    programs, width, layout = _layout(mask, cu_seqlens, aggregate == "sequence")
    loss, figures, partials = _outputs(values, programs, VALUE_ROW)
    gradient = values.new_empty(values.shape if need_gradient else (0,))
    value_kernel[(programs,)](
        values,
        values if clip is None else tokens.old_values,
        tokens.returns,
        mask.view(torch.uint8),
        values if cu_seqlens is None else cu_seqlens,
        values if denominator is None else denominator,
        loss,
        figures,
        gradient,
        partials,
        arrival_counter(values.device),
        mask.numel(),
        width,
        _divisor(aggregate, divisor, mask),
        INFINITY if clip is None else float(clip),
        HAS_CLIP=clip is not None,
        MEAN_OF_MEANS=aggregate == "sequence",
        HAS_DENOMINATOR=denominator is not None,
        HAS_GRADIENT=need_gradient,
        **VALUE_ROW,
        **layout,
        **OPTIONS,
    )
    return loss, figures, gradient


def scaled_gradient(gradient: Tensor, grad: Tensor, figures: Tensor) -> Tensor:
    out = torch.empty_like(gradient)
    programs = triton.cdiv(gradient.numel(), BLOCK)
    if programs:
        arguments = (gradient, grad, figures, out, gradient.numel())
        scale_kernel[(programs,)](*arguments, BLOCK=BLOCK, num_warps=WARPS, **OPTIONS)
    return out


def _layout(mask: Tensor, cu_seqlens: Tensor | None, whole_sequences: bool) -> tuple[int, int, dict]:
    """How many programs, how wide a row is, and the launch options that follow. Without tokens one program remains."""
    width = max(mask.shape[-1], 1)
    if not whole_sequences or not mask.numel():
        programs = max(triton.cdiv(mask.numel(), BLOCK), 1)
        return programs, width, {"LAYOUT": "flat", "BLOCK": BLOCK, "num_warps": WARPS}
    sequences = len(mask) if cu_seqlens is None else len(cu_seqlens) - 1
    # the longest packed sequence would have to be read back; the mean length chooses the block
    block = triton.next_power_of_2(triton.cdiv(mask.numel(), sequences))
    layout = "padded" if cu_seqlens is None else "packed"
    return sequences, width, {"LAYOUT": layout, "BLOCK": min(max(block, 128), SEQUENCE_BLOCK), "num_warps": WARPS}


def _outputs(like: Tensor, programs: int, row: dict[str, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, figures, and the programs' rows."""
    return like.new_empty(()), like.new_empty(row["NUM_FIGURES"]), like.new_empty(programs, row["ROW"])


def _divisor(aggregate: str, divisor: float, mask: Tensor) -> float:
    """What is known of the denominator before anything is read; 0: the local count."""
    return float(max(mask.numel(), 1)) if aggregate == "constant" and not divisor else divisor
