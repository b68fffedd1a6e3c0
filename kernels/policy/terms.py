"""What a backend of the policy loss is given: tensors in one layout, and options that have been checked."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

# what `policy_loss` measures, in this order
FIGURES = (
    "scale",  # d loss / d sum of the token losses: 1 / denominator
    "clip_low",
    "clip_high",
    "clip_region",
    "approx_kl",
    "ratio_mean",
    "ratio_max",
    "kl",
    "entropy",
    "is_ratio_mean",
    "is_ratio_max",
    "rollout_gap",
)
VALUE_FIGURES = ("scale", "clip_fraction", "value_mean", "return_mean")


class PolicyTokens(NamedTuple):
    """Contiguous tensors, float32 unless said: (B, T), or (N,) with ``cu_seqlens``. Masked entries are never read."""

    logprobs: Tensor
    old_logprobs: Tensor | None  # None: those of now
    advantages: Tensor  # of the tokens' shape, or (B,)
    mask: Tensor  # bool
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    entropy: Tensor | None
    cu_seqlens: Tensor | None  # (B + 1,) int32


class PolicyOptions(NamedTuple):
    """Options of :func:`policy_loss`, names and meanings as there; ``clip_high`` is never None."""

    kind: str
    clip_low: float
    clip_high: float
    dual_clip: float | None
    level: str
    kl_coef: float
    kl_estimator: str
    is_clip: float | None
    entropy_coef: float
    aggregate: str

    def bounds(self) -> tuple[float, float, float, float]:
        """Least and largest ratio, dual clip, and largest ratio to the rollout policy; infinity where there is none.

        Those of cispo are absolute, and it has none below.
        """
        absolute = self.kind == "cispo"
        return (
            0.0 if absolute else 1.0 - self.clip_low,
            self.clip_high if absolute else 1.0 + self.clip_high,
            math.inf if self.dual_clip is None else float(self.dual_clip),
            math.inf if self.is_clip is None else float(self.is_clip),
        )


class ValueTokens(NamedTuple):
    """Contiguous tensors, float32 unless said: (B, T), or (N,) with ``cu_seqlens``. Masked entries are never read."""

    values: Tensor
    old_values: Tensor | None  # may be None without a clip
    returns: Tensor
    mask: Tensor  # bool
    cu_seqlens: Tensor | None  # (B + 1,) int32
