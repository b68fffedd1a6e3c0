"""LoRA adapters: several on one frozen base, one active at a time. The only file that knows PEFT.

PEFT gives the layers, the configuration and the file format. Switching is ours: PEFT's ``set_adapter`` walks all
modules and toggles ``requires_grad`` (a graph built before the switch then loses its gradient without a word), so here a
switch sets one attribute per layer, trainability never changes with it, and it is refused while a graph of another
adapter still waits for its backward pass: a checkpointed backward would recompute under the wrong adapter.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_fast.errors import UserError


def lora_config(r: int = 16, alpha: int = 32, dropout: float = 0.0, target_modules: Any = "all-linear") -> LoraConfig:
    """A causal LM's LoRA configuration (Hu et al. 2021, arXiv:2106.09685), all linear layers but the head."""
    return LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, bias="none", task_type="CAUSAL_LM"
    )


def adapter_base(folder: Path) -> str:
    """The base model that the adapter in ``folder`` was trained on."""
    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base:
        raise UserError(f"{folder}/adapter_config.json names no base model; add base_model_name_or_path")
    return base


def is_lora(module: nn.Module) -> bool:
    """Whether ``module`` is one of PEFT's LoRA layers."""
    return isinstance(module, LoraLayer)


def frozen_weight(layer: nn.Module, cls: type, dtype: torch.dtype | None = None) -> Tensor | Callable[[], Tensor] | str:
    """The base weight that ``layer`` multiplies with, or the function that expands it, or why it is neither.

    Args:
        layer: a linear layer, inside one of PEFT's LoRA layers or not.
        cls: the layer's class as PEFT or torch made it.
        dtype: of the multiplication; not checked when None.
    """
    base = layer.get_base_layer() if is_lora(layer) else layer
    cls = type(base) if cls is LoraLinear else cls
    if cls is nn.Linear and type(base) is nn.Linear:
        return base.weight
    if cls.__name__ != "Linear4bit" or type(base).__name__ != "Linear4bit":
        return f"the base is a {type(base).__name__}" if is_lora(layer) else f"it is a {cls.__name__}"
    state = getattr(base.weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return "the 4-bit base is not quantised yet" if state is None else "the 4-bit base was repacked for inference"
    if dtype is not None and base.compute_type_is_set and base.compute_dtype not in (None, dtype):
        return f"the 4-bit base computes in {base.compute_dtype}, its input is {dtype}"
    return functools.partial(_expand, base.weight)


def _expand(weight: nn.Parameter) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


class Adapters:
    """The named adapters of one model. ``names`` is empty until the first is added."""

    def __init__(self, model: PreTrainedModel, on_change: Callable[[], None] = lambda: None):
        self.model = model
        self.on_change = on_change  # called when layers may have been wrapped
        self.active: str | None = None  # None: the base alone
        self._peft: PeftModel | None = None
        self._layers: list[LoraLayer] = []
        self._trainable: dict[str, bool] = {}
        self._graphs: weakref.WeakSet[_Graph] = weakref.WeakSet()

    @property
    def names(self) -> list[str]:
        return list(self._peft.peft_config) if self._peft is not None else []

    def add(self, name: str, config: LoraConfig, *, trainable: bool = True, copy_of: str | None = None) -> None:
        """A new adapter, fresh (it changes nothing until trained) or with the weights of ``copy_of``."""
        with _quiet():
            if self._peft is None:
                self._peft = get_peft_model(self.model, config, adapter_name=name)
            else:
                self._peft.add_adapter(name, config)
        if copy_of is not None:
            source, target = self.parameters(copy_of), self.parameters(name)
            with torch.no_grad():
                for key, parameter in target.items():
                    parameter.copy_(source[key])
        self._added(name, trainable)

    def load(self, name: str, folder: Path, *, trainable: bool = True) -> None:
        """The adapter saved in ``folder`` (PEFT's format), under ``name``."""
        with _quiet():
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(self.model, str(folder), adapter_name=name)
            else:
                self._peft.load_adapter(str(folder), name)
        self._added(name, trainable)

    def _added(self, name: str, trainable: bool) -> None:
        self._layers = [m for m in self.model.modules() if isinstance(m, LoraLayer)]
        self._trainable[name] = trainable
        # adding an adapter makes PEFT freeze the others
        for adapter, train in self._trainable.items():
            for parameter in self.parameters(adapter).values():
                parameter.requires_grad_(train)
        self._switch(name)
        self.on_change()

    def config(self, name: str) -> LoraConfig:
        return self._peft.peft_config[name]

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters by a name that does not depend on which adapter it is."""
        # right behind PEFT's own name: some models call a layer "value" or "policy" too
        of_adapter = re.compile(rf"(.*\.lora_\w+)\.{re.escape(name)}((?:\..+)?)")
        return {
            f"{found[1]}{found[2]}": parameter
            for key, parameter in self.model.named_parameters()
            if (found := of_adapter.fullmatch(key))
        }

    def use(self, name: str | None) -> None:
        """Run the next passes under adapter ``name``, or under the base alone when None.

        It stays in force until the next call, so that a backward pass recomputes under the adapter of its forward.

        Raises:
            RuntimeError: a graph built under another adapter has not been backpropagated (or dropped) yet.
        """
        if name == self.active:
            return
        if waiting := sorted({str(g.adapter) for g in self._graphs if g.adapter != name}):
            raise RuntimeError(
                f"cannot switch to adapter {name!r}: a graph built under {', '.join(waiting)} has not been "
                "backpropagated; call backward() on it or drop it first"
            )
        self._switch(name)

    def _switch(self, name: str | None) -> None:
        for layer in self._layers:
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]
        self.active = name

    def guard(self, hidden: Tensor) -> Tensor:
        """``hidden`` itself, its graph remembered as belonging to the active adapter until its backward has run."""
        if not (torch.is_grad_enabled() and hidden.requires_grad and self._layers):
            return hidden
        graph = _Graph(self.active, self._graphs)
        return _Guard.apply(hidden, graph)

    def save(self, name: str, folder: Path) -> None:
        """Write adapter ``name`` into ``folder`` as PEFT does: adapter_config.json, adapter_model.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        state = get_peft_model_state_dict(self._peft, adapter_name=name)
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / "adapter_model.safetensors")
        config = self.config(name)
        mode, config.inference_mode = config.inference_mode, True
        config.save_pretrained(str(folder))
        config.inference_mode = mode

    def merged(self, name: str) -> PreTrainedModel:
        """A copy of the base with adapter ``name`` folded into its weights."""
        self.use(name)
        return copy.deepcopy(self._peft).merge_and_unload(adapter_names=[name])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """PEFT still calls names that newer transformers deprecates; the user can do nothing about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


class _Graph:
    """A live autograd graph and the adapter that built it."""

    def __init__(self, adapter: str | None, registry: weakref.WeakSet[_Graph]):
        self.adapter = adapter
        self.registry = registry
        registry.add(self)


class _Guard(torch.autograd.Function):
    """The identity. Its context holds the :class:`_Graph`, so that dropping the graph forgets it, as backward does."""

    @staticmethod
    def forward(ctx, hidden: Tensor, graph: _Graph) -> Tensor:
        ctx.graph = graph
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.graph.registry.discard(ctx.graph)
        return grad, None
