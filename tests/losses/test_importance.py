"""Weights worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_fast.losses import sequence_importance


def test_a_sequences_weight_is_the_product_of_its_ratios_cut_at_the_clip_by_hand():
    """Ratios 2 * 0.5 * 1.5 = 1.5; 2 * 2 = 4, cut at 3; 0.25 * 0.5 = 0.125. A prompt's token counts for nothing, NaN or not."""
    ratios = torch.tensor([float("nan"), 2.0, 0.5, 1.5, 9.0, 2.0, 2.0, 0.25, 0.5])
    mask = torch.tensor([False, True, True, True, False, True, True, True, True])
    rollout = torch.full((9,), -1.0)
    old = (rollout + ratios.log()).requires_grad_()
    weights = sequence_importance(old, rollout, mask, torch.tensor([0, 4, 7, 9], dtype=torch.int32), clip=3.0)
    torch.testing.assert_close(weights, torch.tensor([1.5] * 4 + [3.0] * 3 + [0.125] * 2))
    assert not weights.requires_grad


@pytest.mark.parametrize("gap", [1000.0, -1000.0])
def test_an_engine_that_is_far_off_gives_a_finite_weight(gap):
    """A sum of 1,000 nats would overflow float32."""
    old = torch.full((4,), gap / 4)
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    weights = sequence_importance(old, torch.zeros(4), torch.ones(4, dtype=torch.bool), cu_seqlens, math.inf)
    assert weights.isfinite().all()
    assert weights[0] == (torch.tensor(80.0).exp() if gap > 0 else 0)
