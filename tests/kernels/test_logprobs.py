"""Log-probabilities from logits, against float64 formulas written here."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import log_softmax

from rlhf_fast.kernels import sequence_logprobs, token_logprobs, use_backend
from rlhf_fast.kernels.registry import IMPLEMENTATIONS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NaN and log(0) in its interpreter
FAMILY = "logprobs"
IGNORED = -100


def formula(logits, labels, temperature=1.0, softcap=None):
    """The definition in the dtype of ``logits``: logprobs and entropy."""
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_p = log_softmax(z / temperature, -1)
    keep = labels != IGNORED
    logprobs = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    # before the product, or autograd would multiply 0 by inf
    entropy = -(log_p.exp() * torch.where(log_p == float("-inf"), 0.0, log_p)).sum(-1)
    return torch.where(keep, logprobs, 0.0), torch.where(keep, entropy, 0.0)


def with_gradient(function, logits, weights, *args, **kwargs):
    """Return logprobs, entropy and the gradient of their sum under uneven weights."""
    logits = logits.detach().clone().requires_grad_()
    logprobs, entropy = function(logits, *args, **kwargs)
    (logprobs * weights[0] + entropy * weights[1]).sum().backward()
    return logprobs.detach(), entropy.detach(), logits.grad


def fused(logits, labels, temperature=1.0, softcap=None, **kwargs):
    return token_logprobs(logits, labels, temperature=temperature, softcap=softcap, entropy=True, **kwargs)


def problem(shape, vocab_size, dtype, device="cpu", scale=4.0, seed=0):
    """Logits, labels with some ignored, and upstream gradients that differ from token to token."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(*shape, vocab_size, generator=generator) * scale).to(dtype)
    labels = torch.randint(vocab_size, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.2] = IGNORED
    weights = torch.randn(2, *shape, generator=generator)
    return logits.to(device), labels.to(device), weights.to(device)


def test_token_logprobs_by_hand(backend, device):
    """p = 1/4, 3/4 for logits 0, ln 3; at temperature 2 odds are sqrt 3; softcap 1 bounds ln 3 to tanh(ln 3) = 0.8."""
    logits, labels = torch.tensor([[0.0, math.log(3)]], device=device), torch.tensor([1], device=device)
    logprobs, entropy = token_logprobs(logits, labels, entropy=True)
    assert logprobs.item() == pytest.approx(math.log(3 / 4))
    assert entropy.item() == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    root = math.sqrt(3)
    assert token_logprobs(logits, labels, temperature=2.0).item() == pytest.approx(math.log(root / (1 + root)))
    assert token_logprobs(logits, labels, softcap=1.0).item() == pytest.approx(0.8 - math.log(1 + math.exp(0.8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, None), (1.3, 5.0)])
def test_token_logprobs_match_float64(backend, device, no_worse, dtype, temperature, softcap):
    """83 words are prime and fill no block."""
    logits, labels, weights = problem((3, 5), 83, dtype, device)
    actual = with_gradient(fused, logits, weights, labels, temperature, softcap)
    plain = with_gradient(formula, logits.float(), weights, labels, temperature, softcap)
    exact = with_gradient(formula, logits.double(), weights.double(), labels, temperature, softcap)
    for name, a, p, e in zip(("logprobs", "entropy", "gradient"), actual, plain, exact):
        no_worse(a, p.to(dtype) if name == "gradient" else p, e)


