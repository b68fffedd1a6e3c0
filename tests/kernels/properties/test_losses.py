"""The losses on drawn masks, strides, dtypes, options and edge values, against formulas in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from torch.nn.functional import softplus

from rlhf_fast.kernels import (
    dpo_loss,
    kl_penalty,
    pairwise_reward_loss,
    policy_loss,
    ranked_reward_loss,
    use_backend,
    value_loss,
)
from tests.kernels.properties.problems import DTYPES, LAYOUTS, MASKS, NAN, Case, laid_out
from tests.kernels.properties.test_advantages import ESTIMATORS, kl_estimate

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
PAIR_EDGES = ("NaN pair", "hopeless pair", "equal pair")
RANKED_EDGES = ("nothing unmasked", "far apart")
VALUE_EDGES = (*MASKS, "unchanged values")
POLICY_EDGES = (*MASKS, "huge ratio", "on policy")
KL_EDGES = ("nearly equal", "far apart", "NaN", "broadcast reference")


def largest(*tensors):
    """The largest finite magnitude, 0 if there is none."""
    finite = [x.double()[x.isfinite()].abs() for x in tensors if x is not None]
    return max([x.max().item() for x in finite if x.numel()], default=0.0)


@st.composite
def kl_problems(draw, device):
    case = Case(draw, device, KL_EDGES)
    shape, dtype, estimator = case.pick((3, 5), (0,), (1,), (7,), (2, 3, 4)), case.pick(*DTYPES), case.pick(*ESTIMATORS)
    gap = 1e-3 if "nearly equal" in case.edges else 20.0 if "far apart" in case.edges else 0.5
    logprobs = case.normal(*shape) - 2
    ref = logprobs[:1] if "broadcast reference" in case.edges else logprobs
    ref = ref + gap * case.normal(*ref.shape).clamp(-3, 3)
    if "NaN" in case.edges:
        logprobs[-1:] = NAN
    layout = case.pick(*LAYOUTS)
    case.note(dtype=dtype, estimator=estimator, stride=layout)
    inputs = {"logprobs": laid_out(logprobs.to(dtype).to(device), layout), "ref_logprobs": ref.to(dtype).to(device)}

    def call(logprobs, ref_logprobs):
        return (kl_penalty(logprobs, ref_logprobs, estimator),)

    def formula(logprobs, ref_logprobs):
        return (kl_estimate(ref_logprobs - logprobs, estimator),)

    # exp(d) - 1 - d in one expression or in two: the difference of numbers of the size of d
    return case.problem(call, formula, inputs, list(inputs), rounded=min(3 * gap, 1.0))


def test_kl_penalty(explore):
    explore(kl_problems, *KL_EDGES)


def aggregate(x, mask, sequences, how, denominator):
    """Sum and divide, sequence by sequence; ``x`` is 0 where masked."""
    counts = [int(mask[s].sum()) for s in sequences]
    sums = [x[s].sum() / n for s, n in zip(sequences, counts) if n] if how == "sequence" else [x.sum()]
    local = {"sequence": sum(n > 0 for n in counts), "token": sum(counts), "constant": mask.numel()}[how]
    return sum(sums, 0 * x.sum()) / (max(local, 1) if denominator is None else denominator)


def mean_over(x, mask):
    return x[mask].mean() if mask.any() else x.new_zeros(())


def aggregation(case, cu_seqlens):
    """How to reduce, and the denominator: none, a number or a tensor; packed constants need one."""
    how, size = case.pick("token", "sequence", "constant"), case.pick(None, 6.0, "tensor")
    size = 20.0 if size is None and how == "constant" and cu_seqlens is not None else size
    case.note(aggregate=how, denominator=size)
    return how, torch.tensor(11.0, device=case.device) if size == "tensor" else size


class Update:
    """The tokens and options of one policy update."""

    def __init__(self, case: Case):
        self.case = case
        self.mask, self.cu_seqlens, self.sequences = case.tokens()
        self.kind = case.pick("clip", "cispo", "reinforce")
        self.level = "token" if self.kind == "reinforce" else case.pick("token", "sequence", "sequence_token")
        self.low, self.high = case.pick(0.2, 0.05), case.pick(None, 0.4) if self.kind == "clip" else case.pick(1.2, 3.0)
        self.dual = case.pick(None, 1.5) if self.kind == "clip" else None
        self.estimator, self.kl_coef = case.pick("k3", "k2", "k3+", "abs"), case.pick(0.0, 0.3)
        self.is_clip, self.entropy_coef = case.pick(None, 1.1, 2.0), case.pick(0.0, 0.2)
        self.aggregate, self.denominator = aggregation(case, self.cu_seqlens)
        case.note(kind=self.kind, level=self.level, dual=self.dual, kl=self.estimator if self.kl_coef else None)
        self.inputs = self.tensors(case.pick(*DTYPES))
        self.is_clip = self.is_clip if "rollout_logprobs" in self.inputs else None
        case.note(is_clip=self.is_clip)

    def tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        case, mask = self.case, self.mask
        old = case.normal(*mask.shape) - 2
        gap = case.pick(0.3, 0.3, 0.0, 0.02)
        values = {"logprobs": old + gap * case.normal(*mask.shape), "old_logprobs": old}
        if "huge ratio" in case.edges:
            # e^40 is far beyond any clip, and finite
            values["logprobs"].view(-1)[::3] += case.pick(40.0, -40.0)
        if "on policy" in case.edges:
            del values["old_logprobs"]
        if self.kl_coef or case.pick(True, False):
            values["ref_logprobs"] = old + 0.5 * case.normal(*mask.shape)
        if case.pick(True, False):
            values["rollout_logprobs"] = old + 0.3 * case.normal(*mask.shape)
        if self.entropy_coef or case.pick(True, False):
            values["entropy"] = case.normal(*mask.shape).abs()
        inputs = {name: case.per_token(x, mask, dtype) for name, x in values.items()}
        if case.pick(True, False):
            inputs["advantages"] = case.per_token(case.normal(*mask.shape), mask, dtype)
        else:
            inputs["advantages"] = case.normal(len(self.sequences)).to(dtype).to(case.device)
        per_token = inputs["advantages"].shape == mask.shape
        case.note(dtype=dtype, advantages="per token" if per_token else "per sequence")
        return inputs

    def fused(self, logprobs, advantages, old_logprobs=None, **terms):
        loss, metrics = policy_loss(
            logprobs, old_logprobs, advantages, self.mask, kind=self.kind, clip_low=self.low, clip_high=self.high,
            dual_clip=self.dual, level=self.level, kl_coef=self.kl_coef, kl_estimator=self.estimator,
            is_clip=self.is_clip, entropy_coef=self.entropy_coef, aggregate=self.aggregate,
            denominator=self.denominator, cu_seqlens=self.cu_seqlens, **terms,
        )  # fmt: skip
        assert not any(metric.requires_grad for metric in metrics.values())
        return loss, *(metrics[name] for name in sorted(metrics))

    def largest_rounded(self):
        """Terms of the size of A * log p or KL are added up, with either sign."""
        kept = [x[self.mask] if x.shape == self.mask.shape else x for x in self.inputs.values()]
        if self.level == "token" or "old_logprobs" not in self.inputs:
            return 1 + largest(*kept)
        # the rounding of a mean log-ratio is multiplied by the ratio
        logprobs, old = (torch.where(self.mask, self.inputs[x].double(), 0.0) for x in ("logprobs", "old_logprobs"))
        return (1 + largest(*kept)) * max(1.0, largest(self.log_ratios(logprobs - old).exp()))

    def per_token(self, x):
        """One number per sequence, as one per token."""
        out = torch.zeros(self.mask.shape, dtype=x.dtype, device=x.device)
        for i, s in enumerate(self.sequences):
            where = torch.zeros_like(self.mask)
            where[s] = True
            out = torch.where(where, x[i], out)
        return out

    def log_ratios(self, difference):
        """At the level asked for: each token's own, or the mean of its sequence."""
        if self.level == "token" or not self.sequences:
            return difference
        counts = [max(int(self.mask[s].sum()), 1) for s in self.sequences]
        mean = self.per_token(torch.stack([difference[s].sum() / n for s, n in zip(self.sequences, counts)]))
        return mean if self.level == "sequence" else mean.detach() + difference - difference.detach()

    def policy_terms(self, logprobs, ratio, advantages):
        """The loss of each token, and where the ratio is clipped from below and from above."""
        good, bad = advantages > 0, advantages < 0
        never = torch.zeros_like(good)
        if self.kind == "reinforce":
            return -advantages * logprobs, never, never
        if self.kind == "cispo":
            return -ratio.clamp(max=self.high).detach() * advantages * logprobs, never, good & (ratio > self.high)
        high = self.low if self.high is None else self.high
        low, above = bad & (ratio < 1 - self.low), good & (ratio > 1 + high)
        loss = -ratio * advantages
        loss = torch.where(low, -(1 - self.low) * advantages, torch.where(above, -(1 + high) * advantages, loss))
        if self.dual is not None:
            loss = torch.where(bad & (ratio > self.dual), -self.dual * advantages, loss)
        return loss, low, above

    def formula(self, advantages, **tokens):
        mask = self.mask
        tokens = {name: torch.where(mask, x, 0.0) for name, x in tokens.items()}
        advantages = advantages if advantages.shape == mask.shape else self.per_token(advantages)
        advantages = torch.where(mask, advantages, 0.0)
        logprobs = tokens["logprobs"]
        old = tokens.get("old_logprobs", logprobs.detach())
        difference = logprobs - old
        ratio = self.log_ratios(difference).exp()
        loss, low, high = self.policy_terms(logprobs, ratio, advantages)
        d = difference.detach()
        metrics = {
            "approx_kl": mean_over(torch.expm1(d) - d, mask),
            "clip_high": mean_over(high.to(d.dtype), mask),
            "clip_low": mean_over(low.to(d.dtype), mask),
            "clip_region": mean_over((low | high).to(d.dtype), mask),
            "ratio_max": ratio.detach()[mask].max() if mask.any() else d.new_zeros(()),
            "ratio_mean": mean_over(ratio.detach(), mask),
        }
        if "rollout_logprobs" in tokens:
            gap = (old - tokens["rollout_logprobs"]).detach()
            loss = loss if self.is_clip is None else loss * gap.exp().clamp(max=self.is_clip)
            metrics["is_ratio_max"] = gap.exp()[mask].max() if mask.any() else d.new_zeros(())
            metrics["is_ratio_mean"], metrics["rollout_gap"] = mean_over(gap.exp(), mask), mean_over(gap.abs(), mask)
        if "ref_logprobs" in tokens:
            kl = kl_estimate(tokens["ref_logprobs"] - logprobs, self.estimator)
            loss, metrics["kl"] = loss + self.kl_coef * kl, mean_over(kl.detach(), mask)
        if "entropy" in tokens:
            loss = loss - self.entropy_coef * tokens["entropy"]
            metrics["entropy"] = mean_over(tokens["entropy"].detach(), mask)
        total = aggregate(torch.where(mask, loss, 0.0), mask, self.sequences, self.aggregate, self.denominator)
        return total, *(metrics[name] for name in sorted(metrics))


