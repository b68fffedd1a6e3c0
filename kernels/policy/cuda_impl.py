"""The compiled CUDA kernels of policy and value loss (csrc/cuda/policy.cuh): loss, figures and gradient in one launch.

The last block to finish adds up what the others left, in a fixed order: bitwise repeatable, nothing read back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.kernels import cuda_impl as cuda
from rlhf_fast.kernels.codes import AGGREGATE_CODES, ESTIMATOR_CODES, KIND_CODES, LEVEL_CODES, address

from .terms import FIGURES, VALUE_FIGURES, PolicyOptions, PolicyTokens, ValueTokens

_C = cuda._C
INFINITY = float("inf")


def unsupported(op: str, *tensors: Tensor, **options) -> str | None:
    """Say why the kernel cannot run ``op`` on these tensors, or return None. 16-bit ones come to it in float32."""
    return cuda.unsupported(*tensors)


def policy_loss(
    tokens: PolicyTokens,
    options: PolicyOptions,
    denominator: Tensor | None,
    divisor: float,
    need_gradient: bool,
    need_entropy_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss, a scalar; ``FIGURES``; and what :func:`scaled_gradient` makes the gradients of.

    Args:
        denominator: a float32 scalar on the device; None means ``divisor``, or the local count if that is 0.
    Returns:
        loss (), figures (len(FIGURES),), and d sum / d logprobs and d sum / d entropy of the tokens' shape, without the
        denominator and 0 where masked; (0,) if not needed. All float32.
    """
    x = tokens.logprobs
    loss, figures = x.new_empty(()), x.new_empty(len(FIGURES))
    gradients = [torch.empty_like(x) if need else x.new_empty(0) for need in (need_gradient, need_entropy_gradient)]
    sequences = cuda.extent(x, tokens.cu_seqlens)
    memory = cuda.workspace(_C.cuda.loss_workspace(sequences[0]), x.device)
    with cuda.launch_on(x.device) as stream:
        _C.cuda.policy_loss(
            x.data_ptr(),
            address(tokens.old_logprobs),
            tokens.advantages.data_ptr(),
            tokens.mask.data_ptr(),
            address(tokens.ref_logprobs),
            address(tokens.rollout_logprobs),
            address(tokens.entropy),
            tokens.advantages.shape != x.shape,
            *sequences,
            KIND_CODES[options.kind],
            *options.bounds(),
            options.kl_coef,
            ESTIMATOR_CODES[options.kl_estimator],
            options.entropy_coef,
            LEVEL_CODES[options.level],
            AGGREGATE_CODES[options.aggregate],
            address(denominator),
            divisor,
            loss.data_ptr(),
            figures.data_ptr(),
            *(gradient.data_ptr() for gradient in gradients),
            memory.data_ptr(),
            stream,
        )
    return loss, figures, *gradients


def value_loss(
    tokens: ValueTokens,
    clip: float | None,
    aggregate: str,
    denominator: Tensor | None,
    divisor: float,
    need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for the critic: loss (), figures (len(VALUE_FIGURES),) and d sum / d values."""
    x = tokens.values
    loss, figures = x.new_empty(()), x.new_empty(len(VALUE_FIGURES))
    gradient = torch.empty_like(x) if need_gradient else x.new_empty(0)
    sequences = cuda.extent(x, tokens.cu_seqlens)
    memory = cuda.workspace(_C.cuda.loss_workspace(sequences[0]), x.device)
    with cuda.launch_on(x.device) as stream:
        _C.cuda.value_loss(
            x.data_ptr(),
            address(tokens.old_values),
            tokens.returns.data_ptr(),
            tokens.mask.data_ptr(),
            *sequences,
            INFINITY if clip is None else clip,
            AGGREGATE_CODES[aggregate],
            address(denominator),
            divisor,
            loss.data_ptr(),
            figures.data_ptr(),
            gradient.data_ptr(),
            memory.data_ptr(),
            stream,
        )
    return loss, figures, gradient


def scaled_gradient(gradient: Tensor, grad: Tensor, figures: Tensor) -> Tensor:
    """Return gradient * grad * figures[0], ``grad`` being that of the loss, a scalar on the device."""
    result, grad = torch.empty_like(gradient), grad.float()
    with cuda.launch_on(gradient.device) as stream:
        _C.cuda.scaled_gradient(
            gradient.data_ptr(), grad.data_ptr(), figures.data_ptr(), gradient.numel(), result.data_ptr(), stream
        )
    return result
