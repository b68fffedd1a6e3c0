"""Reward modelling: learn a score from comparisons of responses; of their worth, or, as a cost, of their harm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from rlhf_fast.data.batch import Example, Preference
from rlhf_fast.data.prepare import Report, prepare_preferences
from rlhf_fast.errors import UserError
from rlhf_fast.kernels import pairwise_reward_loss, ranked_reward_loss
from rlhf_fast.rewards.calibration import calibration
from rlhf_fast.rewards.model import KINDS

from .config import TrainerConfig, at_least, one_of
from .trainer import Trainer, Window


@dataclass(kw_only=True)
class RewardConfig(TrainerConfig):
    output_dir: str = "runs/reward"  # the run folder: model, checkpoints, metrics, plots
    max_length: int = 1024  # tokens of prompt and response; longer rows are cut, and how many is reported
    center_rewards_coefficient: float = 0.01  # weight of (sum of a pair's scores)^2, which keeps scores around 0
    kind: str = "reward"  # cost learns harm: the safer response scores lower, and safe ones below 0 where rows say so
    num_heads: int = 1  # heads on the one base; of several the mean is the score and the spread says how sure it is
    allow_truncation: bool = False  # go on when more than 1% of the rows are cut

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("kind", self.kind, KINDS)
        at_least(self, 1, "num_heads")


class RewardTrainer(Trainer):
    r"""Bradley-Terry on pairs (Ouyang et al. 2022, arXiv:2203.02155, eq. 1), Plackett-Luce on longer rankings.

    The score is a scalar head on the last token's hidden state. Heads of an ensemble see the same rows with weights of their
    own (a Bayesian bootstrap, Rubin 1981): they agree where the data decides, and part where it does not.

    A cost (Dai et al. 2023, arXiv:2310.12773, sec. 3.2) orders responses the other way round, and where rows say which
    responses are safe, 0 parts them:

    .. math:: -\log\sigma(C_{worse} - C_{safer}) - \sum_k \log\sigma(s_k C_k), \qquad s_k = 1\text{ of an unsafe response, else }-1
    """

    config_class = RewardConfig
    method = "reward"
    headline = ("accuracy", "margin")
    learning_rates = (1e-5, 1e-4)

    @property
    def role(self) -> str:
        return self.args.kind

    @property
    def sign(self) -> float:
        """A score times this is higher for the better response."""
        return -1.0 if self.args.kind == "cost" else 1.0

    @property
    def next_commands(self) -> tuple[str, ...] | None:
        """What to try next, where that is not what follows a reward model."""
        models = "--reward_model_path REWARD_RUN --cost_model_path {run}"
        command = f"rlhf-fast safe-ppo --model_name_or_path SFT_RUN {models} --dataset_name PROMPTS"
        return (command,) if self.args.kind == "cost" else None

    def add_roles(self) -> None:
        self._differences: list[Tensor] = []  # of the scores in pairs that an evaluation has seen
        if self.role not in self.policy.heads:
            self.policy.add_head(self.role, count=self.args.num_heads)
        elif (there := self.policy.heads[self.role].count) != self.args.num_heads:
            raise UserError(f"num_heads is {self.args.num_heads}, but the {self.role} model to go on with has {there}")

    @classmethod
    def tokenize(cls, records, tokenizer, args: RewardConfig, **options) -> tuple[list[Preference], Report]:
        limits = {"max_length": args.max_length, "allow_truncation": args.allow_truncation}
        need = "harm" if args.kind == "cost" else "preferences"
        return prepare_preferences(records, tokenizer, need=need, **limits, **options)

    def prepare_data(self, records, name: str = "train") -> list[Preference]:
        a, preferences = self.args, super().prepare_data(records, name)
        if a.kind == "cost" and name == "train" and not any(p.safe for p in preferences):
            self.say("no row says which responses are safe: costs order them, and their 0 means nothing")
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
        flat = self.model(batch, output="head_scores", role=self.role).T  # (H, responses)
        exists = (torch.arange(int(counts.max())) < counts[:, None]).to(flat.device)
        each = flat.new_zeros(len(flat), *exists.shape).masked_scatter(exists, flat)  # (H, B, K), best first
        weights = torch.tensor([r.head_weights or [1.0] * len(flat) for r in records]).T
        weights = (weights * torch.tensor([r.weight for r in records])).to(flat.device)
        losses = (weights * self._row_losses(each, exists, records)).sum() / len(flat)
        yield losses / window.records, self._figures(each.detach(), exists, records), len(records)

    def _row_losses(self, scores: Tensor, exists: Tensor, records: list[Preference]) -> Tensor:
        """Of every head and row, (H, B). A row's does not depend on what shares its micro-batch."""
        heads = len(scores)
        margin = torch.tensor([r.margin or 0.0 for r in records], device=scores.device).repeat(heads)
        center = self.args.center_rewards_coefficient
        scores = self.sign * scores.flatten(0, 1)
        losses = pairwise_reward_loss(scores[:, 0], scores[:, 1], margin=margin, center=center)
        signs = safety_signs(records, exists).repeat(heads, 1) if self.args.kind == "cost" else None
        if signs is not None:  # where labels say what 0 is, it is not the mean
            losses = torch.where(signs.any(1), pairwise_reward_loss(scores[:, 0], scores[:, 1], margin=margin), losses)
        if exists.shape[1] > 2:
            exists = exists.repeat(heads, 1)
            losses = torch.where(exists[:, 2], ranked_reward_loss(scores, exists), losses)
        if signs is not None:
            losses = losses + torch.where(signs != 0, softplus(-signs * scores), 0.0).sum(1)
        return losses.view(heads, -1)

    def _figures(self, each: Tensor, exists: Tensor, records: list[Preference]) -> dict[str, Any]:
        scores = self.sign * each.mean(0)
        figures = score_metrics(scores, exists)
        if self.args.kind == "cost":
            low, mean, high = (figures.pop(f"{name}_reward") for name in ("min", "mean", "max"))
            figures |= {"min_cost": -high, "mean_cost": -mean, "max_cost": -low}
            signs = safety_signs(records, exists)
            if known := int((signs != 0).sum()):
                figures["sign_accuracy"] = ((signs * scores > 0).sum() / known, known)
        if not torch.is_grad_enabled():
            figures["kendall_tau"] = 2 * figures["accuracy"] - 1
            pairs = (exists[:, :, None] & exists[:, None, :]).triu(1)
            self._differences = [*self._differences, (scores[:, :, None] - scores[:, None, :])[pairs]]
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


def safety_signs(records: list[Preference], exists: Tensor) -> Tensor:
    """1 of a response called safe, -1 of one called unsafe, 0 where nobody said or there is none. (B, K) float."""
    rows = [[1.0 if safe else -1.0 for safe in r.safe or ()] for r in records]
    width = exists.shape[1]
    return torch.tensor([row + [0.0] * (width - len(row)) for row in rows], device=exists.device)


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
