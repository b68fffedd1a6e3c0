"""Rewards and advantages on drawn masks, lengths, strides, dtypes and edge values, against loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from rlhf_fast.kernels import gae, group_advantages, kl_shaped_gae, shaped_rewards, whiten
from tests.kernels.properties.problems import DTYPES, MASKS, NAN, Case

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
WHITEN_EDGES = (*MASKS, "equal entries", "large mean")
GROUP_EDGES = ("NaN rewards", "nothing scored", "equal rewards", "0 and 1")
ESTIMATORS = ("k1", "k2", "k3", "k3+", "abs")


def kl_estimate(d, estimator):
    """Of d = ref - logprob (Schulman 2020)."""
    k2, k3 = d**2 / 2, torch.expm1(d) - d
    return {"k1": -d, "k2": k2, "k3": k3, "k3+": k2 + (k3 - k2).detach(), "abs": d.abs()}[estimator]


def gae_loop(rewards, values, mask, sequences, gamma, lam, bootstrap=None):
    """The recursion of the paper over the unmasked tokens of each sequence, in the arrays' own precision."""
    r, v, keep = (x.detach().cpu().numpy() for x in (rewards, values, mask))
    advantages, returns = np.zeros_like(r), np.zeros_like(r)
    for i, sequence in enumerate(sequences):
        advantage, following = r.dtype.type(0), r.dtype.type(0) if bootstrap is None else bootstrap[i].cpu().numpy()
        for t in reversed(range(len(r[sequence]))):
            if keep[sequence][t]:
                advantage = r[sequence][t] + gamma * following - v[sequence][t] + gamma * lam * advantage
                following = v[sequence][t]
                advantages[sequence][t], returns[sequence][t] = advantage, advantage + following
    return torch.from_numpy(advantages).to(rewards.device), torch.from_numpy(returns).to(rewards.device)


def shaped(scores, logprobs, ref_logprobs, mask, sequences, kl_coef, estimator, clip):
    """-kl_coef * KL, plus the clipped score at the last unmasked token of each sequence; and the KL."""
    d = torch.where(mask, ref_logprobs, 0.0) - torch.where(mask, logprobs, 0.0)
    kl = torch.where(mask, kl_estimate(d, estimator), 0.0)
    place = torch.zeros(mask.shape, dtype=torch.long, device=mask.device)  # 1 + the sequence whose score lands here
    for i, sequence in enumerate(sequences):
        unmasked = mask[sequence].nonzero()[:, 0]
        if len(unmasked):
            place[sequence][unmasked[-1]] = i + 1
    bounded = scores if clip is None else scores.clamp(-clip, clip)
    return torch.cat([scores.new_zeros(1), bounded])[place] - kl_coef * kl, kl


def whitened(x, mask, shift_mean=True, eps=1e-8):
    kept = x[mask]
    if not len(kept):
        return 0 * torch.where(mask, x, 0.0)
    mean = kept.mean()
    z = (torch.where(mask, x, 0.0) - mean) / ((kept - mean).square().mean() + eps).sqrt()
    return torch.where(mask, z if shift_mean else z + mean, 0.0)


def discounting(case):
    gamma, lam = case.pick(1.0, 0.9, 0.0), case.pick(0.95, 1.0, 0.0)
    case.note(gamma=gamma, lam=lam)
    return gamma, lam


@st.composite
def gae_problems(draw, device):
    case = Case(draw, device, MASKS)
    # 150 tokens are more than a tile of the CPU kernel, and several blocks of the Triton scan
    mask, cu_seqlens, sequences = case.tokens(max_length=case.pick(9, 40, 150))
    (gamma, lam), dtype = discounting(case), case.pick(*DTYPES)
    inputs = {name: case.per_token(case.normal(*mask.shape), mask, dtype) for name in ("rewards", "values")}
    if case.pick(False, True):
        inputs["bootstrap"] = case.normal(len(sequences)).to(dtype).to(device)
    case.note(dtype=dtype, bootstrap="bootstrap" in inputs)

    def call(rewards, values, bootstrap=None):
        return gae(rewards, values, mask, gamma, lam, bootstrap=bootstrap, cu_seqlens=cu_seqlens)

    def formula(rewards, values, bootstrap=None):
        return gae_loop(rewards, values, mask, sequences, gamma, lam, bootstrap)

    # rewards and values up to about 3 are added and subtracted at each token
    return case.problem(call, formula, inputs, rounded=3.0)


def test_gae(explore):
    explore(gae_problems, *MASKS, "empty sequence", "no tokens")


def shaping(case, mask, sequences):
    """Scores and log-probabilities, and the options of shaped_rewards."""
    dtype, gap = case.pick(*DTYPES), case.pick(0.1, 0.0, 3.0)
    policy = case.normal(*mask.shape) - 2
    inputs = {
        "scores": (3 * case.normal(len(sequences))).to(dtype).to(case.device),
        "logprobs": case.per_token(policy, mask, dtype),
        "ref_logprobs": case.per_token(policy + gap * case.normal(*mask.shape), mask, dtype),
    }
    options = {"kl_coef": case.pick(0.1, 0.0, 2.0), "estimator": case.pick(*ESTIMATORS), "clip": case.pick(None, 2.0)}
    case.note(dtype=dtype, estimator=options["estimator"], clip=options["clip"])
    return inputs, options


