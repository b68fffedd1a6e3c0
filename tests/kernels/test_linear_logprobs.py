"""The fused head against float64 formulas written here, and the GEMMs it may spend."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fast.kernels import linear_cross_entropy, linear_logprobs
from rlhf_fast.kernels.linear_logprobs import chunked
from rlhf_fast.kernels.registry import IMPLEMENTATIONS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NaN and log(0) in its interpreter
FAMILY = "linear_logprobs"
# by name, as the door's function hides the module of the same name
FAMILY_MODULE = sys.modules["rlhf_fast.kernels.linear_logprobs"]
IGNORED = -100
LEAVES = ("hidden", "weight", "bias", "x", "b")
OPTIONS = {"temperature": 0.7, "softcap": 5.0, "logit_scale": 1.3}
CONFIDENT = {"temperature": 0.7, "softcap": 30.0, "logit_scale": 1.3}  # tanh(13 / 30) still leaves p_y > 0.999


def formula(hidden, weight, labels, bias=None, temperature=1.0, softcap=None, logit_scale=1.0, low_rank=None):
    """The definition in the dtype of ``hidden``: logprobs and entropy."""
    z = hidden @ weight.T
    z = z if low_rank is None else z + low_rank[0].to(z.dtype) @ low_rank[1].to(z.dtype).T
    z = (z if bias is None else z + bias) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p = log_softmax(z / temperature, -1)
    keep = labels != IGNORED
    logprobs = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(keep, logprobs, 0.0), torch.where(keep, -(log_p.exp() * log_p).sum(-1), 0.0)


def problem(shape=(2, 7), width=6, vocab_size=43, dtype=torch.float32, device="cpu", seed=0, scale=1.0):
    """Hidden states, head, bias, labels with some ignored, and uneven upstream gradients."""
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(*shape, width, generator=generator) * scale).to(dtype)
    weight, bias = (torch.randn(vocab_size, *s, generator=generator).to(dtype) for s in ((width,), ()))
    labels = torch.randint(vocab_size, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.3] = IGNORED
    upstream = torch.randn(2, *shape, generator=generator)
    return tuple(x.to(device) for x in (hidden, weight, bias, labels, upstream))


def adapter(shape=(2, 7), rank=3, vocab_size=43, dtype=torch.float32, device="cpu", seed=1):
    """x and B of a low-rank adapter on the head of ``problem``."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*s, rank, generator=generator).to(dtype).to(device) for s in (shape, (vocab_size,))]


def gradients(function, leaves, trained, upstream, use_entropy):
    """Results and the gradients of the trained leaves; ``function`` takes the leaves."""
    leaves = [x.detach().clone().requires_grad_(name in trained.split()) for name, x in zip(LEAVES, leaves)]
    logprobs, entropy = function(*leaves)
    loss = (logprobs * upstream[0]).sum()
    if use_entropy:
        loss = loss + (entropy * upstream[1]).sum()
    return logprobs.detach(), entropy.detach(), *torch.autograd.grad(loss, [x for x in leaves if x.requires_grad])


