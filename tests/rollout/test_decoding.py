"""Sampling and the cache, on numbers small enough to work out by hand."""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicLayer

from rlhf_fast.rollout.decoding import GrowingLayer, invert_cdf, keep_top


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


def test_a_growing_layer_holds_what_a_dynamic_layer_holds():
    """Prefill of 5, rows repeated, 60 single tokens past two reallocations, rows dropped half way."""
    torch.manual_seed(0)
    ours, theirs = GrowingLayer(limit=1000), DynamicLayer()
    rows = 2
    for step in range(61):
        new = [torch.randn(rows, 3, 5 if step == 0 else 1, 4) for _ in range(2)]
        for mine, other in zip(ours.update(*new), theirs.update(*new)):
            assert torch.equal(mine, other)
        if step in (0, 30):
            picked = torch.tensor([0, 0, 1, 1, 1]) if step == 0 else torch.tensor([1, 4])
            ours.batch_select_indices(picked)
            theirs.batch_select_indices(picked)
            rows = len(picked)
        assert ours.get_seq_length() == theirs.get_seq_length() == 5 + step


def test_a_growing_layer_seldom_moves_its_contents():
    layer, places = GrowingLayer(limit=1000), set()
    for _ in range(400):
        layer.update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
        places.add(layer.keys.data_ptr())
    assert len(places) <= 10


def test_a_cache_never_makes_more_room_than_the_longest_sequence_needs():
    """A quarter more than 40 tokens would be 72 places; a limit that was wrong is no reason to lose a token."""
    layer = GrowingLayer(limit=50)
    for count in (40, 1, 9, 1):
        layer.update(torch.zeros(2, 1, count, 4), torch.zeros(2, 1, count, 4))
        assert layer.buffers[0].shape[2] == max(50, layer.get_seq_length())
