"""Linear layers and gated MLPs with low-rank adapters, which keep a third of what plain autograd keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_fast.kernels.dispatch import implementation
from rlhf_fast.kernels.norm import MadeBy, again
from rlhf_fast.kernels.registry import register

from .reference import ACTIVATIONS

__all__ = ["LoraWeights", "lora_linear", "lora_mlp"]


class LoraWeights(NamedTuple):
    """A frozen linear layer and its adapter: x W^T + bias + scaling (x A^T) B^T.

    ``weight`` is (O, I), or a function without arguments that returns it: a quantised base is expanded where it is used,
    forward and backward, and never kept. ``a`` (R, I) and ``b`` (O, R) may be None together: no adapter. A and B may be
    of a wider type than x (float32 masters under a bfloat16 model); their gradients come in their own type.
    """

    weight: Tensor | Callable[[], Tensor]
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0
    bias: Tensor | None = None


def lora_linear(x: Tensor, *layers: LoraWeights) -> Tensor | tuple[Tensor, ...]:
    r"""One or several linear layers with LoRA adapters (Hu et al. 2021, arXiv:2106.09685, eq. 3) on the same input.

    .. math:: y_i = x W_i^\top + b_i + s_i\,(x A_i^\top) B_i^\top

    Keeps x alone, once for all layers (x A^T is made again, rank R), and not even x if it came from ``rms_norm``.
    Follows ``torch.autocast`` as a linear layer does; else everything is computed in x's type.

    Args:
        x: (..., I) float, of any strides.
        layers: the weights of each; base weights and biases are frozen.
    Returns:
        (..., O), one tensor for one layer, else a tuple.
    Raises:
        ValueError: shapes do not fit, a base weight or bias requires a gradient, or only one of A and B is given.
    """
    if not layers:
        raise ValueError("lora_linear needs at least one LoraWeights after x")
    for layer in layers:
        _check(x.shape[-1] if x.dim() else 0, layer)
    results = _LoraLinear.apply(x, *_flatten(x, layers))
    return results[0] if len(layers) == 1 else results


def lora_mlp(x: Tensor, gate: LoraWeights, up: LoraWeights, down: LoraWeights, *, activation: str = "silu") -> Tensor:
    r"""A gated MLP (Shazeer 2020, arXiv:2002.05202, eq. 6) whose three layers may have LoRA adapters.

    .. math:: y = L_\text{down}\big(\text{act}(L_\text{gate}(x)) \odot L_\text{up}(x)\big)

    Keeps x (unless ``rms_norm`` made it), gate and up; the product is made again, in the launch that differentiates it.

    Args:
        x: (..., I) float, of any strides.
        gate: (F, I) layer inside the activation.
        up: (F, I) layer beside it.
        down: (O, F) layer behind.
        activation: "silu" or "gelu_tanh".
    Returns:
        (..., O).
    Raises:
        ValueError: shapes do not fit, a base weight or bias requires a gradient, or the activation is unknown.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    for layer in (gate, up):
        _check(x.shape[-1] if x.dim() else 0, layer)
    _check(None, down)
    return _LoraMLP.apply(x, activation, *_flatten(x, (gate, up, down)))


def _check(width: int | None, layer: LoraWeights) -> None:
    weight, a, b = layer.weight, layer.a, layer.b
    if (a is None) != (b is None):
        raise ValueError("an adapter is both a (R, I) and b (O, R), or neither")
    tensors = [x for x in (weight, layer.bias) if isinstance(x, Tensor)]
    if any(x.requires_grad for x in tensors) and torch.is_grad_enabled():
        raise ValueError("the base weight and bias get no gradient here, but one requires it; requires_grad_(False)")
    # the shape of what a function will return is known when it has
    rows, columns = weight.shape if isinstance(weight, Tensor) else (None, width)
    fits = width is None or columns == width
    if a is not None:
        fits &= a.shape[0] == b.shape[1] and columns in (None, a.shape[1]) and rows in (None, b.shape[0])
    if not fits:
        shapes = {name: tuple(t.shape) for name, t in (("weight", weight), ("a", a), ("b", b)) if isinstance(t, Tensor)}
        raise ValueError(f"weight must be (O, I), a (R, I) and b (O, R) for x (..., {width}); got {shapes}")


