"""Losses of reward models: by hand, in plain Python, and in their limits."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_fast.kernels import pairwise_reward_loss, ranked_reward_loss

FAMILY = "reward"
pytestmark = pytest.mark.usefixtures("everywhere")

NAN = float("nan")


def test_pairwise_loss_by_hand():
    """Rewards 2 and 1, margin 1/2: log(1 + e^-0.5); centering 0.1 adds 0.1 * 3^2 = 0.9."""
    chosen, rejected = torch.tensor([2.0]), torch.tensor([1.0])
    margin = torch.tensor([0.5])
    assert pairwise_reward_loss(chosen, rejected).item() == pytest.approx(math.log1p(math.exp(-1)))
    loss = pairwise_reward_loss(chosen, rejected, margin=margin, center=0.1)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.5)) + 0.9)


def test_pairwise_gradients_and_extremes():
    inputs = [x.requires_grad_() for x in torch.randn(3, 5, dtype=torch.float64).unbind()]
    assert torch.autograd.gradcheck(lambda c, r, m: pairwise_reward_loss(c, r, margin=m, center=0.3), inputs)
    chosen = torch.tensor([-500.0, 500.0], requires_grad=True)
    loss = pairwise_reward_loss(chosen, torch.zeros(2))
    loss.sum().backward()
    assert loss.tolist() == [500.0, 0.0]
    assert chosen.grad.tolist() == [-1.0, 0.0]
    assert pairwise_reward_loss(torch.zeros(1).half(), torch.zeros(1).half()).dtype == torch.float32


def plackett_luce(scores):
    """-log of the product of each response's share among those not placed yet."""
    return -sum(math.log(math.exp(scores[k]) / sum(math.exp(s) for s in scores[k:])) for k in range(len(scores)))


def test_ranked_loss_by_hand():
    """Scores ln 3, ln 2, 0: 3 of 6, then 2 of 3: the probability of this order is 1/3."""
    scores = torch.tensor([[math.log(3), math.log(2), 0.0]])
    assert ranked_reward_loss(scores, torch.ones(1, 3, dtype=torch.bool)).item() == pytest.approx(math.log(3))


def test_ranked_loss_skips_masked_places_wherever_they_stand():
    """NaN in the masked places; rows of 4, 3, 2, 1 and 0 responses."""
    scores = torch.tensor(
        [[1.0, 0.5, -0.3, 2.0], [1.0, NAN, -0.3, 2.0], [NAN, 0.5, NAN, 2.0], [NAN, NAN, NAN, 2.0], [NAN] * 4],
        dtype=torch.float64,
    )
    mask = ~scores.isnan()
    leaf = scores.clone().requires_grad_()
    loss = ranked_reward_loss(leaf, mask)
    expected = [plackett_luce(row[m].tolist()) for row, m in zip(scores, mask)]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))
    loss.sum().backward()
    assert leaf.grad.isfinite().all() and (leaf.grad[~mask] == 0).all()


def test_two_ranked_responses_are_a_bradley_terry_pair():
    scores = torch.randn(7, 2)
    ranked = ranked_reward_loss(scores, torch.ones(7, 2, dtype=torch.bool))
    torch.testing.assert_close(ranked, pairwise_reward_loss(scores[:, 0], scores[:, 1]))


def test_ranked_gradients_and_extremes():
    mask = torch.tensor([[1, 1, 1], [1, 0, 1]]).bool()
    scores = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: ranked_reward_loss(s, mask), scores)
    far = torch.tensor([[-1e4, 0.0, 1e4]], requires_grad=True)
    loss = ranked_reward_loss(far, torch.ones(1, 3, dtype=torch.bool))
    loss.sum().backward()
    assert loss.item() == 3e4 and far.grad.isfinite().all()
    assert ranked_reward_loss(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool)).shape == (0,)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="share one shape"):
        pairwise_reward_loss(torch.zeros(2), torch.zeros(2), margin=torch.zeros(1))
    with pytest.raises(ValueError, match="must be"):
        ranked_reward_loss(torch.zeros(2, 3), torch.ones(2, 3))