def test_linear_logprobs_by_hand(backend, device):
    """hidden 1, weights 0 and ln 3, bias 0 and ln 2: odds 6, p = 1/7 and 6/7; d logprob_1 / d hidden = ln 3 / 7."""
    hidden = torch.ones(1, 1, device=device, requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3)]], device=device)
    bias = torch.tensor([0.0, math.log(2)], device=device)
    logprobs, entropy = linear_logprobs(hidden, weight, torch.tensor([1], device=device), bias=bias, entropy=True)
    assert logprobs.item() == pytest.approx(math.log(6 / 7))
    assert entropy.item() == pytest.approx(math.log(7) - 6 / 7 * math.log(6))
    logprobs.backward()
    assert hidden.grad.item() == pytest.approx(math.log(3) / 7, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", ["hidden", "hidden weight bias", "weight", "bias", "hidden bias"])
@pytest.mark.parametrize("use_entropy", [False, True])
@pytest.mark.parametrize("keep_rows", [True, False])
def test_linear_logprobs_match_float64(backend, device, no_worse, monkeypatch, dtype, trained, use_entropy, keep_rows):
    """Every way through the backward pass, in chunks of 4 rows of 14 (about 10 labelled). Plain = a 16-bit head."""
    if not keep_rows:
        monkeypatch.setattr(chunked, "kept_bytes", lambda device: 0)
    elif trained == "hidden":
        pytest.skip("a frozen head keeps no rows")
    *leaves, labels, upstream = problem(dtype=dtype, device=device)
    actual = gradients(
        lambda h, w, b: linear_logprobs(h, w, labels, bias=b, entropy=True, chunk_size=4, **OPTIONS),
        leaves,
        trained,
        upstream,
        use_entropy,
    )
    plain = gradients(lambda h, w, b: formula(h, w, labels, b, **OPTIONS), leaves, trained, upstream, use_entropy)
    doubled = [x.double() for x in leaves]
    exact = gradients(lambda h, w, b: formula(h, w, labels, b, **OPTIONS), doubled, trained, upstream, use_entropy)
    for i, (a, p, e) in enumerate(zip(actual, plain, exact)):
        no_worse(a, p.float() if i < 2 else p, e)


def test_logits_of_a_16_bit_head_are_not_rounded(backend, device):
    """From the same bf16 numbers, float32 logits: 1e-5 of the exact logprob, where bf16 logits would err by 0.01."""
    hidden, weight, _, labels, _ = problem(shape=(30,), width=64, dtype=torch.bfloat16, device=device)
    exact, exact_entropy = formula(hidden.double(), weight.double(), labels)
    logprobs, entropy = linear_logprobs(hidden, weight, labels, entropy=True)
    assert (logprobs - exact).abs().max() < 3e-5
    assert (entropy - exact_entropy).abs().max() < 3e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_confident_tokens_keeps_its_digits(backend, device, dtype):
    """p_y = 0.9996: the gradient is a small difference, which bf16(p) @ W would lose altogether (error 1.04)."""
    generator = torch.Generator().manual_seed(0)
    own = torch.eye(12, 32)
    hidden = (0.3 * torch.randn(12, 32, generator=generator) + 3 * own).to(dtype).to(device)
    weight = 0.3 * torch.randn(50, 32, generator=generator)
    weight[:12] += 4 * own
    weight, labels = weight.to(dtype).to(device), torch.arange(12, device=device)
    p = (hidden.double() @ weight.double().T).softmax(-1)
    p_y = p.gather(1, labels[:, None])
    assert (p_y > 0.98).all() and (p_y > 0.9996).sum() >= 3
    x = hidden.clone().requires_grad_()
    linear_logprobs(x, weight, labels).sum().backward()
    exact = (torch.nn.functional.one_hot(labels, 50) - p) @ weight.double()
    error = (x.grad.double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.max() < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", ["hidden", "hidden weight bias"])
@pytest.mark.parametrize("function", ["kept rows", "logits made again", "cross entropy"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"softcap": 30.0}, {"logit_scale": 1.3}, CONFIDENT])
def test_confident_tokens_under_every_option(backend, device, monkeypatch, dtype, trained, function, options):
    """p_y > 0.999 throughout: at most twice the error of plain PyTorch, and in bf16 without that of its rounded logits.

    In norms, as every entry of d hidden is a sum of differences that nearly cancel.
    """
    monkeypatch.setattr(chunked, "kept_bytes", lambda device: 1 << 30 if function == "kept rows" else 0)
    generator = torch.Generator().manual_seed(0)
    own = torch.nn.functional.normalize(torch.randn(50, 32, generator=generator))
    hidden = (13.0 if options.keys() & {"temperature", "logit_scale"} else 20.0) * own[:16]
    hidden = hidden + 0.1 * torch.randn(16, 32, generator=generator)
    leaves = [x.to(dtype).to(device) for x in (hidden, own, 0.1 * torch.randn(50, generator=generator))]
    labels, upstream = torch.arange(16, device=device), torch.rand(2, 16, generator=generator).to(device)

    def fused(h, w, b):
        if function == "cross entropy":
            loss = linear_cross_entropy(h, w, labels, bias=b, weights=upstream[0], reduction="sum", **options)
            return -loss / upstream[0], upstream[0]
        return linear_logprobs(h, w, labels, bias=b, entropy=True, chunk_size=6, **options)

    def plain(h, w, b):
        return formula(h, w, labels, b, **options)

    exact = gradients(plain, [x.double() for x in leaves], trained, upstream, False)
    p_y = exact[0].exp()
    assert (p_y > 0.999).all()
    # float32 knows p to the spacing of its numbers at 1, plain PyTorch's too
    spacing = torch.finfo(torch.float32).eps / (1 - p_y).mean()
    expected = gradients(plain, leaves, trained, upstream, False)
    actual = gradients(fused, leaves, trained, upstream / 16 if function == "cross entropy" else upstream, False)
    for a, p, e in zip(actual[2:], expected[2:], exact[2:]):
        error, allowed = ((x.double() - e).norm() / e.norm() for x in (a, p))
        assert error <= 2 * allowed + 2 * torch.finfo(dtype).eps + spacing
        assert dtype == torch.float32 or error <= 8e-3


@pytest.mark.parametrize("vocab_size", [43, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_does_not_move_the_logprobs(backend, device, vocab_size, dtype):
    """The same bits with and without gradient on the CPU, so that PPO's first importance ratios are exactly 1.

    On a GPU the compiler may lay the tile out differently where it also writes: a few ulp.
    """
    hidden, weight, _, labels, _ = problem(vocab_size=vocab_size, dtype=dtype, device=device)
    without = linear_logprobs(hidden, weight, labels, entropy=True, **OPTIONS)
    for entropy in (True, "detached"):
        results = linear_logprobs(hidden.clone().requires_grad_(), weight, labels, entropy=entropy, **OPTIONS)
        for a, b in zip(results, without):
            torch.testing.assert_close(a.detach(), b, rtol=0, atol=0 if device == "cpu" else 2e-6)


def test_long_rows_give_the_same_bits_whatever_the_lag_and_the_batch(monkeypatch):
    """3 tiles a row, so a lag of 3 to 40 programs: the fewest it may be, and more than there are tiles."""
    module = pytest.importorskip("rlhf_fast.kernels.linear_logprobs.triton_impl")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = torch.randn(4, 2 * 8192 + 7, generator=torch.Generator().manual_seed(0)).to(device) * 3
    labels = torch.tensor([0, 16390, IGNORED, 9000], device=device)

    def run(rows, lag, inplace):
        monkeypatch.setattr(module, "lag_of", lambda tiles, device: lag)
        x = logits[rows].clone()
        out = x if inplace else torch.empty_like(x)
        return *module.head_rows(x, labels[rows], 0.7, None, IGNORED, 1.3, out), out

    expected = run(slice(0, 4), 7, False)
    for lag in (3, 4, 40):
        assert all(torch.equal(a, b) for a, b in zip(run(slice(0, 4), lag, True), expected))
    for row in range(4):
        assert all(torch.equal(a, b[row : row + 1]) for a, b in zip(run(slice(row, row + 1), 5, True), expected))
    assert (expected[-1][2] == 0).all() and expected[-1].isfinite().all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs programs that run one after the other")
def test_a_wait_that_never_ends_becomes_nan(monkeypatch):
    """A lag shorter than a row waits for tiles that have not started: 3 tiles a row here, of which 2 have by then."""
    module = pytest.importorskip("rlhf_fast.kernels.linear_logprobs.triton_impl")
    monkeypatch.setattr(module, "lag_of", lambda tiles, device: 1)
    monkeypatch.setattr(module, "POLLS", 3)
    logits = torch.randn(1, 2 * 8192 + 7)
    out = torch.empty_like(logits)
    logprobs, *_ = module.head_rows(logits, torch.tensor([5]), 1.0, None, IGNORED, 1.0, out)
    assert logprobs.isnan().all() and out[:, :8192].isnan().all()


def test_ignored_rows_are_never_read(backend, device, monkeypatch):
    """NaN hidden states at ignored labels reach nothing, neither through compaction nor, on a GPU, without it."""
    hidden, weight, bias, labels, upstream = problem(device=device)
    leaves = (hidden, weight, bias)
    dirty = hidden.clone()
    dirty[labels == IGNORED] = float("nan")

    def run(h, w, b):
        return linear_logprobs(h, w, labels, bias=b, entropy=True, chunk_size=4)

    for compact in (True, False):
        if not compact:
            monkeypatch.setattr(FAMILY_MODULE, "_labelled", lambda labels, *_: (labels.reshape(-1), None))
        for trained in ("hidden", "hidden weight bias"):
            for use_entropy in (False, True):
                clean = gradients(run, leaves, trained, upstream, use_entropy)
                for c, d in zip(clean, gradients(run, (dirty, weight, bias), trained, upstream, use_entropy)):
                    torch.testing.assert_close(d, c, rtol=1e-5, atol=1e-6)
        x, w = dirty.clone().requires_grad_(), weight.clone().requires_grad_()
        linear_cross_entropy(x, w, labels).backward()
        assert x.grad.isfinite().all() and w.grad.isfinite().all()


def test_chunks_change_nothing(backend, device):
    """1, 3 and all rows at a time: float32 sums of another order at most."""
    *leaves, labels, upstream = problem(device=device)
    results = [
        gradients(
            lambda h, w, b, size=size: linear_logprobs(h, w, labels, bias=b, entropy=True, chunk_size=size),
            leaves,
            "hidden weight bias",
            upstream,
            True,
        )
        for size in (1, 3, None)
    ]
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 0)])
def test_no_rows_and_one_row(backend, device, shape):
    hidden, weight, _, labels, _ = problem(shape=shape, device=device)
    labels.clamp_(min=0)
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs, entropy = linear_logprobs(x, w, labels, entropy=True)
    (logprobs.sum() + entropy.sum() + linear_cross_entropy(x, w, labels)).backward()
    exact, exact_entropy = formula(hidden.double(), weight.double(), labels)
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), exact_entropy, rtol=1e-5, atol=1e-5)
    assert x.grad.shape == hidden.shape and w.grad.isfinite().all()


