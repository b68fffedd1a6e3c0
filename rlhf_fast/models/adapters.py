"""LoRA adapters: several on one frozen base, plain or in 4 bit, one active at a time. The only file that knows PEFT and
bitsandbytes.

PEFT gives the layers, the configuration and the file format. Switching is ours: PEFT's ``set_adapter`` walks all
modules and toggles ``requires_grad`` (a graph built before the switch then loses its gradient without a word), so here a
switch sets one attribute per layer, trainability never changes with it, and it is refused while a graph of another
adapter still waits for its backward pass: a checkpointed backward would recompute under the wrong adapter.

A 4-bit base holds its linear layers in NF4 (Dettmers et al. 2023, arXiv:2305.14314) and everything else, embeddings,
norms and head, in the dtype that it computes in. PEFT's ``prepare_model_for_kbit_training`` would turn those into
fp32, 2.2 GB more on a 7B model, and is not called. Adapters are fp32 on every base: in bf16 a small learning rate
moves few of their elements.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_fast.errors import UserError

logger = logging.getLogger(__name__)


def lora_config(r: int = 16, alpha: int = 32, dropout: float = 0.0, target_modules: Any = "all-linear") -> LoraConfig:
    """A causal LM's LoRA configuration (Hu et al. 2021, arXiv:2106.09685).

    "all-linear" is all linear layers but the head; a list may name the head too: ["q_proj", "v_proj", "lm_head"].
    """
    return LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, bias="none", task_type="CAUSAL_LM"
    )


def adapter_base(folder: Path) -> str:
    """The base model that the adapter in ``folder`` was trained on."""
    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base:
        raise UserError(f"{folder}/adapter_config.json names no base model; add base_model_name_or_path")
    return base


def check_adapter(folder: Path, model: nn.Module) -> None:
    """Refuse an adapter (PEFT's format) that is not whole or does not fit ``model``; PEFT notices only after changing it.

    Raises:
        UserError: names the folder, the matrix, its shape and the layer's.
    """
    try:
        PeftConfig.from_pretrained(str(folder))
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder} holds no readable LoRA adapter ({str(error).splitlines()[0]})") from error
    layers = dict(model.named_modules())
    for key, shape in shapes.items():
        name, _, matrix = key.removeprefix("base_model.model.").rpartition(".lora_")
        layer = plain_layer(layers[name]) if name in layers else None
        sizes = _sizes(layer)
        if sizes is None or shape[1 if matrix[0] == "A" else 0] != sizes[matrix[0] == "B"]:
            place = f"a layer of {sizes[0]} inputs and {sizes[1]} outputs" if sizes else "no linear layer"
            raise UserError(f"{folder} does not fit this model: {key} is {shape}, and {name or 'that'} is {place} here")


def _sizes(layer: nn.Module | None) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer; None for anything else."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    return (layer.in_features, layer.out_features) if hasattr(layer, "in_features") else None


def bitsandbytes(wanted_by: str) -> ModuleType:
    """The library of 4-bit weights and 8-bit optimizers.

    Raises:
        UserError: it is not installed, or does not load; names the setting ``wanted_by``.
    """
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"{wanted_by} needs bitsandbytes: pip install 'rlhf-fast[qlora]' ({error})") from error
    return bitsandbytes


def nf4_config(dtype: torch.dtype, device: torch.device) -> BitsAndBytesConfig:
    """How transformers is to load a base in NF4 with double quantisation, computing in ``dtype``.

    Raises:
        UserError: bitsandbytes is missing, or cannot do it on ``device``.
    """
    library = bitsandbytes("load_in_4bit")
    try:  # a block of weights there and back says more than a list of devices and versions
        packed, state = library.functional.quantize_4bit(
            torch.zeros(64, 64, dtype=dtype, device=device), compress_statistics=True, quant_type="nf4"
        )
        library.functional.dequantize_4bit(packed, state)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"load_in_4bit: bitsandbytes {library.__version__} has no NF4 of {dtype} on {device} ({reason[0]}); "
            "leave load_in_4bit out, or use another device, dtype or version"
        ) from error
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def is_4bit(model: nn.Module) -> bool:
    """Whether the model's linear layers are held in 4 bit."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def base_weight(layer: nn.Module) -> Tensor | Callable[[], Tensor]:
    """The frozen weight of a linear layer, with or without adapters on it.

    Returns:
        the parameter itself; of a 4-bit layer a function that dequantizes it, a new (out, in) tensor at every call in
        the dtype that it was quantized from (bfloat16 on a GPU). transformers' Conv1D (GPT-2) keeps its (in, out) when it
        is not quantized.
    """
    layer = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    weight = layer.weight
    if not _packed(layer):
        return weight
    dequantize = bitsandbytes("a 4-bit layer").functional.dequantize_4bit
    return lambda: dequantize(weight.data, weight.quant_state)


def _packed(layer: nn.Module) -> bool:
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def _keep_layout(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking weights at the first pass in eval mode on CPUs with AVX512-BF16.

    The repacked layer computes in bf16 whatever it is asked, differs from the pass in train mode, and has no gradient.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def plain_layer(module: nn.Module) -> nn.Module:
    """``module`` without the LoRA layer around it, if there is one."""
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


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
    return base_weight(base)


class Adapters:
    """The named adapters of one model. ``names`` is empty until the first is added."""

    def __init__(self, model: PreTrainedModel, on_change: Callable[[], None] = lambda: None):
        _keep_layout(model)
        self.model = model
        self.on_change = on_change  # called when layers may have been wrapped
        self.active: str | None = None  # None: the base alone
        self._peft: PeftModel | None = None
        self._layers: list[LoraLayer] = []
        self._trainable: dict[str, bool] = {}
        self._graphs: weakref.WeakSet[_Graph] = weakref.WeakSet()
        self._in_base = False  # the active adapter is merged into the base, see merged_in_place

    @property
    def names(self) -> list[str]:
        return list(self._peft.peft_config) if self._peft is not None else []

    def add(self, name: str, config: LoraConfig, *, trainable: bool = True, copy_of: str | None = None) -> None:
        """A new adapter, fresh (it changes nothing until trained) or with the weights of ``copy_of``.

        Raises:
            UserError: it would train more than linear layers, see :meth:`_check` and :meth:`_check_head`.
        """
        self._refuse_while_merged()
        self._check(config)
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
        """The adapter saved in ``folder`` (PEFT's format), under ``name``; in fp32.

        Raises:
            UserError: it holds more than LoRA on linear layers, see :meth:`_check` and :meth:`_check_head`.
        """
        self._refuse_while_merged()
        self._check(PeftConfig.from_pretrained(str(folder)))
        with _quiet():
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(self.model, str(folder), adapter_name=name)
            else:
                self._peft.load_adapter(str(folder), name)
        self._added(name, trainable)

    def remove(self, name: str) -> None:
        """Forget adapter ``name``; there must be another."""
        self._refuse_while_merged()
        del self._trainable[name]
        active = None if self.active == name else self.active
        self._switch(next(iter(self._trainable)))  # PEFT warns when it has to
        self._peft.delete_adapter(name)
        self._restore(active)

    def _check(self, config: LoraConfig) -> None:
        """Refuse adapters that a pass here would ignore without a word, or that would change the base others share."""
        for field in ("modules_to_save", "trainable_token_indices"):
            if getattr(config, field, None):
                raise UserError(f"the LoRA configuration sets {field}, which passes here would ignore; leave it out")
        if getattr(config, "bias", "none") != "none":
            raise UserError(
                f"the LoRA configuration sets bias={config.bias!r}, which changes the base under every other adapter and "
                "the reference; set bias='none'"
            )
        if getattr(config, "ensure_weight_tying", False):
            raise UserError(
                "the LoRA configuration sets ensure_weight_tying, which puts LoRA on the embeddings along with the head; "
                "leave it out: LoRA on lm_head changes the head alone"
            )
        embeddings = self.model.get_input_embeddings()
        for name, module in self.model.named_modules():
            if module is embeddings and check_target_module_exists(config, name):
                raise UserError(
                    f"LoRA on {name} (embeddings) is not supported; take it out of lora_target_modules (all-linear leaves "
                    "it out)"
                )

    def _check_head(self, name: str) -> None:
        """Refuse on the head what is no product of two matrices, and own up to what LoRA does to a tied one."""
        head = self.model.get_output_embeddings()
        if not is_lora(head) or name not in head.lora_A:
            return
        if name in head.lora_variant or head.lora_A[name].bias is not None or head.lora_B[name].bias is not None:
            raise UserError(
                "the LoRA configuration puts a variant of LoRA (DoRA, lora_bias and such) on the head, whose "
                "log-probabilities are computed with plain LoRA; use plain LoRA or take lm_head out of lora_target_modules"
            )
        if _is_tied(self.model):
            logger.info("LoRA on the head changes the head alone; the embeddings that it shares its weight with stay")

    def _added(self, name: str, trainable: bool) -> None:
        self._check_head(name)
        self._trainable[name] = trainable
        self._restore(name)

    def _restore(self, active: str | None) -> None:
        """Undo what PEFT does to all adapters when one comes or goes: it freezes some and switches."""
        self._layers = [m for m in self.model.modules() if isinstance(m, LoraLayer)]
        for adapter, train in self._trainable.items():
            for parameter in self.parameters(adapter).values():
                parameter.requires_grad_(train)
        self._switch(active)
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
            RuntimeError: a graph built under another adapter has not been backpropagated (or dropped) yet, or the active
                adapter is merged into the base.
        """
        if name == self.active:
            return
        self._refuse_while_merged()
        if waiting := sorted({str(g.adapter) for g in self._graphs if g.adapter != name}):
            raise RuntimeError(
                f"cannot switch to adapter {name!r}: a graph built under {', '.join(waiting)} has not been "
                "backpropagated; call backward() on it or drop it first"
            )
        self._switch(name)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Passes inside may switch even while a graph waits: its adapter is back before its backward can run."""
        self._refuse_while_merged()
        active, graphs = self.active, self._graphs
        self._graphs = weakref.WeakSet()
        try:
            yield
        finally:
            self._graphs = graphs
            self._switch(active)

    def _switch(self, name: str | None) -> None:
        for layer in self._layers:
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]
        self.active = name

    # ---- in the base for a while

    def merge_refusal(self, name: str) -> str | None:
        """Why adapter ``name`` cannot be merged into the base in place; None when it can."""
        uses = Counter(id(p) for module in self.model.modules() for p in module._parameters.values())
        for layer in self._adapted(name):
            base = layer.get_base_layer()
            if type(base) is not nn.Linear:  # 4-bit ones are subclasses
                return f"the base has layers of the class {type(base).__name__}"
            if name in layer.lora_variant or layer.lora_A[name].bias is not None or layer.lora_B[name].bias is not None:
                return "the adapter is a variant of LoRA"
            if uses[id(base.weight)] > 1:
                return "the adapter is on a layer that shares its weight with another"
        return None

    @contextlib.contextmanager
    def merged_in_place(self) -> Iterator[None]:
        """Inside, the base holds the active adapter: W + scaling B A, computed in float32 and rounded once to W's dtype.

        Passes multiply once instead of three times, and differ from those outside by that rounding. The weights of all adapted
        layers exist twice meanwhile. Afterwards the parameters hold the very tensors that they held before, whatever happened
        inside. No adapter can be switched, added or removed meanwhile.

        Raises:
            RuntimeError: it is merged already, or cannot be, see :meth:`merge_refusal`.
        """
        self._refuse_while_merged()
        layers = self._adapted(self.active)
        if reason := self.merge_refusal(self.active):
            raise RuntimeError(f"cannot merge adapter {self.active!r}: {reason}")
        weights = [layer.get_base_layer().weight for layer in layers]
        originals = [weight.data for weight in weights]
        self._in_base = True
        try:
            for layer, weight in zip(layers, weights):
                # the parameter stays the same object and keeps its version: optimizers and graphs never notice
                weight.data = self._sum(layer, weight)
                layer._disable_adapters = True
            yield
        finally:
            for layer, weight, original in zip(layers, weights, originals):
                weight.data = original
                layer._disable_adapters = False
            self._in_base = False

    @torch.no_grad()
    def _sum(self, layer: LoraLayer, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # whose product would be a 16-bit one
            return (weight + layer.get_delta_weight(self.active)).to(weight.dtype)

    def merged_bytes(self, name: str) -> int:
        """Bytes that :meth:`merged_in_place` takes."""
        return sum(layer.get_base_layer().weight.nbytes for layer in self._adapted(name))

    def _adapted(self, name: str | None) -> list[LoraLayer]:
        return [layer for layer in self._layers if name in layer.lora_A]

    def _refuse_while_merged(self) -> None:
        if self._in_base:
            raise RuntimeError(f"adapter {self.active!r} is merged into the base, in which no other can take part")

    # ---- passes and files

    def guard(self, hidden: Tensor) -> Tensor:
        """``hidden`` itself, its graph remembered as belonging to the active adapter until its backward has run."""
        if not (torch.is_grad_enabled() and hidden.requires_grad and self._layers):
            return hidden
        graph = _Graph(self.active, self._graphs)
        return _Guard.apply(hidden, graph)

    def low_rank(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """What the active adapter adds to the output of ``layer`` for inputs x (N, I): y (N, r) and B (O, r), as y B^T.

        y = scaling * A x, made in A's dtype as PEFT makes it (autocast's inside autocast), of which x alone is kept for
        the backward pass. None: it adds nothing.
        """
        name = self.active
        if name is None or self._in_base or not is_lora(layer) or name not in layer.lora_A:
            return None
        a, dropout = layer.lora_A[name], layer.lora_dropout[name]
        drops = isinstance(dropout, nn.Dropout)

        def project(x: Tensor) -> Tensor:
            return a(dropout(x.to(a.weight.dtype)))

        # autograd would keep what dropout leaves of x, or a float32 copy of it; r columns are soon made again
        y = checkpoint(project, x, use_reentrant=False, preserve_rng_state=drops)
        return layer.scaling[name] * y, layer.lora_B[name].weight

    def save(self, name: str, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write adapter ``name`` into ``folder`` as PEFT does: adapter_config.json, adapter_model.safetensors.

        Args:
            weights: the adapter's, by the names of the model's parameters; those in memory when None.
        """
        folder.mkdir(parents=True, exist_ok=True)
        weights = dict(self.model.named_parameters()) if weights is None else weights
        named = {f"base_model.model.{key}": weight for key, weight in weights.items() if ".lora_" in key}
        # by default PEFT adds the base weight of a head that has an adapter
        options = {"adapter_name": name, "save_embedding_layers": False}
        state = get_peft_model_state_dict(self._peft, state_dict=named, **options)
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / "adapter_model.safetensors")
        config = self.config(name)
        mode, config.inference_mode = config.inference_mode, True
        config.save_pretrained(str(folder))
        config.inference_mode = mode

    def merged(self, name: str) -> PreTrainedModel:
        """A copy of the base with adapter ``name`` folded into its weights; a 4-bit base comes out in 16 (or 32) bit.

        A head that is tied to the embeddings comes out apart from them if it has an adapter.

        Raises:
            UserError: the base is in 4 bit and the adapter is a variant of LoRA, such as DoRA.
        """
        self._refuse_while_merged()
        self.use(name)
        if is_4bit(self.model):
            return self._merged_plain(name)
        merged = copy.deepcopy(self._peft)
        if self._unties(name):
            model = merged.get_base_model()
            head = plain_layer(model.get_output_embeddings())
            # merged in place, the adapter would change the embeddings too
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
            _untie(model.config)
        return merged.merge_and_unload(adapter_names=[name])

    def _unties(self, name: str) -> bool:
        """Whether folding adapter ``name`` in parts the head from the embeddings."""
        head = self.model.get_output_embeddings()
        return is_lora(head) and name in head.lora_A and _is_tied(self.model)

    @torch.no_grad()
    def _merged_plain(self, name: str) -> PreTrainedModel:
        """A plain model of dequantized weights with the adapter added; it shares those that are not quantized.

        Nothing is quantized again: rounding to 4 bit would lose most of the adapter.
        """
        if any(name in getattr(layer, "lora_variant", {}) for layer in self._layers):
            raise UserError("only plain LoRA can be merged with a 4-bit base; export the adapter, without --merge")
        weights = {}
        for key, module in self.model.named_modules():
            if ".lora_" in key or isinstance(module, LoraLayer):
                continue
            key = key.removesuffix(".base_layer")
            weights |= {f"{key}.{part}": p.data for part, p in module.named_parameters(recurse=False)}
            layer, packed = self.model.get_submodule(key), _packed(module)
            adapted = isinstance(layer, LoraLayer) and name in layer.lora_A
            if packed or adapted:  # the head is not packed and may have an adapter
                weight = base_weight(module)() if packed else module.weight.data
                if adapted:
                    weight = (weight.float() + layer.get_delta_weight(name)).to(weight.dtype)
                weights[f"{key}.weight"] = weight.T.contiguous() if packed and module.source_cls is Conv1D else weight
        config = copy.deepcopy(self.model.config)
        del config.quantization_config
        if self._unties(name):
            _untie(config)
        with torch.device("meta"):
            plain = type(self.model)(config)
        plain.load_state_dict(weights, strict=False, assign=True)
        for key, buffer in self.model.named_buffers():  # rotary frequencies are in no state dict
            owner, _, part = key.rpartition(".")
            plain.get_submodule(owner).register_buffer(part, buffer.clone(), persistent=False)
        plain.tie_weights()
        return plain


def _is_tied(model: PreTrainedModel) -> bool:
    """Whether the head's weight is that of the embeddings."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and plain_layer(head).weight is embeddings.weight


def _untie(config: PretrainedConfig) -> None:
    """Have the configuration's model made, and read back, with a head of its own."""
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """PEFT still calls names that newer transformers deprecates, and warns of tied heads, whose export is ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="Model (with|has) `tie_word_embeddings=True`")
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
