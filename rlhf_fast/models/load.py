"""From a name, a folder or an object to a :class:`Policy`."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_fast.errors import UserError

from .adapters import adapter_base, is_4bit, nf4_config
from .fingerprint import difference, fingerprint
from .policy import HEADS_FILE, Policy, load_heads, saved_base, saved_role, stop_ids

logger = logging.getLogger(__name__)


def load(
    model: str | Path | PreTrainedModel | Policy,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    peft_config: Any = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    role: str | None = None,
    load_in_4bit: bool | None = None,
) -> Policy:
    """Load a model for training or inference.

    Weights go tensor by tensor from the files to the device. The files are mapped, not read into memory: besides the
    model the process allocates a few tensors at a time, however large the checkpoint (``bench/loading.py`` measures
    it).

    Args:
        model: a Hugging Face name, a model folder, a run folder of ours (adapter or whole model), or a model object.
        tokenizer: its tokenizer; read from the same place when None.
        peft_config: LoRA configuration; adds a trainable adapter unless the folder already holds one. None: full weights.
        dtype: of the base weights; bfloat16 on a GPU and float32 on a CPU when None.
        device: the first GPU if there is one when None.
        role: what the model is to be, "policy" or "reward"; as the folder says when None.
        load_in_4bit: hold the base's linear layers in NF4 and compute in ``dtype``; when None, if that is how the
            adapter in the folder was trained.

    Raises:
        UserError: the folder holds no model or no tokenizer, the name cannot be found, the adapter in the folder was
            trained on another base than its name stands for now, or 4 bit cannot be had.
    """
    if isinstance(model, Policy):
        return model
    device = _device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise UserError("a model object needs its tokenizer too: pass processing_class=tokenizer")
        policy = Policy(_placed(model, device, load_in_4bit), tokenizer, role or "policy")
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
        trained_on = saved_base(folder) if adapter else None
        if load_in_4bit is None:
            load_in_4bit = trained_on is not None and trained_on["format"] != "plain"
        base_model, report = _base(base, dtype, device, load_in_4bit)
        policy = Policy(base_model, tokenizer, role or saved)
        policy.loaded = report
        if adapter:
            _check_base(policy, trained_on, folder)
            policy.model.requires_grad_(False)
            policy.adapters.load(policy.role, folder)
            policy.continued = True
        if saved == policy.role and folder and (folder / HEADS_FILE).is_file():
            load_heads(policy, folder, policy.role)
    if peft_config is not None and not policy.adapters.names:
        policy.model.requires_grad_(False)
        policy.adapters.add(policy.role, peft_config)
    if is_4bit(policy.model) and not policy.adapters.names:
        policy.model.requires_grad_(False)
    return policy


def load_tokenizer(model: str | Path) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """The tokenizer of a model or run folder or name, and what preparing data asks of its model; no weights are read.

    Returns:
        the tokenizer, and ``{"vocab_size": rows of the embedding, "stop_ids": tokens that end a response}``.
    Raises:
        UserError: there is no such model, or it has no tokenizer.
    """
    folder = Path(model)
    base = adapter_base(folder) if (folder / "adapter_config.json").is_file() else str(model)
    _check_folder(base)
    tokenizer = _tokenizer(str(model), base)
    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the config of {base!r}: {_first_line(error)}") from error
    try:
        generation = GenerationConfig.from_pretrained(base)
    except OSError:  # without the file, what transformers makes of the config
        generation = GenerationConfig.from_model_config(config)
    return tokenizer, {
        "vocab_size": config.get_text_config().vocab_size,
        "stop_ids": stop_ids(generation, tokenizer),
    }


def attach(policy: Policy, role: str, folder: str | Path, name: str | None = None) -> Policy:
    """Load the trained model in ``folder`` as a frozen ``role`` beside ``policy``, on the same base when it can be.

    Args:
        name: what ``policy`` calls the role where several models play it; ``role`` when None.
    Returns:
        The :class:`Policy` that plays the role: ``policy`` itself when ``folder`` holds an adapter of its base, known by
        its fingerprint, else by its name.

    Raises:
        UserError: ``folder`` holds no such model, or one trained on another base of the same name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the run folder of a trained {role} model")
    if saved_role(folder) != role or not (folder / HEADS_FILE).is_file():
        raise UserError(
            f"{folder}: not a {role} model (no {HEADS_FILE} of that role); train one with {_training(role)}"
        )
    if (folder / "adapter_config.json").is_file() and policy.adapters.names and _same_base(policy, folder):
        name = name or role
        policy.adapters.load(name, folder, trainable=False)
        load_heads(policy, folder, name)
        policy.heads[name].requires_grad_(False)
        return policy
    other = load(folder, device=policy.device, dtype=policy.model.dtype)
    other.compute_dtype, other.attention = policy.compute_dtype, policy.attention
    if not policy.fused:
        other.unfuse()
    return other.requires_grad_(False)


