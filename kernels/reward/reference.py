"""The definitions, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def pairwise_reward_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None, center: float) -> Tensor:
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    loss = -logsigmoid(difference)
    return loss + center * (chosen + rejected).square() if center else loss


def ranked_reward_loss(scores: Tensor, mask: Tensor) -> Tensor:
    places = scores.shape[1]
    scores = torch.where(mask, scores, 0.0)
    # remaining[b, k, j]: response j is still to be placed when place k is filled. A masked place k keeps itself,
    # so that no logsumexp is taken of nothing.
    later = torch.ones(places, places, dtype=torch.bool, device=scores.device).triu()
    itself = torch.eye(places, dtype=torch.bool, device=scores.device)
    remaining = later & (mask[:, None, :] | itself)
    log_total = torch.where(remaining, scores[:, None, :], float("-inf")).logsumexp(-1)
    return torch.where(mask, log_total - scores, 0.0).sum(-1)
