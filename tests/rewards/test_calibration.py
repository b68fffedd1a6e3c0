"""The calibration of a reward model by hand, and on pairs whose probabilities are known."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_fast.rewards.calibration import calibration


def test_five_pairs_by_hand():
    """Probabilities of the preferred response 0.91, 0.91, 0.09, 0.61, 0.5. The model is 0.91 sure of three pairs and right on two of
    them: gap 0.91 - 2/3. It is 0.61 and 0.5 sure of the others, right on the first and half on the tie: both lie in their own
    bin of ten, gaps 0.39 and 0."""
    probabilities = torch.tensor([0.91, 0.91, 0.09, 0.61, 0.5], dtype=torch.float64)
    report = calibration(torch.logit(probabilities), bins=10)
    assert report["pairs"] == 5
    assert report["accuracy"] == pytest.approx(3.5 / 5)
    assert report["ece"] == pytest.approx((3 * (0.91 - 2 / 3) + (1 - 0.61) + 0) / 5)
    assert report["brier"] == pytest.approx((2 * 0.09**2 + 0.91**2 + 0.39**2 + 0.25) / 5)
    assert report["nll"] == pytest.approx(-(2 * math.log(0.91) + math.log(0.09) + math.log(0.61) + math.log(0.5)) / 5)
    assert [(b["pairs"], round(b["from"], 2)) for b in report["bins"]] == [(1, 0.5), (1, 0.6), (3, 0.9)]


def test_labels_drawn_from_the_models_own_probabilities_are_calibrated_and_doubled_scores_are_not():
    torch.manual_seed(0)
    true = torch.randn(40_000, dtype=torch.float64) * 1.5
    wins = torch.rand(40_000, dtype=torch.float64) < torch.sigmoid(true)
    differences = torch.where(wins, true, -true)
    assert calibration(differences)["ece"] < 0.01
    overconfident = calibration(2 * differences)
    assert overconfident["ece"] > 0.08
    assert overconfident["mean_confidence"] > overconfident["accuracy"] + 0.08


def test_a_certain_model_falls_into_the_last_bin():
    report = calibration(torch.tensor([500.0, -500.0]))
    (last,) = report["bins"]
    assert last["to"] == 1.0 and last["pairs"] == 2 and report["ece"] == pytest.approx(0.5)
