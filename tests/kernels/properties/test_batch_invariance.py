"""A row's result has the same bits whatever rows surround it, in whatever order, on any number of threads."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast import kernels
from rlhf_fast.kernels import use_backend
from tests.kernels.calls import NAN, evaluate

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
ORDERS = ("reference", "cpu,reference", "triton,reference")
ROWS = 7
SOME = torch.tensor([5, 2, 3])  # a smaller batch, in another order


def device_of(order):
    return "cuda" if order.startswith("triton") and torch.cuda.is_available() else "cpu"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_of_all(run, *inputs):
    """Results and gradients of the whole batch under uneven upstream gradients that belong to the rows."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    results = [x for x in run(*leaves) if x.dim() and len(x) == len(inputs[0])]
    wanted = [x for x in results if x.requires_grad]
    trained = [x for x in leaves if x.requires_grad]
    # the last input numbers the rows, so that a row keeps its upstream gradient wherever it stands
    upstream = [(inputs[-1] + 1.5).view(-1, *[1] * (x.dim() - 1)).to(x.dtype).expand_as(x) for x in wanted]
    grads = torch.autograd.grad(wanted, trained, upstream, allow_unused=True) if wanted else ()
    return [x.detach() for x in (*results, *(g for g in grads if g is not None))]


def same_bits(run, *inputs, device):
    """The batch, some of its rows in another order, and one row alone."""
    inputs = [x.to(device) for x in (*inputs, torch.arange(len(inputs[0])))]
    together = rows_of_all(run, *inputs)
    assert together
    for rows in (SOME, SOME[1:2]):
        for a, b in zip(rows_of_all(run, *(x[rows.to(device)] for x in inputs)), together, strict=True):
            assert torch.equal(a.nan_to_num(7.0), b[rows.to(device)].nan_to_num(7.0))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("vocab_size", [1, 2, 61, 521, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logprobs(order, vocab_size, dtype):
    """521 words are more than a block of the CPU kernel, 9,001 several tiles of the Triton kernel."""
    logits = (3 * random(ROWS, vocab_size)).to(dtype)
    labels = torch.randint(vocab_size, (ROWS,), generator=torch.Generator().manual_seed(1))

    def run(x, y, _):
        return kernels.token_logprobs(x, y, temperature=0.7, softcap=20.0, entropy=True)

    with use_backend(order):
        same_bits(run, logits, labels, device=device_of(order))


@pytest.mark.parametrize("order", ORDERS)
def test_losses_and_advantages_of_rows(order):
    """Pairs, rankings, sequences and groups: every operation whose rows share nothing."""
    mask = torch.rand(ROWS, 40, generator=torch.Generator().manual_seed(2)) < 0.8
    a, b, c = (torch.where(mask, random(ROWS, 40, seed=s), NAN) for s in (3, 4, 5))
    one = random(ROWS, seed=6)
    cases = {
        "sequence_logprobs": (lambda x, m, _: (kernels.sequence_logprobs(x, m, average=True),), a, mask),
        "gae": (lambda x, y, m, e, _: kernels.gae(x, y, m, 0.9, 0.8, bootstrap=e), a, b, mask, one),
        "shaped_rewards": (lambda e, x, y, m, _: (kernels.shaped_rewards(e, x, y, m, kl_coef=0.1),), one, a, b, mask),
        "kl_shaped_gae": (
            lambda e, x, y, v, m, _: kernels.kl_shaped_gae(e, x, y, v, m, kl_coef=0.1, whiten=False),
            one, a, b, c, mask,
        ),
        "kl_penalty": (lambda x, y, _: (kernels.kl_penalty(x, y, "k3"),), a, b),
        "dpo_loss": (lambda w, x, y, z, _: kernels.dpo_loss(w, x, y, z), one, one.flip(0), one / 3, one.flip(0) / 5),
        "pairwise_reward_loss": (lambda x, y, _: (kernels.pairwise_reward_loss(x, y, center=0.1),), one, one.flip(0)),
        "ranked_reward_loss": (lambda x, m, _: (kernels.ranked_reward_loss(x, m),), a[:, :6], mask[:, :6]),
    }  # fmt: skip
    with use_backend(order):
        for run, *inputs in cases.values():
            same_bits(run, *inputs, device=device_of(order))


@pytest.mark.parametrize("order", ORDERS)
def test_packed_sequences(order):
    """Sequence 3 of 5 alone, and after all others: the same advantages and sums."""
    device = device_of(order)
    lengths = [70, 3, 0, 41, 1]
    tokens = torch.arange(sum(lengths), device=device).split(lengths)
    rewards, values = random(2, sum(lengths), seed=1).to(device)
    mask = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(2)).to(device) < 0.8

    def run(numbers):
        at = torch.cat([tokens[i] for i in numbers])
        cu_seqlens = torch.tensor([0, *(lengths[i] for i in numbers)]).cumsum(0).to(torch.int32).to(device)
        advantages, returns = kernels.gae(rewards[at], values[at], mask[at], 0.9, 0.8, cu_seqlens=cu_seqlens)
        sums = kernels.sequence_logprobs(values[at], mask[at], cu_seqlens=cu_seqlens)
        n = lengths[3]
        place = sum(lengths[i] for i in numbers[: numbers.index(3)])
        return advantages[place : place + n], returns[place : place + n], sums[numbers.index(3)]

    with use_backend(order):
        alone = run([3])
        for numbers in ([0, 1, 2, 3, 4], [4, 3, 2], [0, 3]):
            for a, b in zip(run(numbers), alone):
                assert torch.equal(a, b)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("trained", ["frozen head", "trained head"])
def test_the_fused_head_to_1e_6(order, trained):
    """BLAS chooses kernels by shape, so the head's rows agree to 1e-6 of their size, in any batch and chunk."""
    device = device_of(order)
    hidden, weight = random(ROWS, 16).to(device), random(43, 16, seed=1).to(device)
    labels = torch.randint(43, (ROWS,), generator=torch.Generator().manual_seed(2)).to(device)

    def run(rows, chunk_size):
        x, w = hidden[rows], weight.clone().requires_grad_(trained == "trained head")
        return evaluate(
            lambda h: kernels.linear_logprobs(h, w, labels[rows], entropy="detached", chunk_size=chunk_size), (x,)
        )[:2] + [x * 0 + _gradient(x, w, labels[rows], chunk_size)]

    with use_backend(order):
        together = run(torch.arange(ROWS), None)
        for rows in (SOME, SOME[:1], torch.arange(ROWS)):
            for chunk_size in (None, 1, 2):
                for a, b in zip(run(rows, chunk_size), together, strict=True):
                    torch.testing.assert_close(a, b[rows], rtol=1e-6, atol=1e-6 * b.abs().max().item())


def _gradient(hidden, weight, labels, chunk_size):
    x = hidden.clone().requires_grad_()
    (grad,) = torch.autograd.grad(kernels.linear_logprobs(x, weight, labels, chunk_size=chunk_size).sum(), x)
    return grad


@pytest.mark.parametrize("name", ["token_logprobs", "gae", "kl_shaped_gae", "policy_loss", "value_loss"])
def test_cpu_kernels_on_any_number_of_threads(name):
    """More than the 65,536 numbers from which threads are worth it; a loss's sum has one order too."""
    rows, length = 96, 1000
    mask = torch.rand(rows, length, generator=torch.Generator().manual_seed(2)) < 0.8
    a, b, c = (random(rows, length, seed=s) for s in (3, 4, 5))
    scores = random(rows)
    labels = torch.randint(length, (rows,), generator=torch.Generator().manual_seed(1))
    run, leaf = {
        "token_logprobs": (lambda x: kernels.token_logprobs(x, labels, entropy=True), a),
        "gae": (lambda _: kernels.gae(a, b, mask, 0.9, 0.8), a),
        "kl_shaped_gae": (lambda _: kernels.kl_shaped_gae(scores, a, b, c, mask, kl_coef=0.1), a),
        "policy_loss": (
            lambda x: kernels.policy_loss(x, b, scores, mask, ref_logprobs=c, kl_coef=0.1)[:1],
            0.1 * a + b,
        ),
        "value_loss": (lambda x: kernels.value_loss(x, b, c, mask)[:1], 0.1 * a + b),
    }[name]
    before = torch.get_num_threads()
    try:
        results = []
        with use_backend("cpu,reference"):
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                x = leaf.clone().requires_grad_()
                outputs = run(x)
                wanted = [y for y in outputs if y.requires_grad]
                grads = torch.autograd.grad([y.sum() for y in wanted], x) if wanted else ()
                results.append([y.detach() for y in (*outputs, *grads)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("order", ORDERS)
def test_decode_attention(order):
    """Slots of different lengths, several blocks of keys and, in the Triton kernel, shares of them."""
    query, lengths = random(ROWS, 4, 24), torch.tensor([600, 1, 64, 65, 513, 30, 599])
    keys, values = random(ROWS, 2, 600, 24, seed=1), random(ROWS, 2, 600, 24, seed=2)

    def run(q, k, v, n, _):
        return (kernels.decode_attention(q, k, v, n),)

    with use_backend(order):
        same_bits(run, query, keys, values, lengths, device=device_of(order))
