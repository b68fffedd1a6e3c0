"""The process of one user's reward function. Run as a program, see ``isolated.py``."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib
import inspect
import json
import os
import pickle
import random
import signal
import sys
import zlib
from pathlib import Path
from typing import Any


def main() -> None:
    with contextlib.suppress(OSError):  # when memory runs out, this process goes and not the run
        Path("/proc/self/oom_score_adj").write_text("1000")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the function prints is no answer
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        (timeout, call) = json.loads(line)
        try:
            signal.setitimer(signal.ITIMER_REAL, timeout + 1)  # SIGALRM ends the process, wherever it hangs
            sys.path[:] = call.get("path", sys.path)
            function, answer = _imported(call["spec"]), {"returned": ""}
            if "given" in call:
                _seed(zlib.crc32(call["given"].encode()))
                answer = {"returned": _sent(_called(function, pickle.loads(base64.b64decode(call["given"]))))}
        except BaseException as error:  # noqa: BLE001 (whatever a user's function does, sys.exit() too)
            answer = {"raised": _told(error)}
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(answer), file=answers, flush=True)


def _told(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:500]
    except Exception:  # noqa: BLE001 (the class is the user's)
        return type(error).__name__


def _imported(spec: str) -> Any:
    module, _, name = spec.partition(":")
    return getattr(importlib.import_module(module), name)


def _seed(seed: int) -> None:
    """Of what is there: nothing is imported for it."""
    random.seed(seed)
    for name, module in (("numpy", "numpy.random"), ("torch", "torch")):
        if name in sys.modules:
            library = importlib.import_module(module)
            (library.seed if name == "numpy" else library.manual_seed)(seed)


def _called(function: Any, given: dict[str, Any]) -> Any:
    result = function(**given)

    async def wait() -> Any:
        return await result

    return asyncio.run(wait()) if inspect.isawaitable(result) else result


def _sent(value: Any) -> str:
    value = value.tolist() if hasattr(value, "tolist") else value  # a tensor needs its library on the other side
    return base64.b64encode(pickle.dumps(value)).decode()


if __name__ == "__main__":
    main()
