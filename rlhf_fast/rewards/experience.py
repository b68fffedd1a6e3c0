"""Where sampled responses meet their rewards: prompts in, scored :class:`Experience` out."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.data.batch import Example, Experience, Prompt, TokenBatch, unpack
from rlhf_fast.errors import UserError
from rlhf_fast.models import Policy
from rlhf_fast.rollout import Engine, Request, Sample, completions_for, decode
from rlhf_fast.rollout.sampling import spaced_seed

from . import check_columns, resolve_all, score
from .functions import RewardTable
from .model import RewardModel

logger = logging.getLogger(__name__)


class ScoredRollouts:
    """Samples responses with an engine and scores them with reward functions.

    Args:
        engine: the rollout engine.
        policy: whose tokenizer turns responses into the text that reward functions read.
        functions: reward functions, see :mod:`rlhf_fast.rewards`.
        names: of the functions, for metrics.
        weights: one per function; None weighs them all 1.
        costs: functions whose sum is a response's cost, or their specs.
        held_out: functions whose sum is a reward that nothing learns from, or their specs.
        share: of the prompts whose responses those score.
    """

    def __init__(
        self,
        engine: Engine,
        policy: Policy,
        functions: Sequence[Callable],
        names: Sequence[str],
        weights: Sequence[float] | None = None,
        costs: Sequence[Any] = (),
        held_out: Sequence[Any] = (),
        share: float = 1.0,
    ):
        self.engine, self.policy = engine, policy
        self.functions, self.names, self.weights = list(functions), list(names), weights
        if weights is not None and len(weights) != len(self.names):
            raise UserError(
                f"reward_weights has {len(weights)} entries for the rewards {', '.join(names)}; give one each"
            )
        self.costs, self.cost_names = resolve_all(list(costs))
        self.held_out, self.held_out_names = resolve_all(list(held_out))
        self.share = share
        check_kinds([*self.functions, *self.held_out], [*self.names, *self.held_out_names], "reward")
        check_kinds(self.costs, self.cost_names, "cost")
        self.seconds: dict[str, float] = {}  # of the last call, by what they were spent on
        self._told: set[str] = set()  # faults of reward functions

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse, before training, reward functions that need a column the prompts do not have.

        Raises:
            UserError: names the function and the column.
        """
        given = [*prompts[0].columns, "prompt_ids"]
        check_columns([*self.functions, *self.costs], [*self.names, *self.cost_names], given)
        check_columns(self.held_out, self.held_out_names, given)

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Prompt], *, n: int, max_new_tokens: int, temperature: float, seed: int
    ) -> tuple[list[Experience], dict[str, float]]:
        """``n`` responses to every prompt, siblings adjacent, each with its reward and its cost.

        Args:
            seed: number of the first prompt; the i-th draws by ``seed + i``, whatever else is in the batch.

        Returns:
            experiences (len(prompts) * n), and metrics under TRL's names.
        """
        requests = [
            Request(
                p.input_ids, n=n, max_new_tokens=max_new_tokens, temperature=temperature, seed=spaced_seed(seed + i)
            )
            for i, p in enumerate(prompts)
        ]
        began = time.perf_counter()
        groups = self.engine.generate(requests)
        generated = time.perf_counter()
        asked = [p for p in prompts for _ in range(n)]
        samples = [s for group in groups for s in group]
        rewards, costs, metrics = self._score(asked, samples)
        watched = n * math.ceil(self.share * len(prompts)) if self.held_out else 0
        held_out, figures = self._hold_out(asked[:watched], samples[:watched])
        held_out, metrics = [*held_out, *[math.nan] * (len(samples) - watched)], metrics | figures
        experiences = [
            Experience(
                example=Example(
                    [*p.input_ids, *s.ids], [False] * len(p.input_ids) + [True] * len(s.ids), where=p.where
                ),
                reward=reward,
                score=reward,
                held_out=other,
                cost=cost,
                finished=s.finish_reason == "stop",
                rollout_logprobs=_after_prompt(p, s, self.policy.device),
            )
            for p, s, reward, cost, other in zip(asked, samples, rewards.tolist(), costs.tolist(), held_out)
        ]
        self.seconds = {"generate": generated - began, "reward": time.perf_counter() - generated}
        lengths = torch.tensor([float(len(s.ids)) for s in samples])
        metrics["completions/mean_length"] = float(lengths.mean())
        metrics["completions/clipped_ratio"] = sum(not e.finished for e in experiences) / len(experiences)
        return experiences, metrics

    def _score(self, prompts: list[Prompt], samples: list[Sample]) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Rewards and costs, both (B,), and their metrics. A response whose cost nobody knows teaches nothing either."""
        table = self.table([*self.functions, *self.costs], [*self.names, *self.cost_names], prompts, samples)
        for message in table.messages:
            if (fault := message.split(" (")[0]) not in self._told:
                self._told.add(fault)
                logger.warning("%s; they teach nothing. Further ones only count as rewards/*/faults.", message)
        rewards, costs = table.part(len(self.names))
        metrics = _metrics("rewards", rewards, self.functions) | _metrics("costs", costs, self.costs)
        total, cost = rewards.total(self.weights), torch.zeros(len(samples))
        if self.costs:
            cost = costs.total()
            total = total.masked_fill(cost.isnan(), torch.nan)
        return total, cost, metrics

    def _hold_out(self, prompts: list[Prompt], samples: list[Sample]) -> tuple[list[float], dict[str, float]]:
        if not samples:
            return [], {}
        table = self.table(self.held_out, self.held_out_names, prompts, samples)
        return table.total().tolist(), _metrics("held_out", table, self.held_out)

    def others(self, prompts: Sequence[Prompt], responses: Sequence[list[int]]) -> dict[str, Tensor]:
        """``cost`` and ``held_out`` reward (B,), where there are such, of one response to each of ``prompts``."""
        samples = [Sample(ids, [0.0] * len(ids), "stop") for ids in responses]
        panels = {"cost": (self.costs, self.cost_names), "held_out": (self.held_out, self.held_out_names)}
        return {
            what: self.table(functions, names, prompts, samples).total()
            for what, (functions, names) in panels.items()
            if functions
        }

    def table(
        self, functions: Sequence[Callable], names: Sequence[str], prompts: Sequence[Prompt], samples: Sequence[Sample]
    ) -> RewardTable:
        """What ``functions`` say of one sample to each of ``prompts``."""
        texts = decode(samples, self.policy.tokenizer)
        # None stands for a column that only some rows have
        columns = {name: [p.columns.get(name) for p in prompts] for name in {k: 0 for p in prompts for k in p.columns}}
        return score(
            functions,
            names,
            [p.prompt for p in prompts],
            completions_for([p.prompt for p in prompts], texts),
            [s.ids for s in samples],
            {**columns, "prompt_ids": [p.input_ids for p in prompts]},
        )


def check_kinds(functions: Sequence[Callable], names: Sequence[str], kind: str) -> None:
    """Refuse a cost model as a reward, and a reward model as a cost: their signs are opposite.

    Raises:
        UserError: names the model and where it belongs.
    """
    places = {"reward": "reward_funcs or reward_model_path", "cost": "cost_funcs or cost_model_path"}
    for function, name in zip(functions, names):
        if isinstance(function, RewardModel) and function.kind != kind:
            raise UserError(
                f"{name} is a {function.kind} model and stands among the {kind}s; give it to {places[function.kind]}"
            )


def _metrics(kind: str, table: RewardTable, functions: Sequence[Callable]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, values, faulted, function in zip(table.names, table.values.T, table.faulted.T, functions):
        scored = values[~values.isnan()]
        if len(scored):
            metrics[f"{kind}/{name}/mean"] = float(scored.mean())
            metrics[f"{kind}/{name}/std"] = float(scored.std()) if len(scored) > 1 else 0.0
        metrics[f"{kind}/{name}/faults"] = float(faulted.sum())
        if isinstance(function, RewardModel) and function.num_heads > 1 and function.stds:
            metrics[f"{kind}/{name}/disagreement"] = sum(function.stds) / len(function.stds)
    return metrics


def _after_prompt(prompt: Prompt, sample: Sample, device: Any) -> Tensor:
    return torch.tensor([0.0] * len(prompt.input_ids) + list(sample.logprobs), device=device)


def restore_experience(fields: dict[str, Any], device: Any) -> Experience:
    """An experience from the fields that ``dataclasses.asdict`` took it apart into, its tensors on ``device``."""
    fields = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in fields.items()}
    return Experience(**{**fields, "example": Example(**fields["example"])})


@torch.no_grad()
def blank_experience(prompt: Sequence[int], length: int, entries: Sequence[str], device: Any) -> Experience:
    """A record of ``length`` tokens that teaches nothing: ``prompt``, its last token over and over, ``entries`` of zeros."""
    new = length - len(prompt)
    example = Example([*prompt, *prompt[-1:] * new], [False] * len(prompt) + [True] * new)
    return Experience(example, reward=0.0, **{name: torch.zeros(length, device=device) for name in entries})


def annotate(
    micro_batches: Sequence[Sequence[Experience]],
    passes: dict[str, Callable[[TokenBatch], Tensor]],
    pack: Callable[[list[Example]], TokenBatch],
) -> None:
    """Fill per-token entries: ``passes`` maps the entry's name to what computes it, ``(batch) -> (N,)``.

    A micro-batch is packed once for all passes, and a pass runs through all of them, so that it switches adapters once.
    """
    batches = [pack([e.example for e in part]) for part in micro_batches] if passes else []
    for name, compute in passes.items():
        for part, batch in zip(micro_batches, batches):
            unpack(part, name, compute(batch), batch)
