r"""The GRPO family as one table: a variant is one row of ``LOSS_TYPES``.

Most are what :func:`rlhf_fast.kernels.policy_loss` fuses. A row with a gate makes the gradient of a token
:math:`-w(\rho)\,A\,\nabla\log\pi` instead of clipping the ratio: w is a factor of the advantages of REINFORCE, so every backend
runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.kernels import kl_penalty, policy_loss
from rlhf_fast.kernels.segments import aggregate, masked_mean, select, sequence_sum, to_tokens

LOG_LEAST = -18.420680743952367  # log 1e-8: likelihood ratios of sequences stay above, as VESPO's authors have it
LOG_MOST = 20.0


class Options(NamedTuple):
    """What the losses are tuned with. A row reads those of its ``options``."""

    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    importance_sampling_level: str = "token"
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0


# ---------------------------------------------------------------------------------------------------------- gates


def sequence_means(x: Tensor, mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Of ``x`` over each sequence's unmasked tokens, repeated over its tokens. (N,) -> (N,), differentiable."""
    counts = sequence_sum(mask.to(x.dtype), cu_seqlens).clamp(min=1)
    return to_tokens(sequence_sum(select(x, mask), cu_seqlens) / counts, mask, cu_seqlens)


def sapo_gate(log_ratio: Tensor, advantages: Tensor, mask: Tensor, cu_seqlens: Tensor, o: Options) -> Tensor:
    r"""SAPO (arXiv:2511.20347): 1 where the ratio is 1, and falling on both sides.

    .. math:: w = 4 p (1 - p) \rho, \qquad p = \sigma(\tau (\rho - 1))

    which makes the gradient that of SAPO's loss :math:`-\tfrac{4}{\tau} p A`, in which :math:`\tau` is ``sapo_temperature_pos``
    where the advantage is above 0 and ``sapo_temperature_neg`` elsewhere.

    Args:
        log_ratio: of the policy to the one that sampled. (N,) float.
        advantages: (N,).
        mask: True on the tokens to train. (N,) bool.
        cu_seqlens: (B + 1,) int32.
    Returns:
        (N,).
    """
    if o.importance_sampling_level == "sequence":
        log_ratio = sequence_means(log_ratio, mask, cu_seqlens)
    ratio = log_ratio.clamp(max=LOG_MOST).exp()
    tau = torch.where(advantages > 0, o.sapo_temperature_pos, o.sapo_temperature_neg)
    p = torch.sigmoid(tau * (ratio - 1))
    return 4 * p * (1 - p) * ratio


def vespo_gate(log_ratio: Tensor, advantages: Tensor, mask: Tensor, cu_seqlens: Tensor, o: Options) -> Tensor:
    r"""VESPO (arXiv:2602.10693): of a whole response's likelihood ratio W, without length normalisation.

    .. math:: w = W^k e^{\lambda (1 - W)}

    with ``vespo_k_pos`` and ``vespo_lambda_pos`` where the advantage is at least 0, and the other two below.
    Arguments and result as of :func:`sapo_gate`.
    """
    total = sequence_sum(select(log_ratio, mask).clamp(-LOG_MOST, LOG_MOST), cu_seqlens)
    log_w = to_tokens(total.clamp(LOG_LEAST, LOG_MOST), mask, cu_seqlens)
    good = advantages >= 0
    k = torch.where(good, o.vespo_k_pos, o.vespo_k_neg)
    decay = torch.where(good, o.vespo_lambda_pos, o.vespo_lambda_neg)
    return torch.exp(k * log_w + decay * (1 - log_w.exp()))


# ---------------------------------------------------------------------------------------------------------- the table


class Row(NamedTuple):
    """One loss_type: what happens to a token, how tokens come together, and which options it reads."""

    kind: str  # of policy_loss
    aggregate: str
    divisor: str  # what the sum is divided by, of the whole optimizer step: its tokens, responses, or tokens at most
    options: frozenset[str]
    gate: Callable[[Tensor, Tensor, Tensor, Tensor, Options], Tensor] | None = None


_LEVEL = frozenset({"importance_sampling_level"})
_CLIP = _LEVEL | {"epsilon", "epsilon_high", "delta"}
_SAPO = _LEVEL | {"sapo_temperature_pos", "sapo_temperature_neg"}
_VESPO = frozenset({"vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"})

LOSS_TYPES: dict[str, Row] = {
    # mean over each response, then over responses (arXiv:2402.03300, eq. 3)
    "grpo": Row("clip", "sequence", "responses", _CLIP),
    # mean over all tokens of the optimizer step (arXiv:2503.14476, eq. 8)
    "dapo": Row("clip", "token", "tokens", _CLIP),
    # mean over the tokens of the batch. In TRL that is one micro-batch of one process, so that how a step is split changes
    # its gradient; here it is the step, as it is there with one micro-batch and one process
    "bnpo": Row("clip", "token", "tokens", _CLIP),
    # sum over a constant: no length bias (arXiv:2503.20783, sec. 3)
    "dr_grpo": Row("clip", "constant", "limit", _CLIP),
    # sum over each response, mean over responses (arXiv:2602.05261)
    "luspo": Row("clip", "constant", "responses", _CLIP),
    # the clipped ratio weighs log-probabilities (arXiv:2506.13585, eq. 4)
    "cispo": Row("cispo", "token", "tokens", _LEVEL | {"epsilon_high"}),
    "sapo": Row("reinforce", "sequence", "responses", _SAPO, sapo_gate),
    "vespo": Row("reinforce", "token", "tokens", _VESPO, vespo_gate),
    # no ratio at all
    "reinforce": Row("reinforce", "token", "tokens", frozenset()),
}


