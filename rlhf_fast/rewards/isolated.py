"""A user's reward function in a process of its own, which can be killed: one that hangs or dies costs its samples, not the run."""

from __future__ import annotations

import atexit
import base64
import functools
import inspect
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_fast.rewards.workers import START_S, Worker, WorkerFault

SCRIPT = Path(__file__).with_name("isolated_worker.py")
TIMEOUT = 300.0  # seconds for one call, unless the function has a `timeout`


def isolate(spec: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, imported as ``spec``, in a process of its own; as it is where that cannot be or is not wanted.

    A plain function is run so unless it says ``function.in_process = True``; ``function.timeout`` is its deadline in seconds, in
    this process too (see :mod:`rlhf_fast.rewards.deadline`).
    """
    if not inspect.isfunction(function) or getattr(function, "in_process", False):
        return function
    return Isolated(spec, function, float(getattr(function, "timeout", TIMEOUT)))


class Isolated:
    """Calls ``package.module:function`` in a worker, started when it is first called and again after it hung or died.

    Calls that are given the same get the same random numbers (of ``random``, NumPy and torch), in whatever run and order, so
    that a resumed run scores as the first one did.
    """

    def __init__(self, spec: str, function: Callable[..., Any], timeout: float) -> None:
        functools.update_wrapper(self, function)  # its name, its signature, and what it needs
        self.spec, self.timeout = spec, timeout
        self._worker: Worker | None = None
        atexit.register(self.close)

    def __call__(self, **given: Any) -> Any:
        """What the function returns.

        Raises:
            WorkerFault: it raised (says what), gave no answer by the deadline, or its process died.
        """
        try:
            if self._worker is None:
                self._worker = Worker(SCRIPT, quiet=False)
                # the import has a deadline of its own; what it raises is raised by the call again
                self._worker.ask({"spec": self.spec, "path": sys.path}, START_S)
            call = {"spec": self.spec, "given": base64.b64encode(pickle.dumps(given)).decode()}
            answer = self._worker.ask(call, self.timeout)
        except WorkerFault:
            self.close()
            raise
        if "raised" in answer:
            raise WorkerFault(f"raised {answer['raised']}")
        return pickle.loads(base64.b64decode(answer["returned"]))

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
