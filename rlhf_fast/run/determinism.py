"""Runs that repeat their bits: what torch must be told, and what it says no to.

A seed fixes what is drawn. What is left is the order of sums on a GPU, where kernels that add up by atomics end differently each
time. In deterministic mode torch takes another kernel, or refuses (``torch.use_deterministic_algorithms``), as do cuDNN, cuBLAS
and the attention kernels that it ships. The kernels of this package know one order only: their atomics count, and no number is
added by one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from rlhf_fast.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
FIXED = (":4096:8", ":16:8")  # with these cuBLAS knows one order (NVIDIA, cuBLAS, "Results Reproducibility")
REFUSAL = "does not have a deterministic implementation"  # of torch's

Method = TypeVar("Method", bound=Callable[..., Any])


def prepare(wanted: bool) -> None:
    """Tell cuBLAS, which reads it once, as CUDA starts: call this before. It stays for the process, and costs nothing.

    Raises:
        UserError: CUDA runs already, and was told otherwise.
    """
    if not wanted or os.environ.get(WORKSPACE) in FIXED:
        return
    if torch.cuda.is_initialized():
        raise UserError(
            f"deterministic: CUDA has started in this process without {WORKSPACE}, which cuBLAS reads once: set "
            f"{WORKSPACE}={FIXED[0]} in the environment, or make this trainer before anything touches the GPU"
        )
    os.environ[WORKSPACE] = FIXED[0]


@contextlib.contextmanager
def deterministic(wanted: bool = True) -> Iterator[None]:
    """Inside, operations repeat their bits or are refused. Afterwards torch's switches are as before; without ``wanted``, none is
    touched.

    Raises:
        UserError: something inside has no form that repeats its bits; says what, and who called it.
    """
    if not wanted:
        yield
        return
    cudnn, memory = torch.backends.cudnn, torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags = cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    # nobody reads what nobody wrote: tests poison it, and to fill it would be a pass over memory each time
    memory.fill_uninitialized_memory = False
    try:
        yield
    except RuntimeError as error:
        if REFUSAL not in str(error):
            raise
        raise UserError(_refused(error)) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory = flags


def repeatable(method: Method) -> Method:
    """Run a method of a trainer in :func:`deterministic` mode where its ``args.deterministic`` asks for that."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with deterministic(self.args.deterministic):
            return method(self, *args, **kwargs)

    return run


def _refused(error: RuntimeError) -> str:
    what = str(error).partition(REFUSAL)[0].split("\n")[-1].strip()
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"deterministic: torch knows no form of {what} that repeats its bits, called at {frame.filename}, line "
        f"{frame.lineno}; compute it otherwise there, or leave deterministic out"
    )
