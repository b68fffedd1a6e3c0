"""What the property tests share: a problem, its comparison with float64, and the edge values that cases are made of."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

NAN, INF = float("nan"), float("inf")
FLOAT32_ULP = torch.finfo(torch.float32).eps
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASKS = ("nothing unmasked", "one sequence masked")
LAYOUTS = ("contiguous", "transposed", "sliced", "every second", "expanded")


@dataclass(frozen=True)
class Problem:
    """One case: a public function with its arguments bound, and the same thing as a plain formula."""

    call: Callable[..., tuple[Tensor, ...]]  # of the inputs, by name
    formula: Callable[..., tuple[Tensor, ...]]  # likewise, in whatever dtype they have
    inputs: dict[str, Tensor]  # float tensors, in the dtype and memory layout that the function gets
    trained: frozenset[str]  # the inputs whose gradients are compared
    edges: frozenset[str]  # the edge classes of this case, for the count
    seed: int
    # 16-bit products round once per matrix in plain PyTorch as well: gradients are measured against those
    plain_in_16_bits: bool = False
    zero_upstream: bool = False  # every second upstream gradient is 0
    # The largest number that is rounded on the way, where it is larger than the results: those are what is left of a
    # difference of such numbers, and a formula whose roundings happen to cancel is no measure of them.
    rounded: float = 0.0
    # Once the formula has run in float64: for each gradient, the largest sum of magnitudes of the products it is made
    # of, one factor of which is rounded to the inputs' dtype on the way.
    rounded_products: Callable[[], dict[str, float]] = dict


def matches_float64(problem: Problem) -> list[Tensor]:
    """Results and gradients err at most twice as much as the formula in float32 does, plus 2 ulp.

    Returns:
        the exact results.
    """
    inputs = problem.inputs
    exact = _evaluate(problem, problem.formula, {name: x.double() for name, x in inputs.items()})
    products = problem.rounded_products()
    plain = _evaluate(problem, problem.formula, {name: x.float() for name, x in inputs.items()})
    actual = _evaluate(problem, problem.call, inputs)
    if problem.plain_in_16_bits and any(x.dtype != torch.float32 for x in inputs.values()):
        plain = plain[0], _evaluate(problem, problem.formula, inputs)[1]
    assert len(actual[0]) == len(exact[0])
    for i, (a, p, e) in enumerate(zip(actual[0], plain[0], exact[0])):
        no_worse(a, p, e, 2 * FLOAT32_ULP * problem.rounded, f"result {i}")
    for name in sorted(problem.trained):
        p = plain[1][name].to(inputs[name].dtype)
        # upstream gradients are normal numbers: 3 of a hundred exceed 2, and the largest scales the rounding
        on_the_way = 2 * FLOAT32_ULP * 3 * problem.rounded
        # a rounding to nearest moves a number by half an ulp at most
        on_the_way += 0.5 * torch.finfo(p.dtype).eps * products.get(name, 0.0)
        no_worse(actual[1][name], p, exact[1][name], on_the_way, f"gradient of {name}")
    return exact[0]


def no_worse(actual: Tensor, plain: Tensor, exact: Tensor, on_the_way: float, what: str) -> None:
    """Twice the error of ``plain``, 2 ulp of the largest entry, and what was rounded ``on_the_way``."""
    assert actual.shape == exact.shape, what
    assert actual.dtype == plain.dtype, what
    ulp = torch.finfo(actual.dtype).eps
    actual, plain, exact = (x.detach().cpu().double() for x in (actual, plain, exact))
    finite = exact.isfinite()
    torch.testing.assert_close(actual[~finite], exact[~finite], rtol=0, atol=0, equal_nan=True, msg=what)
    if finite.any():
        actual, plain, exact = actual[finite], plain[finite], exact[finite]
        allowed = 2 * (plain - exact).abs().max() + 2 * ulp * exact.abs().max() + on_the_way
        error = (actual - exact).abs().max()
        # 1e-30: what is exactly 0 may come out as the smallest of exponentials
        assert error <= allowed + 1e-30, f"{what}: error {error:.3g} where {allowed:.3g} is allowed"


def _evaluate(problem: Problem, function: Callable, inputs: dict[str, Tensor]):
    """The function's results, detached, and the gradients of the trained inputs under uneven upstream gradients."""
    leaves = {name: x.detach().requires_grad_(name in problem.trained) for name, x in inputs.items()}
    results = function(**leaves)
    wanted = [result for result in results if result.requires_grad]
    upstream = [_upstream(problem, i, result) for i, result in enumerate(results) if result.requires_grad]
    trained = {name: leaves[name] for name in problem.trained}
    if not wanted:
        assert not trained
        return [result.detach() for result in results], {}
    grads = torch.autograd.grad(wanted, list(trained.values()), upstream, allow_unused=True)
    filled = {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(trained.items(), grads)}
    return [result.detach() for result in results], filled


