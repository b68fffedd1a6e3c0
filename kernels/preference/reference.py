"""One row per loss: a function of the log-ratios w (chosen) and l (rejected) against the reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def _sigmoid(w: Tensor, l: Tensor, beta: float, eps: float) -> Tensor:
    """DPO; with eps conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences")."""
    d = beta * (w - l)
    return -(1 - eps) * logsigmoid(d) - eps * logsigmoid(-d)


def _robust(w: Tensor, l: Tensor, beta: float, eps: float) -> Tensor:
    """Robust DPO, unbiased under a share eps of flipped labels (arXiv:2403.00409, eq. 12)."""
    d = beta * (w - l)
    return (-(1 - eps) * logsigmoid(d) + eps * logsigmoid(-d)) / (1 - 2 * eps)


def _ipo(w: Tensor, l: Tensor, beta: float, eps: float) -> Tensor:
    """IPO (arXiv:2310.12036, eq. 17)."""
    return (w - l - 1 / (2 * beta)).square()


def _hinge(w: Tensor, l: Tensor, beta: float, eps: float) -> Tensor:
    """SLiC's hinge on DPO's margin (arXiv:2305.10425)."""
    return torch.relu(1 - beta * (w - l))


def _exo_pair(w: Tensor, l: Tensor, beta: float, eps: float) -> Tensor:
    """EXO, the reverse KL to the labels smoothed by eps (arXiv:2402.00856, eq. 16)."""
    d = beta * (w - l)
    wins = torch.sigmoid(d) * (logsigmoid(d) - math.log1p(-eps))
    return wins + torch.sigmoid(-d) * (logsigmoid(-d) - math.log(eps))


def _nca_pair(w: Tensor, l: Tensor, beta: float, eps: float) -> Tensor:
    """NCA for pairs (arXiv:2402.05369): absolute rewards, so the chosen one does not sink along."""
    return -logsigmoid(beta * w) - 0.5 * logsigmoid(-beta * w) - 0.5 * logsigmoid(-beta * l)


def _sppo_hard(w: Tensor, l: Tensor, beta: float, eps: float) -> Tensor:
    """SPPO with hard labels (arXiv:2405.00675, eq. 4.7)."""
    return (w - 0.5 / beta).square() + (l + 0.5 / beta).square()


def _apo_zero(w: Tensor, l: Tensor, beta: float, eps: float) -> Tensor:
    """APO-zero: chosen responses are better than the model's own (arXiv:2408.06266, eq. 7)."""
    return torch.sigmoid(-beta * w) + torch.sigmoid(beta * l)


def _apo_down(w: Tensor, l: Tensor, beta: float, eps: float) -> Tensor:
    """APO-down: chosen responses are worse than the model's own (arXiv:2408.06266, eq. 8)."""
    return torch.sigmoid(beta * w) + torch.sigmoid(-beta * (w - l))


KINDS = {
    "sigmoid": _sigmoid,
    "ipo": _ipo,
    "hinge": _hinge,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
}
SMOOTHED = ("sigmoid", "robust", "exo_pair")
