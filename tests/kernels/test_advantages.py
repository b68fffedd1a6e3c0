"""Rewards and advantages against loops written here, in float64, one sequence and one token at a time."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_fast.kernels import gae, group_advantages, kl_penalty, kl_shaped_gae, shaped_rewards, whiten

FAMILY = "advantages"
NAN = float("nan")


def gae_loop(rewards, values, mask, gamma, lam, bootstrap=0.0):
    """One sequence, plain Python, the recursion of the paper over its unmasked tokens."""
    advantages, returns = [0.0] * len(rewards), [0.0] * len(rewards)
    advantage, next_value = 0.0, float(bootstrap)
    for t in reversed(range(len(rewards))):
        if mask[t]:
            delta = float(rewards[t]) + gamma * next_value - float(values[t])
            advantage = delta + gamma * lam * advantage
            next_value = float(values[t])
            advantages[t], returns[t] = advantage, advantage + next_value
    return torch.tensor([advantages, returns], dtype=torch.float64)


def problem(num_sequences, length, device="cpu", seed=0, dtype=torch.float32):
    """Random rewards and values, NaN where masked; masks with gaps anywhere, one sequence all masked."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, num_sequences, length, generator=generator).to(dtype)
    mask = torch.rand(num_sequences, length, generator=generator) < 0.7
    if num_sequences > 2:
        mask[1] = False
    bootstrap = torch.randn(num_sequences, generator=generator).to(dtype)
    rewards[~mask], values[~mask] = NAN, NAN
    return tuple(x.to(device) for x in (rewards, values, mask, bootstrap))


def test_gae_by_hand(backend, device):
    """gamma = lam = 1/2, r = 1 2 3, V = 1 1 1: deltas 1/2, 3/2, 2; A_3 = 2, A_2 = 3/2 + 2/4 = 2, A_1 = 1/2 + 2/4 = 1.

    With a value of 4 after the end, delta_3 = 2 + 4/2 = 4, A_2 = 3/2 + 4/4 = 5/2, A_1 = 1/2 + 5/8 = 9/8.
    """
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]], device=device), torch.ones(1, 3, device=device)
    mask = torch.ones(1, 3, dtype=torch.bool, device=device)
    advantages, returns = gae(rewards, values, mask, 0.5, 0.5)
    assert advantages.tolist() == [[1.0, 2.0, 2.0]]
    assert returns.tolist() == [[2.0, 3.0, 3.0]]
    advantages, _ = gae(rewards, values, mask, 0.5, 0.5, bootstrap=torch.tensor([4.0], device=device))
    assert advantages.tolist() == [[1.125, 2.5, 4.0]]


def test_gae_skips_masked_tokens_wherever_they_stand(backend, device):
    """Tool output inside, padding on either side: the same numbers as the three tokens alone."""
    rewards = torch.tensor([[NAN, 1.0, NAN, 2.0, 3.0, NAN]], device=device)
    values = torch.tensor([[NAN, 1.0, NAN, 1.0, 1.0, NAN]], device=device)
    advantages, returns = gae(rewards, values, ~rewards.isnan(), 0.5, 0.5)
    assert advantages.tolist() == [[0.0, 1.0, 0.0, 2.0, 2.0, 0.0]]
    assert returns.tolist() == [[0.0, 2.0, 0.0, 3.0, 3.0, 0.0]]


@pytest.mark.parametrize(
    ("gamma", "lam", "shape", "truncated"),
    [
        (1.0, 0.95, (4, 37), False),
        (0.9, 0.0, (4, 37), True),
        (0.99, 1.0, (4, 37), True),
        (0.9, 0.8, (1, 1), True),
        (0.9, 0.8, (3, 64), False),
        (0.99, 0.95, (1, 1100), True),
    ],
)
def test_gae_matches_the_loop(backend, device, gamma, lam, shape, truncated):
    """64 tokens fill a block of the Triton scan, 1100 need two, with a carry between them."""
    rewards, values, mask, bootstrap = problem(*shape, device)
    after = bootstrap if truncated else torch.zeros_like(bootstrap)
    rows = zip(*(x.cpu() for x in (rewards, values, mask, after)))
    expected = torch.stack([gae_loop(r, v, m, gamma, lam, b) for r, v, m, b in rows], 1)
    results = gae(rewards, values, mask, gamma, lam, bootstrap=bootstrap if truncated else None)
    for actual, exact in zip(results, expected):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.cpu().double(), exact, rtol=2e-6, atol=2e-6 * exact.abs().max().item() + 1e-6)


