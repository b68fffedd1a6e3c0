"""The compiled losses: every instruction set against the reference in float64 and against formulas written here, for
every combination of options; the same bits whatever the number of threads; nothing read where the mask is off.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

native = pytest.importorskip("rlhf_fast._C", reason="the native module is not built")

from rlhf_fast.kernels import kl_shaped_gae, policy_loss, use_backend, value_loss
from rlhf_fast.kernels.advantages import cpu_impl as advantages_cpu
from rlhf_fast.kernels.policy import cpu_impl
from rlhf_fast.kernels.policy.terms import FIGURES, PolicyOptions, PolicyTokens

NAN, INF = float("nan"), float("inf")
# 0: nothing; 1: one token; 1100: three blocks of 512; the sequence of 40 has no unmasked token
LENGTHS = [3, 0, 1100, 1, 40, 515]
KINDS = (
    {"kind": "clip"},
    {"kind": "clip", "dual_clip": 1.5},
    {"kind": "cispo", "clip_high": 1.1},
    {"kind": "reinforce"},
)
LEVELS = ("token", "sequence", "sequence_token")
AGGREGATES = ("token", "sequence", "constant")
ESTIMATORS = ("k1", "k2", "k3", "k3+", "abs")


@pytest.fixture(params=native.cpu.isas())
def isa(request):
    """Run the test once per instruction set that this processor has."""
    before = native.cpu.isa()
    native.cpu.select_isa(request.param)
    yield request.param
    native.cpu.select_isa(before)


def problem(layout, names, seed=0):
    """Float32 tensors, the mask, one advantage per sequence, and ``cu_seqlens``; NaN where masked."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(LENGTHS)
    mask = torch.rand(n, generator=generator) < 0.7
    mask[sum(LENGTHS[:4]) : sum(LENGTHS[:5])] = False
    mask[0] = mask[sum(LENGTHS[:3])] = True
    tensors = {name: torch.randn(n, generator=generator) * 0.3 - 1 for name in names}
    for i, x in enumerate(tensors.values()):
        x[~mask] = (NAN, INF, -INF)[i % 3]
    advantages = torch.tensor([1.3, 0.4, -2.0, -0.7, NAN, 0.9])
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    if layout == "padded":
        tensors = {name: pad(x, NAN) for name, x in tensors.items()}
        return tensors, pad(mask, False), advantages, None
    return tensors, mask, advantages, cu_seqlens


def pad(x, value):
    """Packed (N,) to (B, T)."""
    rows = [torch.nn.functional.pad(part, (0, max(LENGTHS) - len(part)), value=value) for part in x.split(LENGTHS)]
    return torch.stack(rows)


def results_of(loss, leaves, metrics):
    grads = torch.autograd.grad(loss, leaves)
    return {"loss": loss.detach(), **metrics} | {f"gradient {i}": grad for i, grad in enumerate(grads)}


def agree(ours, exact, rtol=2e-5, atol=2e-6):
    """Equal up to rounding, relative to the largest entry where that is below 1."""
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        largest = exact[name].abs().max().item()
        allowed = {"rtol": rtol, "atol": atol * min(largest, 1.0) + 1e-12}
        torch.testing.assert_close(value.double(), exact[name].double(), **allowed, msg=f"{name} differs")


def policy_results(tensors, mask, advantages, cu_seqlens, backend, **options):
    leaves = [tensors["logprobs"].clone().requires_grad_(), tensors["entropy"].clone().requires_grad_()]
    with use_backend(backend):
        loss, metrics = policy_loss(
            leaves[0], tensors["old"], advantages, mask, ref_logprobs=tensors["ref"],
            rollout_logprobs=tensors["rollout"], entropy=leaves[1], cu_seqlens=cu_seqlens, **options,
        )  # fmt: skip
        return results_of(loss, leaves, metrics)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(map(str, k.values())))
def test_every_policy_loss_matches_the_reference_in_float64(isa, kind, level, layout):
    """Loss, both gradients and all metrics; over aggregates, advantages and importance weights, each with another KL."""
    if kind["kind"] == "reinforce" and level != "token":
        pytest.skip("reinforce has no ratio")
    tensors, mask, advantages, cu_seqlens = problem(layout, ("logprobs", "old", "ref", "rollout", "entropy"))
    double = {name: x.double() for name, x in tensors.items()}
    per_token = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1)).masked_fill(~mask, NAN)
    estimators = itertools.cycle(("k2", "k3", "k3+", "abs"))
    for aggregate, given, is_clip in itertools.product(AGGREGATES, (advantages, per_token), (None, 1.2)):
        options = kind | {"level": level, "aggregate": aggregate, "is_clip": is_clip, "kl_estimator": next(estimators)}
        options |= {"kl_coef": 0.3, "entropy_coef": 0.1, "denominator": 700.0 if aggregate == "constant" else None}
        ours = policy_results(tensors, mask, given, cu_seqlens, "cpu", **options)
        exact = policy_results(double, mask, given.double(), cu_seqlens, "reference", **options)
        agree(ours, exact)
        assert (ours["gradient 0"][~mask] == 0).all() and (ours["gradient 1"][~mask] == 0).all()


