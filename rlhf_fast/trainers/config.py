"""Settings that trainers share. An algorithm's own stand above its trainer, in its file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.models.attention import CHOICES

from .alarms import ACTIONS as ALARM_ACTIONS
from .alarms import check_alarm_limits
from .guard import ACTIONS as GUARD_ACTIONS
from .guard import check_limits
from .importance import MODES as IMPORTANCE_MODES
from .optimizers import OPTIMIZERS

SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
AT_LEAST_ONE = (
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lora_r",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "micro_batch_tokens",
    "eval_steps",
    "early_stopping_patience",
)


def one_of(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise UserError unless ``value`` is among ``choices``."""
    if value not in choices:
        raise UserError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def at_least(config: Any, bound: float, *names: str) -> None:
    """Raise UserError for a field of ``names`` below ``bound``. One that is None is unset."""
    _refuse(config, names, lambda value: value < bound, f"at least {bound}")


def above(config: Any, bound: float, *names: str) -> None:
    """Raise UserError for a field of ``names`` that is ``bound`` or below. One that is None is unset."""
    _refuse(config, names, lambda value: value <= bound, f"above {bound}")


def _refuse(config: Any, names: Iterable[str], wrong: Callable[[Any], bool], allowed: str) -> None:
    for name in names:
        if (value := getattr(config, name)) is not None and wrong(value):
            unset = ", or unset" if getattr(type(config), name) is None else ""
            raise UserError(f"{name} is {value}; it must be {allowed}{unset}")


@dataclass(kw_only=True)
class TrainerConfig:
    """Settings that every trainer understands; names and meanings as in TRL."""

    model_name_or_path: str | None = None  # a Hugging Face name, a model folder, or a run folder
    dataset_name: str | None = None  # a .jsonl, .json, .parquet or .csv file, a folder, or a Hugging Face data set
    eval_dataset_name: str | None = None  # held-out rows, same formats
    bad_rows: str = "error"  # at a row that cannot be used: error names it and stops, drop leaves it out and counts it
    output_dir: str = "runs/run"  # the run folder: model, checkpoints, metrics, plots
    learning_rate: float | None = None  # peak; None is the algorithm's default, higher with LoRA
    optim: str = "adamw"  # adamw; adamw_8bit and paged_adamw_8bit (bitsandbytes) keep its moments in 8 bit
    lr_scheduler_type: str = "linear"  # linear, cosine, constant, constant_with_warmup, ...
    warmup_ratio: float = 0.03  # share of all steps spent raising the learning rate from 0
    weight_decay: float = 0.0  # AdamW's, on matrices; norms, biases and heads do not decay
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm; 0 leaves them as they are
    num_train_epochs: int = 1  # passes over the data set
    max_steps: int = -1  # optimizer steps; overrides num_train_epochs when positive
    per_device_train_batch_size: int = 8  # records per micro-batch, unless micro_batch_tokens fills micro-batches
    gradient_accumulation_steps: int = 1  # an optimizer step has per_device_train_batch_size times as many records
    micro_batch_tokens: int | None = None  # fill micro-batches up to so many tokens; none: as the plan says, on a GPU
    gradient_checkpointing: bool | None = None  # recompute activations: less memory; none: true, or as the plan says
    offload_activations: bool | None = None  # checkpointed ones wait in host memory; none: false, or as the plan says
    memory_check: bool | None = None  # try the largest micro-batch before the first step; none: on a GPU
    dtype: str = "auto"  # of the base weights: auto, float32, bfloat16
    load_in_4bit: bool = False  # hold the base in NF4, for training an adapter; a run folder trained so always is
    attn_implementation: str = "auto"  # auto, varlen (torch's fused kernel), flash_attention_2 (flash-attn's), sdpa
    shared_prefix: bool = True  # responses to one prompt compute it once, where that spares at least 23% of the tokens
    use_peft: bool = False  # train a LoRA adapter instead of all weights
    lora_r: int = 16  # rank of the adapter
    lora_alpha: int = 32  # its output is scaled by lora_alpha / lora_r
    lora_dropout: float = 0.0  # on the adapter's input; SFT only, elsewhere two passes are compared and it must be 0
    lora_target_modules: str | list[str] = "all-linear"  # layers that get an adapter; a list may name lm_head too
    fused_layers: bool = True  # our LoRA, MLP and RMSNorm where they fit; false: PEFT's and transformers' own
    logging_steps: int = 10  # optimizer steps between log lines
    eval_steps: int | None = None  # optimizer steps between evaluations; None evaluates at the end
    save_steps: int = 500  # optimizer steps between checkpoints
    save_total_limit: int = 2  # checkpoints kept, besides that of the best evaluation
    metric_for_best_model: str | None = None  # figure of an evaluation; the best one's checkpoint is kept
    greater_is_better: bool | None = None  # of that figure; none: yes, unless its name ends in loss
    load_best_model_at_end: bool = False  # the model saved is the best evaluation's, by loss, in RL by reward
    early_stopping_patience: int | None = None  # stop after so many evaluations in a row without a better one
    early_stopping_threshold: float = 0.0  # an evaluation is better when it beats the best by more than this
    callbacks: list[Any] = field(default_factory=list)  # module:class or module:function, called at every step and save
    resume_from_checkpoint: str | bool | None = None  # true: the latest good checkpoint of output_dir; or a path
    seed: int = 42  # of everything random
    deterministic: bool = False  # the same run ends with the same bits, on a GPU too; what cannot do so is refused
    report_to: list[str] = field(default_factory=list)  # tensorboard, wandb; metrics.jsonl is always written
    quiet: bool = False  # no progress bar

    def __post_init__(self) -> None:
        at_least(self, 1, *AT_LEAST_ONE)
        if self.offload_activations and self.gradient_checkpointing is False:
            raise UserError(
                "offload_activations moves what gradient_checkpointing keeps; leave gradient_checkpointing on"
            )
        if self.watches_evaluations and self.eval_steps is None:
            raise UserError("the best evaluation is one of several: set eval_steps, the optimizer steps between them")
        if not 0 <= self.warmup_ratio <= 1:
            raise UserError(f"warmup_ratio is {self.warmup_ratio}; it is a share of all steps, from 0 to 1")
        one_of("optim", self.optim, OPTIMIZERS)
        one_of("lr_scheduler_type", self.lr_scheduler_type, SCHEDULES)
        one_of("bad_rows", self.bad_rows, ("error", "drop"))
        one_of("dtype", self.dtype, ("auto", "float32", "bfloat16"))
        one_of("attn_implementation", self.attn_implementation, CHOICES)

    @property
    def needs_reference(self) -> bool:
        """Whether the run compares the policy with a frozen reference."""
        return False

    @property
    def watches_evaluations(self) -> bool:
        """Whether evaluations decide what is kept, or when the run ends."""
        return bool(self.metric_for_best_model or self.load_best_model_at_end or self.early_stopping_patience)


