"""Reward modelling: learn a score from comparisons of responses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_fast.data.batch import Example, Preference
from rlhf_fast.data.prepare import prepare_preferences
from rlhf_fast.kernels import pairwise_reward_loss, ranked_reward_loss

from .config import TrainerConfig
from .trainer import Trainer, Window


@dataclass(kw_only=True)
class RewardConfig(TrainerConfig):
    output_dir: str = "runs/reward"  # the run folder: model, checkpoints, metrics, plots
    max_length: int = 1024  # tokens of prompt and response; longer rows are cut, and how many is reported
    center_rewards_coefficient: float = 0.01  # weight of (sum of a pair's scores)^2, which keeps scores around 0
    allow_truncation: bool = False  # go on when more than 1% of the rows are cut


class RewardTrainer(Trainer):
    """Bradley-Terry on pairs (Ouyang et al. 2022, arXiv:2203.02155, eq. 1), Plackett-Luce on longer rankings.

    The score is a scalar head on the last token's hidden state.
    """

    config_class = RewardConfig
    method = "reward"
    headline = ("accuracy", "margin")
    role = "reward"
    learning_rates = (1e-5, 1e-4)

    def add_roles(self) -> None:
        if "reward" not in self.policy.heads:
            self.policy.add_head("reward")

    def prepare_data(self, records) -> list[Preference]:
        a = self.args
        preferences, report = prepare_preferences(
            records, self.tokenizer, max_length=a.max_length, allow_truncation=a.allow_truncation, **self.tokenizing
        )
        self.say(report)
        return preferences

    def size(self, record: Preference) -> float:
        return len(record)

    def examples(self, record: Preference) -> list[Example]:
        return record.responses

    def losses(self, records: list[Preference], window: Window) -> Iterator[tuple[Tensor, dict, float]]:
        counts = torch.tensor([len(r.responses) for r in records])
        batch = self.pack([e for r in records for e in r.responses])
        flat = self.model(batch, output="scores")
        exists = (torch.arange(int(counts.max())) < counts[:, None]).to(flat.device)
        scores = flat.new_zeros(exists.shape).masked_scatter(exists, flat)  # (B, K), best first
        margin = torch.tensor([r.margin or 0.0 for r in records], device=flat.device)
        center = self.args.center_rewards_coefficient
        losses = pairwise_reward_loss(scores[:, 0], scores[:, 1], margin=margin, center=center)
        if exists.shape[1] > 2:  # row by row, so that a pair's loss does not depend on what shares its micro-batch
            losses = torch.where(exists[:, 2], ranked_reward_loss(scores, exists), losses)
        yield losses.sum() / window.records, score_metrics(scores.detach(), exists), len(records)


def score_metrics(scores: Tensor, exists: Tensor) -> dict[str, Tensor]:
    """How well scores (B, K), best first, order their rows: accuracy is the share of pairs in the right order, the mean
    over rows. A tie counts as half, so that a constant score has accuracy 0.5.
    """
    pairs = (exists[:, :, None] & exists[:, None, :]).triu(1)
    difference = scores[:, :, None] - scores[:, None, :]
    right = (difference > 0).float() + 0.5 * (difference == 0).float()
    count = pairs.sum((1, 2))
    present = scores[exists]
    return {
        "accuracy": ((right * pairs).sum((1, 2)) / count).mean(),
        "margin": ((difference * pairs).sum((1, 2)) / count).mean(),
        "min_reward": present.min(),
        "mean_reward": ((scores * exists).sum(1) / exists.sum(1)).mean(),
        "max_reward": present.max(),
    }
