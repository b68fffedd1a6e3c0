"""Do the engine and the trainer hold the same model? Asked after every sync, on one sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlhf_fast.data.batch import Example, TokenBatch
from rlhf_fast.errors import UserError
from rlhf_fast.models.policy import in_eval_mode
from rlhf_fast.rollout.engine import Engine, Request, Sample


@torch.no_grad()
def check_logprobs(
    engine: Engine, policy: Any, prompt_ids: Sequence[int], *, temperature: float, tolerance: float, tokens: int = 16
) -> float:
    """Compare the log-probabilities of a sample, as the engine gave them, with those that ``policy`` gives its tokens.

    It sees another base, an adapter that was not applied, a head or a template of another size, another temperature. It
    cannot see weights that are one small step old; the versions in adapters' names are for that.

    Args:
        engine: of several servers each is asked.
        temperature: of sampling, above 0.
        tolerance: nats per token, mean absolute difference. bf16 alone makes about 0.01 to 0.05, a base in 4 bit on one
            side more.
        tokens: length of the sample at most.

    Returns:
        the largest mean absolute difference over the servers, in nats per token.
    Raises:
        UserError: it exceeds ``tolerance``; says where, and whether the engine reports another temperature than it samples
            at.
    """
    request = Request(prompt_ids, max_new_tokens=tokens, temperature=temperature, seed=0)
    probe = getattr(engine, "probe", None)
    samples = probe(request) if probe else {type(engine).__name__: engine.generate([request])[0][0]}
    worst = 0.0
    for where, sample in samples.items():
        difference = _difference(policy, prompt_ids, sample, temperature)
        if difference > tolerance:
            raise UserError(_complaint(where, difference, policy, prompt_ids, sample, temperature, tolerance))
        worst = max(worst, difference)
    return worst


def _difference(policy: Any, prompt_ids: Sequence[int], sample: Sample, temperature: float) -> float:
    """Mean absolute difference between the sample's log-probabilities and the policy's at ``temperature``."""
    example = Example([*prompt_ids, *sample.ids], [False] * len(prompt_ids) + [True] * len(sample.ids))
    batch = TokenBatch.pack([example], policy.device)
    with in_eval_mode(policy):  # the engine drops nothing either
        mine = policy.logprobs(batch, role=policy.role, temperature=temperature)[len(prompt_ids) :]
    return float((mine.cpu() - torch.tensor(sample.logprobs)).abs().mean())


def _complaint(
    where: str,
    difference: float,
    policy: Any,
    prompt_ids: Sequence[int],
    sample: Sample,
    temperature: float,
    tolerance: float,
) -> str:
    if temperature != 1 and _difference(policy, prompt_ids, sample, 1.0) <= tolerance:
        return (
            f"rollout: {where} samples at temperature {temperature:g} and reports log-probabilities at 1; start vLLM with "
            "--logprobs-mode processed_logprobs"
        )
    return (
        f"rollout: log-probabilities of {where} differ from the trainer's by {difference:.3g} nats per token on a probe "
        f"(at most {tolerance:g}); serve the base that is trained, {policy.model.name_or_path or 'the same model'}, in the "
        "same precision, or raise vllm_logprob_tolerance"
    )