@st.composite
def policy_problems(draw, device):
    case = Case(draw, device, POLICY_EDGES)
    update = Update(case)
    trained = ["logprobs"] + (["entropy"] if "entropy" in update.inputs and update.entropy_coef else [])
    return case.problem(update.fused, update.formula, update.inputs, trained, rounded=update.largest_rounded())


def test_policy_loss(explore):
    explore(policy_problems, *POLICY_EDGES)


@st.composite
def value_problems(draw, device):
    case = Case(draw, device, VALUE_EDGES)
    mask, cu_seqlens, sequences = case.tokens()
    clip, dtype = case.pick(0.2, None, 1.0), case.pick(*DTYPES)
    how, denominator = aggregation(case, cu_seqlens)
    old = case.normal(*mask.shape)
    moved = 0.0 if "unchanged values" in case.edges else case.pick(0.3, 0.05)
    values = {"values": old + moved * case.normal(*mask.shape), "returns": old + case.normal(*mask.shape)}
    if clip is not None or case.pick(True, False):
        values["old_values"] = old
    inputs = {name: case.per_token(x, mask, dtype) for name, x in values.items()}
    case.note(dtype=dtype, clip=clip)

    def call(values, returns, old_values=None):
        options = {"clip": clip, "aggregate": how, "denominator": denominator, "cu_seqlens": cu_seqlens}
        loss, metrics = value_loss(values, old_values, returns, mask, **options)
        return loss, *(metrics[name] for name in sorted(metrics))

    def formula(values, returns, old_values=None):
        v, r = torch.where(mask, values, 0.0), torch.where(mask, returns, 0.0)
        error, share = (v - r).square(), torch.zeros_like(v)
        if clip is not None:
            old = torch.where(mask, old_values, 0.0)
            bound = torch.where(v > old, old + clip, old - clip)
            # the clipped error counts where the value left the range, and only if it is the larger one
            active = ((v - old).abs() > clip) & ((bound - r).square() > error)
            error, share = torch.where(active, (bound - r).square(), error), active.to(v.dtype)
        loss = aggregate(torch.where(mask, error / 2, 0.0), mask, sequences, how, denominator)
        return loss, mean_over(share, mask), mean_over(r.detach(), mask), mean_over(v.detach(), mask)

    return case.problem(call, formula, inputs, ["values"], rounded=4.0)


