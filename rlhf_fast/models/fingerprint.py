"""Which base an adapter belongs to: a hash of its configuration and of a few elements of every weight.

An adapter is a correction to one base. On another one it runs without an error and is wrong, so that whoever saves an
adapter also writes down its base, and whoever puts the two together compares. Reading 64 elements of each tensor takes
milliseconds where hashing 15 GB takes a minute, and no fine-tuning leaves them all as they were.
"""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .adapters import plain_layer

SAMPLES = 64  # elements of each tensor
# of a configuration: how the model is run, not what it is
_INCIDENTAL = ("dtype", "torch_dtype", "quantization_config", "transformers_version", "use_cache", "architectures")


def fingerprint(model: PreTrainedModel) -> dict[str, str]:
    """The base's identity; adapters on it do not count.

    Returns:
        hashes: ``config``; ``linear`` of the linear layers' weights and ``rest`` of all others, as if in bfloat16; and
        ``format``, "plain" or "nf4 on <kind of device>": how the linear layers are held, which ``linear`` depends on.
    """
    packed = False
    groups: dict[str, list[tuple[str, Tensor]]] = {"linear": [], "rest": []}
    head = model.get_output_embeddings()
    head = None if head is None else plain_layer(head)
    for key, module in model.named_modules():
        if ".lora_" in key:
            continue
        linear = not isinstance(module, nn.Embedding) and module is not head
        for part, parameter in module.named_parameters(recurse=False):
            group = groups["linear" if linear and parameter.ndim >= 2 else "rest"]
            name = f"{key}.{part}".replace(".base_layer", "")
            group.append((name, _sample(parameter)))
            if (state := getattr(parameter, "quant_state", None)) is not None:
                packed = True
                group.append((f"{name}.absmax", _sample(state.absmax)))
    return {
        "config": _config_hash(model),
        "format": f"nf4 on {model.device.type}" if packed else "plain",
        **{name: _hash(tensors) for name, tensors in groups.items()},
    }


def digest(tensors: dict[str, Tensor]) -> str:
    """A hash of names and of a few elements of each tensor."""
    return _hash([(name, _sample(tensor)) for name, tensor in tensors.items()])


def difference(saved: dict[str, str], here: dict[str, str]) -> str | None:
    """How the base ``here`` differs from the one that was ``saved``, in words, or None.

    A base held in another format is compared by what is never quantized: embeddings, norms, head and configuration.
    """
    if saved["config"] != here["config"]:
        return "its configuration is another"
    if saved["rest"] != here["rest"]:
        return "its weights are others"
    if saved["format"] == here["format"] and saved["linear"] != here["linear"]:
        return "the weights of its linear layers are others"
    return None


def _config_hash(model: PreTrainedModel) -> str:
    config = model.config.to_diff_dict()  # fields that a newer transformers adds at their default leave it as it is
    kept = {k: v for k, v in config.items() if k not in _INCIDENTAL and not k.startswith("_")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _sample(tensor: Tensor) -> Tensor:
    """Elements spread over the tensor; floats in bfloat16, whatever they are held in."""
    flat = tensor.detach().reshape(-1)
    some = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]
    return some.bfloat16().view(torch.int16) if some.is_floating_point() else some.to(torch.int16)


def _hash(tensors: list[tuple[str, Tensor]]) -> str:
    if not tensors:
        return ""
    tensors = sorted(tensors, key=lambda pair: pair[0])
    names = "\n".join(f"{name} {len(sample)}" for name, sample in tensors)
    values = torch.cat([sample for _, sample in tensors]).cpu()  # one transfer from a GPU
    return hashlib.sha256(names.encode() + values.numpy().tobytes()).hexdigest()[:16]
