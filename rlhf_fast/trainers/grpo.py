"""Group relative policy optimization (Shao et al. 2024, arXiv:2402.03300) and its relatives.

PPO without a critic: sample ``num_generations`` responses to a prompt, score each, and let the group's mean reward be the
baseline. A variant is one row of the table in ``losses/policy.py``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.data.batch import Experience, Prompt, packed, shared_runs
from rlhf_fast.errors import UserError
from rlhf_fast.kernels.policy import LEVELS
from rlhf_fast.losses.policy import LOSS_TYPES, Options, check, group_policy_loss

from .config import RLConfig, at_least, one_of
from .figures import GRPO_POLICY, policy_figures
from .groups import ALIKE, BASELINES, SCALES, group_deviations, group_metrics, relative_advantages
from .importance import distance
from .lagrangian import CostConfig
from .rl import RLTrainer
from .scores import kl_of, punish_overlong
from .trainer import Window


@dataclass(kw_only=True)
class GRPOConfig(CostConfig, RLConfig):
    output_dir: str = "runs/grpo"  # the run folder: model, checkpoints, metrics, plots
    num_generations: int = 8  # responses per prompt; batch sizes count responses
    num_iterations: int = 1  # optimizer steps on each batch of responses
    dynamic_sampling_rounds: int = 0  # so often, groups scored all alike give way to other prompts' (DAPO, sec. 3.2)
    loss_type: str = "dapo"  # dapo, grpo, dr_grpo, bnpo, luspo, cispo, sapo, vespo, reinforce
    kl_coef: float = 0.0  # price of KL(policy || reference) in the reward, per nat, as RLOO has it
    beta: float = 0.0  # weight of KL(policy || reference) in the loss; 0 needs no reference
    use_bias_correction_kl: bool = True  # that KL's gradient is the KL's own, off policy too; false: that of k3
    epsilon: float = 0.2  # the ratio may fall to 1 - epsilon
    epsilon_high: float | None = None  # the ratio may rise to 1 + epsilon_high; None is epsilon
    delta: float | None = None  # upper bound of the ratio for negative advantages; None is no bound
    sapo_temperature_pos: float = 1.0  # sapo: how soon its gate closes where the advantage is above 0
    sapo_temperature_neg: float = 1.05  # sapo: how soon elsewhere
    vespo_k_pos: float = 2.0  # vespo: power of the likelihood ratio where the advantage is at least 0
    vespo_lambda_pos: float = 3.0  # vespo: decay in the ratio there
    vespo_k_neg: float = 3.0  # vespo: power where the advantage is below 0
    vespo_lambda_neg: float = 2.0  # vespo: decay there
    importance_sampling_level: str = "token"  # token, sequence (GSPO, with epsilon 3e-4), sequence_token
    advantage_baseline: str = "mean"  # of the group; leave_one_out is RLOO
    scale_rewards: str = "group"  # over the deviation of group or batch; whiten: of all advantages (REINFORCE++); none
    mask_truncated_completions: bool = False  # learn nothing from responses cut by max_completion_length

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("loss_type", self.loss_type, LOSS_TYPES)
        one_of("importance_sampling_level", self.importance_sampling_level, LEVELS)
        one_of("advantage_baseline", self.advantage_baseline, BASELINES)
        one_of("scale_rewards", self.scale_rewards, SCALES)
        try:
            check(self.loss_type, self.options)
        except ValueError as error:
            raise UserError(str(error)) from error
        if not self.use_bias_correction_kl and not self.beta:
            raise UserError("use_bias_correction_kl is about the KL in the loss: set beta above 0, or leave it true")
        correction = self.vllm_importance_sampling_correction
        if self.loss_type == "vespo" and (correction or (self.use_vllm and correction is None)):
            raise UserError(
                "loss_type vespo weighs whole responses itself: set vllm_importance_sampling_correction: false"
            )
        at_least(self, 1, "num_iterations")
        at_least(self, 0, "dynamic_sampling_rounds")
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if self.num_generations < 2 or batch % self.num_generations:
            raise UserError(
                f"num_generations is {self.num_generations}: it must be at least 2 and divide "
                f"per_device_train_batch_size * gradient_accumulation_steps = {batch} responses"
            )
        self.check_costs()

    @property
    def options(self) -> Options:
        """What ``loss_type`` is tuned with."""
        return Options(*(getattr(self, name) for name in Options._fields))

    @property
    def needs_reference(self) -> bool:
        return bool(self.beta or self.kl_coef)


class GRPOTrainer(RLTrainer):
    """Reinforcement learning from reward functions, with the group's mean as baseline."""

    config_class = GRPOConfig
    method = "grpo"
    headline = ("reward", "kl")
    learning_rates = (1e-6, 1e-5)

    def add_roles(self) -> None:
        if self.args.needs_reference:
            self.add_reference()
        self.add_costs()

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

    def counts(self, records: list[Experience]) -> tuple[float, ...]:
        """Responses that nobody could score are as if they had not been sampled."""
        return super().counts([e for e in records if not math.isnan(e.reward)])

    def sizes(self) -> dict[str, Any]:
        return super().sizes() | {"num_generations": self.args.num_generations}

    @property
    def entries(self) -> list[str]:
        a = self.args
        # unless it is asked for, the policy does not move between sampling and its only step
        old = a.num_iterations > 1 or bool(a.kl_coef) or self.corrects
        return ["advantages", *["old_logprobs"] * old, *["ref_logprobs"] * a.needs_reference]

    @torch.no_grad()
    def collect(self, prompts: list[Prompt]) -> list[Experience]:
        """Sample a group of responses to every prompt, score them, and compare each with its group."""
        a, entries = self.args, self.entries
        experiences = self._sample(prompts)
        if self.lagrangian is not None:
            self.metrics.add(self.lagrangian.update([e.cost for e in experiences], self.step), 1.0)
        for _ in range(a.dynamic_sampling_rounds):
            experiences = self._replace_alike(experiences)
        with self.timed("logprobs"):
            self.annotate(experiences, *(name for name in entries if name != "advantages"))
        for experience, advantage in zip(experiences, self._advantages(experiences)):
            experience.advantages = torch.full((len(experience.example),), advantage, device=self.policy.device)
        if "old_logprobs" in entries:
            self.compare(experiences)
        return experiences

    def _sample(self, prompts: list[Prompt]) -> list[Experience]:
        """Scored groups. The figures are of all that is sampled, whether it is kept or not."""
        a = self.args
        experiences, metrics = self.respond(prompts, n=a.num_generations)
        punish_overlong(experiences, a.max_completion_length, a.soft_overlong_cache)
        if experiences:
            rewards = torch.tensor([e.reward for e in experiences])
            self.metrics.add({**metrics, **group_metrics(rewards, a.num_generations)}, len(experiences))
        return experiences

    def _replace_alike(self, experiences: list[Experience]) -> list[Experience]:
        """Further prompts' groups in place of those that were scored all alike, as far as the data goes. Collective."""
        size, rank = self.args.num_generations, self.ranks.index
        deviations = group_deviations(torch.tensor([self._worth(e) for e in experiences]), size)
        alike = (deviations < ALIKE).nonzero().flatten().tolist()
        wanted = self.ranks.gather([len(alike)])
        count, begin = int(min(sum(wanted), max(self.rows_left, 0))), sum(wanted[:rank])
        prompts = self.draw(count, begin, begin + len(alike))
        self.metrics.add({"resampled_prompts": len(prompts)}, 1.0)
        if count:  # some rank has prompts, and a rollout takes them all
            fresh, experiences = self._sample(prompts), list(experiences)
            for number, group in enumerate(alike[: len(prompts)]):
                experiences[group * size : (group + 1) * size] = fresh[number * size : (number + 1) * size]
        return experiences

    def _worth(self, experience: Experience) -> float:
        """Its reward, less its cost at the price of the moment where costs have a limit."""
        reward = experience.reward
        return reward if self.lagrangian is None else self.lagrangian.mix(reward, experience.cost)

    def _advantages(self, experiences: list[Experience]) -> list[float]:
        """Of each response, by the rewards of all ranks less what the distance from the reference costs. Collective."""
        a, rank = self.args, self.ranks.index
        mine = [
            (rank, self._worth(e) - (a.kl_coef * kl_of(e) if a.kl_coef else 0.0), self.size(e)) for e in experiences
        ]
        ranks, rewards, tokens = zip(*self.ranks.gather(mine))
        how = {"baseline": a.advantage_baseline, "scale": a.scale_rewards}
        advantages = relative_advantages(rewards, tokens, a.num_generations, **how)
        return [advantage for r, advantage in zip(ranks, advantages) if r == rank]

    def losses(self, records: list[Experience], window: Window) -> Iterator[tuple[Tensor, dict, float]]:
        a = self.args
        batch = self.pack([e.example for e in records])
        logprobs, entropy = self.model(batch, temperature=a.temperature, entropy="detached")
        old_logprobs = packed(records, "old_logprobs", batch)
        kept = torch.tensor([not self._ignored(e) for e in records])
        mask = batch.response_mask & kept.repeat_interleave(torch.tensor(batch.lengths)).to(self.policy.device)
        divisors = {
            "tokens": window.tokens,
            "responses": window.records,
            "limit": window.records * a.max_completion_length,
        }
        loss, metrics = group_policy_loss(
            a.loss_type,
            logprobs,
            logprobs.detach() if old_logprobs is None else old_logprobs,
            packed(records, "advantages", batch),
            mask,
            a.options,
            ref_logprobs=packed(records, "ref_logprobs", batch) if a.beta else None,
            beta=a.beta,
            unbiased=a.use_bias_correction_kl,
            denominator=divisors[LOSS_TYPES[a.loss_type].divisor],
            cu_seqlens=batch.cu_seqlens,
        )
        tokens = sum(map(self.size, records))
        if old_logprobs is not None:  # else the policy has not moved
            self.watch_policy(metrics, tokens / window.tokens)
        figures = policy_figures(metrics, GRPO_POLICY) | {"entropy": (entropy * mask).sum() / max(tokens, 1)}
        rollout = packed(records, "rollout_logprobs", batch)
        if old_logprobs is None and rollout is not None:  # these are the policy's own of when it sampled
            figures |= distance(logprobs, rollout, mask)
        yield loss, figures, tokens

    def _ignored(self, record: Experience) -> bool:
        """It teaches nothing: nobody could score it, or it was cut off and those are left out."""
        return math.isnan(record.reward) or (self.args.mask_truncated_completions and not record.finished)
