"""Policy and value losses against a loop written here: sequence by sequence, token by token, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_fast.kernels import policy_loss, value_loss

FAMILY = "policy"
pytestmark = pytest.mark.usefixtures("everywhere")

NAN = float("nan")
LENGTHS = [4, 0, 3, 5]  # packed lengths; the sequence of 3 has no unmasked token


def loop(batch, *, kind, low, high, dual=None, level="token", kl_coef=0.0, estimator="k3", is_clip=None, aggregate):
    """Return the loss; ``batch`` is a list of sequences, each a dict of (T,) tensors and one advantage per token."""
    sequences, tokens = [], []
    for sequence in batch:
        kept = [t for t in range(len(sequence["mask"])) if sequence["mask"][t]]
        difference = {t: sequence["logprobs"][t] - sequence["old"][t] for t in kept}
        mean = sum(difference.values()) / max(len(kept), 1)
        losses = []
        for t in kept:
            log_ratio = difference[t]
            if level == "sequence":
                log_ratio = mean
            elif level == "sequence_token":
                log_ratio = mean.detach() + sequence["logprobs"][t] - sequence["logprobs"][t].detach()
            ratio, advantage = log_ratio.exp(), float(sequence["advantages"][t])
            if kind == "clip":
                clipped = min(max(ratio, 1 - low), 1 + high)
                loss = -min(ratio * advantage, clipped * advantage)
                if dual is not None and advantage < 0:
                    loss = min(loss, torch.tensor(-dual * advantage, dtype=torch.float64))
            elif kind == "cispo":
                loss = -min(float(ratio.detach()), high) * advantage * sequence["logprobs"][t]
            elif kind == "reinforce":
                loss = -advantage * sequence["logprobs"][t]
            if is_clip is not None:
                loss = loss * min(math.exp(float(sequence["old"][t] - sequence["rollout"][t])), is_clip)
            d = sequence["ref"][t] - sequence["logprobs"][t]
            loss = loss + kl_coef * {"k2": d**2 / 2, "k3": d.exp() - d - 1, "abs": abs(d)}[estimator]
            losses.append(loss)
        tokens += losses
        if losses:
            sequences.append(sum(losses) / len(losses))
    if aggregate == "sequence":
        return sum(sequences) / len(sequences)
    return sum(tokens) / (len(tokens) if aggregate == "token" else 20.0)


def problem(dtype=torch.float32, seed=0):
    """Packed tensors with NaN where masked, advantages per sequence, boundaries."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(LENGTHS)
    logprobs, old, ref, rollout = (torch.randn(4, n, generator=generator, dtype=torch.float64) * 0.4 - 2).to(dtype)
    mask = torch.rand(n, generator=generator) < 0.8
    mask[4:7] = False
    mask[[1, 9]] = True
    for x in (logprobs, old, ref, rollout):
        x[~mask] = NAN
    advantages = torch.tensor([1.3, 0.0, -2.0, -0.7], dtype=dtype)
    return logprobs, old, ref, rollout, mask, advantages, torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)


def pad(x, value):
    """Packed (N,) to (B, T)."""
    return torch.stack(
        [torch.nn.functional.pad(part, (0, max(LENGTHS) - len(part)), value=value) for part in x.split(LENGTHS)]
    )


CASES = [
    {"kind": "clip", "low": 0.2, "high": 0.2},
    {"kind": "clip", "low": 0.1, "high": 0.4, "dual": 1.2, "kl_coef": 0.3},
    {"kind": "clip", "low": 0.2, "high": 0.3, "level": "sequence", "kl_coef": 0.2, "estimator": "k2"},
    {"kind": "clip", "low": 0.02, "high": 0.03, "level": "sequence_token"},
    {"kind": "clip", "low": 0.2, "high": 0.2, "is_clip": 1.1, "kl_coef": 0.3, "estimator": "abs"},
    {"kind": "cispo", "low": 0.2, "high": 1.2, "kl_coef": 0.1},
    {"kind": "cispo", "low": 0.2, "high": 1.05, "level": "sequence", "is_clip": 2.0},
    {"kind": "reinforce", "low": 0.2, "high": 0.2, "kl_coef": 0.5, "is_clip": 1.0},
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['kind']}-{c.get('level', 'token')}-{len(c)}")
@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_policy_loss_matches_the_loop(case, aggregate, layout):
    logprobs, old, ref, rollout, mask, advantages, cu_seqlens = problem()
    x = logprobs.double().requires_grad_()
    names = ("logprobs", "old", "ref", "rollout", "mask", "advantages")
    per_token = advantages.repeat_interleave(torch.tensor(LENGTHS))
    parts = (y.split(LENGTHS) for y in (x, old.double(), ref.double(), rollout.double(), mask, per_token.double()))
    expected = loop([dict(zip(names, rows)) for rows in zip(*parts)], aggregate=aggregate, **case)
    (exact,) = torch.autograd.grad(expected, x)

    leaf = logprobs.clone().requires_grad_()
    tensors = [leaf, old, ref, rollout]
    shape = {"cu_seqlens": cu_seqlens}
    if layout == "padded":
        tensors, mask, shape = [pad(t, NAN) for t in tensors], pad(mask, False), {}
    loss, _ = policy_loss(
        tensors[0],
        tensors[1],
        advantages,
        mask,
        kind=case["kind"],
        clip_low=case["low"],
        clip_high=case["high"],
        dual_clip=case.get("dual"),
        level=case.get("level", "token"),
        ref_logprobs=tensors[2],
        kl_coef=case.get("kl_coef", 0.0),
        kl_estimator=case.get("estimator", "k3"),
        rollout_logprobs=tensors[3],
        is_clip=case.get("is_clip"),
        aggregate=aggregate,
        denominator=20.0 if aggregate == "constant" else None,
        **shape,
    )
    loss.backward()
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad.double(), exact, rtol=1e-5, atol=1e-6)


