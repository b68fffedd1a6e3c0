"""Every Triton kernel compiles for Ampere, Hopper and Blackwell, and the machine code neither spills nor dawdles.

With ``-m slow`` also under the oldest Triton that is supported, whose wheel pip brings for the time of the test.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("aot.py")
ROOT = SCRIPT.parents[2]
TARGETS = (80, 90, 100)
OLDEST = "3.6.0"


def old_triton(folder: Path) -> Path:
    """A folder with the oldest Triton in it, to stand before the installed one on the path."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "--target", str(folder), f"triton=={OLDEST}"], check=False, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"pip cannot get triton {OLDEST}: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.fixture(scope="module", params=["installed", pytest.param(OLDEST, marks=pytest.mark.slow)])
def measurements(request, tmp_path_factory):
    """One process for all: it must not run in Triton's interpreter, and starting it costs more than a kernel."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    if request.param == OLDEST:
        path.insert(0, str(old_triton(tmp_path_factory.mktemp("triton"))))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path)
    probe = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    version = subprocess.run(probe, check=True, env=environment, capture_output=True, text=True).stdout.strip()
    assert request.param in ("installed", version)
    command = [sys.executable, str(SCRIPT), *map(str, TARGETS)]
    done = subprocess.run(command, check=False, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def launched_kernels(sources: dict[str, str]) -> set[tuple[str, str]]:
    """(family, kernel) of each @triton.jit function that no other one mentions: the rest are their helpers."""
    kernels, mentioned = set(), set()
    for family, source in sources.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and any(
                "triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list
            ):
                kernels.add((family, node.name))
                mentioned |= {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}
    return {(family, name) for family, name in kernels if name not in mentioned}


def test_the_scan_for_kernels_leaves_out_helpers():
    source = "@triton.jit\ndef a(x): return b(x)\n@triton.jit\ndef b(x): pass\ndef run(): a[(1,)](2)\n"
    other = "@triton.jit(do_not_specialize=[])\ndef c(x): pass\n@triton.jit\ndef d(x): b(x)\n"
    assert launched_kernels({"one": source, "two": other}) == {("one", "a"), ("two", "c"), ("two", "d")}


def test_every_kernel_is_compiled_for_every_target(measurements):
    sources = {path.parent.name: path.read_text() for path in ROOT.glob("kernels/*/triton_impl.py")}
    launched = launched_kernels(sources)
    assert len(launched) >= 6
    for capability in TARGETS:
        compiled = {(m["family"], m["kernel"]) for m in measurements if m["capability"] == capability}
        assert launched <= compiled, "kernels without a case in tests/kernels/aot_<family>.py"


def test_no_kernel_spills(measurements):
    spilled = [m for m in measurements if m["stack"] or m["local"]]
    assert not spilled


def test_every_kernel_fits_into_the_shared_memory_of_every_gpu(measurements):
    """99 KiB a program on compute capability 8.6, 8.9 and 12.0, the least of all; a launch of more would fail there alone."""
    assert not [m for m in measurements if m["shared"] > 99 * 1024]


def aligned_rows(measurements):
    """The tiles of logits, but for rows of odd length: those are read one entry at a time."""
    logits = [m for m in measurements if m["family"].endswith("logprobs") and "odd" not in m["case"]]
    rows = [m for m in logits if (m["block"] or 0) >= 4096]
    kernels = {"forward_kernel", "backward_kernel", "short_rows_kernel", "long_rows_kernel"}
    assert kernels <= {m["kernel"] for m in rows}
    return [m for m in rows if m["kernel"] in kernels]


def test_rows_are_read_16_bytes_at_a_time(measurements):
    """A row kernel is bound by memory; a thread reads its 16 or 32 entries of a tile in vectors of 16 bytes.

    Of an odd vocabulary too, where the rows begin at multiples of 16 bytes: only the last tile is read one by one.
    """
    rows = aligned_rows(measurements) + [m for m in measurements if "odd, padded" in m["case"]]
    narrow = [m for m in rows if m["wide_loads"] < (8 if m["kernel"] == "long_rows_kernel" else 4)]
    assert not narrow


def test_norms_and_activations_are_read_16_bytes_at_a_time(measurements):
    """One vector or more of each input per thread; rows of odd width or of one entry have none."""
    inputs = {"norm_forward": 1, "norm_backward": 2, "norm_weight": 2, "gated_forward": 2, "gated_backward": 3}
    found = [m for m in measurements if m["kernel"].removesuffix("_kernel") in inputs and " o" not in m["case"]]
    assert {m["kernel"].removesuffix("_kernel") for m in found} == set(inputs)
    narrow = [m for m in found if m["wide_loads"] < inputs[m["kernel"].removesuffix("_kernel")]]
    assert not narrow


# An H200 issues 14 in the time that its memory takes for a 16-bit logit, 28 for one of float32 or one read and written.
PER_ENTRY = {"forward bf16": 15, "backward bf16": 19, "forward odd, padded": 17, "head bf16": 36, "head fp32": 38}


@pytest.mark.parametrize("case", PER_ENTRY)
def test_rows_take_few_instructions(measurements, case):
    """The longest way through a kernel, per entry of a thread. Base 2 and constants of the row keep it short."""
    for m in measurements:
        if m["case"] == case and m["capability"] == 90:
            assert m["instructions"] <= PER_ENTRY[case] * m["block"] / (32 * m["warps"])


TOKENS = {"policy ppo", "policy everything", "policy reinforce", "value ppo", "gae padded", "shaped rewards", "moments"}
TOKENS |= {"shaped gae padded", "whiten", "whiten packed", "whiten alone", "scale", "kl k3", "sequence sums padded"}


def test_tokens_are_read_16_bytes_at_a_time(measurements):
    """Masks guard no load. A packed sequence may begin anywhere: what walks those is read one token at a time."""
    tokens = [m for m in measurements if m["case"] in TOKENS]
    assert {m["case"] for m in tokens} == TOKENS
    assert not [m for m in tokens if m["wide_loads"] < 2]


def test_registers_leave_room_for_several_blocks_per_processor(measurements):
    """Of 65,536 registers the aligned rows take at most a third, everything else at most half."""
    rows = aligned_rows(measurements)
    crowded = [m for m in measurements if m["registers"] * 32 * m["warps"] > 65536 // (3 if m in rows else 2)]
    assert not crowded
