"""Triton kernels of rewards and advantages.

Generalized advantage estimation is a scan of affine maps: the next unmasked token's V and A reach A_t only through
s = V + lam A (csrc/math.h), so two numbers per token make its map. One program per sequence walks its blocks from the
end with s as the carry. On its way it can also make the rewards and leave the moments of its advantages, so that
:func:`kl_shaped_gae` is that launch and one to whiten: 13 bytes read and 16 written for a token that counts, then 5
and 4.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels.kl.triton_impl import arrival_counter, arrives_last, kl_estimate
from rlhf_fast.kernels.logprobs.triton_impl import OPTIONS, boundaries, clear_unclaimed, load_kept, unsupported

__all__ = [
    "gae",
    "gae_packed",
    "group_advantages",
    "kl_shaped_gae",
    "shaped_rewards",
    "unsupported",
    "whiten",
]

BLOCK, WARPS = 1024, 4
PACKED_BLOCK = 512
# of a scan: two 16-byte vectors of tokens a thread, and room for six programs on a processor
SCAN_WARPS = 4
# what one program whitens by itself, in one launch: 32 numbers a thread
SMALL, SMALL_WARPS = 8192, 8
# programs whose moments are merged at a time
LANES = 256
# rewards of a program of group_advantages, and how many it compares them with at a time: 8 float64 a thread
OWN, OTHERS, GROUP_WARPS = 16, 64, 4


@triton.jit
def compose(slope1, offset1, slope2, offset2):
    """First the later token's map 1, then the earlier one's map 2."""
    return slope2 * slope1, slope2 * offset1 + offset2


@triton.jit
def scan(reward, value, keep, carry, lane, gamma, lam, BLOCK: tl.constexpr):
    """Advantages and returns of a block, and the carry for the block before it."""
    slope = tl.where(keep, gamma * lam, 1.0)
    offset = tl.where(keep, value + lam * (reward - value), 0.0)
    slope, offset = tl.associative_scan((slope, offset), 0, compose, reverse=True)
    leaving = slope * carry + offset
    # what arrives at a token has left the next one
    arriving = tl.gather(leaving, tl.minimum(lane + 1, BLOCK - 1), 0)
    future = gamma * tl.where(lane == BLOCK - 1, carry, arriving)
    carry = tl.sum(tl.where(lane == 0, leaving, 0.0), 0)
    return tl.where(keep, reward - value + future, 0.0), tl.where(keep, reward + future, 0.0), carry


@triton.jit
def gae_kernel(
    rewards_ptr,
    values_ptr,
    mask_ptr,
    bootstrap_ptr,
    cu_seqlens_ptr,
    advantages_ptr,
    returns_ptr,
    width,
    gamma,
    lam,
    HAS_BOOTSTRAP: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first, length = boundaries(cu_seqlens_ptr, width, PACKED)
    carry = 0.0
    if HAS_BOOTSTRAP:
        carry = tl.load(bootstrap_ptr + tl.program_id(0))
    lane = tl.arange(0, BLOCK)
    blocks = tl.cdiv(length, BLOCK)
    for i in range(blocks):
        start = (blocks - 1 - i) * BLOCK
        token = start + lane
        at = first + start + lane
        keep = tl.load(mask_ptr + at, mask=token < length, other=0) != 0
        value = load_kept(values_ptr, at, token < length, keep)
        reward = load_kept(rewards_ptr, at, token < length, keep)
        advantage, ret, carry = scan(reward, value, keep, carry, lane, gamma, lam, BLOCK)
        tl.store(advantages_ptr + at, advantage, mask=token < length)
        tl.store(returns_ptr + at, ret, mask=token < length)
    clear_unclaimed(advantages_ptr, cu_seqlens_ptr, width, PACKED, BLOCK)
    clear_unclaimed(returns_ptr, cu_seqlens_ptr, width, PACKED, BLOCK)


@triton.jit
def load_score(scores_ptr, clip):
    score = tl.load(scores_ptr + tl.program_id(0))
    return tl.where(score > clip, clip, tl.where(score < -clip, -clip, score))


@triton.jit
def shape(
    logprobs_ptr,
    ref_logprobs_ptr,
    mask_ptr,
    at,
    token,
    length,
    score,
    kl_coef,
    has_later,
    ESTIMATOR: tl.constexpr,
):
    """Of a block: what counts, KL and rewards; and whether anything counts from here to the end of the sequence."""
    keep = tl.load(mask_ptr + at, mask=token < length, other=0) != 0
    d = load_kept(ref_logprobs_ptr, at, token < length, keep) - load_kept(logprobs_ptr, at, token < length, keep)
    kl, _ = kl_estimate(d, ESTIMATOR)
    kl = tl.where(keep, kl, 0.0)
    last = tl.max(tl.where(keep, token, -1), 0)
    reward = tl.where(keep, -kl_coef * kl, 0.0) + tl.where((token == last) & (has_later == 0), score, 0.0)
    return keep, kl, reward, tl.where(last >= 0, 1, has_later)


@triton.jit
def shaped_rewards_kernel(
    scores_ptr,
    logprobs_ptr,
    ref_logprobs_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    rewards_ptr,
    width,
    kl_coef,
    clip,
    ESTIMATOR: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first, length = boundaries(cu_seqlens_ptr, width, PACKED)
    score = load_score(scores_ptr, clip)
    has_later = 0
    lane = tl.arange(0, BLOCK)
    blocks = tl.cdiv(length, BLOCK)
    for i in range(blocks):
        start = (blocks - 1 - i) * BLOCK
        token = start + lane
        at = first + start + lane
        tensors = logprobs_ptr, ref_logprobs_ptr, mask_ptr, at, token, length
        _, _, reward, has_later = shape(*tensors, score, kl_coef, has_later, ESTIMATOR)
        tl.store(rewards_ptr + at, reward, mask=token < length)
    clear_unclaimed(rewards_ptr, cu_seqlens_ptr, width, PACKED, BLOCK)


@triton.jit
def moments_of(x, keep):
    """Number, mean, and sum of squares around it: the squares of the raw numbers would cancel."""
    count = tl.sum(keep.to(tl.float32), 0)
    mean = tl.sum(tl.where(keep, x, 0.0), 0) / tl.maximum(count, 1.0)
    d = tl.where(keep, x - mean, 0.0)
    return count, mean, tl.sum(d * d, 0)


@triton.jit
def merge(count, mean, square, count2, mean2, square2):
    """The moments of two sets together (Chan, Golub and LeVeque 1979)."""
    total = count + count2
    d, part = mean2 - mean, count2 / tl.maximum(total, 1.0)
    return total, mean + d * part, square + square2 + d * d * count * part


@triton.jit
def store_moments(partials_ptr, count, mean, square):
    partial = partials_ptr + tl.program_id(0).to(tl.int64) * 3
    tl.store(partial, count)
    tl.store(partial + 1, mean)
    tl.store(partial + 2, square)


@triton.jit
def merge_moments(partials_ptr, arrived_ptr, moments_ptr, eps, LANES: tl.constexpr):
    """Mean and 1 / standard deviation over all programs, in the one that arrives last: a lane merges every LANES-th
    program in order, then the lanes."""
    if arrives_last(arrived_ptr):
        lane = tl.arange(0, LANES)
        count = tl.zeros([LANES], tl.float32)
        mean = count
        square = count
        for start in range(0, tl.num_programs(0), LANES):
            # past the L1 cache, which does not see what other processors write
            partial = partials_ptr + (start + lane).to(tl.int64) * 3
            inside = start + lane < tl.num_programs(0)
            count2 = tl.load(partial, mask=inside, other=0.0, cache_modifier=".cg")
            mean2 = tl.load(partial + 1, mask=inside, other=0.0, cache_modifier=".cg")
            square2 = tl.load(partial + 2, mask=inside, other=0.0, cache_modifier=".cg")
            count, mean, square = merge(count, mean, square, count2, mean2, square2)
        total = tl.maximum(tl.sum(count, 0), 1.0)
        middle = tl.sum(count * mean, 0) / total
        variance = tl.sum(square + count * (mean - middle) * (mean - middle), 0) / total
        tl.store(moments_ptr, middle)
        tl.store(moments_ptr + 1, 1.0 / tl.sqrt_rn(variance + eps))


@triton.jit
def kl_shaped_gae_kernel(
    scores_ptr,
    logprobs_ptr,
    ref_logprobs_ptr,
    values_ptr,
    mask_ptr,
    bootstrap_ptr,
    cu_seqlens_ptr,
    advantages_ptr,
    returns_ptr,
    rewards_ptr,
    kl_ptr,
    partials_ptr,
    arrived_ptr,
    moments_ptr,
    width,
    kl_coef,
    clip,
    gamma,
    lam,
    eps,
    ESTIMATOR: tl.constexpr,
    HAS_BOOTSTRAP: tl.constexpr,
    WHITEN: tl.constexpr,
    PACKED: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first, length = boundaries(cu_seqlens_ptr, width, PACKED)
    score = load_score(scores_ptr, clip)
    carry = 0.0
    if HAS_BOOTSTRAP:
        carry = tl.load(bootstrap_ptr + tl.program_id(0))
    has_later = 0
    count = 0.0
    mean = 0.0
    square = 0.0
    lane = tl.arange(0, BLOCK)
    blocks = tl.cdiv(length, BLOCK)
    for i in range(blocks):
        start = (blocks - 1 - i) * BLOCK
        token = start + lane
        at = first + start + lane
        tensors = logprobs_ptr, ref_logprobs_ptr, mask_ptr, at, token, length
        keep, kl, reward, has_later = shape(*tensors, score, kl_coef, has_later, ESTIMATOR)
        value = load_kept(values_ptr, at, token < length, keep)
        advantage, ret, carry = scan(reward, value, keep, carry, lane, gamma, lam, BLOCK)
        tl.store(kl_ptr + at, kl, mask=token < length)
        tl.store(rewards_ptr + at, reward, mask=token < length)
        tl.store(advantages_ptr + at, advantage, mask=token < length)
        tl.store(returns_ptr + at, ret, mask=token < length)
        if WHITEN:
            count, mean, square = merge(count, mean, square, *moments_of(advantage, keep))
    clear_unclaimed(kl_ptr, cu_seqlens_ptr, width, PACKED, BLOCK)
    clear_unclaimed(rewards_ptr, cu_seqlens_ptr, width, PACKED, BLOCK)
    clear_unclaimed(advantages_ptr, cu_seqlens_ptr, width, PACKED, BLOCK)
    clear_unclaimed(returns_ptr, cu_seqlens_ptr, width, PACKED, BLOCK)
    if WHITEN:
        store_moments(partials_ptr, count, mean, square)
        merge_moments(partials_ptr, arrived_ptr, moments_ptr, eps, LANES)


@triton.jit
def load_block(x_ptr, mask_ptr, num_tokens, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = tl.load(mask_ptr + at, mask=at < num_tokens, other=0) != 0
    return at, keep, load_kept(x_ptr, at, at < num_tokens, keep)


@triton.jit
def moments_kernel(
    x_ptr,
    mask_ptr,
    partials_ptr,
    arrived_ptr,
    moments_ptr,
    num_tokens,
    eps,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _, keep, x = load_block(x_ptr, mask_ptr, num_tokens, BLOCK)
    store_moments(partials_ptr, *moments_of(x, keep))
    merge_moments(partials_ptr, arrived_ptr, moments_ptr, eps, LANES)


@triton.jit
def whiten_kernel(
    x_ptr,
    mask_ptr,
    moments_ptr,
    cu_seqlens_ptr,
    out_ptr,
    num_tokens,
    num_sequences,
    eps,
    SHIFT_MEAN: tl.constexpr,
    ALONE: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out`` may be ``x``. A program that is ALONE takes the moments itself."""
    at, keep, x = load_block(x_ptr, mask_ptr, num_tokens, BLOCK)
    if PACKED:
        # tokens of no sequence stay 0
        keep &= (at >= tl.load(cu_seqlens_ptr)) & (at < tl.load(cu_seqlens_ptr + num_sequences))
    if ALONE:
        count, mean, square = moments_of(x, keep)
        scale = 1.0 / tl.sqrt_rn(square / tl.maximum(count, 1.0) + eps)
    else:
        mean = tl.load(moments_ptr)
        scale = tl.load(moments_ptr + 1)
    out = (x - mean) * scale
    if not SHIFT_MEAN:
        out += mean
    tl.store(out_ptr + at, tl.where(keep, out, 0.0), mask=at < num_tokens)


