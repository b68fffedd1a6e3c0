"""Reward modelling: learn a score from comparisons of responses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlhf_fast.data.batch import Example, Preference
from rlhf_fast.data.prepare import Report, prepare_preferences
from rlhf_fast.errors import UserError
from rlhf_fast.kernels import pairwise_reward_loss, ranked_reward_loss
from rlhf_fast.rewards.calibration import calibration

from .config import TrainerConfig
from .trainer import Trainer, Window


@dataclass(kw_only=True)
class RewardConfig(TrainerConfig):
    output_dir: str = "runs/reward"  # the run folder: model, checkpoints, metrics, plots
    max_length: int = 1024  # tokens of prompt and response; longer rows are cut, and how many is reported
    center_rewards_coefficient: float = 0.01  # weight of (sum of a pair's scores)^2, which keeps scores around 0
    num_heads: int = 1  # heads on the one base; of several the mean is the score and the spread says how sure it is
    allow_truncation: bool = False  # go on when more than 1% of the rows are cut

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads < 1:
            raise UserError(f"num_heads is {self.num_heads}; it must be at least 1")


class RewardTrainer(Trainer):
    """Bradley-Terry on pairs (Ouyang et al. 2022, arXiv:2203.02155, eq. 1), Plackett-Luce on longer rankings.

    The score is a scalar head on the last token's hidden state. Heads of an ensemble see the same rows with weights of their
    own (a Bayesian bootstrap, Rubin 1981): they agree where the data decides, and part where it does not.
    """

    config_class = RewardConfig
    method = "reward"
    headline = ("accuracy", "margin")
    role = "reward"
    learning_rates = (1e-5, 1e-4)

    def add_roles(self) -> None:
        self._differences: list[Tensor] = []  # of the scores in pairs that an evaluation has seen
        if "reward" not in self.policy.heads:
            self.policy.add_head("reward", count=self.args.num_heads)
        elif (there := self.policy.heads["reward"].count) != self.args.num_heads:
            raise UserError(f"num_heads is {self.args.num_heads}, but the reward model to go on with has {there}")

    @classmethod
    def tokenize(cls, records, tokenizer, args: RewardConfig, **options) -> tuple[list[Preference], Report]:
        limits = {"max_length": args.max_length, "allow_truncation": args.allow_truncation}
        return prepare_preferences(records, tokenizer, **limits, **options)

    def prepare_data(self, records, name: str = "train") -> list[Preference]:
        a, preferences = self.args, super().prepare_data(records, name)
        if a.num_heads > 1 and name == "train":
            weights = torch.empty(len(preferences), a.num_heads)
            weights.exponential_(generator=torch.Generator().manual_seed(a.seed))
            for preference, of_heads in zip(preferences, (weights / weights.mean(0)).tolist()):
                preference.head_weights = of_heads
        return preferences

    def size(self, record: Preference) -> float:
        return len(record)

    def counts(self, records: list[Preference]) -> tuple[float, ...]:
        return sum(r.weight for r in records), sum(map(self.size, records))

    def examples(self, record: Preference) -> list[Example]:
        return record.responses

    def losses(self, records: list[Preference], window: Window) -> Iterator[tuple[Tensor, dict, float]]:
        counts = torch.tensor([len(r.responses) for r in records])
        batch = self.pack([e for r in records for e in r.responses])
        flat = self.model(batch, output="head_scores").T  # (H, responses)
        exists = (torch.arange(int(counts.max())) < counts[:, None]).to(flat.device)
        each = flat.new_zeros(len(flat), *exists.shape).masked_scatter(exists, flat)  # (H, B, K), best first
        weights = torch.tensor([r.head_weights or [1.0] * len(flat) for r in records]).T
        weights = (weights * torch.tensor([r.weight for r in records])).to(flat.device)
        losses = (weights * self._row_losses(each, exists, records)).sum() / len(flat)
        yield losses / window.records, self._figures(each.detach(), exists), len(records)

    def _row_losses(self, scores: Tensor, exists: Tensor, records: list[Preference]) -> Tensor:
        """Of every head and row, (H, B). A row's does not depend on what shares its micro-batch."""
        heads = len(scores)
        margin = torch.tensor([r.margin or 0.0 for r in records], device=scores.device).repeat(heads)
        center = self.args.center_rewards_coefficient
        scores = scores.flatten(0, 1)
        losses = pairwise_reward_loss(scores[:, 0], scores[:, 1], margin=margin, center=center)
        if exists.shape[1] > 2:
            exists = exists.repeat(heads, 1)
            losses = torch.where(exists[:, 2], ranked_reward_loss(scores, exists), losses)
        return losses.view(heads, -1)

    def _figures(self, each: Tensor, exists: Tensor) -> dict[str, Tensor]:
        scores = each.mean(0)
        figures = score_metrics(scores, exists)
        if not torch.is_grad_enabled():
            figures["kendall_tau"] = 2 * figures["accuracy"] - 1
            pairs = (exists[:, :, None] & exists[:, None, :]).triu(1)
            self._differences.append((scores[:, :, None] - scores[:, None, :])[pairs])
        if len(each) > 1:
            figures["disagreement"] = each.std(0, correction=0)[exists].mean()
        return figures

    def evaluate(self) -> dict[str, float]:
        """Mean losses and metrics over ``eval_dataset``, and how well calibrated the scores are: also as a file."""
        self._differences = []
        figures = super().evaluate()
        mine = [d for part in self._differences for d in part.tolist()]
        report = calibration(torch.tensor(self.ranks.gather(mine)))
        path = Path(self.args.output_dir) / "reward_calibration.json"
        if self.accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"step": self.step, **report}, indent=1) + "\n")
        self.say(
            f"calibration at step {self.step}: {report['mean_confidence']:.1%} sure and {report['accuracy']:.1%} right on "
            f"{report['pairs']:,} pairs, off by {report['ece']:.1%} on average ({path})"
        )
        return figures | {"eval_ece": report["ece"]}


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
