"""How much memory the slots may fill where nobody has said: what is free now, counted by the memory plan's own formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlhf_fast.errors import UserError
from rlhf_fast.models.adapters import is_4bit
from rlhf_fast.run import memory
from rlhf_fast.run.memory import GB, Job, Shape

DEVICE_SHARE = 0.9  # of a GPU's free memory: graphs, workspaces and fragments have the rest
HOST_SHARE = 0.5  # of the host memory that is available: other processes live there too


class Budget(NamedTuple):
    """Most tokens whose keys and values the slots hold, and where that comes from."""

    tokens: int
    token_bytes: int  # of keys and values, in all layers
    share: float
    free: int  # bytes that the share is of
    where: str

    def __str__(self) -> str:
        return (
            f"keys and values of at most {self.tokens:,} tokens ({self.token_bytes / 1024:.4g} KiB each): what "
            f"{self.share:.0%} of the {self.free / GB:.1f} GB free {self.where} hold beside a step's own tensors"
        )


def default_budget(policy: Any, slots: int, prefill_tokens: int, held: int = 0) -> Budget | None:
    """The cap of a slot engine that was given none.

    Args:
        held: bytes of an earlier session's keys and values, which count as free.
    Returns:
        None where the model's config does not say how large its keys and values are.
    Raises:
        UserError: not even one token fits.
    """
    try:
        job = job_of(policy)
    except UserError:
        return None
    cuda = policy.model.device.type == "cuda"
    free = held + (device_free(policy.model.device) if cuda else host_free())
    share, where = (DEVICE_SHARE, "on the GPU") if cuda else (HOST_SHARE, "in host memory")
    tokens = memory.kv_tokens(job, share * free, slots, prefill_tokens)
    if tokens < 1:
        raise UserError(
            f"generation: {share:.0%} of the {free / GB:.1f} GB free {where} hold no token's keys and values beside what "
            f"{slots} responses at a time need; write fewer at a time, or free memory"
        )
    return Budget(tokens, memory.kv_per_token(job), share, free, where)


def merging_fits(policy: Any, role: str, max_tokens: int | None) -> bool:
    """Whether merging LoRA is cheap: on a GPU, with a 16-bit base whose adapted weights would fit twice more into the memory
    that the keys and values of ``max_tokens`` tokens leave free. No without ``max_tokens``, as these could take all of it.
    """
    model = policy.model
    if model.device.type != "cuda" or model.dtype.itemsize != 2 or max_tokens is None:
        return False
    left = device_free(model.device) - max_tokens * memory.kv_per_token(job_of(policy))
    return 2 * policy.adapters.merged_bytes(role) <= left


def job_of(policy: Any) -> Job:
    """A rollout of ``policy`` as the memory plan sees it.

    Raises:
        UserError: its config is no decoder's.
    """
    model, computed = policy.model, getattr(policy, "compute_dtype", None)
    wide = (computed or model.dtype).itemsize == 4
    base = "fp32" if wide else "nf4" if is_4bit(model) else "bf16"
    shape = Shape.of(model.config.to_dict(), strict=False)
    # autocast copies all weights, as in full fine-tuning
    return Job(shape=shape, method="ppo", base=base, full=computed is not None, device=model.device.type)


def device_free(device: torch.device) -> int:
    """Bytes of a GPU that nobody uses, or that this process has cached."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def host_free(root: Path = Path("/")) -> int:
    """Bytes of memory that this process could still get, within its control group's limit; 8 GB where the system does not say."""
    free = []
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    except OSError:
        pass
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit, now = ((root / "sys/fs/cgroup" / name).read_text().strip() for name in (most, used))
        except OSError:
            continue
        if limit != "max":
            free.append(int(limit) - int(now))
    return max(0, min(free, default=8 * GB))


def out_of_memory(error: BaseException) -> bool:
    """Whether a RuntimeError of torch's says that memory ran out: only the GPU's allocator has a class for it."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error).lower() for word in words)