def test_what_is_only_measured_does_not_change_the_loss(isa):
    """With kl_coef and entropy_coef 0 even an infinite reference or entropy stays out of loss and gradient."""
    tensors, mask, advantages, cu_seqlens = problem("packed", ("logprobs", "old", "ref", "rollout", "entropy"))
    plain, _ = policy_loss(tensors["logprobs"], tensors["old"], advantages, mask, cu_seqlens=cu_seqlens)
    tensors["ref"][0], tensors["entropy"][0] = -INF, INF
    for estimator in ESTIMATORS:
        ours = policy_results(tensors, mask, advantages, cu_seqlens, "cpu", kl_estimator=estimator)
        assert torch.equal(ours["loss"], plain) and ours["gradient 0"].isfinite().all()
        assert ours["entropy"] == INF and (ours["gradient 1"] == 0).all()


def test_ratios_beyond_a_float_are_bounded(isa):
    """Log-ratios around the bound of 80 and the ends of exp, both signs of the advantage: clipped, or exp(80)."""
    log_ratio = torch.tensor([[-200.0, -87.0, 79.0, 80.0, 81.0, 89.0, 1000.0]])
    mask = torch.ones(1, 7, dtype=torch.bool)
    for advantage in (1.0, -1.0):
        leaf, double = log_ratio.clone().requires_grad_(), log_ratio.double().requires_grad_()
        options = {"aggregate": "constant", "denominator": 1.0}
        ours = policy_loss(leaf, torch.zeros(1, 7), torch.tensor([advantage]), mask, **options)
        with use_backend("reference"):
            exact = policy_loss(double, torch.zeros(1, 7).double(), torch.tensor([advantage]), mask, **options)
        ours, exact = results_of(ours[0], [leaf], ours[1]), results_of(exact[0], [double], exact[1])
        ours.pop("approx_kl"), exact.pop("approx_kl")  # e^1000 is infinite in float32 only
        agree(ours, exact)
        assert (ours["gradient 0"][0, 4:] == 0).all()
    _, metrics = policy_loss(leaf, torch.zeros(1, 7), torch.tensor([1.0]), mask)
    assert metrics["approx_kl"] == INF


def test_a_nan_where_it_counts_is_seen(isa):
    """Unmasked NaN log-probability or old value: loss and largest ratio are NaN, not a number that looks right."""
    x, mask = torch.full((1, 40), -1.0), torch.ones(1, 40, dtype=torch.bool)
    bad = x.clone()
    bad[0, 7] = NAN
    loss, metrics = policy_loss(bad, x, torch.ones(1), mask, rollout_logprobs=bad)
    assert all(
        y.isnan() for y in (loss, metrics["ratio_max"], metrics["ratio_mean"], metrics["is_ratio_max"] * bad[0, 7])
    )
    assert value_loss(bad, x, x, mask)[0].isnan() and value_loss(x, bad, x, mask)[0].isnan()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_kl_keeps_its_digits_from_1e_minus_6_to_80(isa, estimator):
    """Value through the metric, slope through the gradient, one token at a time, against the formula in float64."""
    magnitude = torch.logspace(-6, 1.9, 120)
    d = torch.cat([-magnitude, magnitude, torch.linspace(-1.1, 1.1, 45)])
    exact = d.double()
    value = {"k1": -exact, "k2": exact**2 / 2, "abs": exact.abs()}.get(estimator, torch.expm1(exact) - exact)
    slope = {"k2": -exact, "k3+": -exact, "abs": -exact.sign()}.get(estimator, -torch.expm1(exact))
    # (e^d - 1) - d for small d, where float64 cancels too
    series = exact**2 / 2 + exact**3 / 6 + exact**4 / 24 + exact**5 / 120
    value = torch.where((exact.abs() < 1e-3) & torch.tensor(estimator.startswith("k3")), series, value)
    zeros, mask = torch.zeros(1), torch.ones(1, dtype=torch.bool)
    for i in range(len(d)):
        leaf = zeros.clone().requires_grad_()
        options = {
            "ref_logprobs": d[i : i + 1],
            "kl_estimator": estimator,
            "kl_coef": 0.0 if estimator == "k1" else 1.0,
        }
        loss, metrics = policy_loss(leaf, None, zeros, mask, **options)
        torch.testing.assert_close(metrics["kl"].double(), value[i], rtol=1.5e-6, atol=0)
        if estimator != "k1":
            (grad,) = torch.autograd.grad(loss, leaf)
            torch.testing.assert_close(grad[0].double(), slope[i], rtol=5e-7, atol=0)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("clip", [0.2, None])
