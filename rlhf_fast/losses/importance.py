"""Correcting for a rollout engine that sampled from a slightly different policy than the one that is trained."""

from __future__ import annotations

from torch import Tensor

from rlhf_fast.kernels.segments import select, sequence_sum, to_tokens

MAX_LOG_RATIO = 80.0  # exp(80) is a finite float32


def sequence_importance(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, cu_seqlens: Tensor, clip: float
) -> Tensor:
    r"""Truncated importance weight of every sequence, on each of its tokens (Yao et al. 2025; Ionides 2008 truncates).

    .. math:: w_i = \min\Big(\prod_t \pi_{old}(y_{i,t}) / \pi_{engine}(y_{i,t}),\ c\Big)

    The token-level weight min(ratio of one token, c) is ``policy_loss(..., rollout_logprobs=, is_clip=)``.

    Args:
        old_logprobs: (N,) under the policy that is trained, when the update began.
        rollout_logprobs: (N,) as the engine reported them.
        mask: (N,) bool, the tokens that count; whatever stands elsewhere is ignored.
        cu_seqlens: (B + 1,) int32.
        clip: c, above 0.
    Returns:
        (N,) float32 without a gradient, the same on all tokens of a sequence.
    """
    gap = sequence_sum(select((old_logprobs - rollout_logprobs).detach(), mask), cu_seqlens)
    return to_tokens(gap.clamp(max=MAX_LOG_RATIO).exp().clamp(max=clip), mask, cu_seqlens)
