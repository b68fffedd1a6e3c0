"""verl's losses and advantage estimators on these kernels, by the signatures of verl's registries. One line:

    import rlhf_fast.integrations.verl as fast
    fast.register()        # then policy_loss.loss_mode=fast in the actor's config, algorithm.adv_estimator=fast_rloo
    fast.register(replace=True)  # or: verl's own names "vanilla", "gspo", "gae" mean these from now on

``register`` runs in every process that computes a loss (an ``external_lib`` of the model's config is imported there).
Tensors are verl's padded (B, T); ``response_mask`` may be of any dtype. Masked entries are never read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, get_args

import torch
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.integrations.replace import replace_everywhere
from rlhf_fast.kernels import gae, group_advantages, policy_loss, sequence_logprobs, token_logprobs, whiten

__all__ = [
    "gae_advantage_return",
    "grpo_outcome_advantage",
    "logprobs_from_logits",
    "policy_loss_gspo",
    "policy_loss_vanilla",
    "register",
    "rloo_outcome_advantage",
]

_METRICS = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
_AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")


def register(*, replace: bool = False) -> None:
    """Offer these functions to verl: policy losses ``fast`` and ``fast_gspo``, estimators ``fast_grpo``, ``fast_rloo``.

    Args:
        replace: verl's ``vanilla`` and ``gspo`` losses, its GAE (which verl's trainer calls by name, so no registry
            reaches it) and ``logprobs_from_logits`` become these. GRPO's and RLOO's advantages stay verl's: see there
            how ours differ.
    Raises:
        UserError: verl is missing, has no such registries, or its losses return something else.
    """
    try:
        from verl.trainer.ppo import core_algos
        from verl.utils import torch_functional
    except ImportError as error:
        raise UserError(f"rlhf_fast.integrations.verl needs verl: `pip install verl` ({error})") from error
    wanted = ("register_policy_loss", "register_adv_est", "compute_gae_advantage_return", "compute_policy_loss_vanilla")
    missing = [name for name in wanted if not hasattr(core_algos, name)]
    if missing:
        raise UserError(f"this verl has no core_algos.{missing[0]}; releases from 0.5 on have it")
    returns = get_args(inspect.signature(core_algos.compute_policy_loss_vanilla, eval_str=True).return_annotation)
    if len(returns) not in (2, 4):
        raise UserError(f"verl's policy losses return {returns}; rlhf_fast knows (loss, metrics) and (loss, 3 tensors)")
    losses = {"fast": policy_loss_vanilla, "fast_gspo": policy_loss_gspo}
    losses |= {"vanilla": policy_loss_vanilla, "gspo": policy_loss_gspo} if replace else {}
    for name, function in losses.items():
        core_algos.register_policy_loss(name)(function if len(returns) == 2 else _four_values(function))
    for name, function in {"fast_grpo": grpo_outcome_advantage, "fast_rloo": rloo_outcome_advantage}.items():
        core_algos.register_adv_est(name)(function)
    if replace:
        replace_everywhere("verl", core_algos.compute_gae_advantage_return, gae_advantage_return)
        replace_everywhere("verl", torch_functional.logprobs_from_logits, logprobs_from_logits)


def policy_loss_vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """verl's ``vanilla``: PPO's clip with a dual clip at ``clip_ratio_c`` (arXiv:1707.06347, arXiv:1912.09729).

    Equal to verl's while |log ratio| < 20, beyond which verl cuts the ratio off.

    Args:
        old_log_prob, log_prob, advantages, response_mask: (B, T).
        loss_agg_mode: token-mean, seq-mean-token-sum or seq-mean-token-mean.
        config: verl's ActorConfig: clip_ratio, clip_ratio_low, clip_ratio_high, clip_ratio_c, global_batch_info.
        rollout_is_weights: (B, T) importance weights >= 0 of the rollout engine, factors of the token losses.
    Returns:
        the loss and verl's metrics: ``actor/pg_clipfrac``, ``actor/ppo_kl``, ``actor/pg_clipfrac_lower``.
    Raises:
        UserError: the aggregation is unknown, or lacks the size of the global batch.
    """
    low, high = _clips(config)
    dual = _setting(config, "clip_ratio_c", 3.0)
    return _policy_loss(
        old_log_prob,
        log_prob,
        advantages,
        response_mask,
        rollout_is_weights,
        dual,
        clip_low=low,
        clip_high=high,
        dual_clip=dual,
        **_aggregation(loss_agg_mode, response_mask.bool(), config),
    )


def policy_loss_gspo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """verl's ``gspo`` (arXiv:2507.18071, sec. 4.3): the sequence's ratio with each token's gradient.

    Aggregates by seq-mean-token-mean whatever ``loss_agg_mode`` says, as verl does. Everything else as in
    :func:`policy_loss_vanilla`; the third metric is 0.
    """
    low, high = _clips(config)
    return _policy_loss(
        old_log_prob,
        log_prob,
        advantages,
        response_mask,
        rollout_is_weights,
        None,
        clip_low=low,
        clip_high=high,
        level="sequence_token",
        **_aggregation("seq-mean-token-mean", response_mask.bool(), config),
    )


def gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """verl's ``compute_gae_advantage_return``: whitened advantages and returns, (B, T), 0 where masked.

    verl leaves leftovers of its loop on masked positions; nobody reads them, and here they are 0. The variance of the
    whitening is Bessel's, as verl's.
    """
    mask = response_mask.bool()
    advantages, returns = gae(token_level_rewards, values, mask, float(gamma), float(lam))
    count = mask.sum().clamp(min=2)
    return whiten(advantages, mask) * ((count - 1) / count).sqrt(), returns


def grpo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """verl's ``grpo`` without its loop over responses (arXiv:2402.03300, sec. 4.1.2), the same twice, (B, T).

    Two differences, on purpose: a response alone in its group has nothing to be compared with and gets 0, where verl
    gives it its bare reward; and the standard deviation gets :func:`group_advantages`' 1e-4 added instead of
    ``epsilon``, so that rounding does not make an advantage out of equal rewards.

    Args:
        index: B hashable group names (verl's uid), in any order.
    """
    norm = norm_adv_by_std_in_grpo if config is None else _setting(config, "norm_adv_by_std_in_grpo", True)
    return _outcome(token_level_rewards, response_mask, index, scale="group" if norm else "none")


def rloo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence,
    epsilon: float = 1e-6,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """verl's ``rloo``: reward minus the mean of the group's others (arXiv:2402.14740), the same twice, (B, T).

    A response alone in its group gets 0, where verl gives it its bare reward.
    """
    return _outcome(token_level_rewards, response_mask, index, scale="none", baseline="leave_one_out")


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """verl's ``logprobs_from_logits``: (..., V) and (...) -> (...) float32, the gradient written over the logits."""
    return token_logprobs(logits, labels, inplace_backward=inplace_backward)


def _four_values(function: Callable) -> Callable:
    """The losses as verl had them until 0.6: the metrics as tensors behind the loss."""

    @wraps(function)
    def loss_and_figures(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        loss, metrics = function(*args, **kwargs)
        return loss, *(torch.tensor(metrics[name]) for name in _METRICS)

    return loss_and_figures


def _policy_loss(old, new, advantages, response_mask, weights, dual, **options) -> tuple[Tensor, dict[str, float]]:
    mask = response_mask.bool()
    if weights is not None:
        # weights are not negative, so each token's loss is linear in them
        advantages = advantages * weights
    loss, stats = policy_loss(new, old, advantages, mask, **options)
    with torch.no_grad():
        log_ratio = torch.where(mask, new - old, 0.0)
        count = mask.sum().clamp(min=1)
        beyond = torch.zeros_like(log_ratio) if dual is None else (log_ratio.exp() > dual) & (advantages < 0) & mask
        figures = torch.stack([stats["clip_region"], -log_ratio.sum() / count, beyond.sum() / count])
    # one wait for the device instead of three
    return loss, dict(zip(_METRICS, figures.tolist()))


def _aggregation(mode: str, mask: Tensor, config: Any) -> dict[str, Any]:
    """verl's ``agg_loss`` as a way to sum and a denominator, over the global batch where verl says how large it is."""
    info = _setting(config, "global_batch_info", None) or {}
    copies = info.get("dp_size", 1)
    tokens, sequences = info.get("batch_num_tokens"), info.get("global_batch_size")
    if mode not in _AGGREGATIONS:
        raise UserError(
            f"loss_agg_mode {mode!r}: rlhf_fast knows {', '.join(_AGGREGATIONS)}; seq-mean-token-sum-norm divides by "
            "different things in different releases of verl"
        )
    size = tokens if mode == "token-mean" else sequences
    if size is None and copies > 1:
        raise UserError(f"loss_agg_mode {mode!r} on {copies} ranks needs the size of the global batch in config")
    if size is None:
        size = (mask.sum() if mode == "token-mean" else mask.any(-1).sum()).clamp(min=1)
    how = {"token-mean": "token", "seq-mean-token-sum": "constant", "seq-mean-token-mean": "sequence"}[mode]
    return {"aggregate": how, "denominator": size / copies}


def _outcome(rewards: Tensor, response_mask: Tensor, index: Sequence, **options: str) -> tuple[Tensor, Tensor]:
    mask = response_mask.bool()
    if len(index) != len(rewards):
        raise UserError(f"index names the group of each response: {len(rewards)} responses, {len(index)} names")
    number = {name: i for i, name in enumerate(dict.fromkeys(index))}
    groups = torch.tensor([number[name] for name in index], device=rewards.device)
    # verl's score of a response is the sum over all its positions, masked or not
    scores = sequence_logprobs(rewards, torch.ones_like(mask))
    advantages = torch.where(mask, group_advantages(scores, group_ids=groups, **options)[:, None], 0.0)
    return advantages, advantages


def _clips(config: Any) -> tuple[float, float]:
    if config is None:
        raise UserError("the policy losses need verl's actor config: clip_ratio and its relatives")
    both = _setting(config, "clip_ratio", 0.2)
    low, high = _setting(config, "clip_ratio_low", None), _setting(config, "clip_ratio_high", None)
    return both if low is None else low, both if high is None else high


def _setting(config: Any, name: str, default: Any) -> Any:
    """Of a dataclass, an OmegaConf node or a dictionary."""
    if isinstance(config, dict):
        return config.get(name, default)
    return getattr(config, name, default)
