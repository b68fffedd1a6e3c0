"""The compiled CPU kernels of policy and value loss (csrc/cpu/policy.cpp): AVX-512, AVX2 or baseline."""

from __future__ import annotations

# before _C: both use OpenMP, and the one libgomp of the process must be torch's
import torch
from torch import Tensor

from rlhf_fast.kernels.codes import AGGREGATE_CODES, ESTIMATOR_CODES, KIND_CODES, LEVEL_CODES, address

from .terms import FIGURES, VALUE_FIGURES, PolicyOptions, PolicyTokens, ValueTokens

try:
    from rlhf_fast import _C
except ImportError as error:
    _C, _WHY_NOT = None, f"the native module is not built ({error}); `pip install -e .` builds it"

INFINITY = float("inf")


def unsupported(op: str, *tensors: Tensor, **options) -> str | None:
    """Say why the kernel cannot run ``op`` on these tensors, or return None. 16-bit ones come to it in float32."""
    if _C is None:
        return _WHY_NOT
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"it runs on CPU tensors, not on {tensor.device}"
        if tensor.dtype == torch.float64:
            return "float64 runs on the reference only"
    return None


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
        denominator: a float32 scalar; None means ``divisor``, or the local count if that is 0.
    Returns:
        loss (), figures (len(FIGURES),), and d sum / d logprobs and d sum / d entropy of the tokens' shape, without the
        denominator and 0 where masked; (0,) if not needed. All float32.
    Raises:
        ValueError: ``cu_seqlens`` does not rise from 0 to N.
    """
    x = tokens.logprobs
    per_sequence = tokens.advantages.shape != x.shape
    loss, figures = torch.empty(()), torch.empty(len(FIGURES))
    gradient = torch.empty_like(x) if need_gradient else torch.empty(0)
    entropy_gradient = torch.empty_like(x) if need_entropy_gradient else torch.empty(0)
    _C.cpu.policy_loss(
        x.data_ptr(),
        address(tokens.old_logprobs),
        tokens.advantages.data_ptr(),
        tokens.advantages.numel(),
        tokens.mask.data_ptr(),
        address(tokens.ref_logprobs),
        address(tokens.rollout_logprobs),
        address(tokens.entropy),
        *_extent(x, tokens.cu_seqlens),
        KIND_CODES[options.kind],
        *options.bounds(),
        options.kl_coef,
        ESTIMATOR_CODES[options.kl_estimator],
        options.entropy_coef,
        per_sequence,
        LEVEL_CODES[options.level],
        AGGREGATE_CODES[options.aggregate],
        address(denominator),
        divisor,
        loss.data_ptr(),
        figures.data_ptr(),
        gradient.data_ptr(),
        entropy_gradient.data_ptr(),
        torch.get_num_threads(),
    )
    return loss, figures, gradient, entropy_gradient


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
    loss, figures = torch.empty(()), torch.empty(len(VALUE_FIGURES))
    gradient = torch.empty_like(x) if need_gradient else torch.empty(0)
    _C.cpu.value_loss(
        x.data_ptr(),
        address(tokens.old_values),
        tokens.returns.data_ptr(),
        tokens.mask.data_ptr(),
        *_extent(x, tokens.cu_seqlens),
        INFINITY if clip is None else clip,
        AGGREGATE_CODES[aggregate],
        address(denominator),
        divisor,
        loss.data_ptr(),
        figures.data_ptr(),
        gradient.data_ptr(),
        torch.get_num_threads(),
    )
    return loss, figures, gradient


def scaled_gradient(gradient: Tensor, grad: Tensor, figures: Tensor) -> Tensor:
    """Return gradient * grad * figures[0], ``grad`` being that of the loss, a scalar."""
    result = torch.empty_like(gradient)
    grad = grad.float()
    _C.cpu.scaled_gradient(
        gradient.data_ptr(),
        gradient.numel(),
        grad.data_ptr(),
        figures.data_ptr(),
        result.data_ptr(),
        torch.get_num_threads(),
    )
    return result


def _extent(x: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, int]:
    """Tokens, sequences, their length if they are padded to one, and where their boundaries are if not."""
    if cu_seqlens is None:
        return x.numel(), x.shape[0], x.shape[1], 0
    return len(x), len(cu_seqlens) - 1, 0, cu_seqlens.data_ptr()
