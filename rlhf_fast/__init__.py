"""RLHF on one GPU: fused kernels, lean trainers."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    f"{algorithm}{kind}": f"rlhf_fast.trainers.{module}"
    for algorithm, module in (
        *((name, name.lower()) for name in ("SFT", "Reward", "DPO", "KTO", "PPO", "GRPO")),
        ("SafePPO", "safe_ppo"),
    )
    for kind in ("Trainer", "Config")
}

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "SafePPOConfig",
    "SafePPOTrainer",
    "__version__",
]


def __getattr__(name: str) -> Any:
    # trainers import torch and transformers, seconds that `import rlhf_fast` should not cost
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
