"""Triton kernels of the losses and of what feeds them, against the reference in float64, at blocks of a few tokens.

The blocks are small so that tiny inputs have several programs, each with several blocks: sums across programs, the
carry of a scan, and the last block that is not full are all exercised. Masked places hold NaN throughout.
"""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_fast.kernels import (
    available,
    dpo_loss,
    group_advantages,
    kl_penalty,
    kl_shaped_gae,
    pairwise_reward_loss,
    policy_loss,
    sequence_logprobs,
    shaped_rewards,
    use_backend,
    value_loss,
    whiten,
)
from rlhf_fast.kernels.kl import ESTIMATORS
from rlhf_fast.kernels.preference import KINDS, SMOOTHED

triton = pytest.importorskip("triton")
import triton.language as tl

from rlhf_fast.kernels.advantages import triton_impl as advantages_impl
from rlhf_fast.kernels.kl import triton_impl as kl_impl
from rlhf_fast.kernels.kl.triton_impl import arrives_last
from rlhf_fast.kernels.logprobs import triton_impl as logprobs_impl
from rlhf_fast.kernels.policy import triton_impl as policy_impl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
# 3 programs per sequence of 17 at blocks of 8; an empty sequence, and the one of 3 has no unmasked token
LENGTHS = [9, 0, 3, 17, 1]

if reason := available("policy", "triton", "policy_loss", torch.zeros(1, device=DEVICE)):
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(policy_impl, "BLOCK", 8)
    monkeypatch.setattr(policy_impl, "SEQUENCE_BLOCK", 8)
    monkeypatch.setitem(policy_impl.POLICY_ROW, "LANES", 2)
    monkeypatch.setitem(policy_impl.VALUE_ROW, "LANES", 2)
    monkeypatch.setattr(advantages_impl, "BLOCK", 8)
    monkeypatch.setattr(advantages_impl, "SMALL", 16)
    monkeypatch.setattr(advantages_impl, "LANES", 2)
    monkeypatch.setattr(advantages_impl, "OWN", 4)
    monkeypatch.setattr(advantages_impl, "OTHERS", 4)
    monkeypatch.setattr(logprobs_impl, "SEQUENCE_BLOCK", 8)
    monkeypatch.setattr(kl_impl, "BLOCK", 8)