def test_ppo_by_hand():
    """Ratios 1.5 and 0.5, clips 0.8 and 1.2. A = 2: min(3, 2.4) = 2.4 and min(1, 1.6) = 1; A = -2: -3 and -1.6."""
    logprobs = torch.tensor([[1.5, 0.5], [1.5, 0.5]]).log().requires_grad_()
    old, mask = torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool)
    loss, metrics = policy_loss(logprobs, old, torch.tensor([2.0, -2.0]), mask)
    loss.backward()
    assert loss.item() == pytest.approx(-(2.4 + 1 - 3 - 1.6) / 4)
    # clipped tokens have no gradient, the others -A * ratio / 4
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, -0.25], [0.75, 0.0]]))
    approx_kl = 2 * (0.5 - math.log(1.5) + -0.5 - math.log(0.5)) / 4
    expected = {
        "clip_low": 0.25,
        "clip_high": 0.25,
        "clip_region": 0.5,
        "approx_kl": approx_kl,
        "ratio_mean": 1.0,
        "ratio_max": 1.5,
    }
    assert {name: metric.item() for name, metric in metrics.items()} == pytest.approx(expected, rel=1e-5)


def test_dual_clip_bounds_the_loss_of_bad_actions():
    """Ratio 9, A = -1: 9, but with dual_clip 3 only 3 and no gradient; A = 1 is not touched by it."""
    logprobs = torch.full((2, 1), math.log(9.0), requires_grad=True)
    advantages, mask = torch.tensor([-1.0, 1.0]), torch.ones(2, 1, dtype=torch.bool)
    loss, _ = policy_loss(logprobs, torch.zeros(2, 1), advantages, mask, dual_clip=3.0, denominator=1)
    loss.backward()
    assert loss.item() == pytest.approx(3.0 - 1.2)
    assert logprobs.grad.tolist() == [[0.0], [0.0]]


