"""Sampling, on numbers small enough to work out by hand and against transformers' own processors."""

from __future__ import annotations

import torch

from rlhf_fast.rollout.sampling import invert_cdf, keep_top


def test_the_cdf_is_inverted_exactly_and_impossible_tokens_are_never_drawn():
    """Weights 0, 1, 0, 3, 0: a fourth of [0, 1) belongs to index 1, the rest to index 3."""
    weights = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]]).expand(5, -1)
    uniforms = torch.tensor([0.0, 0.2499999, 0.25, 0.999999, 1 - 2**-53], dtype=torch.float64)
    assert invert_cdf(weights, uniforms).tolist() == [1, 1, 3, 3, 3]


def test_a_token_too_unlikely_for_float32_sums_is_still_drawn():
    """One token holds all but 1e-8 of the probability: float32 sums would not see the other."""
    weights = torch.tensor([[1.0, 1e-8]])
    assert invert_cdf(weights, torch.tensor([1 - 0.5e-8], dtype=torch.float64)).item() == 1


def test_top_k_then_top_p_by_hand():
    """0.4 0.3 0.2 0.1, shuffled. Top 3 renormalise to 4/9 3/9 2/9; p = 0.5 needs the first two, p = 0.4 the first."""
    weights = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).expand(4, -1)
    kept, order = keep_top(weights, torch.tensor([3, 3, 0, 2]), torch.tensor([0.5, 0.4, 0.95, 1.0]))
    assert order[0].tolist() == [1, 3, 2, 0]
    torch.testing.assert_close(
        kept, torch.tensor([[0.4, 0.3, 0, 0], [0.4, 0, 0, 0], [0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0, 0]])
    )