def test_value_loss(explore):
    explore(value_problems, *VALUE_EDGES)


@pytest.mark.parametrize("order", ["reference", "cpu,reference", "triton,reference"])
def test_values_inside_the_range_are_never_counted_as_clipped(order):
    """old + (value - old) may miss the value by a rounding, which is no clipping: nothing is 100 away here."""
    generator = torch.Generator().manual_seed(0)
    values, old, returns = torch.randn(3, 2000, generator=generator)
    mask = torch.ones(2000, dtype=torch.bool)
    device = "cuda" if order.startswith("triton") and torch.cuda.is_available() else "cpu"
    with use_backend(order):
        _, metrics = value_loss(*(x.to(device) for x in (values, old, returns, mask)), clip=100.0)
    assert metrics["clip_fraction"].item() == 0


def preference(kind, w, l, beta, eps):
    """The published losses, of the log-ratios of the chosen (w) and the rejected (l) response."""
    d = beta * (w - l)
    if kind == "sigmoid":
        return (1 - eps) * softplus(-d) + eps * softplus(d)
    if kind == "robust":
        return ((1 - eps) * softplus(-d) - eps * softplus(d)) / (1 - 2 * eps)
    if kind == "exo_pair":
        log_shares = torch.log(torch.tensor([1 - eps, eps], dtype=torch.float64)).to(d.device)
        return d.sigmoid() * (-softplus(-d) - log_shares[0].item()) + (-d).sigmoid() * (
            -softplus(d) - log_shares[1].item()
        )
    return {
        "ipo": lambda: (w - l - 0.5 / beta) ** 2,
        "hinge": lambda: torch.where(d < 1, 1 - d, 0.0),
        "nca_pair": lambda: softplus(-beta * w) + 0.5 * softplus(beta * w) + 0.5 * softplus(beta * l),
        "sppo_hard": lambda: (w - 0.5 / beta) ** 2 + (l + 0.5 / beta) ** 2,
        "apo_zero": lambda: 1 - (beta * w).sigmoid() + (beta * l).sigmoid(),
        "apo_down": lambda: (beta * w).sigmoid() + 1 - d.sigmoid(),
    }[kind]()


