"""One judge for both libraries: our engine writes answers to the held-out prompts, and the task scores them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.data import prepare_preferences, prepare_prompts
from rlhf_fast.data.batch import Example
from rlhf_fast.rewards import RewardModel, evaluate_policy

from .tasks import Task, true_quality

SAMPLES = 2  # per held-out prompt, at temperature 1
Figures = dict[str, float]


class PolicyJudge:
    """Held-out figures of a policy: ``reward`` is what reinforcement learning maximises, of answers sampled at temperature 1.

    Args:
        limit: most tokens of an answer.
        reward_model: the folder of the model that is the reward, if one is.
        opponent: held-out scores of the policy to be compared with, (prompts, SAMPLES), as ``self.scores`` holds them.
        quality: answers have a hidden quality; without, they are right or wrong, and that is the reward.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Any,
        limit: int,
        reward_model: Any = None,
        opponent: Tensor | None = None,
        quality: bool = False,
    ):
        self.prompts = prepare_prompts(task.held_out, tokenizer)[0]
        self.limit, self.opponent = limit, opponent
        learned = [] if reward_model is None else [RewardModel(reward_model)]
        self.verifier = task.verifier
        self.functions: list[Any] = [true_quality, task.verifier, *learned] if quality else [task.verifier]
        self.names = ["quality", "accuracy", "reward"] if quality else ["reward"]
        self.scores = torch.empty(0)  # of the last policy's samples: right or wrong, or their hidden quality

    def __call__(self, policy: Any) -> Figures:
        sampled = evaluate_policy(
            policy, self.prompts, self.functions, max_new_tokens=self.limit, n=SAMPLES, temperature=1.0
        )
        greedy = evaluate_policy(policy, self.prompts, self.functions, max_new_tokens=self.limit)
        self.scores = torch.tensor([next(iter(row["rewards"].values())) for row in sampled.samples]).view(-1, SAMPLES)
        figures = {"eos rate": greedy["eos_rate"], "greedy accuracy": greedy[f"rewards/{self.verifier}/mean"]}
        keys = [key for key in sampled if key.startswith("rewards/") and key.endswith("/mean")]
        for name, key in zip(self.names, keys):
            figures |= {f"greedy {name}": greedy[key], name: sampled[key]}
        if self.opponent is not None:
            figures["preferred to SFT"] = preferred(self.scores, self.opponent)
        return figures


def preferred(scores: Tensor, others: Tensor) -> float:
    """How often a sample beats one of the other policy's to the same prompt; a tie counts as half.

    Args:
        scores, others: (P, n), any n each.
    """
    difference = scores[:, :, None] - others[:, None, :]
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


class RewardJudge:
    """Held-out rankings with true labels, a response of each style in each: how many of their pairs are in order, and Kendall's tau."""

    def __init__(self, task: Task, tokenizer: Any):
        self.rankings = prepare_preferences(task.held_out_rankings, tokenizer)[0]

    def __call__(self, score: Callable[[list[Example]], Tensor]) -> Figures:
        count = len(self.rankings[0].responses)
        scores = score([e for ranking in self.rankings for e in ranking.responses]).double().view(-1, count)
        accuracy = in_order(scores)
        return {"pair accuracy": accuracy, "Kendall tau": 2 * accuracy - 1}


def in_order(scores: Tensor) -> float:
    """Share of pairs with the better response, which stands first, ahead; a tie counts as half. Scores (B, K)."""
    first, second = torch.triu_indices(scores.shape[1], scores.shape[1], 1)
    difference = scores[:, first] - scores[:, second]
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())