def test_gradient_of_confident_tokens_keeps_its_digits(backend, device):
    """p_y of 0.9996 and more at logits near 100: the gradient is 1 - p, and float32 of lse alone would lose it."""
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    logits[:, 7] = torch.tensor([90.0, 95.0, 99.0, 12.0, 14.0, 18.0])
    logits[:3] += torch.where(torch.arange(50) == 7, 0.0, 75.0)
    logits, labels = logits.to(device), torch.full((6,), 7, device=device)
    x = logits.clone().requires_grad_()
    logprobs = token_logprobs(x, labels)
    logprobs.sum().backward()
    p = logits.double().softmax(-1)
    assert (p[:, 7] > 0.999).all()
    exact = torch.nn.functional.one_hot(labels, 50) - p
    others = torch.arange(50, device=device) != 7
    torch.testing.assert_close(x.grad.double()[:, others], exact[:, others], rtol=1e-4, atol=0)
    # 1 - p and log p can be no finer than a few times the spacing of float32 at 1
    torch.testing.assert_close(x.grad.double()[:, 7], exact[:, 7], rtol=1e-5, atol=4e-7)
    torch.testing.assert_close(logprobs.double(), p[:, 7].log(), rtol=1e-5, atol=4e-7)


def test_masked_vocabulary_leaves_entropy_and_gradients_finite(backend, device, no_worse):
    """-inf logits: row 0 keeps two equal words (entropy ln 2), row 1's label itself is masked, row 2 is only masked."""
    logits = torch.full((4, 40), float("-inf"), device=device)
    logits[0, [3, 33]] = 1.5
    logits[1, :10] = torch.arange(10.0, device=device)
    logits[3] = torch.linspace(-1, 1, 40, device=device)
    labels = torch.tensor([33, 20, 5, 7], device=device)
    weights = torch.tensor([[1.0, 2.0, 0.5, -1.0], [0.3, -0.4, 0.5, 2.0]], device=device)
    logprobs, entropy, grad = with_gradient(fused, logits, weights, labels)
    assert logprobs[0].item() == pytest.approx(-math.log(2))
    assert entropy[0].item() == pytest.approx(math.log(2))
    assert logprobs[1].item() == float("-inf")
    assert logprobs[2].isnan() and entropy[2].isnan()
    assert grad[[0, 1, 3]].isfinite().all()
    # the masked label of row 1 still gets its share, as in eager PyTorch: d logprob_y / d z_y = 1 - p_y = 1
    assert grad[1, 20].item() == 2.0
    exact = with_gradient(formula, logits[3:].double(), weights[:, 3:].double(), labels[3:])
    for a, e in zip((logprobs[3:], entropy[3:], grad[3:]), exact):
        no_worse(a, e.float(), e)


@pytest.mark.parametrize("masked", [slice(0, 4200), slice(4096, None)])
def test_a_tile_that_is_masked_throughout(backend, device, no_worse, masked):
    """4,200 words of -inf are more than a tile or block, so its maximum is -inf; the last tile may be like that too."""
    logits, labels, weights = problem((2,), 4300, torch.float32, device)
    logits[:, masked], labels[:] = float("-inf"), torch.tensor([4250, 4299] if masked.start == 0 else [3, 4095])
    actual = with_gradient(fused, logits, weights, labels)
    plain = with_gradient(formula, logits, weights, labels)
    exact = with_gradient(formula, logits.double(), weights.double(), labels)
    for a, p, e in zip(actual, plain, exact):
        no_worse(a, p, e)


def test_a_row_masked_with_the_lowest_number_is_uniform(backend, device):
    """Adding log(8) to -3.4e38 changes nothing, so the log-sum-exp cannot carry it to the backward pass."""
    logits = torch.full((1, 8), torch.finfo(torch.float32).min, device=device)
    weights = torch.tensor([[1.0], [0.0]], device=device)
    logprobs, entropy, gradient = with_gradient(fused, logits, weights, torch.tensor([3], device=device))
    assert logprobs.item() == pytest.approx(-math.log(8)) and entropy.item() == pytest.approx(math.log(8))
    expected = torch.full((1, 8), -0.125)
    expected[0, 3] = 0.875
    torch.testing.assert_close(gradient.cpu(), expected)


def test_nan_stays_in_its_row_and_ignored_rows_are_never_read(backend, device):
    logits, labels, weights = problem((5,), 30, torch.float32, device)
    labels[:] = torch.tensor([1, IGNORED, 2, 3, 4])
    clean = with_gradient(fused, logits, weights, labels)
    logits[1:3] = float("nan")
    dirty = with_gradient(fused, logits, weights, labels)
    for c, d in zip(clean, dirty):
        assert d[2].isnan().all()
        assert (d[1] == 0).all()
        assert torch.equal(c[[0, 3, 4]], d[[0, 3, 4]])


