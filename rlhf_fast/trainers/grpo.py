"""Group relative policy optimization (Shao et al. 2024, arXiv:2402.03300) and its relatives.

PPO without a critic: sample ``num_generations`` responses to a prompt, score each, and let the group's mean reward be the
baseline. A variant is one row of ``LOSS_TYPES``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.data.batch import Experience, Prompt, packed, shared_runs
from rlhf_fast.errors import UserError
from rlhf_fast.kernels import group_advantages, policy_loss
from rlhf_fast.kernels.policy import LEVELS

from .config import RLConfig, one_of
from .rl import RLTrainer
from .trainer import Window

# loss_type -> (kind of policy_loss, how token losses are aggregated)
LOSS_TYPES = {
    "grpo": ("clip", "sequence"),  # mean over each response, then over responses (arXiv:2402.03300, eq. 3)
    "dapo": ("clip", "token"),  # mean over all tokens of the optimizer step (arXiv:2503.14476, eq. 8)
    "bnpo": ("clip", "token"),  # mean over the tokens of the batch; the same here, where a batch is the whole step
    "dr_grpo": ("clip", "constant"),  # sum over a constant: no length bias (arXiv:2503.20783, sec. 3)
    "cispo": ("cispo", "token"),  # the clipped ratio weighs log-probabilities (arXiv:2506.13585, eq. 4)
    "reinforce": ("reinforce", "token"),  # no ratio at all
}


@dataclass(kw_only=True)
class GRPOConfig(RLConfig):
    output_dir: str = "runs/grpo"  # the run folder: model, checkpoints, metrics, plots
    num_generations: int = 8  # responses per prompt; batch sizes count responses
    num_iterations: int = 1  # optimizer steps on each batch of responses
    loss_type: str = "dapo"  # dapo, grpo, dr_grpo, bnpo, cispo, reinforce
    beta: float = 0.0  # weight of KL(policy || reference) in the loss; 0 needs no reference
    epsilon: float = 0.2  # the ratio may fall to 1 - epsilon
    epsilon_high: float | None = None  # the ratio may rise to 1 + epsilon_high; None is epsilon
    delta: float | None = None  # upper bound of the ratio for negative advantages; None is no bound
    importance_sampling_level: str = "token"  # token, sequence (GSPO, with epsilon 3e-4), sequence_token
    advantage_baseline: str = "mean"  # of the group; leave_one_out is RLOO
    scale_rewards: str = "group"  # divide advantages by the standard deviation of the group, of the batch, or none
    mask_truncated_completions: bool = False  # learn nothing from responses cut by max_completion_length

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("loss_type", self.loss_type, LOSS_TYPES)
        one_of("importance_sampling_level", self.importance_sampling_level, LEVELS)
        one_of("advantage_baseline", self.advantage_baseline, ("mean", "leave_one_out"))
        one_of("scale_rewards", self.scale_rewards, ("group", "batch", "none"))
        kind = LOSS_TYPES[self.loss_type][0]
        if kind == "cispo" and self.epsilon_high is None:
            raise UserError("loss_type cispo needs epsilon_high, the absolute bound of the ratio; its authors use 5")
        if kind == "reinforce" and self.importance_sampling_level != "token":
            raise UserError("loss_type reinforce has no ratio; leave importance_sampling_level at token")
        if self.delta is not None and (kind != "clip" or self.delta <= 1):
            raise UserError(
                f"delta is {self.delta}; it must exceed 1, and loss_type {self.loss_type} must clip the ratio"
            )
        if self.num_iterations < 1:
            raise UserError(f"num_iterations is {self.num_iterations}; it must be at least 1")
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if self.num_generations < 2 or batch % self.num_generations:
            raise UserError(
                f"num_generations is {self.num_generations}: it must be at least 2 and divide "
                f"per_device_train_batch_size * gradient_accumulation_steps = {batch} responses"
            )


class GRPOTrainer(RLTrainer):
    """Reinforcement learning from reward functions, with the group's mean as baseline."""

    config_class = GRPOConfig
    method = "grpo"
    headline = ("reward", "kl")
    learning_rates = (1e-6, 1e-5)

    def add_roles(self) -> None:
        if self.args.beta:
            self.policy.add_reference()
            self.say(f"reference: {self.policy.reference}")

    @property
    def rows_per_window(self) -> int:
        return super().rows_per_window // self.args.num_generations

    def bundles(self, records: list[Experience]) -> list[list[int]]:
        """Siblings, so that their prompt is computed once."""
        if not self.args.shared_prefix:
            return super().bundles(records)
        rows = iter(range(len(records)))
        runs = shared_runs([record.example for record in records])
        return [list(itertools.islice(rows, count)) for count, _ in runs]

    @property
    def repeats(self) -> int:
        return self.args.num_iterations

    def size(self, record: Experience) -> float:
        return 0 if self._ignored(record) else super().size(record)

    def sizes(self) -> dict[str, Any]:
        return super().sizes() | {"num_generations": self.args.num_generations}

    @property
    def entries(self) -> list[str]:
        a = self.args
        return [
            "advantages",
            "rollout_logprobs",
            *["old_logprobs"] * (a.num_iterations > 1),
            *["ref_logprobs"] * bool(a.beta),
        ]

    @torch.no_grad()
    def collect(self, prompts: list[Prompt]) -> list[Experience]:
        """Sample a group of responses to every prompt, score them, and compare each with its group."""
        a, device = self.args, self.policy.device
        experiences, metrics = self.respond(prompts, n=a.num_generations)
        rewards = torch.tensor([e.reward for e in experiences])
        advantages = group_advantages(rewards, a.num_generations, scale=a.scale_rewards, baseline=a.advantage_baseline)
        for experience, advantage in zip(experiences, advantages.to(device)):
            experience.advantages = advantage.expand(len(experience.example))
        passes = {}
        if a.num_iterations > 1:  # else the policy does not move between sampling and its only step
            passes["old_logprobs"] = lambda b: self.logprobs(b, "policy")
        if a.beta:
            passes["ref_logprobs"] = lambda b: self.logprobs(b, "reference")
        with self.timed("logprobs"):
            self.annotate(experiences, **passes)
        self.metrics.add({**metrics, **group_metrics(rewards, a.num_generations)}, len(experiences))
        return experiences

    def losses(self, records: list[Experience], window: Window) -> Iterator[tuple[Tensor, dict, float]]:
        a = self.args
        batch = self.pack([e.example for e in records])
        logprobs, entropy = self.model(batch, temperature=a.temperature, entropy="detached")
        old_logprobs = packed(records, "old_logprobs", batch)
        old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
        advantages, engine = self.against_engine(records, batch, old_logprobs)
        mask = batch.response_mask
        if a.mask_truncated_completions:
            kept = torch.tensor([not self._ignored(e) for e in records])
            mask = mask & kept.repeat_interleave(torch.tensor(batch.lengths)).to(mask.device)
        kind, aggregate = LOSS_TYPES[a.loss_type]
        denominators = {
            "token": window.tokens,
            "sequence": window.records,
            "constant": window.records * a.max_completion_length,
        }
        loss, metrics = policy_loss(
            logprobs,
            old_logprobs,
            advantages,
            mask,
            kind=kind,
            clip_low=a.epsilon,
            clip_high=a.epsilon_high,
            dual_clip=a.delta,
            level=a.importance_sampling_level,
            ref_logprobs=packed(records, "ref_logprobs", batch),
            kl_coef=a.beta,
            aggregate=aggregate,
            denominator=denominators[aggregate],
            cu_seqlens=batch.cu_seqlens,
            **engine,
        )
        tokens = sum(map(self.size, records))
        figures = {
            "entropy": (entropy * mask).sum() / max(tokens, 1),
            "clip_ratio/low_mean": metrics["clip_low"],
            "clip_ratio/high_mean": metrics["clip_high"],
            "clip_ratio/region_mean": metrics["clip_region"],
            **self.engine_figures(metrics),
        }
        if "kl" in metrics:
            figures["kl"] = metrics["kl"]
        yield loss, figures, tokens

    def _ignored(self, record: Experience) -> bool:
        return self.args.mask_truncated_completions and not record.finished


def group_metrics(rewards: Tensor, group_size: int) -> dict[str, Tensor]:
    """reward, reward_std within groups, and the share of groups that teach nothing: no two different rewards.

    Args:
        rewards: (B,), NaN where there is none. On the CPU.
    """
    groups = rewards.view(-1, group_size)
    scored = (~groups.isnan()).sum(1)
    squares = (groups - groups.nanmean(1, keepdim=True)).square().nansum(1)
    std = (squares / (scored - 1).clamp(min=1)).sqrt()
    metrics = {"frac_reward_zero_std": (std < 1e-6).float().mean()}
    if scored.any():
        metrics |= {"reward": rewards.nanmean(), "reward_std": std[scored > 0].mean()}
    return metrics
