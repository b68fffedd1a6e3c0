"""The CUDA code without a GPU: nvcc compiles it for every architecture without spilling registers, and the kernel's
own code, run on the host thread by thread (cuda_on_host.cpp), gives the right numbers. And who may call it.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf_fast.kernels.advantages import cuda_impl

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cuh"))
# those of CMakeLists.txt
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
NVCC = shutil.which("nvcc")
COMPILER = shutil.which("g++") or shutil.which("clang++")


def cmake_list() -> str:
    return (ROOT / "CMakeLists.txt").read_text()


def test_the_build_names_these_architectures():
    named = re.search(r"set\(CMAKE_CUDA_ARCHITECTURES ([^)]*)\)", cmake_list()).group(1)
    assert tuple(int(word.partition("-")[0]) for word in named.split()) == ARCHITECTURES


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("kernel", KERNELS)
def test_nvcc_compiles_every_architecture_without_spills(kernel, tmp_path):
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    command = [NVCC, "-O3", "-std=c++17", "--fmad=false", "-Xptxas", "-v", "--threads=0", *targets, "-c"]
    result = subprocess.run(
        [*command, str(ROOT / "csrc" / "cuda" / f"{kernel}.cu"), "-o", str(tmp_path / "out.o")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    kernels = re.findall(r"Compiling entry function '(\S+)' for 'sm_(\d+)'", result.stderr)
    reports = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert len(reports) == len(kernels) > 0
    assert all(report == ("0", "0", "0") for report in reports), result.stderr
    assert {int(number) for _, number in kernels} == set(ARCHITECTURES)


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    """The kernel as a host function."""
    if COMPILER is None:
        pytest.skip("no C++ compiler is installed")
    library = tmp_path_factory.mktemp("cuda_on_host") / "library.so"
    source = Path(__file__).with_name("cuda_on_host.cpp")
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas", f"-I{ROOT}"]
    flags += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    subprocess.run([COMPILER, *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library)).gae_on_host


def run(on_host, threads, rewards, values, mask, bootstrap, offsets, gamma, lam):
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    count, length = rewards.shape if offsets is None else (len(offsets) - 1, 0)
    pointers = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in (rewards, values, mask, bootstrap)]
    sizes = [ctypes.c_int64(count), ctypes.c_int64(length)]
    rest = [
        ctypes.c_void_p(None if offsets is None else offsets.data_ptr()),
        ctypes.c_float(gamma),
        ctypes.c_float(lam),
    ]
    results = [ctypes.c_void_p(advantages.data_ptr()), ctypes.c_void_p(returns.data_ptr())]
    on_host(ctypes.c_int(threads), *pointers, *sizes, *rest, *results)
    return advantages, returns


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
def test_the_cuda_kernel_matches_the_recursion(on_host, threads, length):
    generator = torch.Generator().manual_seed(length)
    rewards, values = torch.randn(2, 3, length, generator=generator)
    mask = torch.rand(3, length, generator=generator) < 0.7
    mask[1, length // 3 :] = False  # whole tiles without a token: the carry passes over them
    bootstrap = torch.randn(3, generator=generator)
    exact = [recursion(*row, 0.97, 0.95) for row in zip(rewards, values, mask, bootstrap, strict=True)]
    rewards[~mask], values[~mask] = float("nan"), float("inf")
    ours = run(on_host, threads, rewards, values, mask, bootstrap, None, 0.97, 0.95)
    for row in range(3):
        torch.testing.assert_close(ours[0][row].double(), exact[row][0], rtol=1e-6, atol=4e-6)
        torch.testing.assert_close(ours[1][row].double(), exact[row][1], rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("threads", [32, 96])
def test_the_cuda_kernel_matches_the_recursion_on_packed_sequences(on_host, threads):
    """Lengths 5, 0, 400 and 131: starts at every alignment, an empty sequence, one longer than a tile."""
    offsets = torch.tensor([0, 5, 5, 405, 536], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 536, generator=generator)
    mask = torch.rand(536, generator=generator) < 0.9
    ours = run(on_host, threads, rewards, values, mask, None, offsets, 1.0, 0.9)
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        exact = recursion(rewards[begin:end], values[begin:end], mask[begin:end], 0.0, 1.0, 0.9)
        torch.testing.assert_close(ours[0][begin:end].double(), exact[0], rtol=1e-6, atol=4e-6)
        torch.testing.assert_close(ours[1][begin:end].double(), exact[1], rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize(
    ("built", "driver", "works"),
    [(13000, 13000, True), (13000, 13020, True), (12080, 13000, True), (12080, 12040, True), (13000, 12090, False)],
)
def test_a_driver_too_old_for_the_build_is_refused_with_one_warning(monkeypatch, recwarn, built, driver, works):
    """Within a major version CUDA works both ways; a newer driver runs older builds; an older driver does not."""
    versions = SimpleNamespace(runtime_version=lambda: built, driver_version=lambda: driver)
    monkeypatch.setattr(cuda_impl, "_C", SimpleNamespace(cuda=versions))
    cuda_impl._driver_problem.cache_clear()
    try:
        reasons = {cuda_impl._driver_problem() for _ in range(3)}
    finally:
        cuda_impl._driver_problem.cache_clear()
    if works:
        assert reasons == {None} and not recwarn
    else:
        assert reasons == {"it was built with CUDA 13.0, but the driver supports 12.9 at most"}
        assert len(recwarn) == 1 and "Triton is used instead" in str(recwarn[0].message)


@pytest.mark.parametrize(
    ("compiled_for", "capability", "works"),
    [
        ("80-real,90-real,120", (8, 0), True),
        ("80-real,90-real,120", (8, 9), True),  # machine code of 8.0 runs on all of 8.x
        ("80-real,90-real,120", (10, 0), False),  # but not on 10.0, and PTX of 12.0 does not run on older ones
        ("80-real,90-real,120", (12, 1), True),
        ("80-real,90-real,120", (13, 0), True),  # through the PTX of 12.0
        ("80-real,90-real", (12, 0), False),
        ("90", (8, 0), False),
    ],
)
def test_a_device_that_the_build_has_no_code_for_is_refused(monkeypatch, compiled_for, capability, works):
    native = SimpleNamespace(cuda=SimpleNamespace(architectures=compiled_for))
    monkeypatch.setattr(cuda_impl, "_C", native)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda_impl._architecture_problem.cache_clear()
    try:
        reason = cuda_impl._architecture_problem(torch.device("cuda", 0))
    finally:
        cuda_impl._architecture_problem.cache_clear()
    if works:
        assert reason is None
    else:
        assert compiled_for in reason and "sm_" in reason
