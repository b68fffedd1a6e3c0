"""A training run as the plan sees it, and what a line of a plan is."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

from .shapes import Linear, Shape

METHODS = ("sft", "reward", "dpo", "kto", "ppo", "safe-ppo", "grpo")
SAMPLING_METHODS = ("ppo", "safe-ppo", "grpo")
CRITICS = {"ppo": ("critic",), "safe-ppo": ("critic", "cost critic")}  # models that are trained beside the policy
REFERENCED = (
    "dpo",
    "kto",
    "ppo",
    "safe-ppo",
)  # compare with a reference by default; a config says so itself: ``needs_reference``
GB = 10**9
WHENS = ("always", "gradients", "inputs", "update", "head", "layer", "prefill", "decode", "vllm", "outside", "host")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training run, as far as memory is concerned."""

    shape: Shape
    method: str = "sft"
    length: int = 2048  # tokens of the longest sequence: prompt and response
    record_tokens: int | None = None  # of the largest record; None: one sequence, or the two that a preference compares
    window_tokens: int | None = None  # of the largest optimizer step: no micro-batch is larger; None: no limit
    prompt_length: int | None = None  # of which prompt, when sampling; None is a quarter
    full: bool = False  # all weights rather than an adapter
    base: str = "bf16"  # of the frozen weights: bf16, nf4, or fp32; of the passes, in full fine-tuning
    lora_r: int = 16
    lora_targets: str | tuple[str, ...] = "all-linear"  # may name lm_head
    optimizer: str = "adamw"
    kernels: str = "fused"  # ours where the architecture allows; or peft: PEFT's and transformers' own
    micro_batch_tokens: int | None = None  # None: one longest record
    checkpointing: bool = True
    offload: bool = False
    rollout_batch_size: int = 128  # sequences sampled at a time
    num_generations: int = 8  # of which so many share a prompt, in GRPO
    reward_models: int = 1  # frozen, that score in PPO
    cost_models: int | None = None  # frozen, that score harm; None: one in safe PPO
    reference: bool = (
        False  # the reference has weights of its own: in full fine-tuning, or where a trained adapter goes on
    )
    merge_lora: bool = False  # sampling multiplies with copies of the weights that hold the adapter
    samples_here: bool = True  # with the weights that are trained; no: a server, or a vLLM in the same process, does
    vllm_share: float = 0.0  # of the device, which a vLLM in the same process takes
    vllm_sleeps: bool = False  # and gives back while the policy is updated
    device: str = "cuda"

    @property
    def samples(self) -> bool:
        return self.method in SAMPLING_METHODS

    @property
    def critics(self) -> tuple[str, ...]:
        """What is trained beside the policy."""
        return CRITICS.get(self.method, ())

    @property
    def frozen(self) -> int:
        """Models of the run that only score or compare."""
        costs = int(self.method == "safe-ppo") if self.cost_models is None else self.cost_models
        return int(self.reference) + (self.reward_models if self.critics else 0) + costs

    @property
    def writes(self) -> bool:
        """The policy itself samples, and needs its keys and values in this process."""
        return self.samples and self.samples_here

    @property
    def unit(self) -> int:
        """Tokens of the smallest micro-batch, one record."""
        return self.record_tokens or self.length * (2 if self.method in ("dpo", "reward") else 1)

    @property
    def tokens(self) -> int:
        """Tokens of the largest micro-batch."""
        return max(self.unit, min(self.micro_batch_tokens or 0, self.window_tokens or math.inf))

    @property
    def one_micro_batch(self) -> bool:
        """Each window is one micro-batch, and its gradients start from nothing."""
        return not self.critics and self.tokens >= (self.window_tokens or math.inf)

    @functools.cached_property
    def adapted(self) -> list[Linear]:
        """The linears of a layer that have an adapter."""
        return [] if self.full else self.shape.adapted_in_layer(self.lora_targets)

    @functools.cached_property
    def head_adapter(self) -> bool:
        return not self.full and any(x.reads == "head" for x in self.shape.adapted(self.lora_targets))

    @property
    def merged_bytes(self) -> int:
        """Of the adapted weights that sampling holds a second time, with the adapter in them; a 4-bit base merges nothing."""
        if not self.merge_lora or self.full or self.base == "nf4":
            return 0
        return self.width * sum(x.inputs * x.outputs for x in self.shape.adapted(self.lora_targets))

    @property
    def width(self) -> int:
        """Bytes of a number in the passes."""
        return 4 if self.base == "fp32" else 2

    @property
    def stream_width(self) -> int:
        """Bytes of a number between layers: the embeddings' dtype, float32 in full fine-tuning, which autocast leaves alone."""
        return 4 if self.full else self.width


class Part(NamedTuple):
    """One line of a plan."""

    name: str
    bytes: float
    when: str  # one of WHENS
