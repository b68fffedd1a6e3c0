"""The losses of policy and critic in PPO, GRPO and their relatives.

A kernel makes loss, metrics and gradient in one pass over the tokens: the loss of a token depends on its own numbers
(and its sequence's), so its derivative is known as soon as they are read. The backward pass is one multiplication.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_fast.kernels.dispatch import choose, kernel
from rlhf_fast.kernels.kl import ESTIMATORS
from rlhf_fast.kernels.registry import register
from rlhf_fast.kernels.segments import AGGREGATES, check_devices, check_tokens

from . import reference
from .reference import KINDS, LEVELS
from .terms import FIGURES, VALUE_FIGURES, PolicyOptions, PolicyTokens, ValueTokens

__all__ = ["KINDS", "LEVELS", "policy_loss", "value_loss"]


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    kind: str = "clip",
    clip_low: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    level: str = "token",
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    rollout_logprobs: Tensor | None = None,
    is_clip: float | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    aggregate: str = "token",
    denominator: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Policy-gradient loss: PPO (arXiv:1707.06347, eq. 7), GRPO, DAPO, Dr. GRPO, GSPO, CISPO, REINFORCE.

    .. math:: \ell_t = -\min(\rho_t A_t,\ \mathrm{clip}(\rho_t, 1 - \epsilon_l, 1 + \epsilon_h) A_t)
              + \beta\,\mathrm{KL}_t, \qquad \rho_t = \pi(t) / \pi_{old}(t)

    Masked positions are never read. A batch without a single token gives 0, with a gradient of zeros.

    Args:
        logprobs: of each token under the policy. (B, T), or packed (N,) with ``cu_seqlens``, float.
        old_logprobs: the same at the start of the update; None means now: the ratio is 1, its gradient is not 0.
        advantages: (B,), one per sequence, or one per token. Packed advantages of length N count as per token.
        mask: True on the tokens to train. bool.
        kind: ``"clip"``; ``"cispo"``: -stop_gradient(min(ratio, clip_high)) * A * logprob, clip_high absolute
            (arXiv:2506.13585, eq. 4); ``"reinforce"``: -A * logprob.
        clip_low, clip_high: the ratio stays in [1 - clip_low, 1 + clip_high]; clip_high defaults to clip_low.
        dual_clip: for A < 0, loss <= -dual_clip * A (arXiv:1912.09729; TRL's delta); > 1, "clip" only.
        level: of the ratio: ``"token"``; ``"sequence"``: exp(mean log-ratio) of the sequence (GSPO, arXiv:2507.18071);
            ``"sequence_token"``: that value with each token's own gradient (GSPO-token).
        ref_logprobs, kl_coef, kl_estimator: kl_coef * KL(policy || reference) is added to each token's loss.
        rollout_logprobs, is_clip: log-probabilities as the rollout engine reported them; with ``is_clip`` each token's
            loss is multiplied by min(exp(old - rollout), is_clip), before the KL; without, they are only measured.
        entropy, entropy_coef: of each token's distribution; entropy_coef * entropy is subtracted.
        aggregate: ``"token"``: mean over tokens (DAPO); ``"sequence"``: mean over sequences of their means, empty ones
            skipped (GRPO); ``"constant"``: sum over a constant (Dr. GRPO: B * longest completion allowed).
        denominator: what the sum is divided by instead of the local count: pass the whole window's, and the losses of
            its micro-batches add up.
        cu_seqlens: (B + 1,) int32 boundaries of packed sequences.
    Returns:
        the loss, a float32 scalar, and detached device scalars, means over this call's unmasked tokens: ``clip_low``,
        ``clip_high``, ``clip_region`` (shares clipped), ``approx_kl`` (ratio - 1 - log ratio, against old),
        ``ratio_mean``, ``ratio_max``; ``kl`` with a reference; ``entropy`` when given; with rollout_logprobs
        ``is_ratio_mean``, ``is_ratio_max`` (before truncation) and ``rollout_gap`` (mean |old - rollout|).
    Raises:
        ValueError: shapes differ, a name is unknown, or options contradict each other.
    """
    per_token = {
        "logprobs": logprobs,
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "rollout_logprobs": rollout_logprobs,
        "entropy": entropy,
    }
    check_tokens(mask, cu_seqlens, **per_token)
    _check_layout(mask)
    _check_options(kind, clip_high, dual_clip, level, cu_seqlens, mask)
    _check_terms(ref_logprobs, kl_coef, kl_estimator, rollout_logprobs, is_clip, entropy, entropy_coef)
    _check_aggregate(aggregate, denominator, cu_seqlens)
    _check_advantages(advantages, mask, cu_seqlens)
    clip_high = clip_low if clip_high is None else clip_high
    options = PolicyOptions(
        kind, clip_low, clip_high, dual_clip, level, kl_coef, kl_estimator, is_clip, entropy_coef, aggregate
    )
    tokens = PolicyTokens(logprobs, old_logprobs, advantages, mask, ref_logprobs, rollout_logprobs, entropy, cu_seqlens)
    backend = choose("policy", "policy_loss", *(x for x in per_token.values() if x is not None))
    if backend == "reference":
        return reference.policy_loss(tokens, options, denominator)
    loss, figures = _PolicyLoss.apply(*_one_layout(tokens), *_divisor(denominator, logprobs.device), *options, backend)
    measured = {**dict.fromkeys(FIGURES[1:7], True), "kl": ref_logprobs is not None, "entropy": entropy is not None}
    measured |= dict.fromkeys(FIGURES[9:], rollout_logprobs is not None)
    return loss, {name: figure for name, figure in zip(FIGURES, figures.unbind()) if measured.get(name)}


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
    aggregate: str = "token",
    denominator: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Clipped squared error of the critic (Schulman et al. 2017; as in OpenAI's PPO2).

    .. math:: \ell_t = \tfrac12 \max\big((V_t - R_t)^2, (\mathrm{clip}(V_t, V^{old}_t \pm c) - R_t)^2\big)

    Args:
        values: the critic's estimates. (B, T) or (N,) float.
        old_values: its estimates at the start of the update; may be None without ``clip``.
        returns: targets, advantages + old values, before whitening.
        mask: True on the tokens to train. bool.
        clip: how far a value may move from the old one; None: plain squared error.
        aggregate, denominator, cu_seqlens: as in :func:`policy_loss`.
    Returns:
        the loss, a float32 scalar, and detached device scalars over this call's unmasked tokens: ``clip_fraction``,
        ``value_mean``, ``return_mean``.
    Raises:
        ValueError: shapes differ, or ``clip`` is given without ``old_values``.
    """
    check_tokens(mask, cu_seqlens, values=values, old_values=old_values, returns=returns)
    _check_layout(mask)
    if clip is not None and old_values is None:
        raise ValueError("clip needs old_values; pass them, or clip=None for the plain squared error")
    _check_aggregate(aggregate, denominator, cu_seqlens)
    tokens = ValueTokens(values, old_values if clip is not None else None, returns, mask, cu_seqlens)
    backend = choose("policy", "value_loss", *(x for x in (values, old_values, returns) if x is not None))
    if backend == "reference":
        return reference.value_loss(tokens, clip, aggregate, denominator)
    divisor = _divisor(denominator, values.device)
    loss, figures = _ValueLoss.apply(*_one_layout(tokens), *divisor, clip, aggregate, backend)
    return loss, dict(zip(VALUE_FIGURES[1:], figures.unbind()[1:]))


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, old, advantages, mask, ref, rollout, entropy, *rest):
        ctx.needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[6])
        tensors = (logprobs, old, advantages, mask, ref, rollout, entropy)
        loss, figures, *gradients = _policy_loss(*tensors, *rest, *ctx.needs)
        ctx.save_for_backward(figures, *gradients)
        ctx.backend = rest[-1]
        ctx.mark_non_differentiable(figures)
        # or autograd makes zeros for the figures' gradient: two more launches than the one of backward
        ctx.set_materialize_grads(False)
        return loss, figures

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        figures, *gradients = ctx.saved_tensors
        of_logprobs, of_entropy = (
            _scaled_gradient(gradient, grad, figures, ctx.backend) if need else None
            for gradient, need in zip(gradients, ctx.needs)
        )
        return of_logprobs, *(None,) * 5, of_entropy, *(None,) * (len(ctx.needs_input_grad) - 7)


class _ValueLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, *rest):
        loss, figures, gradient = _value_loss(values, *rest, ctx.needs_input_grad[0])
        ctx.save_for_backward(figures, gradient)
        ctx.backend = rest[-1]
        ctx.mark_non_differentiable(figures)
        ctx.set_materialize_grads(False)
        return loss, figures

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        figures, gradient = ctx.saved_tensors
        gradient = _scaled_gradient(gradient, grad, figures, ctx.backend)
        return gradient, *(None,) * (len(ctx.needs_input_grad) - 1)


def _one_layout(tokens):
    """What the kernels take: contiguous, floats in float32, a lone sequence as (1, T), constants detached."""
    lone = tokens.cu_seqlens is None and tokens.mask.dim() == 1

    def bring(name: str, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        if name == "cu_seqlens":
            return x.to(torch.int32).contiguous()
        # detaching also makes two of a tensor that is given twice, which torch.compile refuses in one Function
        x = x if name in ("logprobs", "entropy", "values") else x.detach()
        x = x if x.dtype == torch.bool else x.float()
        return (x[None] if lone else x).contiguous()

    return tokens._replace(**{name: bring(name, x) for name, x in tokens._asdict().items()})


def _divisor(denominator: Tensor | float | None, device: torch.device) -> tuple[Tensor | None, float]:
    """The denominator as a tensor, or as a number in which 0 stands for the local count."""
    if isinstance(denominator, Tensor) and (denominator.device == device or torch.compiler.is_compiling()):
        return denominator.detach().to(device, torch.float32).reshape(()), 0.0
    # a number on the host costs nothing to read; copying it to a GPU would wait
    return None, 0.0 if denominator is None else float(denominator)


_SUM = "Tensor? denominator, float divisor"
_POLICY_TENSORS = (
    "Tensor logprobs, Tensor? old_logprobs, Tensor advantages, Tensor mask, Tensor? ref_logprobs, "
    "Tensor? rollout_logprobs, Tensor? entropy, Tensor? cu_seqlens"
)
_POLICY_OPTIONS = (
    "str kind, float clip_low, float clip_high, float? dual_clip, str level, float kl_coef, str kl_estimator, "
    "float? is_clip, float entropy_coef, str aggregate, str backend"
)


def _fake_policy_loss(logprobs, *rest):
    need_gradient, need_entropy_gradient = rest[-2:]
    return (
        logprobs.new_empty(()),
        logprobs.new_empty(len(FIGURES)),
        logprobs.new_empty(logprobs.shape if need_gradient else (0,)),
        logprobs.new_empty(logprobs.shape if need_entropy_gradient else (0,)),
    )


@register(
    f"policy_loss({_POLICY_TENSORS}, {_SUM}, {_POLICY_OPTIONS}, bool need_gradient, bool need_entropy_gradient) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _fake_policy_loss,
)
def _policy_loss(*arguments):
    tensors, (denominator, divisor), options = arguments[:8], arguments[8:10], arguments[10:20]
    backend, *needs = arguments[20:]
    return kernel("policy", backend).policy_loss(
        PolicyTokens(*tensors), PolicyOptions(*options), denominator, divisor, *needs
    )


def _fake_value_loss(values, *rest):
    need_gradient = rest[-1]
    return (
        values.new_empty(()),
        values.new_empty(len(VALUE_FIGURES)),
        values.new_empty(values.shape if need_gradient else (0,)),
    )


@register(
    f"value_loss(Tensor values, Tensor? old_values, Tensor returns, Tensor mask, Tensor? cu_seqlens, {_SUM}, "
    "float? clip, str aggregate, str backend, bool need_gradient) -> (Tensor, Tensor, Tensor)",
    _fake_value_loss,
)
def _value_loss(values, old, returns, mask, cu_seqlens, denominator, divisor, clip, aggregate, backend, need_gradient):
    tokens = ValueTokens(values, old, returns, mask, cu_seqlens)
    return kernel("policy", backend).value_loss(tokens, clip, aggregate, denominator, divisor, need_gradient)


@register(
    "scaled_gradient(Tensor gradient, Tensor grad, Tensor figures, str backend) -> Tensor",
    lambda gradient, *_: torch.empty_like(gradient),
)
def _scaled_gradient(gradient, grad, figures, backend):
    """gradient * grad * scale, with the saved gradient left as it is for another backward pass."""
    return kernel("policy", backend).scaled_gradient(gradient, grad, figures)


def _check_layout(mask) -> None:
    if mask.dim() not in (1, 2):
        raise ValueError(f"tokens must be (B, T) or (N,), got {tuple(mask.shape)}")


def _check_options(kind, clip_high, dual_clip, level, cu_seqlens, mask) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}; known: {', '.join(LEVELS)}")
    if kind == "cispo" and clip_high is None:
        raise ValueError("kind='cispo' needs clip_high, the absolute upper bound of the ratio (its authors use 5)")
    if dual_clip is not None and (kind != "clip" or dual_clip <= 1):
        raise ValueError(f"dual_clip must exceed 1 and applies to kind='clip'; got {dual_clip} with kind={kind!r}")
    if kind == "reinforce" and level != "token":
        raise ValueError(f"kind='reinforce' has no ratio, so level={level!r} would have no effect")
    if level != "token" and cu_seqlens is None and mask.dim() != 2:
        raise ValueError(f"level={level!r} needs (B, T) tokens, or packed ones with cu_seqlens")


def _check_aggregate(aggregate, denominator, cu_seqlens) -> None:
    if aggregate not in AGGREGATES:
        raise ValueError(f"unknown aggregate {aggregate!r}; known: {', '.join(AGGREGATES)}")
    if aggregate == "constant" and denominator is None and cu_seqlens is not None:
        raise ValueError("aggregate='constant' needs a denominator for packed tokens, e.g. B * max_length")
    if isinstance(denominator, (int, float)) and not denominator > 0:
        raise ValueError(f"denominator must be positive, got {denominator}; None takes the local count")


def _check_advantages(advantages, mask, cu_seqlens) -> None:
    rows = mask.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if advantages.shape != mask.shape and advantages.shape != (rows,):
        raise ValueError(
            f"advantages must be one per sequence ({rows},) or one per token {tuple(mask.shape)}, "
            f"got {tuple(advantages.shape)}"
        )
    check_devices(mask, advantages=advantages)


def _check_terms(ref_logprobs, kl_coef, kl_estimator, rollout_logprobs, is_clip, entropy, entropy_coef) -> None:
    if kl_estimator not in ESTIMATORS:
        raise ValueError(f"unknown KL estimator {kl_estimator!r}; known: {', '.join(ESTIMATORS)}")
    if kl_coef and ref_logprobs is None:
        raise ValueError("kl_coef needs ref_logprobs")
    if kl_coef and kl_estimator == "k1":
        raise ValueError("kl_estimator='k1' has a gradient of mean zero as a loss; use k3, k3+ or k2")
    if is_clip is not None and rollout_logprobs is None:
        raise ValueError("is_clip needs rollout_logprobs")
    if entropy_coef and entropy is None:
        raise ValueError("entropy_coef needs entropy")
