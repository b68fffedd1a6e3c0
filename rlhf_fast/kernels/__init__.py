"""The public door to every fused operation: ``from rlhf_fast.kernels import gae, token_logprobs``.

The operations live in the top-level ``kernels/`` folder, one folder per family. A wheel installs those folders right
here; a source checkout finds them through the path line below, installed or not. ``kernels/`` itself has no
``__init__.py`` on purpose: transformers and trl probe for a PyPI package of that name, which then always wins over it.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2]
if (_checkout / "csrc").is_dir() and (_checkout / "kernels" / "linear_logprobs").is_dir():
    __path__.append(str(_checkout / "kernels"))

from .advantages import gae, group_advantages, kl_shaped_gae, shaped_rewards, whiten
from .attention import decode_attention
from .dispatch import BACKENDS, available, backend_report, implementation, use_backend
from .kl import kl_penalty
from .linear_logprobs import linear_cross_entropy, linear_logprobs
from .logprobs import sequence_logprobs, token_logprobs
from .lora import LoraWeights, lora_linear, lora_mlp
from .norm import rms_norm
from .policy import policy_loss, value_loss
from .preference import dpo_loss
from .reward import pairwise_reward_loss, ranked_reward_loss

__all__ = [
    "BACKENDS",
    "LoraWeights",
    "available",
    "backend_report",
    "decode_attention",
    "dpo_loss",
    "gae",
    "group_advantages",
    "implementation",
    "kl_penalty",
    "kl_shaped_gae",
    "linear_cross_entropy",
    "linear_logprobs",
    "lora_linear",
    "lora_mlp",
    "pairwise_reward_loss",
    "policy_loss",
    "ranked_reward_loss",
    "rms_norm",
    "sequence_logprobs",
    "shaped_rewards",
    "token_logprobs",
    "use_backend",
    "value_loss",
    "whiten",
]