def _upstream(problem: Problem, index: int, result: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(problem.seed + 17 * index)
    weights = torch.randn(result.shape, generator=generator)
    if problem.zero_upstream and weights.dim():
        weights[::2] = 0.0
    return weights.to(result.dtype).to(result.device)


class Case:
    """The random choices of one case, and a generator for the numbers.

    Hypothesis likes to repeat a choice elsewhere, within a case and from case to case, and then some pairs of options
    hardly ever meet. So what it chooses is counted from a place that depends on all choices before: uniform, and each
    choice can still be shrunk by itself.
    """

    def __init__(self, draw: Callable, device: str, edges: tuple[str, ...] = ()):
        self.draw, self.device = draw, device
        self.seed = self.history = draw(st.integers(0, 2**31))
        self.generator = torch.Generator().manual_seed(self.seed)
        self.edges = {edge for edge in edges if self.pick(*[False] * 7, True)}

    def pick(self, *options):
        chosen = self.draw(st.integers(0, len(options) - 1))
        start = random.Random(self.history).randrange(len(options))
        self.history = hash((self.history, chosen))
        return options[(start + chosen) % len(options)]

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * scale

    def flips(self, *shape: int, share: float = 0.5) -> Tensor:
        return torch.rand(*shape, generator=self.generator) < share

    def note(self, **values) -> None:
        """Count one class for each option: ``kind=clip``, ``dtype=bfloat16``."""
        self.edges |= {f"{name}={str(value).removeprefix('torch.')}" for name, value in values.items()}

    def tokens(self, max_sequences: int = 4, max_length: int = 9) -> tuple[Tensor, Tensor | None, list]:
        """A mask, padded (B, T) or packed (N,), its ``cu_seqlens`` or None, and the index of each sequence.

        ``x[index]`` are the tokens of one sequence.
        """
        packed, count = self.pick(False, True), self.pick(2, 1, 3, max_sequences, 3, 2, 3, max_sequences, 2, 0)
        if packed:
            lengths = [self.pick(5, 1, 2, max_length, 0) for _ in range(count)]
            ends = torch.tensor([0, *lengths]).cumsum(0)
            mask, cu_seqlens = self.flips(sum(lengths), share=0.8), ends.to(torch.int32)
            sequences = [slice(a, b) for a, b in zip(ends.tolist(), ends.tolist()[1:])]
            if 0 in lengths:
                self.edges.add("empty sequence")
        else:
            mask, cu_seqlens = (
                self.flips(count, self.pick(5, 1, 2, max_length, 7, 5, 7, max_length, 4, 0), share=0.8),
                None,
            )
            sequences = list(range(count))
        if "nothing unmasked" in self.edges:
            mask[...] = False
        elif "one sequence masked" in self.edges and len(sequences) > 1:
            mask[sequences[0]] = False
        if not mask.numel():
            self.edges.add("no tokens")
        self.note(layout="packed" if packed else "padded")
        return mask.to(self.device), None if cu_seqlens is None else cu_seqlens.to(self.device), sequences

    def per_token(self, x: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """``x`` in its dtype and layout, with NaN or infinities where masked."""
        x = x.to(dtype, copy=True).to(self.device)
        layout = self.pick(*LAYOUTS)
        if layout == "expanded" and x.dim() == 2 and len(x):
            x = x[:1].expand_as(x).clone()
        if layout != "expanded":
            x[~mask] = self.pick(NAN, INF, -INF)
        self.note(stride=layout)
        return laid_out(x, layout)

    def problem(self, call, formula, inputs, trained=(), **options) -> Problem:
        return Problem(call, formula, inputs, frozenset(trained), frozenset(self.edges), self.seed, **options)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in other memory, NaN between and around them; ``expanded``: the first row for all, stride 0."""
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return torch.nn.functional.pad(x, (3, 2), value=NAN)[..., 3 : 3 + x.shape[-1]]
    if layout == "every second" or layout == "transposed":
        return torch.stack([x, torch.full_like(x, NAN)], -1).flatten(-2)[..., ::2] if x.numel() else x
    if layout == "expanded" and x.dim() > 1 and len(x):
        return x[:1].expand_as(x)
    return x
