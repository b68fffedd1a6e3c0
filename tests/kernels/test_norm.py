"""RMSNorm: by hand, against float64 on every backend, what it keeps, and its result made again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf_fast.kernels import rms_norm
from rlhf_fast.kernels.norm import MadeBy, again

FAMILY = "norm"
LLAMA, GEMMA = {"offset": 0.0, "round_first": True}, {"offset": 1.0, "round_first": False}


def plain(x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool) -> Tensor:
    """As written in models, autograd and all."""
    wide = x if x.dtype == torch.float64 else x.float()
    unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * unit.to(x.dtype) if round_first else (unit * (offset + weight.to(wide.dtype))).to(x.dtype)


def test_rms_norm_by_hand(backend, device):
    """3 and 4 have root mean square sqrt(12.5) = 5 / sqrt(2); weights 2 and 1, with Gemma's 1 + w 3 and 2."""
    x, weight = torch.tensor([[3.0, 4.0]], device=device), torch.tensor([2.0, 1.0], device=device)
    root = 2**0.5
    torch.testing.assert_close(rms_norm(x, weight, 0.0).cpu(), torch.tensor([[1.2 * root, 0.8 * root]]))
    torch.testing.assert_close(rms_norm(x, weight, 0.0, **GEMMA).cpu(), torch.tensor([[1.8 * root, 1.6 * root]]))


# one entry, a prime, a head, more than a block of rows, a row of several warps
@pytest.mark.parametrize("shape", [(3, 1), (2, 3, 7), (37, 128), (5, 1040)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_values_and_gradients_are_no_worse_than_plain_pytorch(backend, device, no_worse, shape, dtype, order):
    torch.manual_seed(0)
    x, grad = torch.randn(2, *shape).to(dtype).to(device).unbind()
    weight = torch.randn(shape[-1]).to(dtype).to(device)

    def run(function, kind):
        leaves = [t.to(kind).requires_grad_() for t in (x, weight)]
        out = function(*leaves, 1e-5, **order)
        return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    for ours, theirs, exact in zip(run(rms_norm, dtype), run(plain, dtype), run(plain, torch.float64), strict=True):
        no_worse(ours, theirs, exact)


def test_a_float32_weight_widens_the_result_as_multiplying_does(backend, device):
    x, weight = torch.randn(3, 8, device=device).bfloat16(), torch.randn(8, device=device)
    assert rms_norm(x, weight).dtype == torch.float32
    assert rms_norm(x, weight, **GEMMA).dtype == torch.bfloat16
    x.requires_grad_()
    rms_norm(x, weight).sum().backward()
    assert x.grad.dtype == torch.bfloat16


def test_rows_do_not_depend_on_their_neighbours(backend, device):
    x, weight = torch.randn(21, 96, device=device), torch.randn(96, device=device)
    assert torch.equal(rms_norm(x, weight)[20:], rms_norm(x[20:], weight))


def test_strided_and_empty_inputs(backend, device):
    weight = torch.randn(6, device=device)
    x = torch.randn(6, 5, 4, device=device).transpose(0, 2).requires_grad_()
    out = rms_norm(x, weight)
    torch.testing.assert_close(out, plain(x, weight, 1e-6, **LLAMA))
    (grad,) = torch.autograd.grad(out.transpose(0, 1).sum(1).square().sum(), x)
    (want,) = torch.autograd.grad(plain(x, weight, 1e-6, **LLAMA).transpose(0, 1).sum(1).square().sum(), x)
    torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-5)
    empty, weight = torch.randn(0, 6, device=device, requires_grad=True), weight.requires_grad_()
    rms_norm(empty, weight).sum().backward()
    assert empty.grad.shape == (0, 6) and not weight.grad.any()


def test_a_row_of_zeros_is_finite_both_ways(backend, device):
    x, weight = torch.zeros(2, 16, device=device, requires_grad=True), torch.ones(16, device=device)
    out = rms_norm(x, weight)
    out.sum().backward()
    assert not out.any() and x.grad.isfinite().all()


def kept(function) -> list[Tensor]:
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        function()
    return found


def test_x_is_kept_as_it_is_with_one_number_a_row():
    x, weight = torch.randn(5, 64).bfloat16().requires_grad_(), torch.randn(64).bfloat16()
    mine = [t for t in kept(lambda: rms_norm(x, weight)) if t.data_ptr() not in (x.data_ptr(), weight.data_ptr())]
    assert [(t.shape, t.dtype) for t in mine] == [((5,), torch.float32)]


def test_a_result_says_how_to_make_it_again_until_it_is_written_over():
    x, weight = torch.randn(5, 64).bfloat16().requires_grad_(), torch.randn(64).bfloat16()
    out = rms_norm(x, weight, **GEMMA)
    note = MadeBy.of(out)
    assert note.x.data_ptr() == x.data_ptr()
    assert torch.equal(again(note.x, note.weight, note.options), out)
    assert MadeBy.of(out + 0) is None
    with torch.no_grad():
        out.mul_(2)
    assert MadeBy.of(out) is None


def test_needs_are_respected():
    x, weight = torch.randn(5, 4), torch.randn(4, requires_grad=True)
    rms_norm(x, weight).sum().backward()
    assert x.grad is None and weight.grad.shape == (4,)
    assert not rms_norm(x, weight.detach()).requires_grad


def test_a_second_derivative_is_refused():
    x = torch.randn(2, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(rms_norm(x, torch.ones(4)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_shapes_that_do_not_fit_are_refused():
    for x, weight in (
        (torch.zeros(2, 3), torch.zeros(4)),
        (torch.zeros(2, 1), torch.zeros(1, 1)),
        (torch.zeros(2, 0),) * 2,
    ):
        with pytest.raises(ValueError, match="must be"):
            rms_norm(x, weight)
    with pytest.raises(ValueError, match="weight is on meta"):
        rms_norm(torch.zeros(2, 3), torch.zeros(3, device="meta"))
