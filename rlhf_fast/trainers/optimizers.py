"""The optimizers that a run can choose: one row each. All are AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101).

The 8-bit ones keep both moments in 8 bit per block of 256 (Dettmers et al. 2022, arXiv:2110.02861), tensors of fewer
than 4,096 elements excepted: 2 bytes per trained parameter instead of 8. That is 14 GB against 56 in full fine-tuning
of a 7B model, and 0.24 GB for its adapter of rank 16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from rlhf_fast.errors import UserError
from rlhf_fast.models.adapters import bitsandbytes

if TYPE_CHECKING:
    from .config import TrainerConfig


def build_optimizer(name: str, parameters: list[nn.Parameter], rate: float, weight_decay: float) -> Optimizer:
    """The optimizer ``name`` of the table. Norms, biases and scalar heads do not decay, as in transformers.

    Raises:
        UserError: it needs a library or a device that is not there.
    """
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return OPTIMIZERS[name]([g for g in groups if g["params"]], rate, parameters[0].device)


def build_scheduler(args: TrainerConfig, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """The learning rate over ``total_steps``: warm-up, then what ``lr_scheduler_type`` says."""
    warmup = math.ceil(args.warmup_ratio * total_steps)
    return get_scheduler(args.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)


def _adamw(groups: list[dict[str, Any]], rate: float, device: torch.device) -> Optimizer:
    # one kernel over all tensors; on a CPU the default loop
    return torch.optim.AdamW(groups, lr=rate, fused=True if device.type == "cuda" else None)


def _adamw_8bit(groups: list[dict[str, Any]], rate: float, device: torch.device) -> Optimizer:
    return bitsandbytes("optim: adamw_8bit").optim.AdamW8bit(groups, lr=rate)


def _paged_adamw_8bit(groups: list[dict[str, Any]], rate: float, device: torch.device) -> Optimizer:
    if device.type != "cuda":
        raise UserError(
            f"optim: paged_adamw_8bit pages between GPU and host memory, and this is a {device.type}; take adamw_8bit"
        )
    return bitsandbytes("optim: paged_adamw_8bit").optim.PagedAdamW8bit(groups, lr=rate)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], float, torch.device], Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,  # moments in 8 bit
    "paged_adamw_8bit": _paged_adamw_8bit,  # the same, moved to host memory when the GPU runs short
}
