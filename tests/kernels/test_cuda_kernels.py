"""The CUDA kernels' own code, run on the host thread by thread (cuda_on_host.h), as the backend of the operations.

Everything but nvcc and the launch is what a GPU runs: the dispatch, cuda_impl.py, the order of the arguments, the kernels.
So the operations' own tests are run once more here, and then what concerns CUDA alone: sums in one order whichever block
finishes last, and rows that begin at any address.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import inspect
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf_fast.kernels import cuda_impl, gae, kl_shaped_gae, policy_loss, token_logprobs, use_backend, value_loss
from tests.kernels import test_advantages, test_linear_logprobs, test_logprobs, test_policy, test_preference

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++") or shutil.which("clang++")
FAMILIES = ("advantages", "linear_logprobs", "logprobs", "policy", "preference")
NAN = float("nan")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler is installed")
    path = tmp_path_factory.mktemp("cuda_on_host") / "library.so"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-w", f"-I{ROOT}"]
    flags += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    source = Path(__file__).with_name("cuda_on_host.cpp")
    subprocess.run([COMPILER, *flags, str(source), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


class OnHost:
    """Stands for ``_C.cuda``: the same functions, run on the host."""

    def __init__(self, library, threads: int = 96, order: int = 0):
        self.library, self.threads, self.order = library, threads, order

    def kl_shaped_gae_workspace(self, count: int) -> int:
        return 24 * count + 12

    loss_workspace = kl_shaped_gae_workspace

    def __getattr__(self, name):
        chosen = {"gae": [self.threads], "kl_shaped_gae": [self.threads, self.order]}
        chosen |= {"policy_loss": [self.order], "value_loss": [self.order]}
        dropped = 2 if name in ("kl_shaped_gae", "policy_loss", "value_loss") else 1  # workspace and stream

        def run(*arguments):
            arguments = [*chosen.get(name, []), *arguments[: len(arguments) - dropped]]
            as_c = [ctypes.c_float(x) if isinstance(x, float) else ctypes.c_int64(int(x)) for x in arguments]
            getattr(self.library, name)(*as_c)

        return run


@pytest.fixture
def put_on_host(library, monkeypatch):
    """A function that replaces the native module by the host's version, e.g. with another order of the blocks."""

    def put(**options):
        native = SimpleNamespace(cuda=OnHost(library, **options))
        for family in FAMILIES:
            monkeypatch.setattr(importlib.import_module(f"rlhf_fast.kernels.{family}.cuda_impl"), "_C", native)

    monkeypatch.setattr(cuda_impl, "unsupported", lambda *tensors: _refuse_double(tensors))
    monkeypatch.setattr(cuda_impl, "launch_on", lambda device: contextlib.nullcontext(0))
    put()
    return put


def _refuse_double(tensors) -> str | None:
    return "float64 runs on the reference only" if any(x.dtype == torch.float64 for x in tensors) else None


@pytest.fixture(autouse=True)
def backend(put_on_host):
    with use_backend("cuda,reference"):
        yield "cuda"


@pytest.fixture
def device() -> str:
    return "cpu"


def _tests_of(module):
    """The tests of an operation that depend on its backend; compiled graphs do not see a module that is replaced."""
    takes_none = module in (test_policy, test_preference)
    for name, test in vars(module).items():
        if not name.startswith("test_") or any(part in name for part in ("compile", "gradcheck", "opcheck")):
            continue
        if takes_none or "backend" in inspect.signature(test).parameters:
            yield f"{name}_of_{module.__name__.rpartition('test_')[2]}", test


for tested in (test_advantages, test_logprobs, test_linear_logprobs, test_policy, test_preference):
    globals().update(_tests_of(tested))
test_kl_shaped_gae_is_its_three_parts_on_the_host = test_advantages.test_kl_shaped_gae_is_its_three_parts


def test_the_cuda_code_is_what_these_tests_run(monkeypatch):
    """Break one function of the host's version: the operation must feel it."""
    broken = SimpleNamespace(cuda=SimpleNamespace(gae=lambda *arguments: None))
    monkeypatch.setattr(importlib.import_module("rlhf_fast.kernels.advantages.cuda_impl"), "_C", broken)
    rewards = torch.ones(1, 2)
    assert not (gae(rewards, rewards, rewards.bool())[0] == 1).all()


