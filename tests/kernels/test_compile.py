"""Every public operation: one graph under torch.compile, sound operators, the same bits twice, gradients in float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from rlhf_fast import kernels
from rlhf_fast.kernels import use_backend
from rlhf_fast.kernels.registry import IMPLEMENTATIONS
from tests.kernels.calls import calls, evaluate

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
NOT_OPERATIONS = {"BACKENDS", "LoraWeights", "available", "backend_report", "implementation", "use_backend"}
NAMES = sorted(calls())
# what a backend has no kernel for runs on the reference
ORDERS = ("reference", "cpu,reference", "triton,reference")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def device_of(order: str) -> str:
    return DEVICE if order.startswith("triton") else "cpu"


def test_every_public_operation_is_called_here():
    assert set(NAMES) == set(kernels.__all__) - NOT_OPERATIONS


# without a gradient to make, these take another way
UNTRAINED = [("shaped_rewards", False), ("token_logprobs", False), ("whiten", False)]


@pytest.mark.parametrize(("name", "trained"), [(name, True) for name in NAMES] + UNTRAINED)
@pytest.mark.parametrize("order", ORDERS)
def test_operations_compile_without_a_graph_break(order, name, trained):
    """The same numbers and gradients from one graph, made by AOTAutograd from our operators' fake versions."""
    call = calls(device=device_of(order))[name]
    with use_backend(order):
        expected = call.results_and_gradients(trained)
        torch.compiler.reset()
        compiled = torch.compile(call.run, fullgraph=True, backend="aot_eager")
        for actual, wanted in zip(evaluate(compiled, call.leaves, trained), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)


def test_one_tensor_may_be_given_twice():
    """The log-probabilities of the rollout are the old ones when the engine's are trusted."""
    old, mask = torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool)

    def loss(logprobs):
        return kernels.policy_loss(logprobs, old, torch.ones(2), mask, rollout_logprobs=old)[0]

    with use_backend("cpu"):
        torch.compiler.reset()
        torch.compile(loss, fullgraph=True, backend="aot_eager")(torch.randn(2, 3, requires_grad=True)).backward()


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every call of our operators."""

    def __init__(self):
        super().__init__()
        self.seen: dict[str, list[tuple]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "rlhf_fast":
            copies = tree_map(lambda x: x.detach().clone() if isinstance(x, torch.Tensor) else x, args)
            self.seen.setdefault(function._opname, []).append(copies)
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def recorded():
    """Arguments that the public operations hand to each operator, forward and backward, on every backend."""
    recorder = Recorder()
    for order in ORDERS:
        for call in calls(device=device_of(order)).values():
            with use_backend(order), recorder:
                call.results_and_gradients()
                call.results_and_gradients(trained=False)
    logits = torch.randn(3, 5, requires_grad=True)
    with recorder:
        kernels.gae(logits.detach(), logits.detach(), logits > 0)
        kernels.token_logprobs(logits * 1, torch.arange(3), inplace_backward=True).sum().backward()
        head = torch.randn(5, 2, requires_grad=True)
        kernels.linear_logprobs(torch.randn(3, 2), head, torch.arange(3)).sum().backward()
    return recorder.seen


@pytest.mark.parametrize("operator", sorted(IMPLEMENTATIONS))
def test_operators_pass_opcheck(recorded, operator):
    """Schema and fake tensors agree with what the operator does, with the arguments it gets in practice."""
    assert operator in recorded, "no call of tests/kernels/calls.py reaches it"
    for arguments in recorded[operator]:
        torch.library.opcheck(
            getattr(torch.ops.rlhf_fast, operator).default, arguments, test_utils=("test_schema", "test_faketensor")
        )


def both_ways(call):
    return call.results_and_gradients() + call.results_and_gradients(trained=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", ORDERS)
def test_operations_repeat_their_bits_in_deterministic_mode(order, name):
    """Nothing refuses torch.use_deterministic_algorithms(True), and two runs agree in every bit."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with use_backend(order):
            first, second = (both_ways(calls(device=device_of(order))[name]) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(before)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("name", [name for name in NAMES if calls()[name].leaves])
def test_gradcheck_of_every_differentiable_operation(name):
    """On the reference, in float64, which stays float64."""
    call = calls(torch.float64)[name]
    with use_backend("reference"):
        leaves = [x.requires_grad_() for x in call.leaves]
        assert all(x.dtype == torch.float64 for x in call.run(*leaves) if x.requires_grad)
        assert torch.autograd.gradcheck(lambda *x: tuple(y for y in call.run(*x) if y.requires_grad), leaves)