@pytest.mark.parametrize("vocab_size", [1, 2, 20])
def test_masked_words_and_tiny_vocabularies(backend, device, no_worse, vocab_size):
    """A bias of -inf masks half of 20 words, and one of 2; a lone word has logprob 0 and no gradient."""
    *leaves, labels, upstream = problem(vocab_size=vocab_size, device=device)
    masked = vocab_size // 2
    leaves[2][:masked] = float("-inf")
    labels[labels != IGNORED] = vocab_size - 1

    def reduced(h, w, b):
        """Without the masked words, whose gradients are 0."""
        shifted = torch.where(labels == IGNORED, labels, labels - masked)
        return formula(h, w[masked:], shifted, b[masked:])

    for trained in ("hidden", "hidden weight bias"):
        actual = gradients(
            lambda h, w, b: linear_logprobs(h, w, labels, bias=b, entropy=True), leaves, trained, upstream, True
        )
        plain = gradients(reduced, leaves, trained, upstream, True)
        exact = gradients(reduced, [x.double() for x in leaves], trained, upstream.double(), True)
        for a, p, e in zip(actual, plain, exact):
            no_worse(a, p, e)


def test_all_labels_ignored_gives_zero_with_a_gradient(backend, device):
    hidden, weight, _, labels, _ = problem(device=device)
    labels[:] = IGNORED
    for trains_head in (False, True):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trains_head)
        loss = linear_cross_entropy(x, w, labels)
        (loss + linear_logprobs(x, w, labels).sum()).backward()
        assert loss.item() == 0 and (x.grad == 0).all()
        assert not trains_head or (w.grad == 0).all()


def test_strided_and_broadcast_inputs(backend, device):
    """Transposed head, every second hidden state, one hidden state for all rows."""
    hidden, weight, _, _, _ = problem(shape=(8,), device=device)
    labels = torch.arange(4, device=device)
    for x in (hidden[::2], hidden[:1].expand(4, -1), hidden.t().contiguous().t()[:4]):
        w = weight.t().contiguous().t()
        exact, _ = formula(x.double(), w.double(), labels)
        leaf = x.detach().requires_grad_()
        logprobs = linear_logprobs(leaf, w, labels)
        torch.testing.assert_close(logprobs.double(), exact, rtol=1e-5, atol=1e-5)
        (grad,) = torch.autograd.grad(logprobs.sum(), leaf)
        y = x.double().detach().requires_grad_()
        (expected,) = torch.autograd.grad(formula(y, w.double(), labels)[0].sum(), y)
        torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-5)


def test_detached_entropy_has_no_gradient(backend, device):
    hidden, weight, _, labels, _ = problem(device=device)
    x = hidden.clone().requires_grad_()
    logprobs, entropy = linear_logprobs(x, weight, labels, entropy="detached")
    assert logprobs.requires_grad and not entropy.requires_grad
    torch.testing.assert_close(entropy, linear_logprobs(x, weight, labels, entropy=True)[1].detach())


