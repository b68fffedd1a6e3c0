"""The one thread that runs the engine, and the models it serves: the event loop never waits for a token.

Jobs and commands form one queue. A turn serves one model: an adapter at a time is active on the base, so a turn takes all
jobs that wait for its model, and newcomers only while nobody else waits. Every turn is therefore finite, whoever waits is
next in order of arrival, and a busy adapter starves no other. Commands (load, unload, sleep, wake, reset) run between
turns, in their place in the queue.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.models.adapters import check_adapter
from rlhf_fast.rollout.engine import Request, Sample

from .protocol import ApiError

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """A request on its way. ``deliver`` is called in the engine's thread and must not block: with (index, sample) for
    every sample that has ended, or for every new token when ``stream``, and with an :class:`ApiError` when there is no
    more to come."""

    request: Request
    role: str
    deliver: Callable[[int, Sample | ApiError], None]
    stream: bool = False
    cancelled: bool = False
    left: int = field(init=False)  # samples that have not ended

    def __post_init__(self) -> None:
        self.left = self.request.n


@dataclass(eq=False)
class Command:
    """Something to do between turns."""

    run: Callable[[], Any]
    done: Future = field(default_factory=Future)


class ServedModels:
    """Names that clients use, and the role of the policy behind each. Changed by the engine's thread only.

    Args:
        policy: the model and its adapters.
        name: of the policy's own weights, adapter included.
    """

    def __init__(self, policy: Any, name: str) -> None:
        self.policy, self.name = policy, name
        self.roles = {name: policy.role}
        self.folders: dict[str, str] = {}  # where each adapter came from
        self._unloaded: list[str] = []  # adapters that are not served any more and still in memory
        self._count = 0

    def role(self, name: str | None) -> str:
        """Who plays the model that a client calls ``name``; the policy when it calls none.

        Raises:
            ApiError: 404.
        """
        if name is None:
            return self.policy.role
        if name not in self.roles:
            raise ApiError(
                404, f"the model {name!r} does not exist here; there are {', '.join(list(self.roles))}", "model"
            )
        return self.roles[name]

    def load(self, name: str, folder: str) -> None:
        """Serve the adapter in ``folder`` (PEFT's format, safetensors) as ``name``.

        Raises:
            ApiError: 400, the name is taken, or the folder holds no adapter of this base.
        """
        if name in self.roles:
            raise ApiError(400, f"the adapter {name!r} is loaded already; unload it first", "lora_name")
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            if not (Path(folder) / file).is_file():
                raise ApiError(400, f"{folder}: no {file} on this machine; save the adapter there first", "lora_path")
        role = f"served{self._count + 1}"  # clients' names may hold what a module's name may not
        try:
            check_adapter(Path(folder), self.policy.model)
            self.policy.adapters.load(role, Path(folder), trainable=False)
        except UserError as error:
            raise ApiError(400, str(error), "lora_path") from error
        self._count += 1
        self.roles[name], self.folders[name] = role, folder
        for gone in self._unloaded:
            self.policy.adapters.remove(gone)
        self._unloaded.clear()

    def unload(self, name: str) -> None:
        """Serve adapter ``name`` no longer. Its memory is given back when the next adapter comes: one must be left.

        Raises:
            ApiError: 404 unknown, 400 it is the model itself.
        """
        if name == self.name:
            raise ApiError(400, f"{name!r} is the model itself, which cannot be unloaded", "lora_name")
        self._unloaded.append(self.role(name))
        del self.roles[name], self.folders[name]


class Worker(threading.Thread):
    """Runs the engine until :meth:`close`.

    Args:
        engine: with ``session()`` and ``role``, such as the slot engine.
        max_waiting: jobs that may wait or be under way; further ones are refused.
    """

    def __init__(self, engine: Any, max_waiting: int = 8192) -> None:
        super().__init__(name="engine", daemon=True)
        self.engine, self.max_waiting = engine, max_waiting
        self.asleep = False
        self.running: dict[Any, Job] = {}  # what the engine is writing, by the session's key
        self._queue: deque[Job | Command] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._deadline = float("inf")  # when the last job must have been answered

    # ---- called by other threads

    def submit(self, job: Job) -> None:
        """Raises:
        ApiError: 503 asleep or about to stop, 429 too many wait.
        """
        with self._changed:
            if self._closing:
                raise ApiError(503, "the server is shutting down")
            if self.asleep:
                raise ApiError(503, "the server sleeps; POST /wake_up first")
            # an open session takes what waits for its model out of the queue before it can begin it
            if len(self._queue) + len(self.running) >= self.max_waiting:
                raise ApiError(429, f"{self.max_waiting} requests wait already; try again later")
            self._queue.append(job)
            self._changed.notify()

    def call(self, run: Callable[[], Any]) -> Future:
        """Have ``run`` called between turns; its result or error is the future's."""
        command = Command(run)
        with self._changed:
            if self._closing:
                raise ApiError(503, "the server is shutting down")
            self._queue.append(command)
            self._changed.notify()
        return command.done

    def sleep(self) -> Future:
        """Give the engine's memory back once what waits now is done; refuse jobs until :meth:`wake`."""
        self.asleep = True
        return self.call(self.engine.sleep)

    def wake(self) -> Future:
        """Undo :meth:`sleep`."""
        done = self.call(self.engine.wake)
        self.asleep = False
        return done

    def drain(self, seconds: float) -> None:
        """Take nothing new, and answer what is there within ``seconds``: with its samples, or that there was no time."""
        with self._changed:
            self._closing, self._deadline = True, min(self._deadline, time.monotonic() + seconds)
            self._changed.notify()

    def close(self) -> None:
        """End the thread and give the engine's memory back. What is still running is told so."""
        self.drain(0.0)
        self.join()
        self.engine.sleep()

    # ---- the thread

    def run(self) -> None:
        while (item := self._next()) is not None:
            if isinstance(item, Command):
                _carry_out(item)
            else:
                self._turn(item)

    def _next(self) -> Job | Command | None:
        """The oldest job or command; None at the end."""
        with self._changed:
            while not self._queue and not self._closing:
                self._changed.wait()
            return self._queue.popleft() if self._queue else None

    def _turn(self, first: Job) -> None:
        """Serve ``first`` and who else waits for its model, then newcomers until somebody else waits.

        The session stays open while nobody asks: on a GPU it holds graphs that take a while to capture.
        """
        running, failure = self.running, None
        newcomers = [first, *self._waiting_for(first.role)]
        try:
            self.engine.role = first.role
            with self.engine.session() as session:
                while newcomers or running:
                    for job in newcomers:
                        self._admit(session, job, running)
                    for key in [key for key, job in running.items() if job.cancelled]:
                        session.cancel(key)
                        del running[key]
                    if running and time.monotonic() > self._deadline:
                        raise ApiError(503, "the server is shutting down and had no time to finish")
                    for writing in session.step() if running else ():
                        self._deliver(running, writing)
                    newcomers = self._head_of_queue(first.role, wait=not running)
        except Exception as error:  # whatever went wrong, the clients must hear of it and the server go on
            if not isinstance(error, ApiError):
                logger.exception("a turn failed")
                error = ApiError(500, f"the engine failed: {_first_line(error)}")
            failure = error
        if failure is not None:
            # here, where nothing holds what the failed step held any more: an engine that ran out of memory needs it back
            try:
                self.engine.sleep()
            except Exception:  # a GPU that has failed for good fails here again, and the clients wait
                logger.exception("the engine's memory was not given back")
            for job in {*newcomers, *running.values()}:
                job.deliver(-1, failure)
            running.clear()

    def _admit(self, session: Any, job: Job, running: dict[Any, Job]) -> None:
        if job.cancelled:
            return
        try:
            running[session.add(job.request)] = job
        except UserError as error:
            job.deliver(-1, ApiError(400, str(error)))

    def _deliver(self, running: dict[Any, Job], writing: Any) -> None:
        """Hand on what a sample gained. ``writing.sample`` grows, so a stream gets a part of its own."""
        job, sample = running[writing.key], writing.sample
        if sample.finish_reason:
            job.left -= 1
        if job.stream:
            job.deliver(writing.index, Sample(sample.ids[-1:], sample.logprobs[-1:], sample.finish_reason))
        elif sample.finish_reason:
            job.deliver(writing.index, sample)
        if not job.left:
            del running[writing.key]

    def _waiting_for(self, role: str) -> list[Job]:
        """Take every job for ``role`` out of the queue that no command stands before."""
        with self._changed:
            ahead: deque[Job | Command] = deque()
            jobs: list[Job] = []
            while self._queue and isinstance(self._queue[0], Job):
                item = self._queue.popleft()
                (jobs if item.role == role else ahead).append(item)
            self._queue.extendleft(reversed(ahead))
            return jobs

    def _head_of_queue(self, role: str, wait: bool) -> list[Job]:
        """Take the jobs for ``role`` that nobody else waits before; with ``wait``, once there is anything at all."""
        with self._changed:
            while wait and not self._queue and not self._closing:
                self._changed.wait()
            jobs: list[Job] = []
            while self._queue and isinstance(self._queue[0], Job) and self._queue[0].role == role:
                jobs.append(self._queue.popleft())
            return jobs


def _carry_out(command: Command) -> None:
    if not command.done.set_running_or_notify_cancel():
        return
    try:
        command.done.set_result(command.run())
    except Exception as error:  # noqa: BLE001 (whoever waits for it gets it)
        command.done.set_exception(error)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