@dataclass(kw_only=True)
class RLConfig(TrainerConfig):
    """Settings of the algorithms that learn from their own samples."""

    reward_funcs: list[Any] = field(default_factory=list)  # built-in name, module:function, or {name: ..., ...}
    reward_weights: list[float] | None = None  # one per reward function; None weighs them all 1
    guard: str = "warn"  # at signs of reward hacking: warn; stop; rollback: stop with the best evaluation's model; off
    guard_reward: list[Any] = field(default_factory=list)  # as reward_funcs, but held out: nothing learns from them
    guard_share: float = 0.25  # of the prompts of a batch whose responses they score
    guard_limits: dict[str, float] = field(default_factory=dict)  # where signs begin, e.g. {kl: 30}; see guard.py
    alarms: str = "stop"  # at a step wildly out of range (KL, ratio, values): stop before it, saved; warn; off
    alarm_limits: dict[str, float] = field(default_factory=dict)  # where that begins, e.g. {kl: 1}; see alarms.py
    disagreement_penalty: float = 0.0  # models of several heads: their spread times this off the score, onto the cost
    soft_overlong_cache: int = 0  # tokens before the limit on which a penalty grows to 1 (DAPO, eq. 13); 0: none
    vllm_importance_sampling_correction: bool | None = None  # weigh by trainer / engine; none: where weights differ
    vllm_importance_sampling_mode: str = "sequence_mask"  # token_ or sequence_; truncate or mask (drop) beyond bounds
    vllm_importance_sampling_clip_min: float | None = None  # lower bound of those weights; none: 0
    vllm_importance_sampling_clip_max: float | None = 3.0  # upper bound of those weights; none: no bound
    max_prompt_length: int | None = 512  # tokens; longer prompts are left out
    allow_truncation: bool = False  # go on when more than 1% of the prompts are left out
    max_completion_length: int = 512  # tokens sampled at most
    temperature: float = 1.0  # of sampling, and of every log-probability
    rollout_batch_size: int = 128  # sequences written at a time; one that ends makes room for the next
    rollout_merge_lora: bool | None = False  # sample with the adapter merged: weights twice; none: if a GPU has room
    num_eval_prompts: int = 256  # held-out prompts answered greedily at each evaluation
    num_completions_to_print: int = 4  # of those answers; all of them are in completions.jsonl
    use_vllm: bool = False  # sample through vLLM, or `rlhf-fast serve`, which speaks its dialect; LoRA only
    vllm_mode: str = "server"  # server: over HTTP; colocate: vLLM in this process, on the same GPU
    vllm_server_base_url: str | list[str] = "http://127.0.0.1:8000"  # of the server; several share the prompts
    vllm_server_timeout: float = 240.0  # seconds to wait at the start until the servers are up
    vllm_request_timeout: float = 600.0  # seconds that a prompt may take before it is sent again
    vllm_enable_sleep_mode: bool = False  # vLLM gives its GPU memory back while the policy is updated
    vllm_gpu_memory_utilization: float = 0.3  # share of the GPU that vLLM takes in colocate mode
    vllm_logprob_tolerance: float = 0.1  # nats per token that engine and trainer may differ by: a probe, and an alarm

    @property
    def vllm_share(self) -> float:
        """Share of the GPU that a vLLM in this process takes, during updates too unless it sleeps then."""
        here = self.use_vllm and self.vllm_mode == "colocate"
        return self.vllm_gpu_memory_utilization if here else 0.0

    @property
    def watches_evaluations(self) -> bool:
        return super().watches_evaluations or self.guard == "rollback"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("guard", self.guard, GUARD_ACTIONS)
        check_limits(self.guard_limits)
        one_of("alarms", self.alarms, ALARM_ACTIONS)
        check_alarm_limits(self.alarm_limits)
        if not 0 < self.guard_share <= 1:
            raise UserError(f"guard_share is {self.guard_share:g}; it is a share of the prompts, above 0 and at most 1")
        if self.guard == "rollback" and not (self.guard_reward or self.metric_for_best_model):
            raise UserError(
                "guard: rollback needs to know which evaluation was the best, and the reward itself is what may be cheated: "
                "name a guard_reward, or another figure as metric_for_best_model"
            )
        models = [m for name in ("reward_models", "cost_models") for m in getattr(self, name, ())]
        if self.disagreement_penalty and not models:
            raise UserError(
                "disagreement_penalty has no effect without a reward_model_path or cost_model_path; a model among reward_funcs "
                "takes its own: {name: model, path: RUN, disagreement_penalty: 0.5}"
            )
        if self.deterministic and self.use_vllm:
            raise UserError(
                "deterministic does not go with use_vllm: what a request's neighbours are, and so how its sums are rounded, is a "
                "matter of time there; leave use_vllm out to sample in process"
            )
        if self.deterministic and self.rollout_merge_lora is None:
            raise UserError(
                "deterministic: rollout_merge_lora left open asks how much memory is free, which differs from run to run; "
                "say true or false"
            )
        one_of("vllm_mode", self.vllm_mode, ("server", "colocate"))
        one_of("vllm_importance_sampling_mode", self.vllm_importance_sampling_mode, IMPORTANCE_MODES)
        low, high = self.vllm_importance_sampling_clip_min or 0.0, self.vllm_importance_sampling_clip_max
        if low < 0 or (high is not None and high <= low):
            raise UserError(
                f"vllm_importance_sampling_clip_min is {low:g} and vllm_importance_sampling_clip_max {high}; "
                "weights lie between them: 0 <= min < max"
            )
        if not 0 <= self.soft_overlong_cache <= self.max_completion_length:
            raise UserError(
                f"soft_overlong_cache is {self.soft_overlong_cache}; it is a part of the max_completion_length of "
                f"{self.max_completion_length} tokens"
            )