def test_every_value_loss_matches_the_reference_in_float64(isa, clip, layout):
    tensors, mask, _, cu_seqlens = problem(layout, ("values", "old", "returns"))
    double = {name: x.double() for name, x in tensors.items()}
    for aggregate in AGGREGATES:
        results = []
        for backend, given in (("cpu", tensors), ("reference", double)):
            leaf = given["values"].clone().requires_grad_()
            with use_backend(backend):
                loss, metrics = value_loss(
                    leaf, given["old"] if clip else None, given["returns"], mask, clip=clip, aggregate=aggregate,
                    denominator=700.0 if aggregate == "constant" else None, cu_seqlens=cu_seqlens,
                )  # fmt: skip
                results.append(results_of(loss, [leaf], metrics))
        agree(*results)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_shaped_advantages_match_the_reference_in_float64(isa, estimator, layout):
    """Scores land on the last unmasked token; one sequence has none. Whitened or not, scores clipped or not."""
    tensors, mask, scores, cu_seqlens = problem(layout, ("logprobs", "ref", "values"))
    bootstrap = torch.tensor([0.5, 0.0, -1.0, 2.0, NAN, 0.0])
    for whiten, clip, end in itertools.product((True, False), (None, 1.0), (None, bootstrap)):
        results = []
        for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
            given = [x.to(dtype) for x in (scores, *tensors.values())]
            with use_backend(backend):
                outputs = kl_shaped_gae(
                    *given, mask, kl_coef=0.1, gamma=0.98, lam=0.9, whiten=whiten, estimator=estimator, clip=clip,
                    bootstrap=None if end is None else end.to(dtype), cu_seqlens=cu_seqlens,
                )  # fmt: skip
            results.append(dict(zip(("advantages", "returns", "rewards", "kl"), outputs, strict=True)))
        agree(*results, atol=6e-6)
        assert all((x[~mask] == 0).all() for x in results[0].values())


def test_whitening_survives_a_mean_far_from_zero(isa):
    """gamma 0: the advantages are rewards - values, 3000 plus steps of 1/64, exact in float32."""
    steps = torch.arange(4000).view(4, 1000) % 97 / 64
    zeros, mask = torch.zeros(4, 1000), torch.ones(4, 1000, dtype=torch.bool)
    ours = kl_shaped_gae(torch.zeros(4), zeros, zeros, -3000 - steps, mask, kl_coef=0.0, gamma=0.0)[0]
    exact = steps.double() - steps.double().mean()
    torch.testing.assert_close(ours.double(), exact / exact.square().mean().sqrt(), rtol=1e-5, atol=1e-6)
    same = kl_shaped_gae(torch.zeros(4), zeros, zeros, zeros - 0.1, mask, kl_coef=0.0, gamma=0.0)[0]
    assert (same == 0).all()