def test_upstream_gradients_of_ignored_rows_are_ignored(backend, device):
    logits, labels, weights = problem((3,), 9, torch.float32, device)
    labels[:] = torch.tensor([2, IGNORED, 3])
    weights[:, 1] = float("nan")
    grad = with_gradient(lambda *a: tuple(torch.where(labels == 2, x, x) for x in fused(*a)), logits, weights, labels)[
        2
    ]
    assert grad.isfinite().all() and (grad[1] == 0).all() and (grad[0] != 0).any()


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("vocab_size", [1, 2, 4097])
def test_odd_sizes(backend, device, no_worse, rows, vocab_size):
    """One word always has logprob 0; 4097 words are one more than a tile."""
    logits, labels, weights = problem((rows,), vocab_size, torch.float32, device)
    labels.clamp_(min=0)
    actual = with_gradient(fused, logits, weights, labels)
    plain = with_gradient(formula, logits, weights, labels)
    exact = with_gradient(formula, logits.double(), weights.double(), labels)
    for a, p, e in zip(actual, plain, exact):
        no_worse(a, p, e)
    if vocab_size == 1:
        assert all((x == 0).all() for x in actual)


def test_a_real_vocabulary(backend, device, no_worse):
    """151,936 words (Qwen) in bf16: sums of many small terms."""
    logits, labels, weights = problem((2,), 151_936, torch.bfloat16, device, scale=2.0)
    labels.clamp_(min=0)
    actual = with_gradient(fused, logits, weights, labels)
    plain = with_gradient(formula, logits.float(), weights, labels)
    exact = with_gradient(formula, logits.double(), weights.double(), labels)
    for name, a, p, e in zip(("logprobs", "entropy", "gradient"), actual, plain, exact):
        no_worse(a, p.to(torch.bfloat16) if name == "gradient" else p, e)


def test_all_labels_ignored_gives_zeros_and_zero_gradients(backend, device):
    logits = torch.randn(2, 3, 11, device=device)
    labels = torch.full((2, 3), IGNORED, device=device)
    for result in with_gradient(fused, logits, torch.ones(2, 2, 3, device=device), labels):
        assert (result == 0).all()


@pytest.mark.parametrize("layout", ["expanded rows", "expanded words", "transposed", "sliced", "every second word"])
@pytest.mark.parametrize("inplace", [False, True])
def test_any_strides(backend, device, layout, inplace):
    """The same numbers whatever the memory behind them; rows that share memory are never overwritten."""
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(device)
    logits = {
        "expanded rows": lambda: base[:1].expand(6, 8),
        "expanded words": lambda: base[:, :1].expand(6, 8),
        "transposed": lambda: base.t()[:6, :6],
        "sliced": lambda: base[1:5, 2:7],
        "every second word": lambda: base[:, ::2],
    }[layout]()
    labels = torch.arange(len(logits), device=device) % logits.shape[1]
    weights = torch.randn(2, len(logits), generator=torch.Generator().manual_seed(1)).to(device)
    exact = with_gradient(formula, logits.double(), weights.double(), labels)
    leaf = logits.requires_grad_() if layout != "transposed" else logits.detach().requires_grad_()
    before = leaf.detach().clone()
    logprobs, entropy = fused(leaf, labels, inplace_backward=inplace)
    (grad,) = torch.autograd.grad((logprobs * weights[0] + entropy * weights[1]).sum(), leaf)
    for a, e in zip((logprobs, entropy, grad), exact):
        torch.testing.assert_close(a.detach().double(), e, rtol=1e-5, atol=1e-6)
    if not inplace or "expanded" in layout:
        assert torch.equal(leaf.detach(), before)