PREFERENCES = ("sigmoid", "ipo", "hinge", "robust", "exo_pair", "nca_pair", "sppo_hard", "apo_zero", "apo_down")


@st.composite
def dpo_problems(draw, device):
    case = Case(draw, device, PAIR_EDGES)
    count, kind, dtype = case.pick(3, 1, 0, 8, 33), case.pick(*PREFERENCES), case.pick(*DTYPES)
    beta = case.pick(0.1, 0.5, 1.0)
    eps = {"exo_pair": 0.01}.get(kind, case.pick(0.0, 0.1, 0.3) if kind in ("sigmoid", "robust") else 0.0)
    ref_chosen, ref_rejected = case.normal(2, count) - 5
    chosen, rejected = ref_chosen + case.normal(count), ref_rejected + case.normal(count)
    if "equal pair" in case.edges:
        chosen, rejected = ref_chosen.clone(), ref_rejected.clone()
    if "hopeless pair" in case.edges:
        chosen[::2] -= 300
    # a hinge's slope at NaN is nothing to agree on: autograd's relu and clamp differ
    if "NaN pair" in case.edges and kind != "hinge":
        rejected[-1:] = NAN
    layout = case.pick("contiguous", "every second", "sliced")
    case.note(kind=kind, dtype=dtype, beta=beta, smoothing=eps, stride=layout)
    named = {"chosen": chosen, "rejected": rejected, "ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
    inputs = {name: laid_out(x.to(dtype).to(device), layout) for name, x in named.items()}

    def call(**tensors):
        return dpo_loss(**tensors, beta=beta, kind=kind, label_smoothing=eps)

    def formula(chosen, rejected, ref_chosen, ref_rejected):
        w, l = chosen - ref_chosen, rejected - ref_rejected
        return preference(kind, w, l, beta, eps), beta * w.detach(), beta * l.detach()

    # sums of numbers of the size of 1 / beta and of the log-probabilities, squared by some kinds
    slope = 1 / beta + largest(*inputs.values()) if kind in ("ipo", "sppo_hard") else 1.0
    return case.problem(call, formula, inputs, ["chosen", "rejected"], rounded=slope)


def test_dpo_loss(explore):
    explore(dpo_problems, *PAIR_EDGES)


@st.composite
def pairwise_problems(draw, device):
    case = Case(draw, device, PAIR_EDGES)
    count, center, dtype = case.pick(3, 1, 0, 8, 33), case.pick(0.0, 0.01, 1.0), case.pick(*DTYPES)
    chosen, rejected = case.normal(2, count)
    if "equal pair" in case.edges:
        rejected = chosen.clone()
    if "hopeless pair" in case.edges:
        chosen[::2] -= 200
    if "NaN pair" in case.edges:
        rejected[-1:] = NAN
    layout = case.pick("contiguous", "every second", "sliced")
    named = {"chosen": chosen, "rejected": rejected}
    if case.pick(False, True):
        named["margin"] = case.normal(count).abs()
    case.note(dtype=dtype, center=center, margin="margin" in named, stride=layout)
    inputs = {name: laid_out(x.to(dtype).to(device), layout) for name, x in named.items()}

    def call(chosen, rejected, margin=None):
        return (pairwise_reward_loss(chosen, rejected, margin=margin, center=center),)

    def formula(chosen, rejected, margin=0.0):
        return (softplus(-(chosen - rejected - margin)) + center * (chosen + rejected) ** 2,)

    return case.problem(call, formula, inputs, ["chosen", "rejected"], rounded=1.0)


def test_pairwise_reward_loss(explore):
    explore(pairwise_problems, *PAIR_EDGES)


@st.composite
def ranked_problems(draw, device):
    case = Case(draw, device, RANKED_EDGES)
    count, places, dtype = case.pick(3, 1, 0, 5), case.pick(4, 1, 2, 3, 7, 0), case.pick(*DTYPES)
    mask = case.flips(count, places, share=0.0 if "nothing unmasked" in case.edges else 0.8).to(device)
    scores = case.normal(count, places, scale=50.0 if "far apart" in case.edges else 1.0)
    case.note(dtype=dtype, places=places)
    inputs = {"scores": case.per_token(scores, mask, dtype)}

    def call(scores):
        return (ranked_reward_loss(scores, mask),)

    def formula(scores):
        losses = [0 * torch.where(m, s, 0.0).sum() for s, m in zip(scores, mask)]
        for i, (row, unmasked) in enumerate(zip(scores, mask)):
            kept = row[unmasked]
            for k in range(len(kept)):
                losses[i] = losses[i] + kept[k:].logsumexp(0) - kept[k]
        return (torch.stack(losses) if losses else 0 * scores.sum(-1),)

    return case.problem(call, formula, inputs, ["scores"], rounded=1 + largest(inputs["scores"][mask]))


def test_ranked_reward_loss(explore):
    explore(ranked_problems, *RANKED_EDGES)