def check(loss_type: str, o: Options) -> None:
    """Refuse options that are out of range, or that ``loss_type`` does not read.

    Raises:
        ValueError: names the option, its value, and the losses that take it.
    """
    for option, default in Options._field_defaults.items():
        takers = [name for name, row in LOSS_TYPES.items() if option in row.options]
        if (value := getattr(o, option)) != default and loss_type not in takers:
            raise ValueError(
                f"{option} is {value} and has no effect with loss_type {loss_type}; it belongs to {', '.join(takers)}"
            )
        if option.startswith(("sapo", "vespo")) and value <= 0:
            raise ValueError(f"{option} is {value}; it must be above 0")
    if o.delta is not None and o.delta <= 1:
        raise ValueError(f"delta is {o.delta}; it bounds the ratio from above and must exceed 1")
    if loss_type == "cispo" and o.epsilon_high is None:
        raise ValueError("loss_type cispo needs epsilon_high, the absolute bound of the ratio; its authors use 5")
    if loss_type == "sapo" and o.importance_sampling_level == "sequence_token":
        raise ValueError(
            "importance_sampling_level sequence_token is not defined for loss_type sapo; choose token or sequence"
        )


def group_policy_loss(
    loss_type: str,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    o: Options,
    *,
    ref_logprobs: Tensor | None,
    beta: float,
    unbiased: bool,
    denominator: float,
    cu_seqlens: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a row of ``LOSS_TYPES``, and ``beta`` times KL(policy || reference).

    Args:
        loss_type: a name of ``LOSS_TYPES``.
        logprobs, old_logprobs, ref_logprobs: of each token, under the policy, when it sampled, under the reference. (N,) float.
        advantages: (N,).
        mask: True on the tokens to train. (N,) bool.
        unbiased: the KL is :func:`unbiased_kl` instead of k3.
        denominator: the row's divisor, of the whole optimizer step.
        cu_seqlens: (B + 1,) int32.
    Returns:
        a scalar, and metrics as of :func:`rlhf_fast.kernels.policy_loss`.
    """
    row, apart = LOSS_TYPES[loss_type], bool(beta) and unbiased
    over = {"denominator": denominator, "cu_seqlens": cu_seqlens}
    if row.gate is not None:
        advantages = advantages * row.gate(logprobs.detach() - old_logprobs, advantages, mask, cu_seqlens, o)
    loss, metrics = policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        kind=row.kind,
        clip_low=o.epsilon,
        clip_high=o.epsilon_high,
        dual_clip=o.delta,
        level="token" if row.kind == "reinforce" else o.importance_sampling_level,
        ref_logprobs=ref_logprobs if beta and not apart else None,
        kl_coef=0.0 if apart else beta,
        aggregate=row.aggregate,
        **over,
    )
    if apart:
        level = o.importance_sampling_level
        kl, metrics["kl"] = unbiased_kl(
            logprobs, old_logprobs, ref_logprobs, mask, how=row.aggregate, level=level, **over
        )
        loss = loss + beta * kl
    return loss, metrics


def unbiased_kl(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    how: str,
    denominator: float,
    cu_seqlens: Tensor,
    level: str = "token",
) -> tuple[Tensor, Tensor]:
    r"""KL(policy || reference), k3 weighed by the differentiable importance ratio (DeepSeek-V3.2, arXiv:2512.02556).

    .. math:: \rho_t \big(e^{d_t} - 1 - d_t\big), \qquad d_t = \log \pi_{ref}(t) - \log \pi(t)

    k3 by itself estimates the KL's value without bias, but not its gradient.

    Args:
        logprobs, old_logprobs, ref_logprobs: (N,) float.
        mask: True on the tokens to train. (N,) bool.
        how, denominator, cu_seqlens: as ``aggregate`` and the others of :func:`rlhf_fast.kernels.policy_loss`.
        level: ``"token"``, or another: the ratio of the sequence, exp of the mean log-ratio.
    Returns:
        the aggregated KL, a scalar, and its mean over tokens, detached.
    """
    log_ratio = select(logprobs, mask) - select(old_logprobs, mask)
    if level != "token":
        log_ratio = sequence_means(log_ratio, mask, cu_seqlens)
    kl = kl_penalty(select(logprobs, mask), select(ref_logprobs, mask), "k3")
    kl = select(kl * log_ratio.clamp(max=LOG_MOST).exp(), mask)
    return aggregate(kl, mask, how, denominator, cu_seqlens), masked_mean(kl.detach(), mask)