def test_inplace_backward_reuses_the_logits(backend, device):
    """The gradient lies where the logits were, and whoever still needs those is told."""
    logits, labels, _ = problem((4,), 12, torch.float32, device)
    expected = with_gradient(fused, logits, torch.ones(2, 4, device=device), labels)[2]
    hidden = logits.clone().requires_grad_()
    computed = hidden * 1.0
    logprobs, entropy = fused(computed, labels, inplace_backward=True)
    loss = (logprobs + entropy).sum()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(hidden.grad, expected)
    torch.testing.assert_close(computed.detach(), expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_only_what_is_used_has_a_gradient(backend, device):
    """Entropy alone, entropy beside an unused logprob, and detached entropy, which has none."""
    logits, labels, _ = problem((4,), 12, torch.float32, device)
    (exact,) = torch.autograd.grad(formula(x := logits.double().requires_grad_(), labels)[1].sum(), x)
    x = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(fused(x, labels)[1].sum(), x)
    torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-6)
    logprobs, entropy = token_logprobs(x, labels, entropy="detached")
    assert logprobs.requires_grad and not entropy.requires_grad
    assert not token_logprobs(logits, labels).requires_grad
    with torch.no_grad():
        assert not token_logprobs(x, labels).requires_grad


@pytest.mark.parametrize("vocab_size", [130, 8200])
def test_a_row_does_not_depend_on_its_batch(backend, device, vocab_size):
    """8200 words are two tiles of a Triton program, cut alike whatever the number of rows."""
    logits, labels, weights = problem((9,), vocab_size, torch.bfloat16, device)
    together = with_gradient(fused, logits, weights, labels)
    alone = with_gradient(fused, logits[4:5], weights[:, 4:5], labels[4:5])
    again = with_gradient(fused, logits, weights, labels)
    for t, a, r in zip(together, alone, again):
        assert torch.equal(t[4:5], a)
        assert torch.equal(t, r)


@pytest.mark.parametrize("bad", [-1, 7, 10**12])
def test_a_label_outside_the_vocabulary_is_named(backend, device, bad):
    logits, labels = torch.zeros(4, 7, device=device), torch.tensor([0, 1, bad, IGNORED], device=device)
    if device == "cpu":
        with pytest.raises(IndexError, match=rf"label {bad} in row 2 .*\[0, 7\)"):
            token_logprobs(logits, labels)
    else:
        logprobs = token_logprobs(logits, labels)
        assert logprobs[2].isnan() and logprobs[[0, 1, 3]].isfinite().all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 4),
    vocab_size=st.sampled_from([1, 2, 3, 17, 64, 257]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    softcap=st.sampled_from([None, 1.0, 30.0]),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    masked=st.booleans(),
    stride=st.sampled_from(["contiguous", "padded", "expanded"]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("name", ["cpu", "triton", "reference"])
def test_any_problem_matches_float64(name, rows, vocab_size, dtype, temperature, softcap, scale, masked, stride, seed):
    logits, labels, weights = problem((rows,), vocab_size, dtype, scale=scale, seed=seed)
    if masked and vocab_size > 2:
        logits[:, : vocab_size // 2] = float("-inf")
        labels[(labels >= 0) & (labels < vocab_size // 2)] = vocab_size - 1
    if stride == "padded":
        logits = torch.nn.functional.pad(logits, (0, 3))[:, :vocab_size]
    elif stride == "expanded" and rows:
        logits = logits[:1].expand(rows, vocab_size)
    exact = with_gradient(formula, logits.double(), weights.double(), labels, temperature, softcap)
    with use_backend(name):
        try:
            actual = with_gradient(fused, logits, weights, labels, temperature, softcap)
        except RuntimeError as error:
            pytest.skip(str(error))
    tolerance = 8 * torch.finfo(dtype).eps
    for name_, a, e in zip(("logprobs", "entropy", "gradient"), actual, exact):
        rtol = tolerance if name_ == "gradient" else 2e-5
        torch.testing.assert_close(a.double(), e, rtol=rtol, atol=rtol * max(1.0, scale / temperature) + 1e-6)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 2.0}])
def test_gradcheck(options):
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 4, IGNORED], [1, 1, 2]])
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, labels, entropy=True, **options), logits)