def tokens(count, seed=0, layout="packed"):
    """``count`` tensors of tokens like log-probabilities, NaN where masked; the mask; what says where sequences end."""
    generator = torch.Generator().manual_seed(seed)
    size = sum(LENGTHS)
    tensors = list(torch.randn(count, size, generator=generator) * 0.4 - 2)
    mask = torch.rand(size, generator=generator) < 0.8
    mask[9:12] = False
    mask[[0, 13, 29]] = True
    for x in tensors:
        x[~mask] = NAN
    shape = {"cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32).to(DEVICE)}
    if layout == "padded":
        tensors, mask, shape = [pad(x, NAN) for x in tensors], pad(mask, False), {}
    return [x.to(DEVICE) for x in tensors], mask.to(DEVICE), shape


def pad(x, value):
    """Packed (N,) to (B, T)."""
    width = max(LENGTHS)
    return torch.stack(
        [torch.nn.functional.pad(part, (0, width - len(part)), value=value) for part in x.split(LENGTHS)]
    )


def compare(function, inputs, tolerance=3e-6):
    """Run on float32 with Triton and on float64 with the reference; compare results and gradients of the inputs.

    ``function`` takes one tensor per entry of ``inputs`` and returns tensors, the first of which is differentiated
    with weights that differ from entry to entry.
    """
    runs = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
        with use_backend(backend):
            results = function(*leaves)
            first = results[0]
            if first.requires_grad:
                weights = torch.linspace(-1.0, 2.0, first.numel(), device=DEVICE).view(first.shape)
                first.backward((weights + 0.1).to(dtype))
        runs.append([x.detach() for x in results] + [x.grad for x in leaves])
    for actual, exact in zip(*runs, strict=True):
        assert (actual is None) == (exact is None)
        if actual is not None:
            assert actual.dtype == torch.float32
            torch.testing.assert_close(actual.double(), exact.double(), rtol=tolerance, atol=tolerance)


CASES = {
    "ppo": {},
    "dapo": {"clip_low": 0.1, "clip_high": 0.4, "dual_clip": 1.2, "kl_coef": 0.3},
    "gspo": {"level": "sequence", "clip_high": 0.3, "kl_coef": 0.2, "kl_estimator": "k2"},
    "gspo-corrected": {"level": "sequence", "clip_low": 0.02, "clip_high": 0.01, "is_clip": 1.1},
    "gspo-token": {"level": "sequence_token", "clip_low": 0.02, "clip_high": 0.03},
    "corrected": {"is_clip": 1.1, "kl_coef": 0.3, "kl_estimator": "abs"},
    "cispo": {"kind": "cispo", "clip_high": 1.2, "kl_coef": 0.1, "kl_estimator": "k3+"},
    "cispo-sequence": {"kind": "cispo", "clip_high": 1.05, "level": "sequence", "is_clip": 2.0},
    "reinforce": {"kind": "reinforce", "kl_coef": 0.5, "is_clip": 1.0},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_policy_loss_matches_the_reference(case, aggregate, layout):
    """Loss, every metric, and the gradients of log-probabilities and entropy; advantages per sequence."""
    (logprobs, old, ref, rollout, entropy), mask, shape = tokens(5, layout=layout)
    advantages = torch.tensor([1.3, 0.0, -2.0, -0.7, 0.4], device=DEVICE)

    def run(logprobs, entropy):
        loss, metrics = policy_loss(
            logprobs,
            old.to(logprobs.dtype),
            advantages.to(logprobs.dtype),
            mask,
            ref_logprobs=ref.to(logprobs.dtype),
            rollout_logprobs=rollout.to(logprobs.dtype),
            entropy=entropy,
            entropy_coef=0.1,
            aggregate=aggregate,
            denominator=20.0 if aggregate == "constant" else None,
            **CASES[case],
            **shape,
        )
        return loss, *(metrics[name] for name in sorted(metrics))

    compare(run, [logprobs, entropy])


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_advantages_per_token_and_no_old_policy(level, layout):
    """Without old log-probabilities every ratio is 1, and what it clips is nothing."""
    (logprobs, advantages), mask, shape = tokens(2, seed=1, layout=layout)

    def run(logprobs):
        options = {"denominator": torch.tensor(7.0, device=DEVICE), "level": level, "aggregate": "sequence"}
        loss, metrics = policy_loss(logprobs, None, advantages.to(logprobs.dtype), mask, **options, **shape)
        return loss, metrics["ratio_max"], metrics["clip_region"]

    compare(run, [logprobs])


@pytest.mark.parametrize("clip", [0.2, None])
@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_value_loss_matches_the_reference(clip, aggregate, layout):
    (values, old, returns), mask, shape = tokens(3, seed=2, layout=layout)
    # sums and squares of multiples of 1/64 do not round, and with a clip between two of them no two errors are equal
    values, old, returns = (torch.round(x * 64) / 64 for x in (values, old, returns))
    clip = clip and 12.5 / 64

    def run(values):
        others = old.to(values.dtype), returns.to(values.dtype)
        denominator = 20.0 if aggregate == "constant" else None
        loss, metrics = value_loss(
            values, *others, mask, clip=clip, aggregate=aggregate, denominator=denominator, **shape
        )
        return loss, *metrics.values()

    compare(run, [values])


def test_a_value_inside_the_clip_always_keeps_its_gradient():
    """old + (value - old) may miss the value by a rounding, and its error then be the larger one: still not clipped."""
    generator = torch.Generator().manual_seed(0)
    values, moves, returns = (torch.rand(3, 1, 200, generator=generator).to(DEVICE) - 0.5) * 0.38
    values = values / 100
    leaf, mask = values.clone().requires_grad_(), torch.ones(1, 200, dtype=torch.bool, device=DEVICE)
    with use_backend("triton"):
        value_loss(leaf, values + moves, returns, mask, denominator=1)[0].backward()
    torch.testing.assert_close(leaf.grad, values - returns, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_of", ["policy", "value"])
@pytest.mark.parametrize("aggregate", ["token", "sequence"])
@pytest.mark.parametrize("shape", [(2, 19), (0, 4), (3, 0), (0,)])
def test_without_a_single_token_the_loss_is_0_with_a_gradient_of_zeros(loss_of, aggregate, shape):
    """All masked; no sequences; sequences of no tokens; packed, no tokens in two empty sequences."""
    x = torch.full(shape, NAN, device=DEVICE, requires_grad=True)
    mask = torch.zeros(shape, dtype=torch.bool, device=DEVICE)
    packed = {"cu_seqlens": torch.zeros(3, dtype=torch.int32, device=DEVICE)} if len(shape) == 1 else {}
    with use_backend("triton"):
        if loss_of == "policy":
            loss, metrics = policy_loss(x, x.detach(), x.detach(), mask, aggregate=aggregate, **packed)
        else:
            loss, metrics = value_loss(x, x.detach(), x.detach(), mask, aggregate=aggregate, **packed)
        loss.backward()
    assert loss.item() == 0.0 and all(metric.item() == 0.0 for metric in metrics.values())
    assert x.grad.shape == shape and (x.grad == 0).all()


def test_ppo_by_hand_over_several_programs():
    """Ratios 1.5 and 0.5, clips 0.8 and 1.2. A = 2: min(3, 2.4) = 2.4 and min(1, 1.6) = 1; A = -2: -3 and -1.6.

    Ten times over, which is 5 programs; clipped tokens have no gradient, the others -A * ratio / 40.
    """
    row = torch.tensor([1.5, 0.5]).log().repeat(2, 10).to(DEVICE).requires_grad_()
    advantages, mask = torch.tensor([2.0, -2.0], device=DEVICE), torch.ones(2, 20, dtype=torch.bool, device=DEVICE)
    with use_backend("triton"):
        loss, metrics = policy_loss(row, torch.zeros_like(row), advantages, mask)
        (3.0 * loss).backward()
    assert loss.item() == pytest.approx(-(2.4 + 1 - 3 - 1.6) / 4)
    expected = torch.tensor([[0.0, -0.025], [0.075, 0.0]]).repeat(1, 10) * 3
    torch.testing.assert_close(row.grad.cpu(), expected)
    shares = {name: metrics[name].item() for name in ("clip_low", "clip_high", "clip_region", "ratio_max")}
    assert shares == pytest.approx({"clip_low": 0.25, "clip_high": 0.25, "clip_region": 0.5, "ratio_max": 1.5})


def test_a_policy_that_ran_away_stays_finite():
    """A log-ratio of 100 has no float32 ratio: exp(80) at most, and no gradient through it, clipped or not."""
    logprobs = torch.tensor([[100.0, 100.0]], device=DEVICE, requires_grad=True)
    mask, zeros = torch.ones(1, 2, dtype=torch.bool, device=DEVICE), torch.zeros(1, 2, device=DEVICE)
    advantages = torch.tensor([[1.0, -1.0]], device=DEVICE)
    with use_backend("triton"):
        loss, metrics = policy_loss(logprobs, zeros, advantages, mask)
        loss.backward()
    assert loss.item() == pytest.approx((math.exp(80) - 1.2) / 2, rel=1e-5)
    assert logprobs.grad.tolist() == [[0.0, 0.0]] and metrics["ratio_max"].isfinite()


def test_a_nan_among_the_tokens_reaches_loss_and_its_own_gradient_only():
    logprobs = torch.tensor([[-1.0, NAN, -2.0]], device=DEVICE, requires_grad=True)
    mask = torch.ones(1, 3, dtype=torch.bool, device=DEVICE)
    with use_backend("triton"):
        loss, _ = policy_loss(
            logprobs, torch.full_like(mask, -1.5, dtype=torch.float32), torch.ones(1).to(DEVICE), mask
        )
        loss.backward()
    assert loss.isnan() and logprobs.grad.isnan().tolist() == [[False, True, False]]


@pytest.fixture
def reversed_programs(monkeypatch):
    """Run the programs of every launch from the last to the first: the first is then the one that arrives last."""
    if DEVICE == "cuda":
        pytest.skip("the order of programs is the GPU's own")
    from triton.runtime.interpreter import interpreter_builder as builder

    set_index = builder.set_grid_idx
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: set_index(builder.grid_dim[0] - 1 - x, y, z))


def measured():
    """Losses, metrics and whitened advantages of one batch: everything that is summed across programs."""
    (logprobs, old, ref, values), mask, shape = tokens(4, seed=3)
    scores = torch.arange(5.0, device=DEVICE)
    with use_backend("triton"):
        loss, metrics = policy_loss(logprobs, old, values, mask, ref_logprobs=ref, kl_coef=0.1)
        value, value_metrics = value_loss(values, old, ref, mask, aggregate="sequence", **shape)
        shaped = kl_shaped_gae(scores, logprobs, ref, values, mask, kl_coef=0.1, **shape)
        whitened = whiten(values, mask)
    return [loss, value, *metrics.values(), *value_metrics.values(), *shaped, whitened]


def test_sums_do_not_depend_on_which_program_arrives_last(request):
    """The same bits: whoever comes last reads all partial sums, its own too, in their order."""
    forward = measured()
    request.getfixturevalue("reversed_programs")
    assert all(torch.equal(a, b) for a, b in zip(forward, measured(), strict=True))


@triton.jit
def arrival_kernel(arrived_ptr, finished_ptr):
    if arrives_last(arrived_ptr):
        tl.atomic_add(finished_ptr, 1)


def test_exactly_one_program_of_a_launch_arrives_last():
    arrived, finished = torch.zeros(2, dtype=torch.int32, device=DEVICE).split(1)
    for launch in (1, 2, 3):
        arrival_kernel[(7,)](arrived, finished)
        assert (arrived.item(), finished.item()) == (0, launch)


def test_the_counter_of_arrivals_is_left_at_0_for_the_next_launch(monkeypatch):
    """As launches on the default stream share it."""
    counter = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    first = measured()
    for module in (policy_impl, advantages_impl):
        monkeypatch.setattr(module, "arrival_counter", lambda device: counter)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, measured(), strict=True))
        assert counter.item() == 0