class _Plan(NamedTuple):
    """What is not a tensor: of the whole call the type computed in, of every layer its scaling and weight function."""

    dtype: torch.dtype
    scalings: tuple[float, ...]
    functions: tuple[Callable[[], Tensor] | None, ...]
    norm: tuple[float, float, bool] | None  # x is made again by rms_norm, with these options


def _flatten(x: Tensor, layers: tuple[LoraWeights, ...]) -> tuple:
    """A plan, what x is made from if it is (x, weight), and weight, bias, a, b of every layer."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if x.dtype == torch.float64:
        dtype = x.dtype  # autocast leaves it alone too
    note = MadeBy.of(x) if torch.is_grad_enabled() else None
    functions = tuple(None if isinstance(layer.weight, Tensor) else layer.weight for layer in layers)
    plan = _Plan(dtype, tuple(float(layer.scaling) for layer in layers), functions, note and note.options)
    tensors = (
        (layer.weight if isinstance(layer.weight, Tensor) else None, layer.bias, layer.a, layer.b) for layer in layers
    )
    source = (note.x, note.weight) if note else (None, None)
    return plan, *source, *(t for four in tensors for t in four)


class _Layer(NamedTuple):
    """One layer inside a pass: everything but the base weight in the type computed in, A and B besides as they are."""

    weight: Callable[[], Tensor]
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scaling: float
    masters: tuple[Tensor | None, Tensor | None]

    def forward(self, x: Tensor) -> Tensor:
        """(N, I) -> (N, O)."""
        out = F.linear(x, self.weight(), self.bias)
        if self.a is not None:
            # the product is added where it is accumulated, rounded once
            out.addmm_(x @ self.a.T, self.b.T, alpha=self.scaling)
        return out

    def input_gradient(self, grad: Tensor, out: Tensor | None = None) -> Tensor:
        """(N, O) -> (N, I), added to ``out`` if there is one."""
        weight = self.weight()
        out = grad @ weight if out is None else out.addmm_(grad, weight)
        return out if self.a is None else out.addmm_(grad @ self.b, self.a, alpha=self.scaling)

    def adapter_gradients(self, grad: Tensor, x: Tensor, needs: tuple[bool, bool]) -> tuple[Tensor | None, ...]:
        """d A and d B from (N, O) and the layer's input, in the types of A and B."""
        a, b = self.masters
        d_a = _product((grad @ self.b).T, x, a.dtype).mul_(self.scaling) if needs[0] else None
        d_b = _product(grad.T, x @ self.a.T, b.dtype).mul_(self.scaling) if needs[1] else None
        return d_a, d_b


def _layers(plan: _Plan, tensors: tuple[Tensor | None, ...]) -> list[_Layer]:
    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(plan.dtype)

    found = []
    for i, (scaling, function) in enumerate(zip(plan.scalings, plan.functions)):
        weight, bias, a, b = tensors[4 * i : 4 * i + 4]
        made = (lambda f=function: cast(f())) if function is not None else (lambda w=weight: cast(w))
        found.append(_Layer(made, cast(bias), cast(a), cast(b), scaling, (a, b)))
    return found


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in ``dtype``; a wider one is what is accumulated in, so that nothing is rounded on the way."""
    if dtype == left.dtype or torch.promote_types(left.dtype, dtype) == left.dtype:
        return (left @ right).to(dtype)
    if left.is_cuda and dtype == torch.float32 and left.shape[1]:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def _plain(device: torch.device) -> contextlib.AbstractContextManager:
    """Without autocast: the types were chosen already, and backward must compute as forward did."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def _keep(ctx, plan: _Plan, x: Tensor, source: tuple[Tensor | None, Tensor | None], *tensors: Tensor | None) -> None:
    """Save for backward, x as what it is made from if that is known."""
    ctx.plan, ctx.shape = plan, x.shape
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(*(source if plan.norm is not None else (x, None)), *tensors)