@pytest.mark.parametrize("lengths", [[5, 1, 0, 7], [0], [], [70, *[1] * 70], [0, 0, 4, 0]])
@pytest.mark.parametrize("truncated", [False, True])
def test_packed_gae_matches_the_loop(backend, device, lengths, truncated):
    """Empty sequences first, last and between; 70 tokens are three blocks, which the mean length makes 32 wide."""
    rewards, values, mask, _ = problem(1, sum(lengths), device, seed=1)
    rewards, values, mask = rewards[0], values[0], mask[0]
    bootstrap = torch.randn(len(lengths), generator=torch.Generator().manual_seed(2)).to(device)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    after = bootstrap if truncated else torch.zeros_like(bootstrap)
    rows = zip(*(x.cpu().split(lengths) for x in (rewards, values, mask)), after.cpu())
    parts = [gae_loop(r, v, m, 0.97, 0.9, b) for r, v, m, b in rows]
    expected = torch.cat(parts, 1) if parts else torch.zeros(2, 0, dtype=torch.float64)
    results = gae(rewards, values, mask, 0.97, 0.9, bootstrap=bootstrap if truncated else None, cu_seqlens=cu_seqlens)
    for actual, exact in zip(results, expected):
        torch.testing.assert_close(actual.cpu().double(), exact, rtol=3e-6, atol=3e-6)


def test_advantage_and_value_pass_over_a_long_gap(backend, device):
    """Masked tokens 20 to 130 of 150 are whole blocks of the scan; 30 short sequences keep its blocks small."""
    lengths = [150, *[1] * 30]
    rewards, values, _, _ = problem(1, sum(lengths), device, seed=3)
    rewards, values = rewards[0].nan_to_num(0.3), values[0].nan_to_num(-0.2)
    mask = torch.ones(sum(lengths), dtype=torch.bool, device=device)
    mask[20:130] = False
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    advantages, _ = gae(rewards, values, mask, 0.97, 0.9, cu_seqlens=cu_seqlens)
    expected = gae_loop(rewards[:150].cpu(), values[:150].cpu(), mask[:150], 0.97, 0.9)[0]
    torch.testing.assert_close(advantages[:150].cpu().double(), expected, rtol=3e-6, atol=3e-6)


def test_gae_takes_any_float_and_any_strides(backend, device):
    """bf16 rewards, transposed values, one row for all; computed in float32 from the same numbers."""
    rewards = torch.randn(5, 1, device=device).bfloat16().expand(5, 6).t()
    values = torch.randn(5, 6, device=device).t()
    mask = torch.ones(1, 5, dtype=torch.bool, device=device).expand(6, 5)
    advantages, returns = gae(rewards, values.requires_grad_(), mask)
    expected = [gae_loop(r, v, m, 1.0, 0.95) for r, v, m in zip(rewards.float().cpu(), values.detach().cpu(), mask)]
    results = torch.stack([advantages, returns], 1).cpu().double()
    torch.testing.assert_close(results, torch.stack(expected), rtol=3e-6, atol=3e-6)
    assert not advantages.requires_grad


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_gae_of_nothing_is_nothing(backend, device, shape):
    x = torch.zeros(shape, device=device)
    advantages, returns = gae(x, x, x.bool())
    assert advantages.shape == returns.shape == shape


def test_a_sequence_does_not_depend_on_its_batch(backend, device):
    rewards, values, mask, _ = problem(6, 50, device)
    together, _ = gae(rewards, values, mask)
    alone, _ = gae(rewards[3:4], values[3:4], mask[3:4])
    assert torch.equal(together[3:4], alone)


def test_gae_in_float64_stays_there():
    rewards, values, mask, bootstrap = problem(4, 30, dtype=torch.float64)
    advantages, _ = gae(rewards, values, mask, 0.9, 0.8, bootstrap=bootstrap)
    rows = [gae_loop(r, v, m, 0.9, 0.8, b)[0] for r, v, m, b in zip(rewards, values, mask, bootstrap)]
    torch.testing.assert_close(advantages, torch.stack(rows), rtol=1e-13, atol=1e-13)