@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_float16_survives_the_small_gradients_of_a_mean(backend, device, monkeypatch, kept):
    """64 equal tokens of 2e-5 each: times a hidden state of 0.11, float16 would round every one of them by 1%."""
    monkeypatch.setattr(chunked, "kept_bytes", lambda device: kept)
    hidden = torch.tensor([[0.3, -0.7, 0.11]], dtype=torch.float16, device=device).expand(64, 3)
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).half().to(device)
    labels = torch.full((64,), 2, device=device)
    exact = weight.double().requires_grad_()
    (formula(hidden.double(), exact, labels)[0] * 2e-5).sum().backward()
    for function in (linear_logprobs, lambda *a: linear_cross_entropy(*a, reduction="sum")):
        w = weight.clone().requires_grad_()
        (function(hidden, w, labels).sum() * 2e-5).backward()
        sign = -1 if w.grad[2, 0] * exact.grad[2, 0] < 0 else 1
        torch.testing.assert_close(sign * w.grad.double(), exact.grad, rtol=2e-3, atol=6e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loss_scale_is_not_rounded_to_16_bits(dtype):
    """2^18 / 3 overflows float16, and would be 0.2% more in bf16."""
    hidden, weight, _, labels, _ = problem(shape=(40,), dtype=dtype)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    small, large = (
        torch.autograd.grad(linear_cross_entropy(hidden, weight, labels) * scale, hidden)[0].double().norm()
        for scale in (2**-8, 2**18 / 3)
    )
    assert (large / small).item() == pytest.approx(2**26 / 3, rel=5e-4)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("trained", ["hidden", "hidden weight bias", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_cross_entropy_matches_float64(backend, device, no_worse, reduction, trained, dtype):
    """Weights 0 to 2, NaN at ignored labels; upstream gradient 1.7, not 1."""
    *leaves, labels, upstream = problem(dtype=dtype, device=device)
    weights = upstream[0].abs().clamp(max=2.0)
    weights[labels == IGNORED] = float("nan")

    def loss_of(function):
        def run(h, w, b):
            loss = function(h, w, b) * 1.7
            return loss, torch.zeros_like(loss)

        return run

    def expected(h, w, b):
        factor = torch.where(labels == IGNORED, 0.0, weights.to(h.dtype))
        nll = -formula(h, w, labels, b, **OPTIONS)[0] * factor
        return {"mean": nll.sum() / factor.sum(), "sum": nll.sum(), "none": nll}[reduction]

    def fused(h, w, b):
        options = dict(OPTIONS, bias=b, weights=weights, reduction=reduction, chunk_size=4)
        return linear_cross_entropy(h, w, labels, **options)

    ones = torch.ones(2, *(labels.shape if reduction == "none" else ()), device=device)
    actual = gradients(loss_of(fused), leaves, trained, ones, False)
    plain = gradients(loss_of(expected), leaves, trained, ones, False)
    exact = gradients(loss_of(expected), [x.double() for x in leaves], trained, ones, False)
    for i, (a, p, e) in enumerate(zip(actual, plain, exact)):
        no_worse(a, p.float() if i < 2 else p, e)


def test_cross_entropy_weights_have_gradients(backend, device):
    """d mean / d w_t = (loss_t - mean) / sum(w)."""
    hidden, weight, _, labels, _ = problem(device=device)
    w = torch.rand(labels.shape, device=device, requires_grad=True)
    nll = -formula(hidden.double(), weight.double(), labels)[0]
    linear_cross_entropy(hidden, weight.requires_grad_(), labels, weights=w).backward()
    keep = labels != IGNORED
    factor = torch.where(keep, w.detach().double(), 0.0)
    exact = torch.where(keep, (nll - (nll * factor).sum() / factor.sum()) / factor.sum(), 0.0)
    torch.testing.assert_close(w.grad.double(), exact, rtol=1e-4, atol=1e-6)


class CountGemms(TorchDispatchMode):
    """Counts products of N x D x V multiplications, whole or in pieces, looking inside our operators too."""

    def __init__(self, hidden, weight):
        super().__init__()
        self.size, self.multiplications = hidden.numel() * len(weight), 0

    @property
    def count(self):
        return self.multiplications / self.size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "rlhf_fast":
            with self:
                return IMPLEMENTATIONS[function._opname](*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        assert name not in ("bmm", "baddbmm", "addbmm", "addmv", "mv"), f"{name} is not counted"
        if name in ("mm", "addmm", "addmm_"):
            (n, k), (_, m) = (x.shape for x in [x for x in args if isinstance(x, torch.Tensor)][-2:])
            self.multiplications += n * k * m
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("trained", "entropy", "kept", "gemms"),
    [
        ("", True, 0, 1),
        ("hidden", False, 0, 2),
        ("hidden", "detached", 0, 2),
        ("hidden", True, 0, 3),
        ("hidden weight", False, 1 << 30, 3),
        ("hidden weight", "detached", 1 << 30, 3),
        ("hidden weight", False, 0, 4),
        ("hidden weight", True, 1 << 30, 4),
        ("weight", False, 1 << 30, 2),
        ("weight", False, 0, 3),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_number_of_gemms(monkeypatch, trained, entropy, kept, gemms, dtype, chunk_size):
    """The fewest that the gradients asked for allow, in one chunk or three."""
    monkeypatch.setattr(chunked, "kept_bytes", lambda device: kept)
    hidden, weight, _, labels, _ = problem(shape=(5,), vocab_size=97, dtype=dtype)
    labels.clamp_(min=0)
    hidden.requires_grad_("hidden" in trained)
    weight.requires_grad_("weight" in trained)
    with CountGemms(hidden, weight) as counter:
        result = linear_logprobs(hidden, weight, labels, entropy=entropy, chunk_size=chunk_size)
        if trained:
            loss = sum(x.sum() for x in result) if entropy is True else (result[0] if entropy else result).sum()
            loss.backward()
    assert counter.count == gemms


def test_no_grad_spends_one_gemm_even_on_leaves_that_want_gradients():
    hidden, weight, _, labels, _ = problem(shape=(5,), vocab_size=97)
    labels.clamp_(min=0)
    with CountGemms(hidden, weight) as counter, torch.no_grad():
        linear_logprobs(hidden.requires_grad_(), weight.requires_grad_(), labels)
    assert counter.count == 1


@pytest.mark.parametrize(("trained", "gemms"), [("", 1), ("hidden", 2), ("hidden weight", 3), ("weight", 2)])
def test_number_of_gemms_of_a_cross_entropy(monkeypatch, trained, gemms):
    """The gradients of a sum are folded into the forward pass: 3 GEMMs without keeping anything of size (N, V)."""
    monkeypatch.setattr(chunked, "kept_bytes", lambda device: 0)
    hidden, weight, _, labels, _ = problem(shape=(5,), vocab_size=97)
    labels.clamp_(min=0)
    with CountGemms(hidden, weight) as counter:
        loss = linear_cross_entropy(
            hidden.requires_grad_("hidden" in trained), weight.requires_grad_("weight" in trained), labels
        )
        if trained:
            loss.backward()
    assert counter.count == gemms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("per_outer", "outers"), [(1, [2, 2, 2, 1]), (2, [4, 3]), (9, [7])])
@pytest.mark.parametrize("function", [linear_cross_entropy, linear_logprobs])
def test_chunks_share_a_gemm_for_the_head(monkeypatch, function, per_outer, outers, dtype):
    """7 rows in chunks of 2: the gradient of the head is made of as many products as there are groups, and is the same.

    A CPU makes one product per chunk; on a GPU as many chunks share one as ``kept_bytes`` has room for.
    """
    monkeypatch.setattr(chunked, "kept_bytes", lambda device: 0)
    monkeypatch.setattr(chunked, "chunks_per_outer", lambda *_: per_outer)
    rows, add_outer = [], chunked._Gemm.add_outer
    monkeypatch.setattr(
        chunked._Gemm, "add_outer", lambda self, *a, **k: (rows.append(len(a[1])), add_outer(self, *a, **k))
    )
    hidden, weight, bias, labels, _ = problem(shape=(7,), vocab_size=97, dtype=dtype)
    labels.clamp_(min=0)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    with CountGemms(hidden, weight) as counter:
        loss = function(hidden, weight, labels, bias=bias, chunk_size=2).sum()
        grads = torch.autograd.grad(loss, leaves)
    assert rows == outers and counter.count == (3 if function is linear_cross_entropy else 4)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    log_p = formula(exact[0], exact[1], labels, exact[2])[0]
    expected = torch.autograd.grad(-log_p.mean() if function is linear_cross_entropy else log_p.sum(), exact)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for found, right in zip(grads, expected):
        assert (found.double() - right).abs().max() <= tolerance * right.abs().max()


@pytest.mark.parametrize("vocab_size", [1, 64, 97, 50_257])
def test_rows_of_odd_vocabularies_begin_at_multiples_of_64(vocab_size):
    rows = chunked.empty_rows(3, vocab_size, torch.bfloat16, "cpu")
    assert rows.shape == (3, vocab_size) and rows.stride(1) == 1
    assert rows.stride(0) % 64 == 0 and rows.stride(0) - vocab_size < 64


@pytest.mark.parametrize(("function", "gemms"), [(linear_logprobs, 2), (linear_cross_entropy, 2)])
def test_only_labelled_rows_meet_the_head(function, gemms):
    """3 of 40 rows are labelled, so on the CPU every GEMM has 3 rows."""
    hidden, weight, _, labels, _ = problem(shape=(40,))
    labels[:] = IGNORED
    labels[[3, 9, 30]] = 1
    with CountGemms(hidden, weight) as counter:
        function(hidden.requires_grad_(), weight, labels).sum().backward()
    assert counter.count == gemms * 3 / 40


def test_a_label_outside_the_vocabulary_is_named_by_the_callers_row():
    hidden, weight, _, labels, _ = problem(shape=(4,))
    labels[:] = torch.tensor([IGNORED, IGNORED, 43, 0])
    for function in (linear_logprobs, linear_cross_entropy):
        with pytest.raises(IndexError, match=r"label 43 in row 2 .*\[0, 43\)"):
            function(hidden, weight, labels)


@pytest.mark.parametrize("trained", ["hidden", "hidden weight bias"])
@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_gradcheck(monkeypatch, trained, kept):
    monkeypatch.setattr(chunked, "kept_bytes", lambda device: kept)
    *leaves, labels, _ = problem(shape=(4,), width=3, vocab_size=5, dtype=torch.float64)
    leaves = [x.requires_grad_(name in trained) for name, x in zip(("hidden", "weight", "bias"), leaves)]

    def fused(h, w, b, entropy):
        return linear_logprobs(h, w, labels, bias=b, entropy=entropy, chunk_size=3, **OPTIONS)

    def cross_entropy(h, w, b, reduction):
        return linear_cross_entropy(h, w, labels, bias=b, reduction=reduction, chunk_size=3)

    for entropy in (False, True):
        assert torch.autograd.gradcheck(partial(fused, entropy=entropy), leaves)
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(partial(cross_entropy, reduction=reduction), leaves)


@pytest.mark.parametrize("keep", range(4))
@pytest.mark.parametrize("factors", [1, 2])
def test_forward_operator_passes_opcheck(keep, factors):
    hidden, weight, bias, labels, _ = problem(shape=(5,))
    x, b = adapter(shape=(5,))
    inputs, matrices = [hidden, x][:factors], [weight, b][:factors]
    for needs in ([True] * factors, [True, False][:factors]):
        torch.library.opcheck(
            torch.ops.rlhf_fast.linear_logprobs_forward,
            (labels, inputs, matrices, bias, 0.7, 2.0, 1.1, IGNORED, 2, keep, needs),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("factors", [1, 2])
def test_backward_operators_pass_opcheck(factors):
    hidden, weight, bias, labels, upstream = problem(shape=(5,))
    x, b = adapter(shape=(5,))
    head = (labels, [hidden, x][:factors], [weight, b][:factors])
    options, all_, first = (0.7, 2.0, 1.1, IGNORED, 2), [True] * factors, [True, False][:factors]
    ops, checks = torch.ops.rlhf_fast, {"test_utils": ("test_schema", "test_faketensor")}
    _, entropy, lse, _, _, rows = ops.linear_logprobs_forward(*head, bias, *options, chunked.KEEP_ROWS, all_)
    recomputed = (*head, bias, lse, entropy, *upstream, *options, all_, all_, True)
    torch.library.opcheck(ops.linear_logprobs_backward, recomputed, **checks)
    from_rows = (*head, rows, upstream[0], IGNORED, all_, first[::-1], True)
    torch.library.opcheck(ops.linear_logprobs_backward_from_rows, from_rows, **checks)
    summed = (*head, bias, upstream[0], *options, first, all_, False)
    torch.library.opcheck(ops.linear_cross_entropy_forward, summed, **checks)


@pytest.mark.parametrize("trained", ["hidden", "hidden weight"])
def test_compiles_without_a_graph_break(trained):
    hidden, weight, _, labels, _ = problem()

    def loss(h, w):
        logprobs, entropy = linear_logprobs(h, w, labels, entropy=True)
        return (logprobs - 0.1 * entropy).sum() + linear_cross_entropy(h, w, labels)

    leaves = [x.requires_grad_(name in trained) for name, x in (("hidden", hidden), ("weight", weight))]
    wanted = [x for x in leaves if x.requires_grad]
    expected = torch.autograd.grad(loss(*leaves), wanted)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), wanted)
    for a, b in zip(compiled, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", ["hidden", "hidden weight"])
@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_autocast_does_what_it_does_to_a_linear_layer(monkeypatch, trained, kept):
    """float32 hidden states and head are multiplied in bf16; the logits and all after them stay float32."""
    monkeypatch.setattr(chunked, "kept_bytes", lambda device: kept)
    hidden, weight, bias, labels, upstream = problem()
    rounded = [x.bfloat16().double() for x in (hidden, weight)] + [bias.double()]
    exact = gradients(lambda *x: formula(*x[:2], labels, x[2]), rounded, trained, upstream.double(), True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gradients(
            lambda h, w, b: linear_logprobs(h, w, labels, bias=b, entropy=True),
            (hidden, weight, bias),
            trained,
            upstream,
            True,
        )
    for i, (a, e) in enumerate(zip(actual, exact)):
        assert a.dtype == torch.float32
        tolerance = 1e-5 if i < 2 else 1e-2 * e.abs().max().item()
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=tolerance)


# ---- a low-rank adapter on the head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", ["hidden x b", "x b", "hidden x", "b", "hidden weight bias x b"])
@pytest.mark.parametrize("use_entropy", [False, True])
@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_a_low_rank_adapter_matches_float64(backend, device, no_worse, monkeypatch, dtype, trained, use_entropy, kept):
    """Every way through the backward pass, with all options; x and B in float32 whatever the head is."""
    monkeypatch.setattr(chunked, "kept_bytes", lambda device: kept)
    *leaves, labels, upstream = problem(dtype=dtype, device=device)
    leaves += adapter(device=device)

    def fused(h, w, bias, x, b):
        options = {"bias": bias, "low_rank": (x, b), "entropy": True, "chunk_size": 4, **OPTIONS}
        return linear_logprobs(h, w, labels, **options)

    def plain(h, w, bias, x, b):
        return formula(h, w, labels, bias, low_rank=(x, b), **OPTIONS)

    actual = gradients(fused, leaves, trained, upstream, use_entropy)
    expected = gradients(plain, leaves, trained, upstream, use_entropy)
    # what the head multiplies is rounded to its dtype, the plain one's as well
    exact = gradients(plain, [x.to(dtype).double() for x in leaves], trained, upstream, use_entropy)
    for i, (a, p, e) in enumerate(zip(actual, expected, exact)):
        no_worse(a, p.float() if i < 2 else p, e)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", ["hidden x b", "x b", "hidden weight x b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cross_entropy_of_a_low_rank_adapter_matches_float64(backend, device, no_worse, reduction, trained, dtype):
    *leaves, labels, _ = problem(dtype=dtype, device=device)
    leaves += adapter(device=device)

    def fused(h, w, bias, x, b):
        loss = linear_cross_entropy(h, w, labels, bias=bias, low_rank=(x, b), reduction=reduction, chunk_size=4)
        return loss, torch.zeros_like(loss)

    def plain(h, w, bias, x, b):
        nll = -formula(h, w, labels, bias, low_rank=(x, b))[0]
        nll = nll.sum() / (labels != IGNORED).sum() if reduction == "mean" else nll
        return nll, torch.zeros_like(nll)

    ones = torch.ones(2, *(labels.shape if reduction == "none" else ()), device=device)
    actual = gradients(fused, leaves, trained, ones, False)
    expected = gradients(plain, leaves, trained, ones, False)
    exact = gradients(plain, [x.to(dtype).double() for x in leaves], trained, ones, False)
    for i, (a, p, e) in enumerate(zip(actual, expected, exact)):
        no_worse(a, p.float() if i < 2 else p, e)


def test_a_low_rank_adapter_is_the_head_with_the_product_in_it(backend, device):
    """x = s * hidden A^T: log-probabilities and the gradients of hidden, A and B are those of W + s B A."""
    hidden, weight, _, labels, upstream = problem(device=device)
    a, b = adapter(shape=(3,), rank=6)[0].to(device), adapter(device=device)[1]
    leaves = [x.requires_grad_() for x in (hidden, a, b)]
    found = linear_logprobs(hidden, weight, labels, low_rank=(0.5 * hidden @ a.T, b), **OPTIONS)
    expected = formula(hidden.double(), weight.double() + 0.5 * b.double() @ a.double(), labels, **OPTIONS)[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad((x * upstream[0]).sum(), leaves) for x in (found, expected)]
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "trained", "kept", "gemms", "narrow"),
    [
        (linear_logprobs, "", 0, 1, 1),
        (linear_logprobs, "hidden x", 0, 2, 2),
        (linear_logprobs, "x", 0, 1, 2),
        (linear_logprobs, "hidden x b", 1 << 30, 2, 3),
        (linear_logprobs, "hidden x b", 0, 3, 4),
        (linear_logprobs, "x b", 1 << 30, 1, 3),
        (linear_logprobs, "x b", 0, 2, 4),
        (linear_logprobs, "hidden weight x b", 1 << 30, 3, 3),
        (linear_cross_entropy, "hidden x b", 0, 2, 3),
        (linear_cross_entropy, "x b", 0, 1, 3),
        (partial(linear_logprobs, entropy=True), "hidden x", 0, 3, 3),
        (partial(linear_logprobs, entropy=True), "hidden x b", 1 << 30, 3, 4),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_number_of_gemms_under_a_low_rank_adapter(monkeypatch, function, trained, kept, gemms, narrow, dtype):
    """No more of size V x D than without, and none for a frozen weight's gradient; those of rank r are ``narrow``."""
    monkeypatch.setattr(chunked, "kept_bytes", lambda device: kept)
    hidden, weight, _, labels, _ = problem(shape=(5,), vocab_size=97, dtype=dtype)
    labels.clamp_(min=0)
    leaves = dict(zip(("hidden", "weight", "x", "b"), (hidden, weight, *adapter(shape=(5,), vocab_size=97))))
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in trained.split())
    with CountGemms(hidden, weight) as counter:
        result = function(hidden, weight, labels, low_rank=(leaves["x"], leaves["b"]), chunk_size=2)
        result = sum(x.sum() for x in result) if isinstance(result, tuple) else result.sum()
        if trained:
            result.backward()
    assert counter.multiplications == 5 * 97 * (gemms * 6 + narrow * 3)


class Allocated(TorchDispatchMode):
    """The most elements of any tensor made, looking inside our operators too."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "rlhf_fast":
            with self:
                return IMPLEMENTATIONS[function._opname](*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(x)}
        result = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return result


def test_the_weight_is_neither_copied_nor_merged_nor_concatenated(monkeypatch):
    """V = 97, D = 64: nothing as large as the weight is made, and of the logits 2 rows at a time."""
    monkeypatch.setattr(chunked, "kept_bytes", lambda device: 0)
    hidden, weight, _, labels, _ = problem(shape=(7,), width=64, vocab_size=97)
    leaves = [x.requires_grad_() for x in (hidden, *adapter(shape=(7,), vocab_size=97))]
    for function in (linear_logprobs, linear_cross_entropy):
        with Allocated() as allocated:
            loss = function(hidden, weight, labels, low_rank=leaves[1:], chunk_size=2).sum()
            torch.autograd.grad(loss, leaves)
        # the vectors of hidden, (7, 64), and the gradient of B, (97, 3)
        assert allocated.largest == 7 * 64


@pytest.mark.parametrize("kept", [0, 1 << 30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapters_get_unrounded_gradients_from_a_16_bit_head(backend, device, monkeypatch, kept, dtype):
    """Sums over 300 tokens in float32, of products with g * x in 16 bits as a GPU takes them; not rounded at the end."""
    monkeypatch.setattr(chunked, "kept_bytes", lambda device: kept)
    hidden, weight, _, labels, upstream = problem(shape=(300,), dtype=dtype, device=device)
    x, b = (y.requires_grad_() for y in adapter(shape=(300,), device=device))
    for scale in (1.0, 1e-6):  # float16 has nothing below 6e-8
        found = linear_logprobs(hidden, weight, labels, low_rank=(x, b), chunk_size=64)
        found = torch.autograd.grad((found * upstream[0]).sum() * scale, (x, b))
        doubles = [y.detach().to(dtype).double().requires_grad_() for y in (x, b)]
        exact = formula(hidden.double(), weight.double(), labels, low_rank=doubles)[0]
        exact = torch.autograd.grad((exact * upstream[0].double()).sum() * scale, doubles)
        for got, want in zip(found, exact):
            assert got.dtype == torch.float32 and (got != got.to(dtype).float()).any()
            # Triton's interpreter cuts bf16 off where a GPU rounds
            assert (got.double() - want).norm() <= 6e-3 * want.norm()


def test_ignored_rows_of_a_low_rank_input_are_never_read(backend, device, monkeypatch):
    hidden, weight, _, labels, upstream = problem(device=device)
    x, b = adapter(device=device)
    dirty = [torch.where((labels == IGNORED)[..., None], float("nan"), y) for y in (hidden, x)]

    def run(h, w, _, x, b):
        return linear_logprobs(h, w, labels, low_rank=(x, b), entropy=True, chunk_size=4)

    for compact in (True, False):
        if not compact:
            monkeypatch.setattr(FAMILY_MODULE, "_labelled", lambda labels, *_: (labels.reshape(-1), None))
        for use_entropy in (False, True):
            clean = gradients(run, (hidden, weight, weight, x, b), "hidden x b", upstream, use_entropy)
            found = gradients(run, (dirty[0], weight, weight, dirty[1], b), "hidden x b", upstream, use_entropy)
            for c, d in zip(clean, found):
                torch.testing.assert_close(d, c, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_gradcheck_of_a_low_rank_adapter(monkeypatch, kept):
    monkeypatch.setattr(chunked, "kept_bytes", lambda device: kept)
    hidden, weight, bias, labels, _ = problem(shape=(4,), width=3, vocab_size=5, dtype=torch.float64)
    leaves = [y.requires_grad_() for y in (hidden, *adapter(shape=(4,), rank=2, vocab_size=5, dtype=torch.float64))]

    def fused(h, x, b, entropy):
        options = {"bias": bias, "low_rank": (x, b), "entropy": entropy, "chunk_size": 3, **OPTIONS}
        return linear_logprobs(h, weight, labels, **options)

    for entropy in (False, True):
        assert torch.autograd.gradcheck(partial(fused, entropy=entropy), leaves)
    assert torch.autograd.gradcheck(lambda h, x, b: linear_cross_entropy(h, weight, labels, low_rank=(x, b)), leaves)


@pytest.mark.parametrize("trained", ["hidden x", "hidden x b"])
def test_a_low_rank_adapter_compiles_without_a_graph_break(trained):
    hidden, weight, _, labels, _ = problem()
    x, b = adapter()

    def loss(h, x, b):
        logprobs, entropy = linear_logprobs(h, weight, labels, low_rank=(x, b), entropy=True)
        detached = linear_logprobs(h, weight, labels, low_rank=(x, b))
        return (logprobs - 0.1 * entropy + detached).sum() + linear_cross_entropy(h, weight, labels, low_rank=(x, b))

    leaves = [y.requires_grad_(n in trained.split()) for n, y in (("hidden", hidden), ("x", x), ("b", b))]
    wanted = [y for y in leaves if y.requires_grad]
    expected = torch.autograd.grad(loss(*leaves), wanted)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), wanted)
    for got, want in zip(compiled, expected):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_autocast_multiplies_a_low_rank_adapter_in_its_dtype(monkeypatch, kept):
    monkeypatch.setattr(chunked, "kept_bytes", lambda device: kept)
    hidden, weight, bias, labels, upstream = problem()
    leaves = (hidden, weight, bias, *adapter())
    rounded = [y if y is bias else y.bfloat16() for y in leaves]

    def plain(h, w, bias, x, b):
        return formula(h, w, labels, bias, low_rank=(x, b))

    exact = gradients(plain, [y.double() for y in rounded], "hidden x b", upstream.double(), True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gradients(
            lambda h, w, bias, x, b: linear_logprobs(h, w, labels, bias=bias, low_rank=(x, b), entropy=True),
            leaves,
            "hidden x b",
            upstream,
            True,
        )
    for i, (a, e) in enumerate(zip(actual, exact)):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5 if i < 2 else 1e-2 * e.abs().max().item())


PEAK = """
import json, sys
from pathlib import Path
import torch
from rlhf_fast.kernels import linear_cross_entropy, linear_logprobs

rows, width, vocab_size, dtype, kind = json.loads(sys.argv[1])

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

def run(rows):
    hidden = torch.randn(rows, width).to(getattr(torch, dtype)).requires_grad_()
    weight = torch.randn(vocab_size, width).to(getattr(torch, dtype)).requires_grad_(kind == "cross entropy")
    labels = torch.randint(vocab_size, (rows,))
    # forget the peak so far
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    if kind == "cross entropy":
        loss = linear_cross_entropy(hidden, weight, labels)
    else:
        loss = sum(linear_logprobs(hidden, weight, labels, entropy=True if kind == "entropy" else "detached")).sum()
    loss.backward()
    return status("VmHWM") - before

# libraries get loaded and BLAS makes its buffers
run(8)
print(run(rows))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc, Linux only")
@pytest.mark.parametrize(
    ("rows", "dtype", "kind", "kept"),
    [
        (4096, "float32", "frozen", 2),
        (1024, "float32", "frozen", 2),
        (4096, "bfloat16", "frozen", 2),
        (2048, "float32", "entropy", 3),
        (2048, "float32", "cross entropy", 1),
    ],
)
def test_memory_does_not_grow_with_the_logits(rows, dtype, kind, kept):
    """V = 32,000: 64 MB of chunk buffers and ``kept`` tensors of (N, D), where the logits of 4096 rows are 524 MB."""
    width, vocab_size = 64, 32_000
    arguments = json.dumps([rows, width, vocab_size, dtype, kind])
    done = subprocess.run([sys.executable, "-c", PEAK, arguments], capture_output=True, text=True, check=True)
    allowed = 64e6 + kept * rows * width * 4
    if kind == "cross entropy":
        allowed += vocab_size * width * 4  # the gradient of the head
    assert 20e6 < int(done.stdout) <= allowed


def test_chunk_size_keeps_to_the_budget():
    """48 MiB of float32 logits in chunks of equal size: 393 rows of 32,000 words fit, so 4096 rows are 11 chunks.

    Half as many fit when the entropy's gradient needs the logits twice; 256 rows of any vocabulary must.
    """
    hidden = torch.empty(4096, 8, device="meta")
    rows = {v: chunked.choose_chunk_size(hidden, torch.empty(v, 8, device="meta")) for v in (100, 32_000, 151_936)}
    assert rows == {100: 4096, 32_000: 373, 151_936: 256}
    assert chunked.choose_chunk_size(hidden, torch.empty(32_000, 8, device="meta"), entropy=True) == 196
    assert chunked.choose_chunk_size(hidden[:5], torch.empty(32_000, 8, device="meta")) == 5
    assert chunked.choose_chunk_size(hidden[:400], torch.empty(32_000, 8, device="meta")) == 200


def test_chunk_size_fills_the_processors():
    """kernels.md: on 132 SMs width 4096 wants 1024 rows and width 3584 wants 1152 when memory stops below two waves."""
    assert chunked.fill_processors(8192, 1500, 4096, 132) == 1024
    assert chunked.fill_processors(8192, 1500, 3584, 132) == 1152
    assert chunked.fill_processors(8192, 100, 4096, 132) == 128
    # what fits goes at once: 600 rows in chunks of 512 and 88 would read the head twice
    assert chunked.fill_processors(600, 1500, 4096, 132) == 640
    # and a remainder is a wave of its own: 1100 rows are 2 waves as 1024 + 76, and as 1152 at once
    assert chunked.fill_processors(1100, 1500, 4096, 132) == 1152


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.zeros(5, 3)}, "hidden must be"),
        ({"weight": torch.zeros(5, 4, dtype=torch.bfloat16)}, "cast one"),
        ({"bias": torch.zeros(4)}, "bias must be"),
        ({"low_rank": (torch.zeros(2, 3), torch.zeros(5, 2))}, "low_rank must be x"),
        ({"low_rank": (torch.zeros(2, 3), torch.zeros(4, 3))}, r"B \(5, r\)"),
        ({"low_rank": (torch.zeros(3), torch.zeros(5, 3))}, "low_rank must be x"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"temperature": -1.0}, "temperature"),
        ({"logit_scale": 0.0}, "logit_scale must be positive, got 0.0"),
        ({"logit_scale": -1.3}, "logit_scale must be positive, got -1.3"),
        ({"logit_scale": math.nan}, "logit_scale must be positive, got nan"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    weight = arguments.pop("weight", torch.zeros(5, 4))
    for function in (linear_logprobs, linear_cross_entropy):
        with pytest.raises(ValueError, match=message):
            function(torch.zeros(2, 4), weight, torch.zeros(2, dtype=torch.long), **arguments)


def test_unknown_reduction_and_weights_that_do_not_fit_are_refused():
    arguments = (torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="unknown reduction 'avg'"):
        linear_cross_entropy(*arguments, reduction="avg")
    with pytest.raises(ValueError, match="weights must have"):
        linear_cross_entropy(*arguments, weights=torch.ones(3))