def _recall(ctx) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The rows of x, (N, I) in the type computed in, and the other saved tensors."""
    x, weight, *tensors = ctx.saved_tensors
    if weight is not None:
        x = again(x, weight, ctx.plan.norm)
    return _rows(x, ctx.plan), tuple(tensors)


def _rows(x: Tensor, plan: _Plan) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(plan.dtype)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, plan, source, source_weight, *tensors):
        with _plain(x.device):
            rows = _rows(x, plan)
            results = tuple(layer.forward(rows) for layer in _layers(plan, tensors))
        _keep(ctx, plan, x, (source, source_weight), *tensors)
        ctx.set_materialize_grads(False)
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in results)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, tensors = _recall(ctx)
        needs, d_x, found = ctx.needs_input_grad[4:], None, []
        with _plain(x.device):
            for i, (layer, grad) in enumerate(zip(_layers(ctx.plan, tensors), grads)):
                if grad is None:
                    found += [None] * 4
                    continue
                grad = _rows(grad, ctx.plan)
                if ctx.needs_input_grad[0]:
                    d_x = layer.input_gradient(grad, d_x)
                found += [None, None, *layer.adapter_gradients(grad, x, needs[4 * i + 2 : 4 * i + 4])]
        return _as_input(ctx, d_x), None, None, None, *found


class _LoraMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, activation, plan, source, source_weight, *tensors):
        with _plain(x.device):
            rows = _rows(x, plan)
            gate_layer, up_layer, down_layer = _layers(plan, tensors)
            gate, up = gate_layer.forward(rows), up_layer.forward(rows)
            out = down_layer.forward(_gated_forward(gate, up, activation))
        _keep(ctx, plan, x, (source, source_weight), gate, up, *tensors)
        ctx.activation = activation
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, (gate, up, *tensors) = _recall(ctx)
        needs, d_x = ctx.needs_input_grad[5:], None
        with _plain(x.device):
            grad = _rows(grad, ctx.plan)
            gate_layer, up_layer, down_layer = _layers(ctx.plan, tuple(tensors))
            product = down_layer.input_gradient(grad)
            # reads the product's gradient, leaves the product in its place
            d_gate, d_up = _gated_backward(product, gate, up, ctx.activation)
            found = [None] * 12
            found[10:] = down_layer.adapter_gradients(grad, product, needs[10:])
            del product
            for i, (layer, d_out) in enumerate(((gate_layer, d_gate), (up_layer, d_up))):
                if ctx.needs_input_grad[0]:
                    d_x = layer.input_gradient(d_out, d_x)
                found[4 * i + 2 : 4 * i + 4] = layer.adapter_gradients(d_out, x, needs[4 * i + 2 : 4 * i + 4])
        return _as_input(ctx, d_x), None, None, None, None, *found


def _as_input(ctx, d_x: Tensor | None) -> Tensor | None:
    return None if d_x is None else d_x.to(ctx.x_dtype).view(ctx.shape)


@register("gated_forward(Tensor gate, Tensor up, str activation) -> Tensor", lambda gate, up, _: torch.empty_like(gate))
def _gated_forward(gate, up, activation):
    return implementation("lora", "gated_forward", gate, up).gated_forward(gate, up, activation)


@register(
    "gated_backward(Tensor(a!) grad, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    lambda grad, gate, up, _: (torch.empty_like(gate), torch.empty_like(up)),
)
def _gated_backward(grad, gate, up, activation):
    return implementation("lora", "gated_backward", grad, gate, up).gated_backward(grad, gate, up, activation)
