"""What held-out data says of a policy: its mean losses, or what its answers are worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from rlhf_fast.data.batch import Example, Experience, Prompt
from rlhf_fast.models.policy import in_eval_mode
from rlhf_fast.rewards import evaluate_policy
from rlhf_fast.run.means import Means

from .scores import kl_of
from .shards import idle_losses

if TYPE_CHECKING:
    from .rl import RLTrainer
    from .trainer import Trainer


@torch.no_grad()
def mean_losses(trainer: Trainer) -> dict[str, float]:
    """Mean loss and figures over the held-out records. Collective."""
    means = Means()
    mine = trainer.ranks.share(list(trainer.eval_records))
    window = trainer.window(mine)  # all of the data is one: the mean loss does not depend on the batch size
    total = torch.zeros((), device=trainer.accelerator.device)
    with in_eval_mode(trainer.policy):
        parts = trainer.micro_batches(trainer.collect(mine))
        idle = trainer.idle_passes(len(parts))
        for part in parts:
            for loss, figures, weight in trainer.losses(part, window):
                total += loss
                means.add(figures, weight)
        for _ in idle_losses(trainer, parts[-1:] * idle, window):
            pass
    means.add({"loss": trainer.accelerator.reduce(total, "sum")}, 1.0)
    return means.read()


def answers(trainer: RLTrainer) -> dict[str, float]:
    """Greedy answers to held-out prompts, scored by the reward functions, and the KL where there is a reference.

    The answers are ``trainer.completions`` afterwards, and what each is worth ``trainer.judged``.
    """
    a = trainer.args
    prompts = trainer.eval_records[: a.num_eval_prompts]
    limits = {"max_new_tokens": a.max_completion_length, "max_tokens": trainer.rollout_tokens}
    limits["slots"] = trainer.rollout_batch_size or a.rollout_batch_size
    functions, weights = trainer.rollouts.functions, {"reward_weights": a.reward_weights}
    evaluation = evaluate_policy(trainer.policy, prompts, functions, **weights, **limits)
    figures = {name: value for name, value in evaluation.items() if isinstance(value, float)}
    trainer.completions = evaluation.samples
    trainer.judged = trainer.rollouts.others(prompts, evaluation.completion_ids)
    figures |= {name: float(values.nanmean()) for name, values in trainer.judged.items()}
    trainer.judged["reward"] = evaluation.totals
    if trainer.policy.has_reference:
        sampled = evaluate_policy(trainer.policy, prompts, [], temperature=a.temperature, seed=a.seed, **limits)
        figures["kl"] = kl_to_reference(trainer, prompts, sampled.completion_ids)
    return figures


@torch.no_grad()
def kl_to_reference(trainer: RLTrainer, prompts: Sequence[Prompt], responses: list[list[int]]) -> float:
    """Mean KL(policy || reference) of a response, in nats, estimated (k1) on the policy's own samples."""
    experiences = [
        Experience(Example([*p.input_ids, *r], [False] * len(p.input_ids) + [True] * len(r)), reward=0.0)
        for p, r in zip(prompts, responses)
    ]
    with in_eval_mode(trainer.policy):
        trainer.annotate(experiences, "old_logprobs", "ref_logprobs")
    return sum(map(kl_of, experiences)) / len(experiences)
