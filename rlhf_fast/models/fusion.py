"""Our LoRA, MLP and RMSNorm in place of PEFT's and transformers', module by module, in any decoder.

A module is fused by giving it a subclass of its own class, which changes ``forward`` and nothing else: parameters, names,
state_dict keys, ``isinstance``, copies and merging stay what they were. What to do is decided at every call, from the
state PEFT keeps in its layers (which adapter, on or off, merged, dropout), so nothing has to be told when that changes.
What cannot be fused runs the code it always ran, and one line says so.

transformers' classes are recognised by the very code of their ``forward``: a module with the same name or the same
parameters that computes something else is left alone.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaMLP, GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from rlhf_fast.kernels import LoraWeights, lora_linear, lora_mlp, rms_norm

from .adapters import frozen_weight, is_lora

logger = logging.getLogger(__name__)

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_told: set[tuple[str, str]] = set()


class Fusion(NamedTuple):
    """How the modules of a model run, counted by kind."""

    fused: dict[str, int]  # kind -> modules
    plain: dict[tuple[str, str], int]  # kind, reason -> modules

    def covers(self, *kinds: str) -> bool:
        """Whether there are modules of all these ``KINDS``, and every one of them is fused."""
        titles = {KINDS[kind].title for kind in kinds}
        return titles <= self.fused.keys() and not titles & {title for title, _ in self.plain}

    @property
    def summary(self) -> str:
        """What is fused, in a line."""
        return "fused: " + (", ".join(f"{count} {kind}" for kind, count in self.fused.items()) or "nothing")

    @property
    def refusals(self) -> list[str]:
        """What is not, in a line for every kind and reason."""
        return [f"not fused: {count} {kind}: {reason}" for (kind, reason), count in self.plain.items()]

    def __str__(self) -> str:
        return "\n".join([self.summary, *self.refusals])


def fuse(model: nn.Module) -> Fusion:
    """Fuse what can be fused in ``model``, also after adapters were added; logs every reason why something is not."""
    for module in _candidates(model):
        name = _kind_of(module)
        if name and "forward" not in vars(module) and KINDS[name].refusal(module) is None:
            module.__class__ = _fused_class(_class_of(module), name)
    report = describe(model)
    for (kind, reason), count in report.plain.items():
        _tell(kind, reason, count)
    return report


def unfuse(model: nn.Module) -> None:
    """Give every module its own class back."""
    for module in model.modules():
        module.__class__ = _class_of(module)


def describe(model: nn.Module) -> Fusion:
    """What runs fused and what does not, under the adapter that is active now."""
    fused, plain = Counter(), Counter()
    for module in _candidates(model):
        if name := _kind_of(module):
            kind = KINDS[name]
            reason = kind.refusal(module) or kind.now(module)
            if reason is None and not hasattr(type(module), "_unfused"):
                reason = "its forward was replaced by somebody else" if "forward" in vars(module) else "fusion is off"
            plain.update({(kind.title, reason): 1}) if reason else fused.update({kind.title: 1})
    return Fusion(dict(fused), dict(plain))


def _candidates(model: nn.Module) -> Iterator[nn.Module]:
    """All modules but the head: training multiplies by its weight elsewhere, and generation has no graph to save."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return (module for module in model.modules() if module is not head)


class _Kind(NamedTuple):
    """A kind of module: what to call it, why a module can never be fused, why not now, and what it runs if it is."""

    title: str
    refusal: Callable[[nn.Module], str | None]
    now: Callable[[nn.Module], str | None]
    forward: Callable


def _kind_of(module: nn.Module) -> str | None:
    """The kind that ``module`` is, or looks like; None for what nobody would expect to be fused."""
    if is_lora(module):
        return "lora"
    if all(isinstance(getattr(module, name, None), nn.Module) for name in PROJECTIONS):
        return "mlp" if any(is_lora(getattr(module, name)) for name in PROJECTIONS) else None
    return "norm" if type(module).__name__.endswith("RMSNorm") else None