# ---------------------------------------------------------------------------------------------------------------------
# Sums in one order: blocks finish as they like, and the last one adds up what all of them left
# ---------------------------------------------------------------------------------------------------------------------


def tokens_of(length, seed=0):
    """Six tensors of log-probabilities and the like, and a mask with a long gap; NaN where masked."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(length, generator=generator) < 0.8
    mask[length // 3 : length // 2] = False
    tensors = torch.randn(6, length, generator=generator) * 0.4 - 1
    return *torch.where(mask, tensors, NAN), mask


# three blocks of 1024 tokens, the last one partial; a block per sequence, one of them empty, one longer than a tile
LENGTH, OFFSETS = 2500, torch.tensor([0, 7, 7, 1300, 2500], dtype=torch.int32)


def policy_results(aggregate, level):
    logprobs, old, advantages, ref, rollout, entropy, mask = tokens_of(LENGTH)
    leaves = logprobs.requires_grad_(), entropy.requires_grad_()
    options = {"ref_logprobs": ref, "kl_coef": 0.1, "rollout_logprobs": rollout, "is_clip": 1.5, "entropy_coef": 0.02}
    options |= {"aggregate": aggregate, "level": level, "cu_seqlens": OFFSETS, "denominator": 300.0, "entropy": entropy}
    loss, figures = policy_loss(logprobs, old, advantages, mask, **options)
    return loss.detach(), *(figures[name] for name in sorted(figures)), *torch.autograd.grad(loss, leaves)


def value_results(aggregate, level):
    values, old, returns, *_, mask = tokens_of(LENGTH)
    loss, figures = value_loss(values.requires_grad_(), old, returns, mask, aggregate=aggregate, cu_seqlens=OFFSETS)
    return loss.detach(), *(figures[name] for name in sorted(figures)), *torch.autograd.grad(loss, values)


def gae_results(aggregate, level):
    logprobs, ref, values, *_, mask = tokens_of(LENGTH)
    scores = torch.tensor([1.0, NAN, -0.5, 2.0])
    return kl_shaped_gae(scores, logprobs, ref, values, mask, kl_coef=0.1, clip=1.5, cu_seqlens=OFFSETS)


@pytest.mark.parametrize(
    ("results", "aggregate", "level"),
    [
        (policy_results, "token", "token"),
        (policy_results, "sequence", "sequence"),
        (value_results, "token", None),
        (value_results, "sequence", None),
        (gae_results, None, None),
    ],
)
def test_the_order_in_which_blocks_finish_changes_no_bit(put_on_host, results, aggregate, level):
    first, *others = [put_on_host(order=order) or results(aggregate, level) for order in range(3)]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    with use_backend("reference"):
        plain = results(aggregate, level)
    torch.testing.assert_close(first, plain, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("threads", [32, 96])
@pytest.mark.parametrize("whiten", [False, True])
def test_shaped_gae_of_sequences_longer_than_a_tile(put_on_host, threads, whiten):
    """A tile is 128 or 384 tokens; the last unmasked token, which takes the score, lies tiles before the end."""
    put_on_host(threads=threads)
    logprobs, ref, values, *_, mask = tokens_of(3 * 900)
    mask[900 + 40 : 1800] = False
    mask[1800:] = False
    shape = (3, 900)
    scores = torch.tensor([3.0, -1.0, NAN])  # the third has no token to put its score
    tensors = [x.view(shape) for x in (logprobs, ref, values, mask)]
    options = {"kl_coef": 0.2, "gamma": 0.97, "lam": 0.9, "estimator": "k3", "bootstrap": torch.randn(3)}
    ours = kl_shaped_gae(scores, *tensors, **options, whiten=whiten)
    with use_backend("reference"):
        exact = [x.double() if x.is_floating_point() else x for x in (scores, *tensors)]
        options["bootstrap"] = options["bootstrap"].double()
        exact = kl_shaped_gae(*exact, **options, whiten=whiten)
    for a, e in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)


def test_a_mean_far_from_zero_does_not_cost_the_variance_its_digits():
    """Advantages near 1000 with a spread of 1: squares minus the squared mean would keep three digits of it."""
    generator = torch.Generator().manual_seed(1)
    values, mask = torch.randn(4, 700, generator=generator) - 1000.0, torch.ones(4, 700, dtype=torch.bool)
    zeros = torch.zeros(4, 700)
    options = {"kl_coef": 0.0, "gamma": 1.0, "lam": 0.0, "bootstrap": torch.zeros(4)}
    advantages = kl_shaped_gae(torch.zeros(4), zeros, zeros, values, mask, **options)[0].double()
    plain = kl_shaped_gae(torch.zeros(4), zeros, zeros, values, mask, **options, whiten=False)[0].double()
    expected = (plain - plain.mean()) / plain.var(correction=0).sqrt()
    torch.testing.assert_close(advantages, expected, rtol=1e-5, atol=1e-5)


def recursion(rewards, values, mask, bootstrap, gamma, lam):
    """GAE of one sequence in float64, as on paper; masked tokens are passed over."""
    advantages, returns = torch.zeros(2, len(rewards), dtype=torch.float64)
    next_value, advantage = float(bootstrap), 0.0
    for t in reversed(range(len(rewards))):
        if mask[t]:
            value = values[t].item()
            advantage = rewards[t].item() + gamma * next_value - value + gamma * lam * advantage
            next_value = value
            advantages[t], returns[t] = advantage, advantage + value
    return advantages, returns


# 32 threads: one warp, no exchange across warps; 96: three warps. A thread owns 4 tokens, so a tile is 128 or 384.
@pytest.mark.parametrize("threads", [32, 96])
# 1: one token; 6: 16-byte loads do not apply; 128 and 384: exactly one tile; 900: several, the first one partial
@pytest.mark.parametrize("length", [1, 6, 128, 384, 900])
def test_gae_of_every_number_of_tiles(put_on_host, threads, length):
    put_on_host(threads=threads)
    generator = torch.Generator().manual_seed(length)
    rewards, values = torch.randn(2, 3, length, generator=generator)
    mask = torch.rand(3, length, generator=generator) < 0.7
    mask[1, length // 3 :] = False  # whole tiles without a token: the carry passes over them
    bootstrap = torch.randn(3, generator=generator)
    exact = [recursion(*row, 0.97, 0.95) for row in zip(rewards, values, mask, bootstrap, strict=True)]
    rewards[~mask], values[~mask] = NAN, float("inf")
    ours = gae(rewards, values, mask, 0.97, 0.95, bootstrap=bootstrap)
    for row in range(3):
        torch.testing.assert_close(ours[0][row].double(), exact[row][0], rtol=1e-6, atol=4e-6)
        torch.testing.assert_close(ours[1][row].double(), exact[row][1], rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("threads", [32, 96])
def test_gae_of_packed_sequences_that_begin_at_every_alignment(put_on_host, threads):
    """Lengths 5, 0, 400 and 131: an empty sequence, one longer than a tile."""
    put_on_host(threads=threads)
    offsets = torch.tensor([0, 5, 5, 405, 536], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 536, generator=generator)
    mask = torch.rand(536, generator=generator) < 0.9
    ours = gae(rewards, values, mask, 1.0, 0.9, cu_seqlens=offsets)
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        exact = recursion(rewards[begin:end], values[begin:end], mask[begin:end], 0.0, 1.0, 0.9)
        torch.testing.assert_close(ours[0][begin:end].double(), exact[0], rtol=1e-6, atol=4e-6)
        torch.testing.assert_close(ours[1][begin:end].double(), exact[1], rtol=1e-6, atol=4e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Rows at any address
# ---------------------------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 7, 131, 4099])
def test_a_row_gives_the_same_bits_at_every_address(dtype, vocab_size):
    """With an odd V rows begin at every multiple of the item size; 4099 fills more than one round of the threads."""
    generator = torch.Generator().manual_seed(vocab_size)
    row = torch.randn(vocab_size, generator=generator).mul(4).to(dtype)
    results = []
    for shift in range(9):
        memory = torch.full((vocab_size + 16,), NAN, dtype=dtype)
        logits = memory[shift : shift + vocab_size].copy_(row)[None].requires_grad_()
        both = token_logprobs(logits, torch.tensor([vocab_size // 2]), entropy=True, temperature=0.7)
        (gradient,) = torch.autograd.grad(both, logits, [torch.tensor([0.7]), torch.tensor([-0.3])])
        results.append((*both, gradient))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_certain_token_and_its_rivals_in_one_thread_keep_their_digits(dtype):
    """Added to the 1 of the maximum, rivals of 1e-9 would vanish; 1 - p and the entropy are made of nothing else."""
    logits = torch.tensor([[20.0, 0.5, -0.25, -1.0]]).to(dtype).requires_grad_()
    both = token_logprobs(logits, torch.tensor([0]), entropy=True)
    # large, or float16 could not hold the result
    (gradient,) = torch.autograd.grad(both[0], logits, torch.tensor([1e6]))
    rivals = (logits[0].detach().double() - 20)[1:]
    share = rivals.exp().sum() / (1 + rivals.exp().sum())
    torch.testing.assert_close(gradient[0, 0].double(), 1e6 * share, rtol=2 * torch.finfo(dtype).eps + 1e-6, atol=0)
    entropy = share - (rivals.exp() * rivals).sum()
    torch.testing.assert_close(both[1].double(), entropy[None], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", range(8))
def test_gradient_rows_go_to_any_address_and_nowhere_else(dtype, shift):
    """float32 logits and a gradient that lie differently to 16 bytes: what the fused head does with an odd V."""
    rows, vocab_size = 3, 37
    generator = torch.Generator().manual_seed(shift)
    logits = torch.randn(rows, vocab_size, generator=generator) * 3
    labels = torch.tensor([0, -100, 36])
    memory = torch.full((rows * vocab_size + 16,), 77.0, dtype=dtype)
    out = memory[shift : shift + rows * vocab_size].view(rows, vocab_size)
    head = importlib.import_module("rlhf_fast.kernels.linear_logprobs.cuda_impl")
    head.head_rows(logits, labels, 0.7, None, -100, 1.3, out)
    z = logits.double() * 1.3 / 0.7
    exact = (torch.nn.functional.one_hot(labels.clamp(min=0), vocab_size) - z.softmax(-1)) * 1.3 / 0.7
    exact[1] = 0.0
    torch.testing.assert_close(out.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert (memory[:shift] == 77).all() and (memory[shift + rows * vocab_size :] == 77).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_label_outside_the_vocabulary_gives_a_row_of_nan(dtype):
    """On a device nobody can raise: its row is NaN, the others are as without it, nothing is read out of bounds."""
    logprobs = importlib.import_module("rlhf_fast.kernels.logprobs.cuda_impl")
    logits = torch.randn(3, 13, generator=torch.Generator().manual_seed(0)).to(dtype)
    bad, good = torch.tensor([2, 10**12, -5]), torch.tensor([2, 0, 0])
    options = (0.9, 3.0, -100)
    forward, plain = (logprobs.token_logprobs_forward(logits, labels, *options) for labels in (bad, good))
    assert forward[0].isnan().tolist() == [False, True, True] and forward[0][0] == plain[0][0]
    out = torch.empty_like(logits)
    ones = torch.ones(3)
    logprobs.token_logprobs_backward(logits, bad, forward[2], forward[1], ones, None, *options, out)
    assert out.isnan().all(1).tolist() == [False, True, True] and not out[0].isnan().any()


# ---------------------------------------------------------------------------------------------------------------------
# Losses: padded tokens in the flat kernel
# ---------------------------------------------------------------------------------------------------------------------


# 7: four neighbours span two sequences; 3: a vector spans three; 1: every token is a sequence
@pytest.mark.parametrize("shape", [(300, 7), (5, 3), (9, 1), (2, 1024)])
def test_padded_advantages_per_sequence_find_their_tokens(shape):
    logprobs, old, *_, mask = (x.view(shape) for x in tokens_of(shape[0] * shape[1]))
    advantages = torch.randn(shape[0], generator=torch.Generator().manual_seed(2))
    results = []
    for given in (advantages, advantages[:, None].expand(shape)):
        leaf = logprobs.detach().clone().requires_grad_()
        loss, _ = policy_loss(leaf, old, given, mask)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_ratio_that_is_nan_reaches_loss_and_figures():
    logprobs = torch.tensor([[-1.0, NAN, -2.0]])
    loss, figures = policy_loss(logprobs, torch.full((1, 3), -1.0), torch.ones(1), torch.ones(1, 3, dtype=torch.bool))
    assert loss.isnan() and figures["ratio_max"].isnan() and figures["ratio_mean"].isnan()
