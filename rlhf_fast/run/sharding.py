"""Weights sharded over the processes of a run: torch's ``fully_shard`` (FSDP2; Zhao et al. 2023, arXiv:2304.11277) by accelerate.

Every decoder layer is a unit and the rest is another. A process keeps its part of each parameter, a ``DTensor``; a unit is
gathered for its pass and dropped after it. A pass is therefore collective: all ranks make equally many, in the same order and
through the root module. Under :func:`whole` everything is gathered, and a pass is nobody else's business.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from rlhf_fast.errors import UserError


def asked_for(accelerator: Accelerator) -> bool:
    """Whether this run was started with FSDP2. On CPUs accelerate does not look for that; here it does.

    Raises:
        UserError: it was started with FSDP1, or with parameters on the host.
    """
    state = accelerator.state
    by_environment = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if accelerator.distributed_type == DistributedType.MULTI_CPU and by_environment:
        state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin()
    if accelerator.distributed_type != DistributedType.FSDP:
        return False
    if not accelerator.is_fsdp2:
        raise UserError("weights are sharded by FSDP2 here: start with accelerate launch --use_fsdp --fsdp_version 2")
    if isinstance(state.fsdp_plugin.cpu_offload, CPUOffloadPolicy):
        raise UserError("sharded weights stay on the device here: start with --fsdp_offload_params false")
    # every process loads the model and keeps its part; layers checkpoint themselves, see gradient_checkpointing
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    state.fsdp_plugin.cpu_ram_efficient_loading = state.fsdp_plugin.activation_checkpointing = False
    return True


def prepare(
    accelerator: Accelerator, module: nn.Module, layers: Iterable[str], optimizer: Optimizer
) -> tuple[nn.Module, Any]:
    """Shard ``module`` in place, a unit for every module whose class has a name in ``layers``, and have ``optimizer`` step on
    the parts."""
    plugin = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = transformer_auto_wrap_policy, list(layers)
    return accelerator.prepare(module, optimizer)


def is_sharded(module: nn.Module) -> bool:
    """Whether ``module`` is the root of sharded weights."""
    return isinstance(module, FSDPModule)


@contextlib.contextmanager
def whole(root: nn.Module) -> Iterator[None]:
    """Inside, every weight of ``root`` is on this device, and passes are not collective; the block's two ends are.

    Without effect where nothing is sharded, and inside another such block. Optimizers may not step inside, and modules give no
    ``state_dict``, which would part them again; parameters are there under their names.
    """
    units = [m for m in root.modules() if isinstance(m, FSDPModule)]
    if not units or getattr(root, "_is_whole", False):
        yield
        return
    root._is_whole = True
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        part(root)
        for unit in units:
            unit.set_reshard_after_forward(unit is not root, recurse=False)
        root._is_whole = False


def part(root: nn.Module) -> None:
    """Have ``root``'s parameters be this process's parts: after a pass some are still gathered, for the next one."""
    for unit in root.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def gathered(tree: Any, keep: bool = True) -> Any:
    """``tree`` of dicts, lists and tensors with every sharded tensor in one piece, in host memory. Collective.

    Args:
        keep: what was sharded; no: None stands in its place, on ranks that only help to gather it.
    """
    if isinstance(tree, dict):
        return {key: gathered(value, keep) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [gathered(value, keep) for value in tree]
    if not isinstance(tree, DTensor):
        return tree
    tensor = tree.full_tensor().detach()
    return tensor.cpu() if keep else None


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copy ``value``, in one piece, into ``target``, sharded or not."""
    target.copy_(_like(value, target))


def scattered(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's gathered state for this process to load: what is as large as a sharded parameter becomes a part too."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parts = {
        number: {
            name: _like(value, parameters[number])
            if isinstance(value, Tensor) and value.shape == parameters[number].shape
            else value
            for name, value in entries.items()
        }
        for number, entries in state["state"].items()
    }
    return {**state, "state": parts}


def _like(value: Tensor, target: Tensor) -> Tensor:
    if not isinstance(target, DTensor):
        return value
    # each process has the whole, so nobody sends anything
    value = value.to(target.device)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
