"""What a run folder, or the settings of a trainer, say about a job: its fields by name, those alone that are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.run.config import read_yaml

from .job import CRITICS, SAMPLING_METHODS

SETTINGS, ABOUT, ADAPTER = "config.yaml", "rlhf_fast.json", "adapter_config.json"  # of a run folder


def continues_adapter(model: str) -> bool:
    """Whether ``model`` is a folder with an adapter, which training goes on with."""
    return (Path(model) / ADAPTER).is_file()


def of_run(model: str) -> dict[str, Any]:
    """A run's own rank, targets, base, optimizer and layers; nothing if ``model`` is no folder of a run.

    The base is held as the run's fingerprint of it says: what was trained in 4 bit goes on in 4 bit.
    """
    folder, known = Path(model), {}
    if (path := folder / SETTINGS).is_file():
        settings = read_yaml(path)
        known["optimizer"] = settings.get("optim", "adamw")
        known["kernels"] = "fused" if settings.get("fused_layers", True) else "peft"
        known["full"] = not settings.get("use_peft", False)
    if continues_adapter(model):
        adapter = _read(folder / ADAPTER)
        targets = adapter["target_modules"]
        targets = targets if isinstance(targets, str) else tuple(sorted(targets))
        known |= {"full": False, "lora_r": adapter["r"], "lora_targets": targets}
        if (path := folder / ABOUT).is_file() and (base := _read(path).get("base")):
            known["base"] = "bf16" if base["format"] == "plain" else "nf4"
    return known


def of_settings(method: str, config: Any, length_given: bool = False) -> dict[str, Any]:
    """What the config of ``method``'s trainer says; ``config`` is an instance of its class.

    Args:
        length_given: the length of sequences is known from elsewhere.

    Raises:
        UserError: it does not say how long a sequence can be.
    """
    c, on_gpu = config, {"bfloat16": "bf16", "auto": "bf16", "float32": "fp32"}
    targets = c.lora_target_modules
    known = {
        "method": method,
        "full": not c.use_peft,
        "base": "nf4" if c.load_in_4bit else on_gpu[c.dtype],
        "lora_r": c.lora_r,
        "lora_targets": targets if isinstance(targets, str) else tuple(targets),
        "optimizer": c.optim,
        "kernels": "fused" if c.fused_layers and not c.lora_dropout else "peft",  # dropout is PEFT's
        "checkpointing": c.gradient_checkpointing,
        "offload": c.offload_activations,
        "micro_batch_tokens": c.micro_batch_tokens,
    }
    if method in SAMPLING_METHODS:
        known |= _sampling(method, c, length_given)
    else:
        known["length"] = c.max_length
    return {name: value for name, value in known.items() if value is not None}


def _sampling(method: str, config: Any, length_given: bool) -> dict[str, Any]:
    c = config
    if c.max_prompt_length is None and not length_given:
        raise UserError("the config leaves max_prompt_length open, so how long sequences get: set it, or give --length")
    known = {
        "length": (c.max_prompt_length or 0) + c.max_completion_length,
        "prompt_length": c.max_prompt_length,
        "rollout_batch_size": c.rollout_batch_size,
        "merge_lora": c.rollout_merge_lora is True,  # left to the rollouts, they merge where there is room
        # evaluations are written by the policy itself
        "samples_here": not c.use_vllm or bool(c.eval_dataset_name),
        "vllm_share": c.vllm_share,
        "vllm_sleeps": c.vllm_enable_sleep_mode,
    }
    if hasattr(c, "cost_models"):
        known["cost_models"] = len(c.cost_models) or int(method == "safe-ppo" and not c.cost_funcs)
    if method not in CRITICS:
        return known | {"num_generations": c.num_generations}
    # recipes leave models and functions to the command line, where a reward model is the usual one
    return known | {"reward_models": len(c.reward_models) or int(not c.reward_funcs)}


def window_tokens(config: Any, unit: int) -> int:
    """Tokens of an optimizer step at most, in records of ``unit`` tokens."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * unit


def combine(run: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Settings win over the run that they go on from, except over its adapter and over a base that it held in 4 bit."""
    own = {name: run[name] for name in ("full", "lora_r", "lora_targets") if "lora_r" in run}
    kept = {"base": "nf4"} if run.get("base") == "nf4" else {}
    return {**run, **settings, **own, **kept}


def has_reference(needed: bool, model: str, full: bool) -> bool:
    """Whether a reference that is ``needed`` has weights of its own: with LoRA it is the base, unless a trained adapter goes on."""
    return needed and (full or continues_adapter(model))


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}; save the run again") from None
