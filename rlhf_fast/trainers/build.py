"""What a trainer is made of: the processes, the policy that its config describes, and data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType

from rlhf_fast.data.sources import load_records
from rlhf_fast.errors import UserError
from rlhf_fast.models import Policy, disable_dropout, load
from rlhf_fast.models.adapters import is_4bit, lora_config
from rlhf_fast.models.attention import check_implementation
from rlhf_fast.run import sharding

from .config import TrainerConfig

REPLICAS = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def build_accelerator() -> tuple[Accelerator, bool]:
    """The run's processes and devices, and whether weights are to be sharded over them once they are complete.

    Raises:
        UserError: accelerate was told to do something else.
    """
    # precision is the policy's: accelerate holds one for the whole process, where SFT and PPO may follow each other.
    # buffers are constants; broadcasting them would make ranks with fewer micro-batches wait for ever
    replicas = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[replicas])
    shards = sharding.asked_for(accelerator)
    if not shards and accelerator.distributed_type not in REPLICAS:
        raise UserError(
            f"accelerate was told to use {accelerator.distributed_type.value}, and runs of several processes are "
            "replicas (DDP) or shards (FSDP2) here: start them with `accelerate launch --multi_gpu`, with `--use_fsdp "
            "--fsdp_version 2`, or torchrun"
        )
    return accelerator, shards


def build_policy(
    model: Any,
    args: TrainerConfig,
    *,
    tokenizer: Any,
    peft_config: Any,
    role: str,
    device: torch.device,
    say: Callable[[Any], None],
) -> Policy:
    """``model`` (a name, a folder or a transformers model) as the policy that ``args`` describes.

    Adapters are trained on a frozen base, in bfloat16 on a GPU or in 4 bit; whole models in float32, on a GPU with 16-bit
    passes.

    Raises:
        UserError: all weights of a 4-bit base were to be trained.
    """
    if peft_config is None and args.use_peft:
        peft_config = lora_config(args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_target_modules)
    continues = isinstance(model, (str, Path)) and (Path(model) / "adapter_config.json").is_file()
    lora = peft_config is not None or continues
    if not lora and (args.load_in_4bit or is_4bit(model)):
        raise UserError(
            "a 4-bit base is frozen and takes an adapter: add use_peft, or leave load_in_4bit out to train all weights"
        )
    half = device.type == "cuda" and args.dtype == "auto"
    policy = load(
        model,
        tokenizer=tokenizer,
        peft_config=peft_config,
        dtype=torch.bfloat16 if args.dtype == "bfloat16" or (half and lora) else torch.float32,
        device=device,
        role=role,
        load_in_4bit=args.load_in_4bit or None,
    )
    if policy.loaded:
        say(policy.loaded)
    check_implementation(args.attn_implementation, policy.device)
    policy.attention = args.attn_implementation
    if not args.fused_layers:
        policy.unfuse()
    elif lora:
        say(policy.fusion.summary)  # what is not fused was logged, with why
    if policy.continued and args.use_peft:
        c = policy.adapters.config(policy.role)
        say(f"going on with the adapter in {model} (r {c.r}, alpha {c.lora_alpha}); lora_* settings do not apply")
    if half and not lora:  # fp32 weights, 16-bit passes: steps of a small learning rate vanish in 16-bit weights
        policy.compute_dtype = torch.bfloat16
    return policy


def without_dropout(policy: Policy, args: TrainerConfig) -> None:
    """Turn the model's own dropout off.

    Raises:
        UserError: the adapter was to have some.
    """
    if args.lora_dropout:
        raise UserError("lora_dropout must be 0 here: ratios and margins compare two passes; only SFT has dropout")
    disable_dropout(policy)


def records_of(dataset: Any, name: str) -> Any:
    """The records of an argument ``name``: a ``datasets.Dataset``, a list of dicts, or a path to read.

    Raises:
        UserError: there are none.
    """
    if dataset is None:
        raise UserError(f"{name} is missing: pass records, a datasets.Dataset, or a path")
    records = load_records(dataset) if isinstance(dataset, (str, Path)) else dataset
    if len(records) == 0:
        raise UserError(f"{name} is empty: nothing to train on")
    return records