@functools.cache
def _fused_class(cls: type, kind: str) -> type:
    """``cls`` with the forward of ``kind``, under the same name. Copies and pickles as ``cls`` and its state."""

    def reduce(self, protocol):
        return _blank, (cls, kind), vars(self).copy()

    body = {"forward": KINDS[kind].forward, "_unfused": cls, "__reduce_ex__": reduce}
    return type(cls.__name__, (cls,), body | {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def _blank(cls: type, kind: str) -> nn.Module:
    fused = _fused_class(cls, kind)
    return fused.__new__(fused)


def _class_of(module: nn.Module) -> type:
    return getattr(type(module), "_unfused", type(module))


def _tell(kind: str, reason: str, count: int | None = None) -> None:
    """Log a reason, once in a process."""
    if (kind, reason) not in _told:
        _told.add((kind, reason))
        logger.warning("not fused: %s%s: %s", "" if count is None else f"{count} ", kind, reason)


def _hooked(*modules: nn.Module) -> bool:
    """Whether somebody waits for a call of one of the modules, which a fused forward passes by."""
    return any("forward" in vars(m) or any(getattr(m, hooks) for hooks in _HOOKS) for m in modules)


def _own(module: nn.Module, *args, **kwargs):
    """What the module runs when it is not fused."""
    return type(module)._unfused.forward(module, *args, **kwargs)


# ---- LoRA layers


def _known_lora(module: nn.Module) -> str | None:
    weight = frozen_weight(module, _class_of(module))
    return weight if isinstance(weight, str) else None


def _lora_weights(layer: nn.Module, dtype: torch.dtype | None = None) -> LoraWeights | str | None:
    """What ``layer`` multiplies with now; why it cannot be fused now; None if its base runs alone."""
    if layer._disable_adapters:
        return None
    active = layer.active_adapters
    if layer.merged_adapters:
        return "an adapter is merged into the base"
    if len(active) > 1:
        return "several adapters are active at once"
    name = active[0] if active else None
    if name not in layer.lora_A:
        return None
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if name in layer.lora_variant:
        return f"the adapter is a variant of LoRA ({type(layer.lora_variant[name]).__name__})"
    if a.bias is not None or b.bias is not None:
        return "the adapter has a bias"
    if getattr(dropout, "p", 0.0) > 0 and layer.training:
        return "the adapter has dropout"
    if _hooked(a, b, dropout):
        return "hooks are attached inside"
    base = _base_weights(layer, dtype)
    return base if isinstance(base, str) else base._replace(a=a.weight, b=b.weight, scaling=layer.scaling[name])


def _base_weights(layer: nn.Module, dtype: torch.dtype | None = None) -> LoraWeights | str:
    """The base of a LoRA layer, or a plain linear layer, without adapter; or why it cannot be fused."""
    base = layer.get_base_layer() if is_lora(layer) else layer
    if _hooked(base):
        return "hooks are attached inside"
    if any(p.requires_grad for p in base.parameters(recurse=False)):
        return "the base is trained too"
    weight = frozen_weight(layer, _class_of(layer), dtype)
    return weight if isinstance(weight, str) else LoraWeights(weight, bias=base.bias)


def _dtype(x: Tensor) -> torch.dtype:
    """The type that a linear layer computes in."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def _lora_now(layer: nn.Module) -> str | None:
    weights = _lora_weights(layer)
    return weights if isinstance(weights, str) else None


def _lora_forward(self, x: Tensor, *args, **kwargs) -> Tensor:
    # more arguments choose adapters by row, or belong to a variant
    weights = None if args or kwargs else _lora_weights(self, _dtype(x))
    if isinstance(weights, LoraWeights):
        return lora_linear(x, weights)
    if weights is not None:
        _tell(KINDS["lora"].title, weights)
    return _own(self, x, *args, **kwargs)


# ---- gated MLPs


def _known_mlp(module: nn.Module) -> str | None:
    if _code(_class_of(module).forward) not in _MLPS:
        return f"the forward of {type(module).__name__} is not the one of Llama and its relatives"
    if _activation(module) is None:
        return f"its activation is {type(module.act_fn).__name__}, not silu or gelu by tanh"
    reasons = (frozen_weight(p, _class_of(p)) for p in _projections(module))
    return next((f"a layer in it cannot be: {reason}" for reason in reasons if isinstance(reason, str)), None)


def _projections(mlp: nn.Module) -> list[nn.Module]:
    return [getattr(mlp, name) for name in PROJECTIONS]


def _activation(mlp: nn.Module) -> str | None:
    """Its name among ours."""
    act = mlp.act_fn
    if isinstance(act, nn.SiLU) or type(act).__name__ == "SiLUActivation":
        return "silu"
    by_tanh = isinstance(act, nn.GELU) and act.approximate == "tanh"
    return "gelu_tanh" if by_tanh or type(act).__name__ in ("GELUTanh", "PytorchGELUTanh") else None


def _mlp_weights(mlp: nn.Module, dtype: torch.dtype | None = None) -> list[LoraWeights] | str | None:
    """As :func:`_lora_weights`, of the three layers."""
    layers = _projections(mlp)
    if _hooked(*layers, mlp.act_fn):
        return "hooks are attached inside"
    found = [_lora_weights(layer, dtype) if is_lora(layer) else None for layer in layers]
    if all(weights is None for weights in found):
        return None
    found = [_base_weights(layer, dtype) if w is None else w for layer, w in zip(layers, found)]
    return next((reason for reason in found if isinstance(reason, str)), found)


def _mlp_now(mlp: nn.Module) -> str | None:
    weights = _mlp_weights(mlp)
    return weights if isinstance(weights, str) else None


def _mlp_forward(self, x: Tensor) -> Tensor:
    weights = _mlp_weights(self, _dtype(x))
    if isinstance(weights, list):
        return lora_mlp(x, *weights, activation=_activation(self))
    if weights is not None:
        _tell(KINDS["mlp"].title, weights)
    return _own(self, x)


# ---- RMSNorm


def _known_norm(module: nn.Module) -> str | None:
    if _norm_options(_class_of(module)) is None or module.weight is None:
        return f"the forward of {type(module).__name__} is not the one of Llama or Gemma"
    return None


@functools.cache
def _norm_options(cls: type) -> tuple[str, float, bool] | None:
    """Where the class keeps its epsilon, what it adds to its weight, and whether it rounds before it multiplies."""
    return _NORMS.get((_code(cls.forward), _code(getattr(cls, "_norm", None))))


def _norm_forward(self, x: Tensor) -> Tensor:
    epsilon, offset, round_first = _norm_options(type(self)._unfused)
    return rms_norm(x, self.weight, getattr(self, epsilon), offset=offset, round_first=round_first)


def _code(function: Callable | None) -> tuple | None:
    """What a function does: its instructions, and the names and numbers in them."""
    code = getattr(function, "__code__", None)
    return code and (code.co_code, code.co_names, tuple(c for c in code.co_consts if not isinstance(c, str)))


def _pristine(*classes: type) -> list[type]:
    """Those that are still transformers' own: other libraries put theirs in their place."""
    return [cls for cls in classes if cls.__module__.startswith("transformers.models.")]


_MLPS = {_code(cls.forward) for cls in _pristine(LlamaMLP, GemmaMLP)}
_NORM_OPTIONS = {LlamaRMSNorm: ("variance_epsilon", 0.0, True), GemmaRMSNorm: ("eps", 1.0, False)}
_NORMS = {
    (_code(cls.forward), _code(getattr(cls, "_norm", None))): _NORM_OPTIONS[cls] for cls in _pristine(*_NORM_OPTIONS)
}
KINDS = {
    "lora": _Kind("LoRA layers", _known_lora, _lora_now, _lora_forward),
    "mlp": _Kind("MLPs", _known_mlp, _mlp_now, _mlp_forward),
    "norm": _Kind("norms", _known_norm, lambda module: None, _norm_forward),
}
