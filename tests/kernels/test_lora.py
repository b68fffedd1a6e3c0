"""LoRA layers and gated MLPs: by hand, against plain PyTorch in float64, and what they keep and expand."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf_fast.kernels import LoraWeights, lora_linear, lora_mlp, rms_norm

FAMILY = "lora"
ACTS = {"silu": F.silu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh")}


def plain_linear(x: Tensor, layer: LoraWeights) -> Tensor:
    """As PEFT computes it: the adapter in its own type, the sum in that of the base."""
    base = F.linear(x, layer.weight, layer.bias)
    if layer.a is None:
        return base
    return (base + F.linear(F.linear(x.to(layer.a.dtype), layer.a), layer.b) * layer.scaling).to(base.dtype)


def plain_mlp(x: Tensor, gate: LoraWeights, up: LoraWeights, down: LoraWeights, activation: str = "silu") -> Tensor:
    return plain_linear(ACTS[activation](plain_linear(x, gate)) * plain_linear(x, up), down)


def layers(*shapes, dtype=torch.float32, master=None, device="cpu", rank=3) -> list[LoraWeights]:
    """One per (out, in), the second without a bias; entries so small that results have the size of x."""
    torch.manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, device=device) / shape[-1] ** 0.5

    return [
        LoraWeights(
            random(o, i).to(dtype),
            random(rank, i).to(master or dtype).requires_grad_(),
            random(o, rank).to(master or dtype).requires_grad_(),
            0.7 + n,
            None if n == 1 else random(o).to(dtype),
        )
        for n, (o, i) in enumerate(shapes)
    ]


def to(layer: LoraWeights, dtype: torch.dtype) -> LoraWeights:
    weight, bias = (None if t is None else t.detach().to(dtype) for t in (layer.weight, layer.bias))
    a, b = (t.detach().to(dtype).requires_grad_() for t in (layer.a, layer.b))
    return LoraWeights(weight, a, b, layer.scaling, bias)


def adapters(*used: LoraWeights) -> list[Tensor]:
    return [t for layer in used for t in (layer.a, layer.b)]


def results(out, leaves) -> list[Tensor]:
    outs = out if isinstance(out, tuple) else (out,)
    upstream = [torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view(y.shape) for y in outs]
    return [*outs, *torch.autograd.grad(outs, leaves, upstream)]


def close(ours, wanted, tolerance=1e-6):
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == b.dtype and (a - b).norm() <= tolerance * b.norm()


def test_a_linear_layer_by_hand():
    """x = (1, 2), W = (3, 4), A = (5, 6), B = 7, scaling 1/2: 11 + 17 * 7 / 2; dA = 7/2 x, dB = 17/2, dx = W + 7/2 A."""
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    a, b = torch.tensor([[5.0, 6.0]], requires_grad=True), torch.tensor([[7.0]], requires_grad=True)
    y = lora_linear(x, LoraWeights(torch.tensor([[3.0, 4.0]]), a, b, 0.5, torch.tensor([10.0])))
    y.backward()
    assert y.item() == 21 + 59.5
    assert (a.grad.tolist(), b.grad.tolist(), x.grad.tolist()) == ([[3.5, 7.0]], [[8.5]], [[20.5, 25.0]])


def test_several_layers_equal_as_many_alone_and_plain_pytorch():
    x = torch.randn(2, 5, 8, requires_grad=True)
    used = layers((6, 8), (3, 8), (4, 8))
    leaves = [x, *adapters(*used)]
    want = results(tuple(plain_linear(x, layer) for layer in used), leaves)
    close(results(lora_linear(x, *used), leaves), want)
    close(results(tuple(lora_linear(x, layer) for layer in used), leaves), want)


@pytest.mark.parametrize("activation", ACTS)
def test_an_mlp_equals_plain_pytorch(backend, device, activation):
    used = layers((11, 8), (11, 8), (8, 11), device=device)
    x = torch.randn(2, 5, 8, device=device, requires_grad=True)
    leaves = [x, *adapters(*used)]
    close(
        results(lora_mlp(x, *used, activation=activation), leaves),
        results(plain_mlp(x, *used, activation), leaves),
    )


@pytest.mark.parametrize("activation", ACTS)
def test_in_16_bits_an_mlp_is_no_worse_than_peft(backend, device, no_worse, activation):
    """A base in 16 bits, float32 adapters, whose gradients stay in float32."""
    # Triton's interpreter cuts float32 down to bfloat16 instead of rounding
    half = torch.float16 if backend == "triton" and device == "cpu" else torch.bfloat16
    used = layers((160, 96), (160, 96), (96, 160), dtype=half, master=torch.float32, device=device)
    x = torch.randn(40, 96, device=device).to(half)

    def run(function, dtype):
        mine = used if dtype is None else [to(layer, dtype) for layer in used]
        leaves = [x.to(dtype or x.dtype).requires_grad_(), *adapters(*mine)]
        return results(function(leaves[0], *mine, activation=activation), leaves)

    ours, theirs, exact = run(lora_mlp, None), run(plain_mlp, None), run(plain_mlp, torch.float64)
    assert [t.dtype for t in ours] == [half] * 2 + [torch.float32] * 6
    for a, b, c in zip(ours, theirs, exact, strict=True):
        no_worse(a, b, c)


def test_gradients_of_float32_adapters_are_not_rounded_on_the_way():
    """Sums of 257 ones, which bfloat16 does not have: 256 or 258."""
    x, weight = torch.ones(257, 1, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16)
    a, b = (torch.ones(1, 1, requires_grad=True) for _ in range(2))
    lora_linear(x, LoraWeights(weight, a, b)).sum().backward()
    assert a.grad.item() == b.grad.item() == 257


@pytest.mark.parametrize("activation", ACTS)
def test_activations_far_from_zero(backend, device, activation):
    """Through identity layers: values and slopes of the whole range, in its limits exactly 0 or z."""
    z = torch.tensor([-1e4, -90.0, -20.0, -3.0, -0.1, 0.0, 0.2, 4.0, 30.0, 1e4], device=device)
    one = LoraWeights(torch.eye(10, device=device))
    x = z.clone().requires_grad_()
    doubled = z.double().cpu().requires_grad_()
    want = ACTS[activation](doubled) * doubled
    got = lora_mlp(x, one, one, one, activation=activation)
    torch.testing.assert_close(got.double().cpu(), want, rtol=3e-6, atol=1e-6)
    want.sum().backward()
    got.sum().backward()
    torch.testing.assert_close(x.grad.double().cpu(), doubled.grad, rtol=3e-6, atol=1e-6)


def storages(function, *known: Tensor) -> list[Tensor]:
    """What ``function`` makes autograd keep, the tensors that exist anyway left out."""
    found = {}
    skip = {t.untyped_storage().data_ptr() for t in known}

    def keep(t):
        if t.untyped_storage().data_ptr() not in skip:
            found[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = function()
    return [*found.values(), out]


def test_linear_layers_keep_x_and_an_mlp_keeps_x_gate_and_up():
    x = torch.randn(5, 8)
    used = layers((11, 8), (11, 8), (8, 11), dtype=torch.bfloat16, master=torch.float32)
    weights = [t for layer in used for t in layer if isinstance(t, Tensor)]
    x = x.bfloat16().requires_grad_()
    kept = storages(lambda: lora_linear(x * 1, *used[:2]), *weights, x)[:-1]
    assert [(t.shape, t.dtype) for t in kept] == [((5, 8), torch.bfloat16)]
    kept = storages(lambda: lora_mlp(x * 1, *used), *weights, x)[:-1]
    assert [tuple(t.shape) for t in kept] == [(5, 8), (5, 11), (5, 11)]


def test_what_rms_norm_made_is_made_again_with_the_same_gradients():
    used = layers((11, 8), (11, 8), (8, 11))
    x, norm = torch.randn(5, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    weights = [t for layer in used for t in layer if isinstance(t, Tensor)]
    kept = storages(lambda: lora_mlp(rms_norm(x, norm), *used), *weights, x, norm)[:-1]
    assert sorted(tuple(t.shape) for t in kept) == [(5,), (5, 11), (5, 11)]
    leaves = [x, norm, *adapters(*used)]
    for function, mine in ((lambda h: lora_mlp(h, *used), leaves), (lambda h: lora_linear(h, *used[:2]), leaves[:6])):
        # a copy says nothing about where it comes from
        want = results(function(rms_norm(x, norm).clone()), mine)
        for a, b in zip(results(function(rms_norm(x, norm)), mine), want, strict=True):
            assert torch.equal(a, b)


def test_a_base_is_expanded_where_it_is_used_and_never_kept():
    used = layers((11, 8), (11, 8), (8, 11))
    calls, alive = [], []

    def expanding(n, weight):
        def expand():
            calls.append(n)
            made = weight.clone()
            alive.append(weakref.ref(made))
            return made

        return expand

    x = torch.randn(5, 8, requires_grad=True)
    hidden = [layer._replace(weight=expanding(n, layer.weight)) for n, layer in enumerate(used)]
    leaves = [x, *adapters(*used)]
    out = lora_mlp(x, *hidden)
    assert calls == [0, 1, 2] and not any(ref() is not None for ref in alive)
    got = results(out, leaves)
    assert calls[3:] == [2, 0, 1] and not any(ref() is not None for ref in alive)
    close(got, results(plain_mlp(x, *used), leaves))
    calls.clear()
    lora_linear(x.detach(), hidden[0]).sum().backward()
    assert calls == [0]  # an input without gradient does not need the weight again


def test_only_what_is_asked_for_gets_a_gradient():
    x = torch.randn(5, 8, requires_grad=True)
    first, second, down = layers((11, 8), (11, 8), (8, 11))
    first.a.requires_grad_(False)
    second = second._replace(a=None, b=None)
    lora_mlp(x, first, second, down).sum().backward()
    assert first.a.grad is None and first.b.grad is not None and x.grad is not None
    frozen = [layer._replace(a=layer.a.detach(), b=layer.b.detach()) for layer in (first, down)]
    assert not lora_mlp(x.detach(), frozen[0], second, frozen[1]).requires_grad
    with torch.no_grad():
        assert not lora_linear(x, first).requires_grad


def test_an_output_nobody_uses_costs_nothing():
    x = torch.randn(5, 8, requires_grad=True)
    first, second = layers((6, 8), (3, 8))
    lora_linear(x, first, second)[1].sum().backward()
    assert first.a.grad is None and first.b.grad is None
    close([x.grad], torch.autograd.grad(plain_linear(x, second).sum(), x))


def test_a_graph_that_is_kept_gives_the_same_gradients_twice(backend, device):
    """The backward pass overwrites nothing that it was given to keep."""
    used = layers((11, 8), (11, 8), (8, 11), device=device)
    x = torch.randn(5, 8, device=device, requires_grad=True)
    out = lora_mlp(x, *used).square().sum()
    first, second = (torch.autograd.grad(out, [x, *adapters(*used)], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_checkpointing_changes_nothing():
    used = layers((11, 8), (11, 8), (8, 11))
    x, norm = torch.randn(5, 8, requires_grad=True), torch.randn(8)

    def block(x):
        return lora_mlp(rms_norm(x, norm), *used)

    leaves = [x, *adapters(*used)]
    want = results(block(x), leaves)
    for a, b in zip(results(checkpoint(block, x, use_reentrant=False), leaves), want, strict=True):
        assert torch.equal(a, b)


def test_autocast_is_followed_and_backward_computes_as_forward_did():
    """float32 weights under autocast give what bfloat16 weights give, gradients in float32."""
    used = layers((11, 8), (11, 8), (8, 11))
    x = torch.randn(5, 8, requires_grad=True)
    half = [
        layer._replace(weight=layer.weight.bfloat16(), bias=None if layer.bias is None else layer.bias.bfloat16())
        for layer in used
    ]
    with torch.autocast("cpu", torch.bfloat16):
        out = lora_mlp(x, *used)
        got = results(out, [x, *adapters(*used)])
    narrow = x.detach().bfloat16().requires_grad_()
    want = results(lora_mlp(narrow, *half), [narrow, *adapters(*used)])
    want[1] = want[1].float()
    assert out.dtype == torch.bfloat16
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("make", ["transposed", "every second", "expanded", "empty", "one row"])
def test_any_strides_and_no_rows(make):
    used = layers((11, 8), (11, 8), (8, 11))
    x = {
        "transposed": torch.randn(8, 3, 5).transpose(0, 2),
        "every second": torch.randn(5, 16)[:, ::2],
        "expanded": torch.randn(1, 8).expand(5, 8),
        "empty": torch.randn(2, 0, 8),
        "one row": torch.randn(8),
    }[make].requires_grad_()
    leaves = [x, *adapters(*used)]
    close(results(lora_mlp(x, *used), leaves), results(plain_mlp(x, *used), leaves), 2e-6)
    close(
        results(lora_linear(x, *used[:2]), leaves[:5]), results(tuple(plain_linear(x, y) for y in used[:2]), leaves[:5])
    )


def test_a_second_derivative_is_refused():
    x = torch.randn(5, 8, requires_grad=True)
    used = layers((11, 8), (11, 8), (8, 11))
    for out in (lora_mlp(x, *used), lora_linear(x, used[0])):
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_weights_changed_before_backward_are_noticed():
    x = torch.randn(5, 8, requires_grad=True)
    (layer,) = layers((6, 8))
    out = lora_linear(x, layer).sum()
    with torch.no_grad():
        layer.b.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_bad_arguments_are_refused():
    x, (layer, other) = torch.zeros(2, 8), layers((6, 8), (6, 7))
    with pytest.raises(ValueError, match="at least one"):
        lora_linear(x)
    with pytest.raises(ValueError, match=r"got \{'weight': \(6, 7\)"):
        lora_linear(x, other)
    with pytest.raises(ValueError, match="a .R, I. and b"):
        lora_linear(x, layer._replace(b=torch.zeros(6, 4)))
    with pytest.raises(ValueError, match="or neither"):
        lora_linear(x, layer._replace(b=None))
    with pytest.raises(ValueError, match="requires_grad_"):
        lora_linear(x, layer._replace(weight=layer.weight.clone().requires_grad_()))
    with pytest.raises(ValueError, match="unknown activation 'relu'; known: silu, gelu_tanh"):
        lora_mlp(x, layer, layer, layer, activation="relu")
