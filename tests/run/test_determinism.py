"""Deterministic mode: torch's switches inside it and after it, what cuBLAS is told, what is refused."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.run.determinism import WORKSPACE, deterministic, prepare

ROOT = Path(__file__).resolve().parents[2]


def switches():
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": torch.backends.cudnn.deterministic,
        "benchmark": torch.backends.cudnn.benchmark,
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
    }


ON = {"algorithms": True, "warn only": False, "cudnn": True, "benchmark": False, "fill": False}


@pytest.fixture
def somebody_elses():
    """Switches as another library in the process may have set them."""
    before = switches()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = True
    yield switches()
    torch.use_deterministic_algorithms(before["algorithms"], warn_only=before["warn only"])
    torch.backends.cudnn.benchmark = before["benchmark"]


def test_the_switches_are_on_inside_and_as_before_afterwards(somebody_elses):
    with deterministic():
        assert switches() == ON
        with deterministic(False):
            assert switches() == ON
        with pytest.raises(KeyError), deterministic():
            raise KeyError
        assert switches() == ON
    assert switches() == somebody_elses
    with deterministic(False):
        assert switches() == somebody_elses


def test_what_torch_refuses_is_one_sentence_with_the_place():
    message = r"deterministic: torch knows no form of put_ .* at .*test_determinism\.py, line"
    with pytest.raises(UserError, match=message), deterministic():
        torch.zeros(3).put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))
    assert not switches()["algorithms"]


def test_other_errors_pass_as_they_are():
    with pytest.raises(RuntimeError, match="the size of tensor") as raised, deterministic():
        _ = torch.ones(2) + torch.ones(3)
    assert not isinstance(raised.value, UserError)


@pytest.mark.parametrize("given", [None, ":16:8", ":0:0"])
def test_cublas_is_told_before_cuda_starts_or_the_run_is_refused(given, monkeypatch):
    """A choice that is good stays; one that is not is replaced, unless cuBLAS may have read it."""
    monkeypatch.delenv(WORKSPACE, raising=False)
    if given:
        monkeypatch.setenv(WORKSPACE, given)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    prepare(False)
    assert os.environ.get(WORKSPACE) == given
    if given == ":16:8":
        prepare(True)
    else:
        with pytest.raises(
            UserError, match="CUDA has started .* set CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment"
        ):
            prepare(True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    prepare(True)
    assert os.environ[WORKSPACE] == (given if given == ":16:8" else ":4096:8")


def test_atomics_of_our_kernels_only_count():
    """What is added by one is an integer literal: a float's sum would depend on who comes first."""
    found = {
        str(path): re.findall(r"atomic_?[aA]dd\(\s*[^,]+,\s*([^,)]+)|atomic_(?!add)\w+\(", path.read_text())
        for folder in ("kernels", "csrc")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cuh", ".cu", ".h")
    }
    amounts = {amount for several in found.values() for amount in several}
    assert amounts == {"0", "1", "1u"}, found