def test_gae_operators_pass_opcheck_and_compile():
    rewards, values, mask, bootstrap = problem(3, 5)
    cu_seqlens = torch.tensor([0, 4, 4, 15], dtype=torch.int32)
    packed = (rewards.flatten(), values.flatten(), mask.flatten(), bootstrap, cu_seqlens, 0.9, 0.8)
    torch.library.opcheck(torch.ops.rlhf_fast.gae, (rewards, values, mask, bootstrap, 0.9, 0.8))
    torch.library.opcheck(torch.ops.rlhf_fast.gae_packed, packed)
    compiled = torch.compile(gae, fullgraph=True, backend="aot_eager")(rewards, values, mask)
    assert torch.equal(compiled[0], gae(rewards, values, mask)[0])


def test_gae_refuses_what_does_not_fit():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="values must have the mask's shape"):
        gae(x, torch.zeros(2, 4), mask)
    with pytest.raises(ValueError, match="mask must be bool"):
        gae(x, x, x)
    with pytest.raises(ValueError, match="bootstrap must be one value per sequence"):
        gae(x, x, mask, bootstrap=torch.zeros(3))
    with pytest.raises(ValueError, match=r"must be \(B, T\)"):
        gae(x[0], x[0], mask[0])


def test_shaped_rewards_by_hand():
    """kl_coef 0.1, k1 = logprob - ref: -0.1 * (-1 + 2) = -0.1, then 0.1 * 0.5 + score 3; the score's place is the last
    response token, not the last column."""
    logprobs = torch.tensor([[NAN, -1.0, -2.0, NAN], [-3.0, NAN, NAN, NAN]])
    ref_logprobs = torch.tensor([[NAN, -2.0, -1.5, NAN], [-3.5, NAN, NAN, NAN]])
    rewards = shaped_rewards(torch.tensor([3.0, -7.0]), logprobs, ref_logprobs, ~logprobs.isnan(), kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[0.0, -0.1, 3.05, 0.0], [-7.05, 0.0, 0.0, 0.0]]))
    clipped = shaped_rewards(
        torch.tensor([3.0, -7.0]), logprobs, ref_logprobs, ~logprobs.isnan(), kl_coef=0.1, clip=2.0
    )
    torch.testing.assert_close(clipped, torch.tensor([[0.0, -0.1, 2.05, 0.0], [-2.05, 0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3+", "abs"])
def test_packed_shaped_rewards_match_a_loop(estimator):
    """Sequences of 3, 0, 4 and 2 tokens, the last without a response token: its score has no place."""
    lengths, generator = [3, 0, 4, 2], torch.Generator().manual_seed(0)
    logprobs, ref = -torch.rand(2, 9, generator=generator, dtype=torch.float64)
    mask = torch.tensor([0, 1, 0, 1, 1, 1, 0, 0, 0]).bool()
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    rewards = shaped_rewards(scores, logprobs, ref, mask, kl_coef=0.3, estimator=estimator, cu_seqlens=cu_seqlens)
    expected = torch.where(mask, -0.3 * kl_penalty(logprobs, ref, estimator), 0.0)
    expected[1] += 1.0
    expected[5] += 3.0
    torch.testing.assert_close(rewards, expected)


@pytest.mark.parametrize("packed", [False, True])
def test_kl_shaped_gae_is_its_three_parts(packed):
    """Returns are those before whitening, and the KL is unweighted."""
    values, logprobs, mask, bootstrap = problem(3, 20, seed=4)
    ref = torch.where(mask, logprobs - 0.1, NAN)
    scores = torch.tensor([1.0, -2.0, 0.5])
    shape = {}
    if packed:
        values, logprobs, mask, ref = (x.flatten() for x in (values, logprobs, mask, ref))
        shape = {"cu_seqlens": torch.tensor([0, 20, 40, 60], dtype=torch.int32)}
    advantages, returns, rewards, kl = kl_shaped_gae(
        scores, logprobs, ref, values, mask, kl_coef=0.2, gamma=0.9, lam=0.8, clip=1.5, bootstrap=bootstrap, **shape
    )
    expected = shaped_rewards(scores, logprobs, ref, mask, kl_coef=0.2, clip=1.5, **shape)
    raw, raw_returns = gae(expected, values, mask, 0.9, 0.8, bootstrap=bootstrap, **shape)
    assert torch.equal(rewards, expected) and torch.equal(returns, raw_returns)
    torch.testing.assert_close(advantages, whiten(raw, mask))
    torch.testing.assert_close(kl, torch.where(mask, 0.1, 0.0), rtol=1e-4, atol=1e-5)
    unwhitened = kl_shaped_gae(
        scores, logprobs, ref, values, mask, kl_coef=0.2, gamma=0.9, lam=0.8, whiten=False, clip=1.5,
        bootstrap=bootstrap, **shape,
    )[0]  # fmt: skip
    assert torch.equal(unwhitened, raw)


def test_whiten_by_hand():
    """1, 3, 5 have mean 3 and population variance 8/3; a fourth, masked, entry is NaN."""
    x = torch.tensor([[1.0, 3.0], [NAN, 5.0]])
    root = math.sqrt(8 / 3)
    torch.testing.assert_close(whiten(x, ~x.isnan()), torch.tensor([[-2 / root, 0.0], [0.0, 2 / root]]))
    kept = whiten(x, ~x.isnan(), shift_mean=False)
    torch.testing.assert_close(kept, torch.tensor([[3 - 2 / root, 3.0], [0.0, 3 + 2 / root]]))


def test_whiten_survives_constants_and_nothing():
    """Variance 0 gives 0, not NaN; so does an empty mask."""
    constant, nothing = torch.full((2, 3), 7.0), torch.zeros(2, 3, dtype=torch.bool)
    assert (whiten(constant, ~nothing) == 0).all()
    assert (whiten(constant, nothing) == 0).all()
    assert whiten(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool)).shape == (0, 3)


def test_whiten_gradients():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 4) < 0.7
    mask[0, :2] = True
    assert torch.autograd.gradcheck(lambda x: whiten(torch.where(mask, x, NAN), mask), x)


def group_loop(rewards, ids, scale, baseline):
    """Group by group, in float64, with the statistics module's formulas."""
    rewards = rewards.double()
    scored = [i for i, r in enumerate(rewards) if not r.isnan()]
    out = torch.zeros_like(rewards)
    batch_std = rewards[scored].std() if len(scored) > 1 else 0.0
    for i in scored:
        group = [j for j in scored if ids[j] == ids[i]]
        if len(group) < 2:
            continue
        others = [j for j in group if j != i] if baseline == "leave_one_out" else group
        spread = {"group": rewards[group].std() + 1e-4, "batch": batch_std + 1e-4, "none": 1.0}[scale]
        out[i] = (rewards[i] - rewards[others].mean()) / spread
    return out


def test_group_advantages_by_hand():
    """Rewards 0, 1, NaN: mean 1/2, std sqrt(1/2). A lone scored response and a group of NaN get 0."""
    rewards = torch.tensor([0.0, 1.0, NAN, 5.0, NAN, NAN])
    spread = math.sqrt(0.5) + 1e-4
    expected = torch.tensor([-0.5 / spread, 0.5 / spread, 0.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(group_advantages(rewards, 3), expected)
    leave = group_advantages(rewards, 3, scale="none", baseline="leave_one_out")
    torch.testing.assert_close(leave, torch.tensor([-1.0, 1.0, 0.0, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_group_advantages_match_the_loop(scale, baseline):
    """Groups by size, and by ids that are scattered, negative and far apart."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(24, generator=generator)
    rewards[torch.rand(24, generator=generator) < 0.2] = NAN
    ids = torch.tensor([-5, 10**12, 3, 77])[torch.randint(4, (24,), generator=generator)]
    by_id = group_advantages(rewards, group_ids=ids, scale=scale, baseline=baseline)
    torch.testing.assert_close(by_id, group_loop(rewards, ids, scale, baseline).float())
    by_size = group_advantages(rewards, 6, scale=scale, baseline=baseline)
    torch.testing.assert_close(by_size, group_loop(rewards, torch.arange(24) // 6, scale, baseline).float())


def test_equal_rewards_have_no_advantage_at_all():
    """0.1 has no exact float32: a mean in float32 would leave a rounding error, divided by 1e-4."""
    for scale in ("group", "batch", "none"):
        assert group_advantages(torch.full((7,), 0.1), 7, scale=scale).abs().max() < 1e-9
    assert group_advantages(torch.zeros(0), 4).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either group_size or group_ids"),
        ({"group_size": 2, "group_ids": torch.zeros(6, dtype=torch.long)}, "either group_size or group_ids"),
        ({"group_size": 4}, "do not divide"),
        ({"group_ids": torch.zeros(5, dtype=torch.long)}, "group_ids must be"),
        ({"group_size": 2, "scale": "std"}, "unknown scale 'std'"),
        ({"group_size": 2, "baseline": "max"}, "unknown baseline 'max'"),
    ],
)
def test_group_advantages_refuse_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.zeros(6), **arguments)