def test_only_the_default_stream_shares_a_counter(monkeypatch):
    """Elsewhere launches may overlap, or be captured in a graph: a counter each."""
    monkeypatch.setattr(kl_impl.torch, "zeros", lambda *a, **o: object())
    stream = type("Stream", (), {"cuda_stream": 0})
    monkeypatch.setattr(kl_impl.torch.cuda, "current_stream", lambda device: stream)
    kl_impl._counter_of_default_stream.cache_clear()
    device, other = torch.device("cuda", 0), torch.device("cuda", 1)
    shared = kl_impl.arrival_counter(device)
    assert kl_impl.arrival_counter(device) is shared and kl_impl.arrival_counter(other) is not shared
    stream.cuda_stream = 7
    assert kl_impl.arrival_counter(device) is not shared
    assert kl_impl.arrival_counter(device) is not kl_impl.arrival_counter(device)
    kl_impl._counter_of_default_stream.cache_clear()


def test_packed_boundaries_reach_no_token_outside_and_leave_none_unwritten():
    """On a GPU nobody has read them. 12 tokens: sequences [2, 5) and [5, 9), or a last one that ends at 40."""
    memory = torch.full((3, 60), 7.0, device=DEVICE)
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    mask = torch.ones(60, dtype=torch.bool, device=DEVICE)[:12]
    for offsets, claimed in (([2, 5, 9], slice(2, 9)), ([2, 5, 40], slice(2, 12)), ([-3, 5, 9], slice(0, 9))):
        cu = torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
        outside = torch.ones(12, dtype=torch.bool, device=DEVICE)
        outside[claimed] = False
        inputs = memory.clone()
        inputs[:, :12] = x
        packed = [row[:12] for row in inputs]
        scores = torch.ones(2, device=DEVICE)
        results = [
            *advantages_impl.gae_packed(*packed[:2], mask, None, cu, 0.9, 0.8),
            advantages_impl.shaped_rewards(scores, *packed[:2], mask, cu, 0.1, "k1", None),
            *advantages_impl.kl_shaped_gae(scores, *packed, mask, None, cu, 0.1, "k1", None, 0.9, 0.8, True, 1e-8),
            logprobs_impl.sequence_logprobs_backward(scores, mask, cu, scores, False),
        ]
        for result in results:
            assert result.isfinite().all() and (result[outside] == 0).all() and (result[claimed] != 0).any()
        sums, counts = logprobs_impl.sequence_logprobs(packed[0], mask, cu, False)
        assert counts.sum() == claimed.stop - claimed.start
        torch.testing.assert_close(sums.sum(), x[0, claimed].sum())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_penalty_matches_the_reference(estimator):
    logprobs, ref = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    compare(lambda a, b: (kl_penalty(a, b, estimator),), [logprobs, ref])