@triton.jit
def load_rewards(rewards_ptr, at, end):
    """Rewards in float64 and which of them are scored. float32 rewards add up exactly there, so equal ones equal their
    mean; in float32 its rounding would be divided by 1e-4."""
    r = tl.load(rewards_ptr + at, mask=at < end, other=float("nan")).to(tl.float64)
    # neither holds for a NaN
    scored = tl.abs(r) >= 0.0
    return tl.where(scored, r, 0.0), scored


@triton.jit
def members(rewards_ptr, ids_ptr, start, end, own_ids, group_size, HAS_IDS: tl.constexpr, OTHERS: tl.constexpr):
    """A stretch of rewards, and which of them are scored and in the group of each of this program's own."""
    at = start + tl.arange(0, OTHERS)
    r, scored = load_rewards(rewards_ptr, at, end)
    ids = at // group_size
    if HAS_IDS:
        ids = tl.load(ids_ptr + at, mask=at < end, other=0)
    return r[None, :], (ids[None, :] == own_ids[:, None]) & scored[None, :]


@triton.jit
def batch_deviation(rewards_ptr, num_rewards, OTHERS: tl.constexpr):
    """Standard deviation of all scored rewards, Bessel's."""
    count = tl.zeros([OTHERS], tl.float64)
    total = count
    square = count
    for start in range(0, num_rewards, OTHERS):
        r, scored = load_rewards(rewards_ptr, start + tl.arange(0, OTHERS), num_rewards)
        count += scored.to(tl.float64)
        total += r
    number = tl.sum(count, 0)
    mean = tl.sum(total, 0) / tl.maximum(number, 1.0)
    for start in range(0, num_rewards, OTHERS):
        r, scored = load_rewards(rewards_ptr, start + tl.arange(0, OTHERS), num_rewards)
        d = tl.where(scored, r - mean, 0.0)
        square += d * d
    return tl.sqrt(tl.sum(square, 0) / tl.maximum(number - 1.0, 1.0))


