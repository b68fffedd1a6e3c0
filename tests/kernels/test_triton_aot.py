"""Every Triton kernel compiles for Ampere, Hopper and Blackwell, and the machine code neither spills nor dawdles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("aot.py")
ROOT = SCRIPT.parents[2]


@pytest.fixture(scope="module")
def measurements():
    """One process for all: it must not run in Triton's interpreter, and starting it costs more than a kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    command = [sys.executable, str(SCRIPT), "80", "90", "100"]
    done = subprocess.run(command, check=False, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_no_kernel_spills(measurements):
    assert len(measurements) == 27
    spilled = [m for m in measurements if m["stack"] or m["local"]]
    assert not spilled


def test_rows_are_read_16_bytes_at_a_time(measurements):
    """A row kernel is bound by memory; scalar loads would halve its rate."""
    rows = [
        m for m in measurements if m["kernel"].startswith(("token_logprobs", "head_rows")) and "one" not in m["kernel"]
    ]
    assert len(rows) == 18 and all(m["wide_loads"] >= 2 for m in rows)


def test_registers_leave_room_for_several_blocks_per_processor(measurements):
    """8 warps at 64 registers still fit 4 times; the scan of five numbers may have 128."""
    assert all(m["registers"] <= (128 if m["kernel"].startswith("gae") else 64) for m in measurements)
