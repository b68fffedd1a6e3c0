"""From a name, a folder or an object to a :class:`Policy`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast.errors import UserError

from .adapters import adapter_base
from .policy import HEADS_FILE, Policy, load_heads, saved_role

logger = logging.getLogger(__name__)


def load(
    model: str | Path | PreTrainedModel | Policy,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    peft_config: Any = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    role: str | None = None,
) -> Policy:
    """Load a model for training or inference.

    Args:
        model: a Hugging Face name, a model folder, a run folder of ours (adapter or whole model), or a model object.
        tokenizer: its tokenizer; read from the same place when None.
        peft_config: LoRA configuration; adds a trainable adapter unless the folder already holds one. None: full weights.
        dtype: of the base weights; bfloat16 on a GPU and float32 on a CPU when None.
        device: the first GPU if there is one when None.
        role: what the model is to be, "policy" or "reward"; as the folder says when None.

    Raises:
        UserError: the folder holds no model or no tokenizer, or the name cannot be found.
    """
    if isinstance(model, Policy):
        return model
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise UserError("a model object needs its tokenizer too: pass processing_class=tokenizer")
        policy = Policy(model.to(device), tokenizer, role or "policy")
    elif not isinstance(model, (str, Path)):
        raise UserError(
            f"model is a {type(model).__name__}; pass a name, a folder or a transformers model "
            "(for LoRA the plain model and a peft_config)"
        )
    else:
        folder = Path(model) if Path(model).is_dir() else None
        adapter = folder is not None and (folder / "adapter_config.json").is_file()
        base = adapter_base(folder) if adapter else str(model)
        _check_folder(base)
        tokenizer = tokenizer or _tokenizer(str(model), base)
        saved = saved_role(folder) if folder else "policy"
        policy = Policy(_base(base, dtype).to(device), tokenizer, role or saved)
        if adapter:
            policy.model.requires_grad_(False)
            policy.adapters.load(policy.role, folder)
            policy.continued = True
        if saved == policy.role and folder and (folder / HEADS_FILE).is_file():
            load_heads(policy, folder, policy.role)
    if peft_config is not None and not policy.adapters.names:
        policy.model.requires_grad_(False)
        policy.adapters.add(policy.role, peft_config)
    return policy


def attach(policy: Policy, role: str, folder: str | Path) -> Policy:
    """Load the trained model in ``folder`` as a frozen ``role`` beside ``policy``, on the same base when it can be.

    Returns:
        The :class:`Policy` that plays the role: ``policy`` itself when ``folder`` holds an adapter of its base.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the run folder of a trained {role} model")
    if saved_role(folder) != role or not (folder / HEADS_FILE).is_file():
        raise UserError(f"{folder}: not a {role} model (no {HEADS_FILE} of that role); train one with rlhf-fast {role}")
    one_base = (folder / "adapter_config.json").is_file() and policy.adapters.names
    if one_base and adapter_base(folder) == policy.model.name_or_path:
        policy.adapters.load(role, folder, trainable=False)
        load_heads(policy, folder, role)
        policy.heads[role].requires_grad_(False)
        return policy
    other = load(folder, device=policy.device, dtype=policy.model.dtype)
    other.compute_dtype, other.attention = policy.compute_dtype, policy.attention
    return other.requires_grad_(False)


def disable_dropout(policy: nn.Module) -> None:
    """Turn every dropout off: ratios and margins compare two passes, which dropout would make differ by chance."""
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # many models hand a number of their own to F.dropout: attention_dropout, hidden_dropout, dropout, layerdrop
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _check_folder(name: str) -> None:
    """Say what is wrong with a local path before transformers asks the hub for it."""
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{name}: no config.json in this folder, so it holds no model; give a model or a run folder")
    if not path.is_dir() and (path.is_absolute() or name.startswith(".")):
        raise UserError(f"{name}: no such model folder")


def _base(name: str, dtype: torch.dtype) -> PreTrainedModel:
    path = Path(name)
    try:
        # an absolute path, so that an adapter trained on it is found again from any working folder
        return AutoModelForCausalLM.from_pretrained(str(path.resolve()) if path.is_dir() else name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a model from {name!r}: {_first_line(error)}") from error


def _tokenizer(folder: str, base: str) -> PreTrainedTokenizerBase:
    """The tokenizer saved with the model, else the base's."""
    errors = []
    for name in dict.fromkeys((folder, base)):
        # without files, transformers 5 makes up an empty tokenizer of the model's type and says nothing
        if Path(name).is_dir() and not any(Path(name).glob("tokenizer*")) and not any(Path(name).glob("vocab*")):
            errors.append(f"{name}: no tokenizer files")
            continue
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            break
        except (OSError, ValueError, TypeError) as error:
            errors.append(f"{name}: {_first_line(error)}")
    else:
        raise UserError(f"no tokenizer found ({'; '.join(errors)}); save one beside the model with save_pretrained")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # only ever seen by batched generation, which masks it
    return tokenizer


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
