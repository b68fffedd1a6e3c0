r"""Safe RLHF's Lagrangian (Dai et al. 2023, arXiv:2310.12773): the most reward at a mean cost within a limit.

.. math:: \max_\theta \min_{\lambda \ge 0} \; J_R(\theta) - \lambda \, (J_C(\theta) - d)

One piece of PPO and GRPO: it keeps lambda, and says what a reward and a cost are worth together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.models import Policy
from rlhf_fast.rewards.model import attach_reward_models
from rlhf_fast.run.distribution import Ranks

Number = TypeVar("Number", float, Tensor)


@dataclass(kw_only=True)
class CostConfig:
    """Costs of a response, and the limit that Safe RLHF keeps their mean within."""

    cost_funcs: list[Any] = field(default_factory=list)  # as reward_funcs, but what they score is harm; costs add up
    cost_model_path: str | list[str] | None = None  # run folders of cost models (reward --kind cost), after cost_funcs
    cost_limit: float = 0.0  # the mean cost that a response may have, in the units of the costs
    lambda_init: float = 1.0  # the costs' multiplier at the start
    lambda_lr: float = 0.1  # log lambda moves by this times lambda times the cost above the limit, a batch
    lambda_min: float = 0.01  # lambda never falls below it
    lambda_max: float = 10.0  # lambda never rises above it
    lambda_warmup_steps: int = 0  # first optimizer steps during which lambda stays as it is

    @property
    def cost_models(self) -> list[str]:
        """Run folders of the cost models."""
        paths = self.cost_model_path or []
        return [paths] if isinstance(paths, str) else list(paths)

    @property
    def has_costs(self) -> bool:
        return bool(self.cost_funcs or self.cost_models)

    def check_costs(self, needed: bool = False) -> None:
        """Raise UserError for a multiplier that cannot be, or, unless costs are ``needed`` anyway, has nothing to multiply."""
        if not 0 < self.lambda_min <= self.lambda_init <= self.lambda_max:
            raise UserError(
                f"lambda_init is {self.lambda_init:g}; it must lie within lambda_min {self.lambda_min:g} (above 0) and "
                f"lambda_max {self.lambda_max:g}"
            )
        for name in ("lambda_lr", "lambda_warmup_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 0")
        changed = [f.name for f in fields(CostConfig) if f.name[:4] != "cost" or f.name == "cost_limit"]
        changed = [name for name in changed if getattr(self, name) != getattr(CostConfig, name)]
        if changed and not (needed or self.has_costs):
            raise UserError(f"{changed[0]} has no effect without costs: name cost_funcs or a cost_model_path")


def cost_functions(policy: Policy, args: CostConfig, say: Callable[[str], None]) -> list[Any]:
    """What costs are scored by: ``cost_funcs``, then the cost models, each an adapter on the policy's base where it can be."""
    models = attach_reward_models(policy, args.cost_models, "cost", args.disagreement_penalty)
    for m in models:
        say(f"{m.__name__}: {m.place_beside(policy)}")
    return [*args.cost_funcs, *models]


class Lagrangian:
    """Lambda, and what follows from it. The same on all ranks.

    Args:
        args: limit, start, limits and learning rate of lambda.
        ranks: whose costs count together.
    """

    def __init__(self, args: CostConfig, ranks: Ranks) -> None:
        self.args, self.ranks = args, ranks
        self.log_value = math.log(args.lambda_init)

    @property
    def value(self) -> float:
        """Lambda."""
        return math.exp(self.log_value)

    def update(self, costs: Sequence[float], step: int) -> dict[str, float]:
        r"""Move lambda by the costs of a batch, and say how they are. Collective.

        .. math:: \ln\lambda_{k+1} = \ln\lambda_k + \alpha \, \lambda_k \, (J_C - d)

        (eq. 31), cut to ``lambda_min`` and ``lambda_max``: without them a long time under the limit would take lambda so
        near 0 that, moving by a multiple of itself, it came back too late.

        Args:
            costs: of this rank's responses; NaN where nobody could say.
            step: optimizer steps so far.
        Returns:
            ``cost``, the mean; ``cost_violations``, the share of responses above the limit; ``lambda``. Of all ranks.
        """
        a = self.args
        known = [c for c in costs if not math.isnan(c)]
        total, above, count = self.ranks.sum(sum(known), sum(c > a.cost_limit for c in known), len(known))
        if not count:
            return {"lambda": self.value}
        if step >= a.lambda_warmup_steps:
            log_value = self.log_value + a.lambda_lr * self.value * (total / count - a.cost_limit)
            self.log_value = min(max(log_value, math.log(a.lambda_min)), math.log(a.lambda_max))
        return {"cost": total / count, "cost_violations": above / count, "lambda": self.value}

    def mix(self, reward: Number, cost: Number) -> Number:
        r"""What reward and cost (or their advantages) are worth together.

        .. math:: (R - \lambda C) / (1 + \lambda)

        (eq. 30): dividing keeps the scale, and with it the learning rate, whatever lambda is.
        """
        return (reward - self.value * cost) / (1 + self.value)

    def state(self) -> dict[str, float]:
        """What :meth:`load_state` needs to go on from here."""
        return {"log_value": self.log_value}

    def load_state(self, state: dict[str, float]) -> None:
        """Go on where ``state`` was taken."""
        self.log_value = state["log_value"]
