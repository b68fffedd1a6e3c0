"""Whether a reward model is as sure as it is right: reliability of the probabilities that its scores stand for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def calibration(differences: Tensor, bins: int = 10) -> dict[str, Any]:
    r"""Reliability of :math:`\sigma(r_w - r_l)`, the probability that a Bradley-Terry model gives the preferred response.

    Pairs are told apart by the confidence of the model in the response that it scores higher, max(p, 1 - p), and each bin's
    mean confidence is compared with the share of its pairs in which people preferred that response (Guo et al. 2017,
    arXiv:1706.04599). A tie counts as half right.

    Args:
        differences: score of the preferred response minus that of the other one, of every pair. (N,) float, N >= 1.
        bins: of equal width from 0.5 to 1.
    Returns:
        ``pairs``, ``accuracy``, ``mean_confidence``; ``ece``, the expected calibration error: the gap between confidence and
        accuracy, averaged over pairs; ``brier``, mean squared error of the probability; ``nll`` in nats; and ``bins``, those
        that hold pairs.
    """
    differences = differences.double().flatten()
    confidence = torch.sigmoid(differences.abs())
    right = (differences > 0).double() + 0.5 * (differences == 0).double()
    which = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    table, gaps = [], 0.0
    for i in range(bins):
        inside = which == i
        if count := int(inside.sum()):
            sure, hit = float(confidence[inside].mean()), float(right[inside].mean())
            gaps += count * abs(sure - hit)
            table.append(
                {
                    "from": 0.5 + 0.5 * i / bins,
                    "to": 0.5 + 0.5 * (i + 1) / bins,
                    "pairs": count,
                    "mean_confidence": sure,
                    "accuracy": hit,
                }
            )
    return {
        "pairs": len(differences),
        "accuracy": float(right.mean()),
        "mean_confidence": float(confidence.mean()),
        "ece": gaps / len(differences),
        "brier": float(torch.sigmoid(-differences).square().mean()),
        "nll": float(torch.nn.functional.softplus(-differences).mean()),
        "bins": table,
    }