@pytest.mark.parametrize("shape", [(70, 1111), (1, 90_000), (40_000, 2)], ids=str)
def test_losses_do_not_depend_on_the_number_of_threads(shape):
    """Many rows, a lone one in pieces, and more rows than parts."""
    generator = torch.Generator().manual_seed(3)
    logprobs, old, ref = torch.randn(3, *shape, generator=generator)
    mask, scores = torch.rand(shape, generator=generator) < 0.8, torch.randn(shape[0], generator=generator)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            leaf, output = logprobs.clone().requires_grad_(), []
            for level, aggregate in (("token", "token"), ("token", "sequence"), ("sequence", "token")):
                loss, metrics = policy_loss(
                    leaf, old, scores, mask, level=level, aggregate=aggregate, ref_logprobs=ref, kl_coef=0.1
                )
                output += [loss, *metrics.values(), *torch.autograd.grad(loss, leaf)]
            loss, metrics = value_loss(leaf, old, ref, mask)
            output += [loss, *metrics.values(), *torch.autograd.grad(loss, leaf)]
            results.append(output + list(kl_shaped_gae(scores, logprobs, ref, old, mask, kl_coef=0.1)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_lone_sequence_gives_the_same_in_one_row_or_many_pieces():
    """(1, T) with one advantage, and the same as packed advantages per token."""
    generator = torch.Generator().manual_seed(4)
    logprobs, old = torch.randn(2, 1, 50_000, generator=generator)
    mask, advantage = torch.rand(1, 50_000, generator=generator) < 0.8, torch.tensor([-1.5])
    whole = policy_loss(logprobs, old, advantage, mask, aggregate="sequence")[0]
    pieces = policy_loss(logprobs, old, advantage, mask)[0]
    packed = policy_loss(logprobs[0], old[0], advantage.expand(50_000), mask[0])[0]
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=0)
    assert torch.equal(pieces, packed)


def test_the_saved_gradient_is_left_for_another_backward_pass():
    logprobs, mask = torch.randn(3, 50, requires_grad=True), torch.ones(3, 50, dtype=torch.bool)
    loss, _ = policy_loss(logprobs, None, torch.tensor([1.0, 2.0, -1.0]), mask)
    (once,) = torch.autograd.grad(loss, logprobs, retain_graph=True)
    (twice,) = torch.autograd.grad(loss * -3, logprobs)
    torch.testing.assert_close(twice, once * -3)
    torch.testing.assert_close(once, torch.tensor([[-1.0], [-2.0], [1.0]]).expand(3, 50) / 150)


def test_no_gradient_is_made_that_nobody_needs():
    x, mask = torch.full((2, 5), -1.0), torch.ones(2, 5, dtype=torch.bool)
    options = PolicyOptions("clip", 0.2, 0.2, None, "token", 0.0, "k3", None, 0.1, "token")
    tokens = PolicyTokens(x, x, torch.ones(2), mask, None, None, x, None)
    for wanted in itertools.product((True, False), repeat=2):
        loss, figures, *gradients = cpu_impl.policy_loss(tokens, options, None, 0.0, *wanted)
        assert loss.item() == pytest.approx(-1 + 0.1) and figures.shape == (len(FIGURES),)
        assert [g.shape for g in gradients] == [(2, 5) if want else (0,) for want in wanted]


def test_sixteen_bit_inputs_run_on_the_kernel_and_float64_is_refused():
    half, double = torch.zeros(1, dtype=torch.float16), torch.zeros(1, dtype=torch.float64)
    for op, module in (("policy_loss", cpu_impl), ("value_loss", cpu_impl), ("kl_shaped_gae", advantages_cpu)):
        assert module.unsupported(op, half, half.bfloat16()) is None
        assert module.unsupported(op, half, double) == "float64 runs on the reference only"
        assert "not on meta" in module.unsupported(op, half.to("meta"))


def test_offsets_that_do_not_rise_are_refused():
    x, mask = torch.zeros(3), torch.ones(3, dtype=torch.bool)
    for offsets in ([1, 3], [0, 2, 1, 3], [0, -1, 3]):
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
        rows = torch.zeros(len(offsets) - 1)
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the number of tokens, 3"):
            policy_loss(x, x, x, mask, cu_seqlens=cu_seqlens)
        with pytest.raises(ValueError, match="cu_seqlens must rise"):
            value_loss(x, x, x, mask, cu_seqlens=cu_seqlens)
        with pytest.raises(ValueError, match="cu_seqlens must rise"):
            kl_shaped_gae(rows, x, x, x, mask, kl_coef=0.1, cu_seqlens=cu_seqlens)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_loss_of_tensors_without_memory_is_refused():
    options = PolicyOptions("clip", 0.2, 0.2, None, "token", 0.0, "k3", None, 0.0, "token")
    with FakeTensorMode():
        x = torch.zeros(2, 3)
        tokens = PolicyTokens(x, x, x, x == 0, None, None, None, None)
        with pytest.raises(ValueError, match="logprobs: null pointer"):
            cpu_impl.policy_loss(tokens, options, None, 0.0, True, False)
        with pytest.raises(ValueError, match="null pointer"):
            advantages_cpu.kl_shaped_gae(x[:, 0], x, x, x, x == 0, None, None, 0.1, "k1", None, 1.0, 1.0, True, 1e-8)
    real = torch.zeros(2, 3)
    tokens = PolicyTokens(real, real, torch.zeros(5), real == 0, None, None, None, None)
    with pytest.raises(ValueError, match="advantages must be one per sequence, got 5"):
        cpu_impl.policy_loss(tokens, options, None, 0.0, True, False)


def test_losses_of_nothing_are_zero():
    nothing, mask = torch.zeros(0), torch.zeros(0, dtype=torch.bool)
    offsets = torch.zeros(1, dtype=torch.int32)
    loss, metrics = policy_loss(nothing, nothing, nothing, mask, cu_seqlens=offsets)
    assert loss == 0 and all(metric == 0 for metric in metrics.values())
    assert value_loss(nothing, nothing, nothing, mask, cu_seqlens=offsets)[0] == 0
    outputs = kl_shaped_gae(nothing, nothing, nothing, nothing, mask, kl_coef=0.1, cu_seqlens=offsets)
    assert [x.shape for x in outputs] == [(0,)] * 4
    masked = torch.full((2, 3), NAN)
    outputs = kl_shaped_gae(torch.ones(2), masked, masked, masked, masked == 0, kl_coef=0.1)
    assert all((x == 0).all() for x in outputs)