def _training(role: str) -> str:
    return "rlhf-fast reward --kind cost" if role == "cost" else f"rlhf-fast {role}"


def _same_base(policy: Policy, folder: Path) -> bool:
    """Whether the adapter in ``folder`` was trained on the base of ``policy``."""
    trained_on = saved_base(folder)
    if adapter_base(folder) == policy.model.name_or_path:
        _check_base(policy, trained_on, folder)
        return True
    # the same model under another name, such as a moved folder
    return trained_on is not None and difference(trained_on, fingerprint(policy.model)) is None


def _check_base(policy: Policy, trained_on: dict[str, str] | None, folder: Path) -> None:
    """Compare the base of ``policy`` with the one that the adapter in ``folder`` was trained on, where that is known."""
    if trained_on is None:  # another library's adapter
        return
    here = fingerprint(policy.model)
    if difference_ := difference(trained_on, here):
        raise UserError(
            f"{folder} was trained on another base than {policy.model.name_or_path} is now ({difference_}); "
            "restore that base, or train the adapter again on this one"
        )
    if trained_on["format"].split()[0] != here["format"].split()[0]:
        logger.warning(
            "%s was trained on a base in %s and runs on one in %s here: its outputs shift a little",
            *(folder, *("4 bit" if base["format"] != "plain" else "full precision" for base in (trained_on, here))),
        )


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


def _device(wanted: torch.device | str | None) -> torch.device:
    device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
    # a device map wants its number
    return (
        torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device
    )


def _placed(model: PreTrainedModel, device: torch.device, load_in_4bit: bool | None) -> PreTrainedModel:
    """A model object on ``device``. One in 4 bit stays where it is, and none is quantized after the fact."""
    if not is_4bit(model):
        if load_in_4bit:
            raise UserError("load_in_4bit quantizes while loading; pass the model's name or folder, not the model")
        return model.to(device)
    if model.device != device:
        raise UserError(f"the 4-bit model is on {model.device} and is wanted on {device}; load it there")
    return model


def _base(name: str, dtype: torch.dtype, device: torch.device, in_4bit: bool) -> tuple[PreTrainedModel, str]:
    """The model, straight to its device, and a line about it."""
    path, began = Path(name), time.perf_counter()
    options = {"dtype": dtype, "device_map": {"": device}}
    if in_4bit:
        options["quantization_config"] = nf4_config(dtype, device)
    try:
        # an absolute path, so that an adapter trained on it is found again from any working folder
        model = AutoModelForCausalLM.from_pretrained(str(path.resolve()) if path.is_dir() else name, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a model from {name!r}: {_first_line(error)}") from error
    plain = str(dtype).removeprefix("torch.")
    held = f"NF4, computing in {plain}, embeddings, norms and head in {plain}" if in_4bit else plain
    seconds = time.perf_counter() - began
    report = f"loaded {name}: {held}, {weight_bytes(model) / 1e9:.2f} GB on {device} in {seconds:.1f} s"
    if in_4bit and (left := _unquantized_bytes(model)):
        report += f"; {left / 1e9:.2f} GB are in no linear layer (fused experts) and stay in {plain}"
    logger.info(report)
    return model, report


def _unquantized_bytes(model: PreTrainedModel) -> int:
    """Bytes of matrices of the body that bitsandbytes could not pack, because they are in no linear layer."""
    head = model.get_output_embeddings()
    kept = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) or m is head}
    matrices = (p for p in model.parameters() if p.ndim >= 2 and p.is_floating_point())
    return sum(p.nbytes for p in matrices if id(p) not in kept)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights on their device, the scales of quantized ones included."""
    return sum(held_bytes(x) for x in (*model.parameters(), *model.buffers()))


def held_bytes(tensor: Tensor) -> int:
    """Bytes of one weight, with its scales if it is quantized."""
    total, state = tensor.nbytes, getattr(tensor, "quant_state", None)
    while state is not None:  # the scales of scales
        total += state.absmax.nbytes
        state = getattr(state, "state2", None)
    return total


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