def test_operators_pass_opcheck():
    logits, labels = torch.randn(3, 6), torch.tensor([0, IGNORED, 5])
    forward, backward = torch.ops.rlhf_fast.token_logprobs_forward, torch.ops.rlhf_fast.token_logprobs_backward
    torch.library.opcheck(forward, (logits, labels, 0.7, 2.0, IGNORED))
    _, entropy, lse = forward(logits, labels, 0.7, 2.0, IGNORED)
    for grad_entropy in (None, torch.ones(3)):
        arguments = (logits.clone(), labels, lse, entropy, torch.ones(3), grad_entropy, 0.7, 2.0, IGNORED)
        torch.library.opcheck(backward, arguments)
        torch.library.opcheck(torch.ops.rlhf_fast.token_logprobs_backward_, arguments)


def test_every_operator_of_the_family_is_registered():
    assert {"token_logprobs_forward", "token_logprobs_backward", "token_logprobs_backward_"} <= set(IMPLEMENTATIONS)


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_without_a_graph_break(inplace):
    logits, labels, weights = problem((2, 3), 10, torch.float32)

    def loss(x):
        logprobs, entropy = token_logprobs(x, labels, entropy=True, inplace_backward=inplace)
        return (logprobs * weights[0] + entropy * weights[1]).sum()

    expected = torch.autograd.grad(loss(x := logits.clone().requires_grad_()), x)[0]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x = logits.clone().requires_grad_()
    compiled(x).backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"softcap": -1.0}, "softcap"),
        ({"entropy": "yes"}, "entropy"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels.shape"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    labels = arguments.pop("labels", torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=message):
        token_logprobs(torch.zeros(2, 4), labels, **arguments)


def test_sequence_logprobs_by_hand():
    """Sums -1 - 2 and -4; means -1.5 and -4; an empty row gives 0; NaN under the mask reaches nothing."""
    nan = float("nan")
    logprobs = torch.tensor([[-1.0, -2.0, nan], [nan, -4.0, nan], [nan, nan, nan]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0]]).bool()
    assert sequence_logprobs(logprobs, mask).tolist() == [-3.0, -4.0, 0.0]
    average = sequence_logprobs(logprobs, mask, average=True)
    assert average.tolist() == [-1.5, -4.0, 0.0]
    (grad,) = torch.autograd.grad((average * torch.tensor([1.0, 2.0, 3.0])).sum(), logprobs)
    assert grad.tolist() == [[0.5, 0.5, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]]


def test_packed_sequences_give_what_padded_ones_give():
    """Lengths 3, 0, 1, 4: an empty sequence in the middle."""
    lengths = [3, 0, 1, 4]
    logprobs, mask = torch.randn(8, dtype=torch.float64, requires_grad=True), torch.rand(8) < 0.7
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    for average in (False, True):
        packed = sequence_logprobs(logprobs, mask, average=average, cu_seqlens=cu_seqlens)
        rows = zip(logprobs.split(lengths), mask.split(lengths))
        expected = [x[m].sum() / (max(int(m.sum()), 1) if average else 1) for x, m in rows]
        torch.testing.assert_close(packed, torch.stack(expected))
    assert torch.autograd.gradcheck(lambda x: sequence_logprobs(x, mask, cu_seqlens=cu_seqlens), logprobs)


def test_sequence_logprobs_refuses_what_does_not_fit():
    x, mask = torch.zeros(4), torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match="number of tokens, 4; entry 1 is 3"):
        sequence_logprobs(x, mask, cu_seqlens=torch.tensor([0, 3], dtype=torch.int32))
    with pytest.raises(ValueError, match="mask must be bool"):
        sequence_logprobs(x, torch.ones(4))
    with pytest.raises(ValueError, match="shape"):
        sequence_logprobs(torch.zeros(3), mask)
