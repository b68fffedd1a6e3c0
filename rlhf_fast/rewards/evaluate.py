"""Evaluation of a policy: generate on held-out prompts, score, summarise."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.data.batch import Prompt
from rlhf_fast.errors import UserError
from rlhf_fast.rewards.functions import RewardTable, check_columns, resolve_all, score
from rlhf_fast.rollout import Request, Sample, completions_for, decode, engine_for


class Evaluation(dict[str, float]):
    """Metric name -> value, and beside it what was generated and what went wrong."""

    samples: list[dict[str, Any]]  # one row per completion: prompt, completion, rewards, finish_reason, tokens, columns
    completion_ids: list[list[int]]  # of each of them, as sampled
    totals: Tensor  # of each of them: the weighted sum of all functions, NaN where there is none
    messages: list[str]  # faults of reward functions


def evaluate_policy(
    policy: Any,
    prompts: Sequence[Prompt],
    reward_funcs: Any,
    *,
    reward_weights: Sequence[float] | None = None,
    n: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    max_new_tokens: int = 256,
    stop: tuple[str, ...] = (),
    stop_ids: tuple[int, ...] = (),
    seed: int = 0,
    slots: int = 128,
    max_tokens: int | None = None,
    role: str = "policy",
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Generate ``n`` completions of every prompt and score them. The policy and the global generators stay as they were.

    Args:
        policy: the Policy.
        prompts: held-out prompts, with the columns that the reward functions need.
        reward_funcs: functions or their specs (see ``resolve``); may be empty.
        reward_weights: one per function; None weighs them all 1.
        n: samples per prompt; more than one needs a temperature.
        seed: of the sampling; prompt i draws from a stream of its own.
        slots: completions written at once.
        max_tokens: most tokens whose keys and values are held meanwhile, see ``SlotEngine``.
        progress: called with the number of completions so far.

    Returns:
        ``reward`` (the weighted sum of all functions) and ``rewards/<function>/mean`` with their ``stderr`` over prompts, ``pass@k`` of
        functions that say only 0 or 1, ``eos_rate``, ``completions/mean_length`` in tokens, and speed.
    Raises:
        UserError: no prompts, greedy with n > 1, or a column that a reward function needs is missing.
    """
    if not prompts:
        raise UserError("evaluate: there are no prompts.")
    if n > 1 and temperature == 0:
        raise UserError(f"evaluate: {n} greedy samples of a prompt are all the same. Set a temperature, or n to 1.")
    functions, names = resolve_all(reward_funcs)
    columns = _columns(prompts, n)
    check_columns(functions, names, list(columns))

    longest = max(len(p.input_ids) for p in prompts) + max_new_tokens
    engine = engine_for(policy, role=role, slots=slots, max_tokens=max_tokens, progress=progress, longest=longest)
    options = {"n": n, "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    options |= {"min_p": min_p, "repetition_penalty": repetition_penalty, "stop": stop, "stop_ids": stop_ids}
    requests = [Request(p.input_ids, seed=seed * 2**32 + i, **options) for i, p in enumerate(prompts)]
    start = time.perf_counter()
    samples = [sample for group in engine.generate(requests) for sample in group]
    seconds = time.perf_counter() - start

    asked = [prompt.prompt for prompt in prompts for _ in range(n)]
    texts = decode(samples, policy.tokenizer)
    table = score(functions, names, asked, completions_for(asked, texts), [s.ids for s in samples], columns)
    evaluation = Evaluation(_reward_metrics(table, n, reward_weights) | _text_metrics(samples, seconds))
    evaluation.messages = table.messages
    evaluation.totals = table.total(reward_weights)
    evaluation.completion_ids = [s.ids for s in samples]
    evaluation.samples = _rows(asked, texts, samples, table, columns)
    return evaluation


def pass_at_k(correct: Tensor, k: int) -> float:
    """Unbiased chance that one of k samples is right (Chen et al. 2021, arXiv:2107.03374, eq. 1).

    Args:
        correct: (P, n) bool, n samples of each of P prompts.
    """
    n = correct.shape[1]
    return sum(1 - math.comb(n - int(c), k) / math.comb(n, k) for c in correct.sum(1)) / len(correct)


def _columns(prompts: Sequence[Prompt], n: int) -> dict[str, list[Any]]:
    """Every column of the prompts, and their token ids, with one entry per sample."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    columns = {name: [p.columns.get(name) for p in prompts for _ in range(n)] for name in names}
    return {**columns, "prompt_ids": [p.input_ids for p in prompts for _ in range(n)]}


def _reward_metrics(table: RewardTable, n: int, weights: Sequence[float] | None) -> dict[str, float]:
    metrics: dict[str, float] = {}
    if table.names:
        total = table.total(weights)
        metrics |= {"reward": _mean(total), "reward/stderr": _standard_error(total, n)}
    for name, values in zip(table.names, table.values.T):
        metrics[f"rewards/{name}/mean"] = _mean(values)
        metrics[f"rewards/{name}/stderr"] = _standard_error(values, n)
        if n > 1 and ((values == 0) | (values == 1)).all():
            for k in (1 << i for i in range(n.bit_length())):
                metrics[f"rewards/{name}/pass@{k}"] = pass_at_k(values.view(-1, n) == 1, k)
        if name in table.faults:
            metrics[f"rewards/{name}/faults"] = float(table.faults[name])
    return metrics


def _mean(values: Tensor) -> float:
    return float(values.double().nanmean())


def _standard_error(values: Tensor, n: int) -> float:
    """Of the mean, over prompts: the samples of one prompt are not independent of each other."""
    per_prompt = values.double().view(-1, n).nanmean(1)
    per_prompt = per_prompt[~per_prompt.isnan()]
    return float(per_prompt.std() / math.sqrt(len(per_prompt))) if len(per_prompt) > 1 else math.nan


def _text_metrics(samples: Sequence[Sample], seconds: float) -> dict[str, float]:
    lengths = torch.tensor([len(s.ids) for s in samples], dtype=torch.float32)
    eos_rate = sum(s.finish_reason == "stop" for s in samples) / len(samples)
    return {
        "eos_rate": eos_rate,
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": 1 - eos_rate,
        "num_completions": float(len(samples)),
        "tokens_per_second": float(lengths.sum()) / seconds,
    }


def _rows(
    prompts: list[Any], texts: list[str], samples: list[Sample], table: RewardTable, columns: dict[str, list[Any]]
) -> list[dict[str, Any]]:
    """What was asked, written and scored, for reading."""
    shown = {name: values for name, values in columns.items() if name != "prompt_ids"}
    rows = []
    for i, (prompt, text, sample) in enumerate(zip(prompts, texts, samples)):
        scores = {name: None if math.isnan(v) else v for name, v in zip(table.names, table.values[i].tolist())}
        rows.append(
            {
                "prompt": prompt,
                "completion": text,
                "rewards": scores,
                "finish_reason": sample.finish_reason,
                "tokens": len(sample.ids),
                **{name: values[i] for name, values in shown.items()},
            }
        )
    return rows
