"""Set up before any test: where Triton kernels run, uninitialised memory, threads."""

from __future__ import annotations

import os

import pytest
import torch

# Before anything imports Triton, which reads it once: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# pytest-xdist runs one process per core; each with all threads would only get in the others' way
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """A test's name must be the same in every process that runs some of them; an address in it is not."""
    unstable = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if unstable:
        raise pytest.UsageError(f"give these parameters ids of their own: {unstable[0]}")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """Nothing is kept from test to test, or in the user's cache folder."""
    monkeypatch.setenv("RLHF_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory():
    """Fill what torch.empty and its relatives return with NaN, so that an output nobody wrote fails a comparison."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
        ):
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


def _poisoned(allocate):
    def poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point() and not tensor.is_meta:
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return poisoned
