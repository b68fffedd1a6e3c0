"""Reward functions of a run in the fork server. They misbehave at the ``n``-th call of a process while the file
``misbehave`` of the harness's folder says ``n``.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path

CALLS = [0]


def _now() -> bool:
    CALLS[0] += 1
    told = Path(os.environ["FAULTS_FOLDER"], "misbehave")
    return told.is_file() and CALLS[0] == int(told.read_text())


def _reward(misbehave: Callable[[], None]) -> Callable:
    def reward(completions, **_):
        if _now():
            misbehave()
        return [float(sum(c.count(v) for v in "aeiou")) for c in completions]

    reward.in_process, reward.timeout = True, 0.5
    return reward


def _swallow() -> None:
    while True:
        try:
            time.sleep(60)
        except BaseException:  # noqa: BLE001, S112 (as bad code does)
            continue


def _lock_twice() -> None:
    """In a library, with Python's lock held, and no signal ends it."""
    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


waits = _reward(lambda: time.sleep(60))
swallows = _reward(_swallow)
holds_the_lock = _reward(_lock_twice)
