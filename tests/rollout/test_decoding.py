"""The cache that grows in place, against the one that concatenates."""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicLayer

from rlhf_fast.rollout.decoding import GrowingLayer


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
