"""Proximal policy optimization (Schulman et al. 2017, arXiv:1707.06347) as RLHF uses it (arXiv:1909.08593, 2203.02155).

Policy, critic, reference and, where it shares their base, the reward model are adapters on one base.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlhf_fast.data.batch import Experience, Prompt, TokenBatch, packed, unpack
from rlhf_fast.errors import UserError
from rlhf_fast.kernels import gae, kl_penalty, kl_shaped_gae, policy_loss, shaped_rewards, value_loss
from rlhf_fast.kernels.kl import ESTIMATORS
from rlhf_fast.rewards import resolve_all
from rlhf_fast.rewards.model import attach_reward_models
from rlhf_fast.rollout import Engine

from .config import RLConfig, above, at_least, one_of
from .figures import PPO_POLICY, explained_variance, policy_figures, shaped_rewards_figures
from .rl import RLTrainer
from .scores import Scores, kl_factor, leave_out_unscored, punish_overlong, punish_unfinished, whiten_over_ranks
from .trainer import Window

SMALLEST_SCALE = 1.0  # mean square of returns below which a critic's errors are judged as they are


@dataclass(kw_only=True)
class PPOConfig(RLConfig):
    output_dir: str = "runs/ppo"  # the run folder: model, checkpoints, metrics, plots
    reward_model_path: str | list[str] | None = None  # run folders of reward models, which come after reward_funcs
    num_ppo_epochs: int = 4  # passes over each batch of responses
    num_mini_batches: int = 1  # optimizer steps per pass
    kl_coef: float = 0.05  # price of KL(policy || reference) in the reward, per nat
    beta: float = 0.0  # weight of that KL (k3) in the loss, instead or besides
    kl_estimator: str = "k1"  # of the KL in the reward, per token: k1, k2, k3, abs
    kl_target: float | None = None  # nats per response; adapts kl_coef towards it (arXiv:1909.08593, eq. 8)
    kl_horizon: int = 10_000  # responses over which the adaptation acts
    cliprange: float = 0.2  # the ratio stays within 1 +- cliprange
    cliprange_value: float = 0.2  # a value moves at most this far per batch of responses
    vf_coef: float = 0.1  # weight of the critic's loss
    gamma: float = 1.0  # discount per token
    lam: float = 0.95  # GAE's trade-off between bias (0) and variance (1)
    normalize_rewards: bool = False  # scores less their running mean, over their running standard deviation
    reward_scale: float = 1.0  # scores are multiplied by it
    reward_clip: float | None = None  # scores are then cut to at most this, at least its negative
    whiten_rewards: bool = False  # scale token rewards, KL included, to unit variance, their mean kept
    missing_eos_penalty: float | None = None  # taken from the score of a response that never ended
    entropy_coef: float = 0.0  # reward for entropy, in the loss
    critic_warmup_steps: int = 0  # first optimizer steps that train the critic alone
    target_kl: float | None = None  # drop a batch's remaining passes once the policy moved this far (approximate KL)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("kl_estimator", self.kl_estimator, ESTIMATORS)
        at_least(self, 1, "num_ppo_epochs", "num_mini_batches", "kl_horizon")
        above(self, 0, "kl_target", "target_kl", "reward_clip")
        if self.kl_target is not None and self.kl_coef <= 0:
            raise UserError(f"kl_target adapts kl_coef, which is {self.kl_coef}; start from one above 0")

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def reward_models(self) -> list[str]:
        """Run folders of the reward models."""
        paths = self.reward_model_path or []
        return [paths] if isinstance(paths, str) else list(paths)


class PPOTrainer(RLTrainer):
    """PPO with a KL-penalised reward, a critic on the policy's base, and clipped policy and value losses."""

    config_class = PPOConfig
    method = "ppo"
    headline = ("objective/scores", "objective/kl")
    # role of each critic -> the entries of a record that hold its values and what they should have been
    critics: ClassVar[dict[str, tuple[str, str]]] = {"value": ("values", "returns")}
    learning_rates = (3e-6, 3e-5)

    def __init__(self, model, reward_funcs=None, args=None, engine: Engine | None = None, **kwargs):
        super().__init__(model, reward_funcs, args, engine, **kwargs)
        a = self.args
        self.kl_coef = a.kl_coef
        self.scores = Scores(a.normalize_rewards, a.reward_scale, a.reward_clip, self.ranks)
        self.moved = 0.0  # approximate KL between the policy and where it sampled, before the last step
        self.scales = dict.fromkeys(self.critics, SMALLEST_SCALE)  # largest mean square of a critic's returns in a step

    def check_rewards(self, args: PPOConfig) -> None:
        if not self.functions and not args.reward_model_path:
            raise UserError("PPO needs a reward: --reward_model_path RUN of a trained reward model, or --reward_funcs")

    def add_roles(self) -> None:
        self.add_reference()
        for role in self.critics:
            self.policy.add_role(role, trainable=True, head=True)
        models = attach_reward_models(
            self.policy, self.args.reward_models, disagreement_penalty=self.args.disagreement_penalty
        )
        for m in models:
            self.say(f"{m.__name__}: {m.place_beside(self.policy)}")
        self.functions, self.names = resolve_all([*self.functions, *models])

    @property
    def windows_per_round(self) -> int:
        return self.args.num_mini_batches

    @property
    def repeats(self) -> int:
        return self.args.num_ppo_epochs

    def make_plan(self, count: int) -> list[list[int]]:
        """``num_ppo_epochs`` shuffled passes, each in ``num_mini_batches`` windows."""
        plan = []
        for _ in range(self.args.num_ppo_epochs):
            order = torch.randperm(count).tolist()
            bounds = [round(count * i / self.args.num_mini_batches) for i in range(self.args.num_mini_batches + 1)]
            plan += [order[a:b] for a, b in itertools.pairwise(bounds)]
        return plan

    @property
    def largest_step(self) -> int:
        """One that trains the policy too."""
        return max(super().largest_step, self.args.critic_warmup_steps)

    @property
    def entries(self) -> list[str]:
        critics = itertools.chain(*self.critics.values())
        return ["old_logprobs", "advantages", *critics, *["ref_logprobs"] * bool(self.args.beta)]

    @torch.no_grad()
    def collect(self, prompts: list[Prompt]) -> list[Experience]:
        """Sample one response to every prompt, score it, and estimate the advantage of each of its tokens."""
        a = self.args
        experiences, metrics = self.respond(prompts, n=1)
        self.scores.settle(experiences)
        punish_overlong(experiences, a.max_completion_length, a.soft_overlong_cache)
        punish_unfinished(experiences, a.missing_eos_penalty)
        leave_out_unscored(experiences)
        critics = {values: functools.partial(self.policy.values, role=r) for r, (values, _) in self.critics.items()}
        with self.timed("logprobs"):
            self.annotate(experiences, "old_logprobs", "ref_logprobs", **critics)
        self.metrics.add(metrics, len(experiences))
        self._estimate_advantages(experiences)
        self.compare(experiences)
        return experiences

    def _estimate_advantages(self, experiences: list[Experience]) -> None:
        """Fill advantages and returns, measure the rewards they come from, and adapt ``kl_coef``."""
        a = self.args
        batch = self.pack([e.example for e in experiences])
        scores = torch.tensor([e.reward for e in experiences], device=self.policy.device)
        values, mask = packed(experiences, "values", batch), batch.response_mask
        advantages, returns, rewards, kl = self.shaped(experiences, batch, scores, values, self.kl_coef)
        advantages = self.weigh_costs(experiences, batch, advantages)
        advantages = whiten_over_ranks(advantages, mask, self.ranks)
        unpack(experiences, "advantages", advantages, batch)
        unpack(experiences, "returns", returns, batch)
        count = sum(self.size(e) > 0 for e in experiences)  # those that were scored
        if count:
            figures = shaped_rewards_figures(scores, rewards, kl, count) | {"objective/kl_coef": self.kl_coef}
            rows = batch.response_rows
            figures["val/explained_variance"] = explained_variance(values[rows], returns[rows])
            self.metrics.add(figures, count)
        if a.kl_target is not None:
            kl_of_all, count_of_all = self.ranks.sum(float(kl.sum()), count)
            self.kl_coef *= kl_factor(kl_of_all, count_of_all, a.kl_target, a.kl_horizon)

    def shaped(
        self, experiences: list[Experience], batch: TokenBatch, scores: Tensor, values: Tensor, kl_coef: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Advantages, returns, rewards and KL (N,) of ``scores`` (B,) at the ends of responses, less ``kl_coef`` times the KL."""
        a, mask = self.args, batch.response_mask
        logprobs = [packed(experiences, name, batch) for name in ("old_logprobs", "ref_logprobs")]
        discounting = {"gamma": a.gamma, "lam": a.lam, "cu_seqlens": batch.cu_seqlens}
        pricing = {"kl_coef": kl_coef, "estimator": a.kl_estimator}
        if not a.whiten_rewards:
            return kl_shaped_gae(scores, *logprobs, values, mask, whiten=False, **pricing, **discounting)
        # their deviation is that of all ranks, which no kernel knows: shape, whiten, and only then look back
        rewards = shaped_rewards(scores, *logprobs, mask, cu_seqlens=batch.cu_seqlens, **pricing)
        scaled = whiten_over_ranks(rewards, mask, self.ranks, shift_mean=False)
        kl = kl_penalty(*logprobs, a.kl_estimator).masked_fill(~mask, 0.0)
        return *gae(scaled, values, mask, **discounting), rewards, kl

    def weigh_costs(self, experiences: list[Experience], batch: TokenBatch, advantages: Tensor) -> Tensor:
        """Advantages (N,) with those of the costs taken off; plain PPO knows none. Collective."""
        return advantages

    def losses(self, records: list[Experience], window: Window) -> Iterator[tuple[Tensor, dict, float]]:
        a = self.args
        batch = self.pack([e.example for e in records])
        tokens = batch.num_response_tokens
        whole = window.tokens / max(tokens, 1)  # a loss times this is its mean over this micro-batch
        if self.step >= a.critic_warmup_steps:
            logprobs, entropy = self.model(
                batch, temperature=a.temperature, entropy=True if a.entropy_coef else "detached"
            )
            loss, metrics = policy_loss(
                logprobs,
                packed(records, "old_logprobs", batch),
                packed(records, "advantages", batch),
                batch.response_mask,
                clip_low=a.cliprange,
                ref_logprobs=packed(records, "ref_logprobs", batch) if a.beta else None,
                kl_coef=a.beta,
                entropy=entropy if a.entropy_coef else None,
                entropy_coef=a.entropy_coef,
                denominator=window.tokens,
                cu_seqlens=batch.cu_seqlens,
            )
            figures = policy_figures(metrics, PPO_POLICY) | {"loss/policy_avg": loss.detach() * whole}
            figures["objective/entropy"] = entropy.detach().sum() / max(tokens, 1)
            self.watch_policy(metrics, tokens / window.tokens)
            yield loss, figures, tokens
        for role, (values, returns) in self.critics.items():
            targets = packed(records, returns, batch)
            loss, metrics = value_loss(
                self.model(batch, output="values", role=role),
                packed(records, values, batch),
                targets,
                batch.response_mask,
                clip=a.cliprange_value,
                denominator=window.tokens,
            )
            # the loss is half the mean squared error; returns are 0 outside of responses
            self.watch(1.0, **{role: 2 * loss, f"{role} scale": targets.square().sum() / window.tokens})
            yield a.vf_coef * loss, {f"loss/{role}_avg": loss.detach() * whole}, tokens

    def inspect(self, figures: dict[str, float]) -> None:
        self.moved = figures.get("kl", 0.0)
        errors = []
        for role in self.critics:
            self.scales[role] = max(self.scales[role], figures.pop(f"{role} scale"))
            errors.append(figures.pop(role) / self.scales[role])
        super().inspect({**figures, "value": max(errors, key=lambda x: (math.isnan(x), x))})

    def after_step(self) -> None:
        """Drop the batch's remaining passes once the policy has moved ``target_kl`` away from where it sampled."""
        if self.args.target_kl is not None and self.moved > self.args.target_kl:
            self.plan = []

    def extra_state(self) -> dict[str, Any]:
        return {**super().extra_state(), "kl_coef": self.kl_coef, "scores": self.scores.state()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        self.kl_coef = state["kl_coef"]
        self.scores.load_state(state["scores"])
