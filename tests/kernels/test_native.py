"""What the compiled module owes its callers besides the right numbers on the best instruction set: the same numbers on
every other, clear errors instead of crashes, results that do not depend on threads, and an import that touches nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

native = pytest.importorskip("rlhf_fast._C", reason="the native module is not built")

from rlhf_fast.kernels.advantages import cpu_impl as advantages
from rlhf_fast.kernels.linear_logprobs import cpu_impl as linear_logprobs
from rlhf_fast.kernels.logprobs import cpu_impl as logprobs

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=native.cpu.isas())
def isa(request):
    """Run the test once per instruction set that this processor has."""
    before = native.cpu.isa()
    native.cpu.select_isa(request.param)
    yield request.param
    native.cpu.select_isa(before)


def oracle(logits, labels, temperature=1.0, softcap=None, logit_scale=1.0, up_logprob=None, up_entropy=None):
    """Log-probabilities, entropy and the gradient of their weighted sum, in float64, -inf logits included."""
    x = logits.double() * logit_scale
    z = (softcap * torch.tanh(x / softcap) if softcap else x) / temperature
    slope = logit_scale / temperature * (1 - torch.tanh(x / softcap) ** 2 if softcap else 1.0)
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    entropy = -torch.where(p == 0, 0.0, p * log_p).sum(-1)
    gradient = torch.zeros_like(z)
    if up_logprob is not None:
        onehot = torch.nn.functional.one_hot(labels, z.shape[-1])
        gradient += up_logprob.double()[:, None] * (onehot - p)
    if up_entropy is not None:
        gradient -= up_entropy.double()[:, None] * torch.where(p == 0, 0.0, p * (log_p + entropy[:, None]))
    return log_p.gather(-1, labels[:, None])[:, 0], entropy, gradient * slope


def close(actual, expected, ulps=4.0):
    """Equal up to a few units in the last place, of the value or of logits near 10; NaN and inf where they belong."""
    eps = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=ulps * eps, atol=1e-6, equal_nan=True)


# 1 and 2: the smallest vocabularies; 97: less than a vector block; 512 and 513: one block, one more; 1543: a prime
@pytest.mark.parametrize("vocab", [1, 2, 97, 512, 513, 1543])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_gives_the_exact_logprobs_and_gradients(isa, dtype, vocab):
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(6, vocab, generator=generator) * 3).to(dtype)
    labels = torch.randint(0, vocab, (6,), generator=generator)
    logits[0, labels[0]] += 14  # one nearly certain token, p > 0.999
    up_logprob, up_entropy = torch.randn(2, 6, generator=generator)
    for temperature, softcap in ((1.0, None), (0.7, 5.0)):
        exact = oracle(logits, labels, temperature, softcap, 1.0, up_logprob, up_entropy)
        ours = logprobs.token_logprobs_forward(logits, labels, temperature, softcap, -100)
        close(ours[0], exact[0])
        close(ours[1], exact[1])
        gradient = torch.full_like(logits, NAN)
        logprobs.token_logprobs_backward(
            logits, labels, ours[2], ours[1], up_logprob, up_entropy, temperature, softcap, -100, gradient
        )
        close(gradient, exact[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_keeps_infinities_and_nan_in_their_rows(isa, dtype):
    """Rows: masked vocabulary; the label masked; a NaN; all -inf; a +inf; lowest finite number everywhere; a plain one."""
    vocab = 700  # more than one block, so that a block of nothing but -inf comes first
    logits = torch.randn(7, vocab, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.full((7,), vocab - 1)
    logits[0, :600] = -INF
    logits[1, 100:] = -INF
    logits[2, 5] = NAN
    logits[3] = -INF
    logits[4, 9] = INF
    logits[5] = torch.finfo(dtype).min
    ones = torch.ones(7)
    exact = oracle(logits, labels, up_logprob=ones, up_entropy=ones)
    ours = logprobs.token_logprobs_forward(logits, labels, 1.0, None, -100)
    close(ours[0], exact[0])
    close(ours[1], exact[1])
    assert ours[0][1] == -INF
    assert ours[0].isnan().tolist() == [False, False, True, True, True, False, False]
    gradient = torch.full_like(logits, 7.0)
    logprobs.token_logprobs_backward(logits, labels, ours[2], ours[1], ones, ones, 1.0, None, -100, gradient)
    close(gradient, exact[2])
    assert (gradient[0, :600] == 0).all()


def test_a_certain_token_keeps_the_digits_of_one_minus_p(isa):
    """p = .9996 at logits near 100: a float32 log-sum-exp, off by 4e-6, would make p - 1 wrong by one percent."""
    logits = torch.full((1, 1000), 85.0)
    logits[0, 3] = 85.0 + 14.7
    label = torch.tensor([3])
    exact = oracle(logits, label, up_logprob=torch.ones(1))
    ours = logprobs.token_logprobs_forward(logits, label, 1.0, None, -100)
    gradient = torch.empty_like(logits)
    logprobs.token_logprobs_backward(logits, label, ours[2], ours[1], torch.ones(1), None, 1.0, None, -100, gradient)
    assert 0.999 < ours[0].exp().item() < 0.9999
    torch.testing.assert_close(gradient.double(), exact[2], rtol=2e-6, atol=0)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=2e-6, atol=0)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_head_rows_give_the_gradient_of_the_raw_logits(isa, out_dtype):
    """Row 2 is ignored and holds NaN: zeros, never read."""
    logits = torch.randn(5, 1100, generator=torch.Generator().manual_seed(1)) * 40
    labels = torch.tensor([0, 1099, 0, 7, 511])
    exact = oracle(logits, labels, 0.8, 20.0, 0.3, torch.ones(5))
    logits[2], labels[2] = NAN, -100
    out = torch.full((5, 1100), NAN, dtype=out_dtype)
    ours = linear_logprobs.head_rows(logits, labels, 0.8, 20.0, -100, 0.3, out)
    keep = labels != -100
    close(ours[0][keep], exact[0][keep])
    close(ours[1][keep], exact[1][keep])
    close(out[keep], exact[2][keep])
    assert ours[0][2] == ours[1][2] == 0 and (out[2] == 0).all()
    without = linear_logprobs.head_rows(logits, labels, 0.8, 20.0, -100, 0.3, None)
    assert all(torch.equal(a, b) for a, b in zip(ours, without, strict=True))


def test_rounding_to_16_bits_is_to_nearest_even_for_every_class_of_number(isa):
    """Through the kernel: with V = 2 and logits (x, 0) the second gradient is -g * sigmoid(x), rounded once."""
    x = torch.cat([torch.linspace(-60, 60, 4001), torch.tensor([0.0, -INF])])
    logits = torch.stack([x, torch.zeros_like(x)], -1)
    labels = torch.zeros(len(x), dtype=torch.long)
    ours = logprobs.token_logprobs_forward(logits, labels, 1.0, None, -100)
    upstream = torch.full_like(x, 70000.0)  # beyond half's range: overflow to infinity is one of the classes
    wide = torch.empty_like(logits)
    arguments = (logits, labels, ours[2], ours[1], upstream, None, 1.0, None, -100)
    logprobs.token_logprobs_backward(*arguments, wide)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = torch.empty_like(logits, dtype=dtype)
        logprobs.token_logprobs_backward(*arguments, narrow)
        assert torch.equal(narrow, wide.to(dtype))
    subnormal = wide.to(torch.float16).abs()
    assert ((subnormal > 0) & (subnormal < torch.finfo(torch.float16).tiny)).any()
    assert subnormal.isinf().any()


def test_every_instruction_set_gives_the_same_advantages(isa):
    """Against the recursion in float64. 300 tokens: three tiles; 11 rows: a full group of 8 and a part of one."""
    generator = torch.Generator().manual_seed(2)
    rewards, values = torch.randn(2, 11, 300, generator=generator)
    mask = torch.rand(11, 300, generator=generator) < 0.6
    bootstrap = torch.randn(11, generator=generator)
    exact = torch.zeros(2, 11, 300, dtype=torch.float64)
    for row in range(11):
        next_value, advantage = bootstrap[row].item(), 0.0
        for t in reversed(range(300)):
            if mask[row, t]:
                value = values[row, t].item()
                advantage = rewards[row, t].item() + 0.98 * next_value - value + 0.98 * 0.9 * advantage
                next_value = value
                exact[:, row, t] = torch.tensor([advantage, advantage + value])
    rewards[~mask], values[~mask] = NAN, INF
    ours = advantages.gae(rewards, values, mask, bootstrap, 0.98, 0.9)
    torch.testing.assert_close(torch.stack(ours).double(), exact, rtol=1e-6, atol=4e-6)
    # the same tokens packed, the sequences of all lengths from 0 on
    keep = torch.arange(300) >= 300 - torch.arange(0, 300, 28)[:, None]
    offsets = torch.cat([torch.zeros(1), keep.sum(-1).cumsum(0)]).int()
    packed = advantages.gae_packed(rewards[keep], values[keep], mask[keep], bootstrap, offsets, 0.98, 0.9)
    assert torch.equal(packed[0], ours[0][keep]) and torch.equal(packed[1], ours[1][keep])


def test_results_do_not_depend_on_the_number_of_threads():
    logits = torch.randn(67, 3001, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(67)
    rewards, values = torch.randn(2, 70, 1000, generator=torch.Generator().manual_seed(4))
    mask = torch.ones(70, 1000, dtype=torch.bool)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            forward = logprobs.token_logprobs_forward(logits, labels, 1.0, None, -100)
            gradient = torch.empty_like(logits)
            logprobs.token_logprobs_backward(
                logits, labels, forward[2], forward[1], forward[0], None, 1.0, None, -100, gradient
            )
            results.append((*forward, gradient, *advantages.gae(rewards, values, mask, None, 0.99, 0.95)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_gradient_may_overwrite_the_logits():
    for dtype in DTYPES:
        for softcap in (None, 4.0):
            logits = torch.randn(4, 1300, generator=torch.Generator().manual_seed(5)).to(dtype)
            labels = torch.tensor([1, -100, 1299, 600])
            forward = logprobs.token_logprobs_forward(logits, labels, 1.0, softcap, -100)
            arguments = (labels, forward[2], forward[1], torch.ones(4), torch.ones(4), 1.0, softcap, -100)
            apart = torch.empty_like(logits)
            logprobs.token_logprobs_backward(logits, *arguments, apart)
            logprobs.token_logprobs_backward(logits, *arguments, logits)
            assert torch.equal(logits, apart)


def test_a_label_out_of_range_names_its_row_and_writes_nothing():
    logits = torch.randn(4, 5)
    for bad in (5, -1, -101, 2**40):
        with pytest.raises(IndexError, match=rf"label {bad} in row 2 is outside \[0, 5\)"):
            logprobs.token_logprobs_forward(logits, torch.tensor([0, -100, bad, 1]), 1.0, None, -100)
        with pytest.raises(IndexError, match=rf"label {bad} in row 2"):
            linear_logprobs.head_rows(logits, torch.tensor([0, 4, bad, 1]), 1.0, None, -100, 1.0, None)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_tensor_without_memory_is_refused():
    with FakeTensorMode():
        fake = torch.randn(3, 5)
        labels = torch.zeros(3, dtype=torch.long)
        with pytest.raises(ValueError, match="logits: null pointer; is it a FakeTensor"):
            logprobs.token_logprobs_forward(fake, labels, 1.0, None, -100)
        with pytest.raises(ValueError, match="null pointer"):
            advantages.gae(fake, fake, fake > 0, None, 1.0, 1.0)
    real = torch.randn(3, 5)
    with pytest.raises(ValueError, match="labels: null pointer"):
        logprobs.token_logprobs_forward(real, torch.zeros(3, dtype=torch.long, device="meta"), 1.0, None, -100)


def test_nothing_to_do_needs_no_memory():
    labels = torch.zeros(0, dtype=torch.long)
    assert all(len(x) == 0 for x in logprobs.token_logprobs_forward(torch.zeros(0, 5), labels, 1.0, None, -100))
    nothing = torch.zeros(3, 0)
    assert advantages.gae(nothing, nothing, nothing > 0, None, 1.0, 1.0)[0].shape == (3, 0)
    offsets = torch.zeros(1, dtype=torch.int32)
    assert len(advantages.gae_packed(nothing[0], nothing[0], nothing[0] > 0, None, offsets, 1.0, 1.0)[0]) == 0


def test_impossible_arguments_raise_before_anything_runs():
    logits, labels = torch.randn(2, 5), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="temperature and logit_scale must be positive"):
        logprobs.token_logprobs_forward(logits, labels, 0.0, None, -100)
    with pytest.raises(ValueError, match="temperature and logit_scale must be positive"):
        linear_logprobs.head_rows(logits, labels, 1.0, None, -100, NAN, None)
    with pytest.raises(ValueError, match="rows of the result overlap"):
        linear_logprobs.head_rows(logits, labels, 1.0, None, -100, 1.0, torch.empty(1, 5).expand(2, 5))
    token = torch.zeros(3)
    for offsets, entry in (([0, 2], 1), ([1, 3], 0), ([0, 2, 1, 3], 2), ([0, 5, 3], 2)):
        with pytest.raises(ValueError, match=rf"must rise from 0 to the number of tokens, 3; entry {entry} is"):
            cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
            advantages.gae_packed(token, token, token == 0, None, cu_seqlens, 1.0, 1.0)
    pointers = [0] * 4
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        native.cpu.gae(*pointers, 0, 0, 1.0, 1.0, 0, 0, 0)


def test_other_python_threads_run_while_a_kernel_does():
    """With switching by time off, this thread's counter can advance during a call only if the call gives up the GIL."""
    logits, labels = torch.randn(1, 100_000).expand(100, 100_000), torch.zeros(100, dtype=torch.long)
    ticks, advanced = 0, False

    def work():
        nonlocal advanced
        for _ in range(50):  # a busy machine may not run this thread's counter during the first calls
            before = ticks
            logprobs.token_logprobs_forward(logits, labels, 1.0, None, -100)
            if advanced := ticks > before:
                return

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        worker = threading.Thread(target=work)
        worker.start()
        while worker.is_alive():
            ticks += 1
            time.sleep(1e-4)
    finally:
        sys.setswitchinterval(interval)
    assert advanced


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | environment
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", native.cpu.isas())
def test_the_environment_chooses_the_instruction_set(name):
    result = run_python("from rlhf_fast import _C; print(_C.cpu.isa())", RLHF_FAST_CPU_ISA=name)
    assert result.stdout.strip() == name


def test_an_unknown_instruction_set_is_an_error_that_lists_the_known():
    result = run_python("from rlhf_fast import _C; _C.cpu.isa()", RLHF_FAST_CPU_ISA="sse9")
    assert result.returncode != 0
    known = ", ".join(native.cpu.isas())
    assert f"instruction set 'sse9' is unknown or not supported by this processor; choose {known}" in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_import_loads_no_cuda_driver_and_no_second_openmp():
    """A CUDA context made at import breaks every later fork; two OpenMP runtimes fight over the cores."""
    code = """
import torch
import rlhf_fast._C
libraries = {line.split()[-1] for line in open('/proc/self/maps') if '.so' in line}
print(sum('libgomp' in name for name in libraries), sum('libcuda.so' in name for name in libraries))
"""
    openmp, cuda = run_python(code).stdout.split()
    assert int(openmp) <= 1
    assert int(cuda) == 0
