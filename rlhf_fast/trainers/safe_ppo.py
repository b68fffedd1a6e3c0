"""PPO-Lagrangian, the reinforcement learning of Safe RLHF (Dai et al. 2023, arXiv:2310.12773).

PPO with a second critic: it learns what a response will cost, and the policy climbs the advantage of the reward less lambda
times that of the cost. Critics, reward and cost model, and reference are adapters on the policy's base.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlhf_fast.data.batch import Experience, TokenBatch, packed, unpack
from rlhf_fast.errors import UserError

from .figures import explained_variance
from .lagrangian import CostConfig
from .ppo import PPOConfig, PPOTrainer


@dataclass(kw_only=True)
class SafePPOConfig(CostConfig, PPOConfig):
    output_dir: str = "runs/safe-ppo"  # the run folder: model, checkpoints, metrics, plots

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_costs(needed=True)
        if self.whiten_rewards:
            raise UserError("whiten_rewards would price the KL twice, in units of reward and of cost; use reward_scale")
        # while the critics learn alone the policy holds still, and no lambda could change its cost
        self.lambda_warmup_steps = max(self.lambda_warmup_steps, self.critic_warmup_steps)


class SafePPOTrainer(PPOTrainer):
    """PPO whose mean cost stays within ``cost_limit``."""

    config_class = SafePPOConfig
    method = "safe-ppo"
    headline = ("objective/scores", "cost", "lambda")
    critics: ClassVar[dict[str, tuple[str, str]]] = {
        **PPOTrainer.critics,
        "cost_value": ("cost_values", "cost_returns"),
    }

    def check_rewards(self, args: SafePPOConfig) -> None:
        super().check_rewards(args)
        if not args.has_costs:
            raise UserError("safe PPO needs a cost: --cost_model_path RUN of a trained cost model, or --cost_funcs")

    def add_roles(self) -> None:
        super().add_roles()
        self.add_costs()

    def weigh_costs(self, experiences: list[Experience], batch: TokenBatch, advantages: Tensor) -> Tensor:
        r"""Mix in the cost's advantages, move lambda, and fill what the cost critic learns from.

        The KL's price goes into the reward with one sign and into the cost with the other (eqs. 24 and 25), so that it is
        ``kl_coef`` whatever lambda is:

        .. math:: \frac{(R - \beta\,KL) - \lambda (C + \beta\,KL)}{1 + \lambda} = \frac{R - \lambda C}{1 + \lambda} - \beta\,KL
        """
        figures = self.lagrangian.update([e.cost for e in experiences], self.step)
        # what could not be scored is masked, and a NaN would pass through the mask
        costs = torch.tensor([0.0 if math.isnan(e.cost) else e.cost for e in experiences], device=advantages.device)
        values, rows = packed(experiences, "cost_values", batch), batch.response_rows
        of_cost, returns, *_ = self.shaped(experiences, batch, costs, values, -self.kl_coef)
        unpack(experiences, "cost_returns", returns, batch)
        if len(rows):
            figures["val/cost_explained_variance"] = explained_variance(values[rows], returns[rows])
        self.metrics.add(figures, len(experiences))
        return self.lagrangian.mix(advantages, of_cost)
