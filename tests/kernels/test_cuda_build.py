"""The CUDA code without a GPU: nvcc compiles it for every architecture without spilling registers, and rows of logits
are read 16 bytes at a time. And who may call it. What the kernels compute is in test_cuda_kernels.py.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf_fast.kernels import cuda_impl

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted({path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")} - {"runtime"})
# those of CMakeLists.txt
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
NVCC = shutil.which("nvcc")


def cmake_list() -> str:
    return (ROOT / "CMakeLists.txt").read_text()


def compile_cuda(kernel: str, target: Path, *options: str) -> str:
    """Compile one file as CMakeLists.txt does; returns what ptxas says."""
    command = [NVCC, "-O3", "-std=c++17", "--fmad=false", "-Xptxas", "-v", "--threads=0", *options]
    source = ROOT / "csrc" / "cuda" / f"{kernel}.cu"
    result = subprocess.run([*command, str(source), "-o", str(target)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stderr


def disassembler() -> str | None:
    """nvdisasm of the CUDA toolkit, or of the triton package."""
    triton = importlib.util.find_spec("triton")
    folders = (
        [Path(place) / "backends" / "nvidia" / "bin" for place in triton.submodule_search_locations] if triton else []
    )
    return shutil.which("nvdisasm") or next((shutil.which("nvdisasm", path=str(folder)) for folder in folders), None)


def test_the_build_names_these_architectures_and_every_file():
    named = re.search(r"set\(CMAKE_CUDA_ARCHITECTURES ([^)]*)\)", cmake_list()).group(1)
    assert tuple(int(word.partition("-")[0]) for word in named.split()) == ARCHITECTURES
    assert set(re.findall(r"csrc/cuda/(\w+)\.cu\b", cmake_list())) == {*KERNELS, "runtime"}


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("kernel", KERNELS)
def test_nvcc_compiles_every_architecture_without_spills(kernel, tmp_path):
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    report = compile_cuda(kernel, tmp_path / "out.o", *targets, "-c")
    kernels = re.findall(r"Compiling entry function '(\S+)' for 'sm_(\d+)'", report)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", report)]
    assert len(spills) == len(registers) == len(kernels) > 0
    assert all(spilled == ("0", "0", "0") for spilled in spills), report
    assert {int(number) for _, number in kernels} == set(ARCHITECTURES)
    print(*(f"{name} sm_{number}: {used}" for (name, number), used in zip(kernels, registers, strict=True)), sep="\n")
    # two blocks of 512 threads, or four of 256, fit a multiprocessor's 65536
    assert max(registers) <= (64 if kernel == "logprobs" else 128)


@pytest.mark.skipif(NVCC is None or disassembler() is None, reason="nvcc or nvdisasm is not installed")
@pytest.mark.parametrize("number", [80, 90])
def test_rows_are_read_and_written_16_bytes_at_a_time(number, tmp_path):
    compile_cuda("logprobs", tmp_path / "out.cubin", f"-arch=sm_{number}", "-cubin")
    sass = subprocess.run([disassembler(), str(tmp_path / "out.cubin")], capture_output=True, text=True, check=True)
    functions = re.split(r"^\.text\.", sass.stdout, flags=re.MULTILINE)[1:]
    assert len(functions) == 11
    for code in functions:
        name = code[: code.index(":")]
        # a pass over the row keeps four loads in flight forward, two backward
        assert len(re.findall(r"\bLDG\.E\.\S*128", code)) >= (2 if "backward" in name else 4), name
        narrower = "head_rows" in name or "7Float32ENS" in name  # float32 logits, maybe a 16-bit gradient
        if "kernel" in name and not re.search(r"\d+logprobs_kernel", name):
            assert re.search(r"\bSTG\.E\.\S*64" if narrower else r"\bSTG\.E\.\S*128", code), name


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