@triton.jit
def group_kernel(
    rewards_ptr,
    ids_ptr,
    out_ptr,
    num_rewards,
    group_size,
    HAS_IDS: tl.constexpr,
    SCALE: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    OWN: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """A program compares OWN rewards with all others, or with those that groups of a known size can hold."""
    first = tl.program_id(0) * OWN
    at = first + tl.arange(0, OWN)
    own, scored = load_rewards(rewards_ptr, at, num_rewards)
    if HAS_IDS:
        own_ids = tl.load(ids_ptr + at, mask=at < num_rewards, other=0)
        begin = 0
        end = num_rewards
    else:
        own_ids = at // group_size
        begin = first // group_size * group_size
        end = tl.minimum(((first + OWN - 1) // group_size + 1) * group_size, num_rewards)
    count = tl.zeros([OWN], tl.float64)
    total = count
    square = count
    for start in range(begin, end, OTHERS):
        r, member = members(rewards_ptr, ids_ptr, start, end, own_ids, group_size, HAS_IDS, OTHERS)
        count += tl.sum(member.to(tl.float64), 1)
        total += tl.sum(tl.where(member, r, 0.0), 1)
    mean = total / tl.maximum(count, 1.0)
    advantage = own - mean
    if LEAVE_ONE_OUT:
        advantage *= count / tl.maximum(count - 1.0, 1.0)
    if SCALE == "group":
        for start in range(begin, end, OTHERS):
            r, member = members(rewards_ptr, ids_ptr, start, end, own_ids, group_size, HAS_IDS, OTHERS)
            d = tl.where(member, r - mean[:, None], 0.0)
            square += tl.sum(d * d, 1)
        advantage /= tl.sqrt(square / tl.maximum(count - 1.0, 1.0)) + 1e-4
    elif SCALE == "batch":
        advantage /= batch_deviation(rewards_ptr, num_rewards, OTHERS) + 1e-4
    advantage = tl.where(scored & (count > 1.0), advantage, 0.0)
    tl.store(out_ptr + at, advantage.to(tl.float32), mask=at < num_rewards)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    return _gae(rewards, values, mask, bootstrap, None, gamma, lam)


def gae_packed(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    return _gae(rewards, values, mask, bootstrap, cu_seqlens, gamma, lam)


def _gae(rewards, values, mask, bootstrap, cu_seqlens, gamma, lam):
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    sequences, width, sizes = _sequences(mask, cu_seqlens)
    if rewards.numel():
        gae_kernel[(sequences,)](
            rewards,
            values,
            mask.view(torch.uint8),
            rewards if bootstrap is None else bootstrap,
            rewards if cu_seqlens is None else cu_seqlens,
            advantages,
            returns,
            width,
            gamma,
            lam,
            HAS_BOOTSTRAP=bootstrap is not None,
            PACKED=cu_seqlens is not None,
            **sizes,
            **OPTIONS,
        )
    return advantages, returns


def shaped_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    kl_coef: float,
    estimator: str,
    clip: float | None,
) -> Tensor:
    rewards = torch.empty_like(logprobs)
    sequences, width, sizes = _sequences(mask, cu_seqlens)
    if rewards.numel():
        shaped_rewards_kernel[(sequences,)](
            scores,
            logprobs,
            ref_logprobs,
            mask.view(torch.uint8),
            logprobs if cu_seqlens is None else cu_seqlens,
            rewards,
            width,
            kl_coef,
            float("inf") if clip is None else float(clip),
            ESTIMATOR=estimator,
            PACKED=cu_seqlens is not None,
            **sizes,
            **OPTIONS,
        )
    return rewards


def kl_shaped_gae(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    kl_coef: float,
    estimator: str,
    clip: float | None,
    gamma: float,
    lam: float,
    whiten: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = tuple(torch.empty_like(logprobs) for _ in range(4))
    if not logprobs.numel():
        return results
    sequences, width, sizes = _sequences(mask, cu_seqlens)
    partials, moments = logprobs.new_empty(3 * sequences + 2).split([3 * sequences, 2])
    kl_shaped_gae_kernel[(sequences,)](
        scores,
        logprobs,
        ref_logprobs,
        values,
        mask.view(torch.uint8),
        values if bootstrap is None else bootstrap,
        values if cu_seqlens is None else cu_seqlens,
        *results,
        partials,
        arrival_counter(logprobs.device) if whiten else partials,
        moments,
        width,
        kl_coef,
        float("inf") if clip is None else float(clip),
        gamma,
        lam,
        eps,
        ESTIMATOR=estimator,
        HAS_BOOTSTRAP=bootstrap is not None,
        WHITEN=whiten,
        PACKED=cu_seqlens is not None,
        LANES=LANES,
        **sizes,
        **OPTIONS,
    )
    if whiten:
        _apply_moments(results[0], mask, cu_seqlens, moments, results[0], True, eps)
    return results


def whiten(x: Tensor, mask: Tensor, shift_mean: bool, eps: float) -> Tensor:
    out = torch.empty_like(x)
    num_tokens = x.numel()
    if 0 < num_tokens <= SMALL:
        # at most two sizes, for the compiler's sake
        size, warps = (BLOCK, WARPS) if num_tokens <= BLOCK else (SMALL, SMALL_WARPS)
        options = {"SHIFT_MEAN": shift_mean, "ALONE": True, "PACKED": False, "BLOCK": size, "num_warps": warps}
        whiten_kernel[(1,)](x, mask.view(torch.uint8), x, x, out, num_tokens, 0, eps, **options, **OPTIONS)
    elif num_tokens:
        programs = triton.cdiv(num_tokens, BLOCK)
        partials, moments = x.new_empty(3 * programs + 2).split([3 * programs, 2])
        arguments = (x, mask.view(torch.uint8), partials, arrival_counter(x.device), moments, num_tokens, eps)
        moments_kernel[(programs,)](*arguments, LANES=LANES, BLOCK=BLOCK, num_warps=WARPS, **OPTIONS)
        _apply_moments(x, mask, None, moments, out, shift_mean, eps)
    return out


def group_advantages(rewards: Tensor, group_ids: Tensor | None, group_size: int, scale: str, baseline: str) -> Tensor:
    out = torch.empty_like(rewards)
    if len(rewards):
        group_kernel[(triton.cdiv(len(rewards), OWN),)](
            rewards,
            rewards if group_ids is None else group_ids,
            out,
            len(rewards),
            max(group_size, 1),
            HAS_IDS=group_ids is not None,
            SCALE=scale,
            LEAVE_ONE_OUT=baseline == "leave_one_out",
            OWN=OWN,
            OTHERS=OTHERS,
            num_warps=GROUP_WARPS,
            **OPTIONS,
        )
    return out


def _apply_moments(
    x: Tensor, mask: Tensor, cu_seqlens: Tensor | None, moments: Tensor, out: Tensor, shift_mean: bool, eps: float
) -> None:
    packed = cu_seqlens is not None
    bounds, sequences = (cu_seqlens, len(cu_seqlens) - 1) if packed else (x, 0)
    arguments = (x, mask.view(torch.uint8), moments, bounds, out, x.numel(), sequences, eps)
    options = {"SHIFT_MEAN": shift_mean, "ALONE": False, "PACKED": packed, "BLOCK": BLOCK, "num_warps": WARPS}
    whiten_kernel[(triton.cdiv(x.numel(), BLOCK),)](*arguments, **options, **OPTIONS)


def _sequences(mask: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, dict[str, int]]:
    """How many programs, how many tokens a row or everything packed has, and the launch options of a program that walks a sequence."""
    count, width = mask.shape if cu_seqlens is None else (len(cu_seqlens) - 1, len(mask))
    # one block for all packed sequences: chosen by their lengths, a sequence's bits would depend on its neighbours
    length = width if cu_seqlens is None else PACKED_BLOCK
    block = max(min(BLOCK, 32), min(triton.next_power_of_2(max(length, 1)), BLOCK))
    return count, width, {"BLOCK": block, "num_warps": max(1, min(SCAN_WARPS, block // 128))}