@pytest.mark.parametrize("estimator", ["k3", "k3+"])
def test_k3_keeps_its_digits_from_nearly_equal_to_far_apart(estimator):
    """Relative to expm1(d) - d in float64, whose float32 form has no digit left at d = 1e-4; -inf costs infinity."""
    d = torch.tensor([1e-30, 1e-6, -1e-4, 1e-2, -0.3, 0.999, -1.001, 5.0, -20.0, 80.0], device=DEVICE)
    logprobs = torch.zeros_like(d).requires_grad_()
    with use_backend("triton"):
        kl = kl_penalty(logprobs, d, estimator)
        kl.sum().backward()
        assert kl_penalty(d[:1], torch.tensor([float("-inf")], device=DEVICE), estimator).item() == math.inf
    exact = d.double()
    torch.testing.assert_close(kl.detach().double(), torch.expm1(exact) - exact, rtol=6e-6, atol=1e-40)
    slope = torch.expm1(exact) if estimator == "k3" else exact
    torch.testing.assert_close(-logprobs.grad.double(), slope, rtol=6e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_dpo_loss_matches_the_reference(kind):
    """131 pairs: one program and three pairs of the next. Log-ratios from hopeless to perfect."""
    inputs = torch.randn(4, 131, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 5
    options = {"kind": kind, "beta": 0.3, "label_smoothing": 0.1 if kind in SMOOTHED else 0.0}
    compare(lambda *x: dpo_loss(*x, **options), list(inputs), tolerance=1e-5)


@pytest.mark.parametrize("kind", ["sigmoid", "nca_pair", "robust", "exo_pair", "apo_zero", "apo_down", "hinge"])
@pytest.mark.parametrize("gap", [-4000.0, 4000.0])
def test_hopeless_and_perfect_pairs_cost_what_the_reference_says(kind, gap):
    """Summed log-probabilities of long responses differ by thousands; exp of that is no float32."""
    zero = torch.zeros(1, device=DEVICE)
    options = {"kind": kind, "beta": 1.0, "label_smoothing": 0.1 if kind in SMOOTHED else 0.0}
    compare(lambda *x: dpo_loss(*x, **options), [torch.full_like(zero, gap), zero, zero, zero])


def test_the_log_of_a_sigmoid_near_1_keeps_its_digits():
    """-log sigmoid(12) = 6.1e-6, which 1 + exp(-12) in float32 misses by 2%; and a NaN stays one."""
    x = torch.tensor([0.0, 3.0, 12.0, -5.0, NAN], device=DEVICE)
    with use_backend("triton"):
        loss = pairwise_reward_loss(x, torch.zeros_like(x))
    exact = -torch.nn.functional.logsigmoid(x.double())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("center", [0.0, 0.3])
@pytest.mark.parametrize("has_margin", [False, True])
def test_pairwise_reward_loss_matches_the_reference(center, has_margin):
    chosen, rejected, margin = torch.randn(3, 131, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def run(chosen, rejected):
        options = {"margin": margin.to(chosen.dtype) if has_margin else None, "center": center}
        return (pairwise_reward_loss(chosen, rejected, **options),)

    compare(run, [chosen, rejected])


def test_losses_of_no_pairs_are_empty():
    nothing = torch.zeros(0, device=DEVICE)
    with use_backend("triton"):
        assert dpo_loss(nothing, nothing, nothing, nothing)[0].shape == (0,)
        assert pairwise_reward_loss(nothing, nothing).shape == kl_penalty(nothing, nothing).shape == (0,)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_sequence_logprobs_match_the_reference(average, layout):
    """A sequence without tokens, and one whose tokens are all masked, give 0."""
    (logprobs,), mask, shape = tokens(1, seed=4, layout=layout)
    compare(lambda x: (sequence_logprobs(x, mask, average=average, **shape),), [logprobs])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("clip", [None, 1.5])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_shaped_rewards_match_the_reference(estimator, clip, layout):
    """The score's place is the last unmasked token, in whichever block it is."""
    (logprobs, ref), mask, shape = tokens(2, seed=5, layout=layout)
    # of the last sequence, packed its one token: its score has no place
    mask[-1] = False
    scores = torch.tensor([1.0, -2.0, 3.0, -4.0, NAN], device=DEVICE)
    options = {"kl_coef": 0.3, "estimator": estimator, "clip": clip, **shape}
    with use_backend("triton"):
        rewards = shaped_rewards(scores, logprobs, ref, mask, **options)
    exact = shaped_rewards(scores.double(), logprobs.double(), ref.double(), mask, **options)
    torch.testing.assert_close(rewards.double(), exact, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("has_bootstrap", [False, True])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_kl_shaped_gae_matches_the_reference(whitened, has_bootstrap, layout):
    (logprobs, ref, values), mask, shape = tokens(3, seed=6, layout=layout)
    scores = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0], device=DEVICE)
    bootstrap = torch.linspace(-1.0, 2.0, 5, device=DEVICE) if has_bootstrap else None
    options = {"kl_coef": 0.2, "gamma": 0.9, "lam": 0.8, "clip": 3.5, "whiten": whitened, "estimator": "k3"}
    with use_backend("triton"):
        results = kl_shaped_gae(scores, logprobs, ref, values, mask, bootstrap=bootstrap, **options, **shape)
    inputs = [x.double() for x in (scores, logprobs, ref, values)]
    bootstrap = None if bootstrap is None else bootstrap.double()
    for result, exact in zip(results, kl_shaped_gae(*inputs, mask, bootstrap=bootstrap, **options, **shape)):
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_the_carry_survives_the_ends_of_lambda(lam):
    """At 0 a token's advantage has no part in what it hands on, and still must be made; gamma 1 and whole blocks."""
    x = torch.randn(4, 2, 24, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    mask, scores = torch.ones(2, 24, dtype=torch.bool, device=DEVICE), torch.ones(2, device=DEVICE)
    options = {"kl_coef": 0.5, "gamma": 1.0, "lam": lam, "whiten": False}
    with use_backend("triton"):
        advantages, returns, _, _ = kl_shaped_gae(scores, *x[:3], mask, **options)
    exact = kl_shaped_gae(scores.double(), *x[:3].double(), mask, **options)
    torch.testing.assert_close(advantages.double(), exact[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(returns.double(), exact[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("size", [1, 7, 16, 17, 53])
def test_whiten_matches_the_reference_in_one_program_and_in_several(shift_mean, size):
    """Up to 16 in one launch, 8 or 16 wide. A mean of 1000 would cancel all digits of a variance of squares."""
    generator = torch.Generator().manual_seed(size)
    x, mask = torch.randn(size, generator=generator) + 1000.0, torch.rand(size, generator=generator) < 0.7
    x[~mask] = NAN
    x, mask = x.to(DEVICE), mask.to(DEVICE)
    with use_backend("triton"):
        result = whiten(x, mask, shift_mean=shift_mean)
        assert (whiten(x, torch.zeros_like(mask)) == 0).all()
    torch.testing.assert_close(result.double(), whiten(x.double(), mask, shift_mean=shift_mean), rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("groups", ["of 6", "of 2", "by ids"])
def test_group_advantages_match_the_reference(scale, baseline, groups):
    """30 rewards, a fifth of them NaN. Programs own 4 each, so groups cross them, or share one; ids are far apart."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(30, generator=generator)
    rewards[torch.rand(30, generator=generator) < 0.2] = NAN
    ids = torch.tensor([-5, 10**12, 3, 77, 78])[torch.randint(5, (30,), generator=generator)].to(DEVICE)
    rewards = rewards.to(DEVICE)
    how = {"group_ids": ids} if groups == "by ids" else {"group_size": int(groups[3:])}
    with use_backend("triton"):
        result = group_advantages(rewards, scale=scale, baseline=baseline, **how)
    exact = group_advantages(rewards.double(), scale=scale, baseline=baseline, **how)
    torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=1e-7)


def test_equal_rewards_have_no_advantage_and_lone_ones_neither():
    """0.1 has no exact float32: a mean in float32 would leave a rounding error, divided by 1e-4."""
    rewards = torch.full((14,), 0.1, device=DEVICE)
    with use_backend("triton"):
        for scale in ("group", "batch", "none"):
            assert (group_advantages(rewards, 7, scale=scale) == 0).all()
            assert (group_advantages(torch.randn(3, device=DEVICE), 1, scale=scale) == 0).all()
        assert (group_advantages(torch.full((6,), NAN, device=DEVICE), 3) == 0).all()
        assert group_advantages(torch.zeros(0, device=DEVICE), 4).shape == (0,)