def test_on_policy_the_ratio_is_one_and_its_gradient_is_not_zero():
    """Without old log-probabilities: the policy gradient -A / n, exactly; approx_kl is exactly 0."""
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    loss, metrics = policy_loss(logprobs, None, torch.tensor([3.0]), torch.ones(1, 2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == -3.0 and logprobs.grad.tolist() == [[-1.5, -1.5]]
    assert metrics["ratio_mean"].item() == 1.0 and metrics["approx_kl"].item() == 0.0


def test_gspo_uses_the_mean_log_ratio_of_the_sequence():
    """Log-ratios 0.3 and -0.1: exp(0.1); each token gets half of the gradient, straight-through its own whole."""
    logprobs, mask = torch.tensor([[0.3, -0.1]], requires_grad=True), torch.ones(1, 2, dtype=torch.bool)
    ratio = math.exp(0.1)
    for level in ("sequence", "sequence_token"):
        loss, metrics = policy_loss(logprobs, torch.zeros(1, 2), torch.tensor([1.0]), mask, level=level)
        (grad,) = torch.autograd.grad(loss, logprobs)
        assert loss.item() == pytest.approx(-ratio)
        assert metrics["ratio_max"].item() == pytest.approx(ratio)
        torch.testing.assert_close(grad, torch.full((1, 2), -ratio / 2))
    weighted = torch.tensor([[1.0, 0.0]])
    loss, _ = policy_loss(logprobs, torch.zeros(1, 2), weighted, mask, level="sequence_token")
    (grad,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(grad, torch.tensor([[-ratio / 2, 0.0]]))


def test_entropy_bonus_and_metrics():
    """Entropy 1 and 3, coefficient 0.1: the loss falls by 0.2, the metric is their mean."""
    logprobs, mask = torch.zeros(1, 3), torch.tensor([[True, True, False]])
    entropy = torch.tensor([[1.0, 3.0, NAN]], requires_grad=True)
    loss, metrics = policy_loss(logprobs, None, torch.zeros(1), mask, entropy=entropy, entropy_coef=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(-0.2) and metrics["entropy"].item() == 2.0
    torch.testing.assert_close(entropy.grad, torch.tensor([[-0.05, -0.05, 0.0]]))


def test_rollout_metrics_without_correction():
    """old - rollout = ln 2 and -ln 4: ratios 2 and 1/4; measured, but the loss is left alone."""
    mask, zeros = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2)
    rollout = torch.tensor([[-math.log(2), math.log(4)]])
    loss, metrics = policy_loss(zeros, zeros, torch.ones(1), mask, rollout_logprobs=rollout)
    assert loss.item() == -1.0
    assert metrics["is_ratio_mean"].item() == pytest.approx(1.125)
    assert metrics["is_ratio_max"].item() == pytest.approx(2.0)
    assert metrics["rollout_gap"].item() == pytest.approx(1.5 * math.log(2))


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_micro_batches_add_up_to_the_window(aggregate):
    """Given the window's denominator, the losses of its two halves sum to the loss of the whole."""
    logprobs, old, _, _, mask, advantages, cu_seqlens = problem()
    denominator = torch.tensor({"token": float(mask.sum()), "sequence": 2.0, "constant": 20.0}[aggregate])
    options = {"aggregate": aggregate, "denominator": denominator}
    whole, _ = policy_loss(logprobs, old, advantages, mask, cu_seqlens=cu_seqlens, **options)
    parts = [
        policy_loss(
            logprobs[a:b], old[a:b], advantages[i:j], mask[a:b], cu_seqlens=cu_seqlens[i : j + 1] - a, **options
        )[0]
        for a, b, i, j in ((0, 4, 0, 2), (4, 12, 2, 4))
    ]
    torch.testing.assert_close(sum(parts), whole)
    if aggregate != "constant":
        alone, _ = policy_loss(logprobs, old, advantages, mask, cu_seqlens=cu_seqlens, aggregate=aggregate)
        torch.testing.assert_close(alone, whole)


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
@pytest.mark.parametrize("n", [0, 3])
def test_nothing_to_train_gives_zero_with_a_gradient(aggregate, n):
    """A fully masked micro-batch, and one without tokens, still have a gradient: of zeros."""
    logprobs = torch.full((1, n), NAN, requires_grad=True)
    mask = torch.zeros(1, n, dtype=torch.bool)
    for level in ("token", "sequence"):
        loss, metrics = policy_loss(
            logprobs,
            logprobs.detach(),
            torch.ones(1),
            mask,
            level=level,
            aggregate=aggregate,
            ref_logprobs=logprobs.detach(),
        )
        (grad,) = torch.autograd.grad(loss, logprobs)
        assert loss.item() == 0 and (grad == 0).all()
        assert all(metric.isfinite() for metric in metrics.values())


def test_exploded_ratios_do_not_turn_into_nan():
    """A log-ratio of 500: clipped for A > 0 with gradient exactly 0, not 0 * inf."""
    logprobs = torch.tensor([[500.0, 0.0]], requires_grad=True)
    loss, _ = policy_loss(logprobs, torch.zeros(1, 2), torch.ones(1), torch.ones(1, 2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == pytest.approx(-1.1) and logprobs.grad.tolist() == [[0.0, -0.5]]


def test_advantages_per_token_and_per_sequence_agree():
    logprobs, old, _, _, mask, advantages, cu_seqlens = problem()
    per_token = advantages.repeat_interleave(torch.tensor(LENGTHS))
    per_token[~mask] = NAN
    a, _ = policy_loss(logprobs, old, advantages, mask, cu_seqlens=cu_seqlens)
    b, _ = policy_loss(logprobs, old, per_token, mask, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_16_bit_and_broadcast_inputs_are_computed_in_float32():
    """bf16 log-probabilities of one row, shared by three."""
    logprobs = (torch.randn(1, 5) - 2).bfloat16().expand(3, 5)
    old, mask = (torch.randn(3, 5) - 2).bfloat16(), torch.ones(3, 5, dtype=torch.bool)
    loss, _ = policy_loss(logprobs, old, torch.tensor([1.0, -1.0, 2.0]), mask)
    exact, _ = policy_loss(logprobs.double(), old.double(), torch.tensor([1.0, -1.0, 2.0]).double(), mask)
    assert loss.dtype == torch.float32 and exact.dtype == torch.float64
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradcheck(level):
    logprobs, old, ref, _, mask, advantages, cu_seqlens = problem(torch.float64)
    entropy = torch.rand(len(mask), dtype=torch.float64)

    def loss(logprobs, ref, entropy):
        return policy_loss(
            torch.where(mask, logprobs, NAN), old, advantages, mask, level=level, ref_logprobs=ref, kl_coef=0.3,
            entropy=entropy, entropy_coef=0.2, cu_seqlens=cu_seqlens,
        )[0]  # fmt: skip

    clean = [torch.where(mask, x, 0.0).requires_grad_() for x in (logprobs, ref, entropy)]
    assert torch.autograd.gradcheck(loss, clean)


def test_compiles_without_a_graph_break():
    logprobs, old, _, _, mask, advantages, cu_seqlens = problem()

    def loss(x):
        return policy_loss(x, old, advantages, mask, level="sequence", cu_seqlens=cu_seqlens)[0]

    x = logprobs.requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    (actual,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "ppo"}, "unknown kind 'ppo'; known: clip, cispo, reinforce"),
        ({"level": "word"}, "unknown level 'word'"),
        ({"aggregate": "mean"}, "unknown aggregate 'mean'"),
        ({"kl_estimator": "k5", "kl_coef": 0.1}, "unknown KL estimator 'k5'"),
        ({"kl_estimator": "k1", "kl_coef": 0.1, "ref_logprobs": torch.zeros(2, 3)}, "gradient of mean zero"),
        ({"kl_coef": 0.1}, "kl_coef needs ref_logprobs"),
        ({"kind": "cispo"}, "'cispo' needs clip_high"),
        ({"kind": "reinforce", "dual_clip": 3.0}, "dual_clip"),
        ({"kind": "reinforce", "level": "sequence"}, "no ratio"),
        ({"dual_clip": 0.5}, "dual_clip must exceed 1"),
        ({"is_clip": 2.0}, "is_clip needs rollout_logprobs"),
        ({"entropy_coef": 0.1}, "entropy_coef needs entropy"),
        ({"ref_logprobs": torch.zeros(3)}, "ref_logprobs must have the mask's shape"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        policy_loss(x, x, torch.zeros(2), mask, **options)


def test_shapes_that_do_not_fit_are_refused():
    x, mask = torch.zeros(5), torch.ones(5, dtype=torch.bool)
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"advantages must be one per sequence \(1,\)"):
        policy_loss(x, x, torch.zeros(3), mask, cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="'constant' needs a denominator"):
        policy_loss(x, x, x, mask, aggregate="constant", cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="needs .B, T. tokens"):
        policy_loss(x, x, x, mask, level="sequence")


def test_value_loss_by_hand():
    """V = 1, old 0, clip 0.2. R = 2: errors 1 and (0.2 - 2)^2 = 3.24: 1.62. R = 0: errors 1 and 0.04: 0.5."""
    values = torch.tensor([[1.0, 1.0, NAN]], requires_grad=True)
    old, returns = torch.tensor([[0.0, 0.0, NAN]]), torch.tensor([[2.0, 0.0, NAN]])
    mask = ~old.isnan()
    loss, metrics = value_loss(values, old, returns, mask)
    loss.backward()
    assert loss.item() == pytest.approx((1.62 + 0.5) / 2)
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, 0.5, 0.0]]))
    assert metrics["clip_fraction"].item() == 0.5
    assert (metrics["value_mean"].item(), metrics["return_mean"].item()) == (1.0, 1.0)
    plain, _ = value_loss(values, None, returns, mask, clip=None)
    assert plain.item() == pytest.approx(0.5)


def test_value_loss_of_micro_batches_adds_up_and_of_nothing_is_zero():
    generator = torch.Generator().manual_seed(0)
    values, old, returns = torch.randn(3, 10, generator=generator)
    mask = torch.rand(10, generator=generator) < 0.6
    whole, _ = value_loss(values, old, returns, mask)
    parts = [
        value_loss(values[s], old[s], returns[s], mask[s], denominator=mask.sum())[0] for s in (slice(4), slice(4, 10))
    ]
    torch.testing.assert_close(sum(parts), whole)
    leaf = torch.zeros(3, requires_grad=True)
    loss, _ = value_loss(leaf, leaf.detach(), leaf.detach(), torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and (leaf.grad == 0).all()


def test_value_loss_gradcheck_and_sequence_means():
    """Sequence means: each sequence counts once, whatever its length."""
    values, old, returns = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([1, 1, 1, 0, 1, 0]).bool()
    cu_seqlens = torch.tensor([0, 3, 3, 6], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, returns, mask)[0], values.requires_grad_())
    loss, _ = value_loss(values, None, returns, mask, clip=None, aggregate="sequence", cu_seqlens=cu_seqlens)
    error = (values - returns).square() / 2
    torch.testing.assert_close(loss, (error[:3].mean() + error[4]) / 2)
    with pytest.raises(ValueError, match="clip needs old_values"):
        value_loss(values, None, returns, mask)