@st.composite
def shaped_problems(draw, device):
    case = Case(draw, device, MASKS)
    mask, cu_seqlens, sequences = case.tokens()
    inputs, options = shaping(case, mask, sequences)

    def call(scores, logprobs, ref_logprobs):
        return (shaped_rewards(scores, logprobs, ref_logprobs, mask, cu_seqlens=cu_seqlens, **options),)

    def formula(scores, logprobs, ref_logprobs):
        return (shaped(scores, logprobs, ref_logprobs, mask, sequences, **options)[0],)

    # without a gradient to make, a kernel may run
    return case.problem(call, formula, inputs, list(inputs) if case.pick(False, True) else (), rounded=2.0)


def test_shaped_rewards(explore):
    explore(shaped_problems, *MASKS, "empty sequence")


@st.composite
def kl_shaped_problems(draw, device):
    case = Case(draw, device, MASKS)
    mask, cu_seqlens, sequences = case.tokens(max_length=case.pick(9, 40))
    inputs, options = shaping(case, mask, sequences)
    (gamma, lam), whiten_them = discounting(case), case.pick(True, False)
    inputs["values"] = case.per_token(case.normal(*mask.shape), mask, case.pick(*DTYPES))
    if case.pick(False, True):
        inputs["bootstrap"] = case.normal(len(sequences)).to(device)
    case.note(whiten=whiten_them, bootstrap="bootstrap" in inputs)

    def call(**tensors):
        bound = {"mask": mask, "gamma": gamma, "lam": lam, "whiten": whiten_them, "cu_seqlens": cu_seqlens}
        return kl_shaped_gae(**tensors, **bound, **options)

    def formula(scores, logprobs, ref_logprobs, values, bootstrap=None):
        rewards, kl = shaped(scores, logprobs, ref_logprobs, mask, sequences, **options)
        advantages, returns = gae_loop(rewards, values, mask, sequences, gamma, lam, bootstrap)
        return whitened(advantages, mask) if whiten_them else advantages, returns, rewards, kl

    lone = whiten_them and int(mask.sum()) == 1  # its deviation from its own mean is 0 in any precision
    case.edges |= {"whitens one token"} if lone else set()
    return case.problem(call, formula, inputs, rounded=8.0)


def test_kl_shaped_gae(explore):
    explore(kl_shaped_problems, *MASKS, "empty sequence")


@st.composite
def whiten_problems(draw, device):
    case = Case(draw, device, WHITEN_EDGES)
    mask, _, _ = case.tokens()
    shift_mean, eps, dtype = case.pick(True, False), case.pick(1e-8, 1e-2), case.pick(*DTYPES)
    x = case.normal(*mask.shape)
    if "equal entries" in case.edges:
        x[...] = 1.5
    elif "large mean" in case.edges:
        x += 100
    case.note(dtype=dtype, shift_mean=shift_mean)
    inputs = {"x": case.per_token(x, mask, dtype)}
    kept = inputs["x"][mask].double()
    # subtracting the mean leaves the rounding of the entries, in units of their spread
    spread = (kept.var(correction=0) + eps).sqrt().item() if len(kept) else 1.0
    largest = kept.abs().max().item() if len(kept) else 0.0

    def call(x):
        return (whiten(x, mask, shift_mean=shift_mean, eps=eps),)

    def formula(x):
        return (whitened(x, mask, shift_mean, eps),)

    rounded = 0.0 if "equal entries" in case.edges else largest / spread * max(1.0, 1 / spread)
    # without a gradient to make, a kernel may run
    return case.problem(call, formula, inputs, ["x"] if case.pick(False, True) else (), rounded=rounded)


def test_whiten(explore):
    explore(whiten_problems, *WHITEN_EDGES)


def group_loop(rewards, ids, scale, baseline):
    """Group by group, with the statistics of the scored rewards."""
    scored = [i for i, r in enumerate(rewards.tolist()) if not math.isnan(r)]
    out = torch.zeros_like(rewards)
    for i in scored:
        group = [j for j in scored if ids[j] == ids[i]]
        if len(group) < 2:
            continue
        others = [j for j in group if j != i] if baseline == "leave_one_out" else group
        spread = {"group": rewards[group].std(), "batch": rewards[scored].std(), "none": 1 - 1e-4}[scale] + 1e-4
        out[i] = (rewards[i] - rewards[others].mean()) / spread
    return out


@st.composite
def group_problems(draw, device):
    case = Case(draw, device, GROUP_EDGES)
    groups, size, by_id = case.pick(2, 1, 3, 5, 0), case.pick(4, 1, 2, 3, 8), case.pick(False, True)
    options = {"scale": case.pick("group", "batch", "none"), "baseline": case.pick("mean", "leave_one_out")}
    dtype, count = case.pick(*DTYPES), groups * size
    rewards = case.normal(count)
    if "equal rewards" in case.edges:
        rewards[:] = 0.75
    elif "0 and 1" in case.edges:
        rewards = (rewards > 0).float()
    if "NaN rewards" in case.edges:
        rewards[case.flips(count, share=0.4)] = NAN
    if "nothing scored" in case.edges:
        rewards[:] = NAN
    ids = torch.arange(count) // size
    if by_id:
        ids = torch.tensor([-5, 10**12, 3, 77, 0])[ids][torch.randperm(count, generator=case.generator)]
    case.note(dtype=dtype, groups="by id" if by_id else "by size", size=size, **options)
    arguments = {"group_ids": ids.to(device)} if by_id else {"group_size": size}

    def call(rewards):
        return (group_advantages(rewards, **arguments, **options),)

    def formula(rewards):
        return (group_loop(rewards, ids.tolist(), **options),)

    return case.problem(call, formula, {"rewards": rewards.to(dtype).to(device)}, rounded=4.0)


def test_group_advantages(explore):
    explore(group_problems, *GROUP_EDGES)
