"""Grading on another machine: the client, and the small server behind ``rlhf-fast code-runner``.

One POST a task, JSON both ways, the token of the server on every request. The server refuses what it cannot run with a
status that the client turns into a fault, never into a score.
"""

from __future__ import annotations

import dataclasses
import hmac
import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.rewards.grading import KINDS, Grade, Grader, Task
from rlhf_fast.rewards.sandbox import Limits, SandboxFault

TOKEN = "RLHF_FAST_RUNNER_TOKEN"  # environment variable; never a setting, which a run would save
LARGEST = 16 << 20  # bytes of a request
CEILING = Limits(timeout=60.0, memory_mb=4096, scratch_mb=256, output_kb=4096)  # the most that a client may ask for


class RemoteGrader:
    """Grades at ``url``, a machine that runs ``rlhf-fast code-runner``. The token comes from RLHF_FAST_RUNNER_TOKEN.

    Raises:
        UserError: the token is not set, or nobody answers there, or the token is refused.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._token = os.environ.get(TOKEN, "")
        if not self._token:
            raise UserError(f"sandbox {url}: set {TOKEN} to the token that `rlhf-fast code-runner` prints there.")
        try:
            self._ask("health", None, 10.0)
        except SandboxFault as fault:
            raise UserError(f"sandbox {url}: {fault}. Start `rlhf-fast code-runner` there.") from None

    def grade(self, task: Task, limits: Limits, partial: bool = False) -> Grade:
        """As ``LocalGrader.grade``, over there.

        Raises:
            SandboxFault: no answer, or a refusal.
        """
        body = {"task": asdict(task), "limits": asdict(limits), "partial": partial}
        answer = self._ask("grade", body, 60.0 + limits.timeout * max(1, len(task.tests)))
        try:
            return Grade(int(answer["passed"]), int(answer["total"]), str(answer["reason"]))
        except (KeyError, TypeError, ValueError):
            raise SandboxFault(f"{self.url} answered {str(answer)[:80]}") from None

    def _ask(self, path: str, body: Any, timeout: float) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        try:
            request = urllib.request.Request(f"{self.url}/{path}", data, headers)
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return json.loads(response.read(LARGEST))
        except urllib.error.HTTPError as error:
            raise SandboxFault(f"the runner refuses: {error.code} {error.read(500).decode(errors='replace')}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise SandboxFault(f"the runner does not answer ({error})") from None


class Runner(ThreadingHTTPServer):
    """Serves a grader: ``GET /health`` and ``POST /grade``, both for holders of the token only.

    Args:
        address: host and port.
        grader: what grades; at most ``workers`` tasks at a time.
    """

    daemon_threads = True

    def __init__(self, address: tuple[str, int], grader: Grader, token: str, workers: int) -> None:
        self.grader, self.token = grader, token
        self.free = threading.Semaphore(workers)
        super().__init__(address, _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: Runner
    timeout = 60  # seconds of silence on a connection

    def do_GET(self) -> None:
        if self._allowed():
            self._answer(200, {"ok": True}) if self.path == "/health" else self._answer(404, "no such page")

    def do_POST(self) -> None:
        if not self._allowed():
            return
        length = self.headers.get("Content-Length", "")
        if self.path != "/grade" or not length.isdecimal() or int(length) > LARGEST:
            return self._answer(400, f"expected POST /grade with a body of at most {LARGEST} bytes")
        try:
            task, limits, partial = _read(json.loads(self.rfile.read(int(length))))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            return self._answer(400, f"not a task: {error}")
        try:
            with self.server.free:
                self._answer(200, asdict(self.server.grader.grade(task, limits, partial)))
        except (SandboxFault, ValueError, TypeError, SyntaxError, KeyError, AttributeError) as error:
            self._answer(503, f"cannot grade: {error}")

    def _allowed(self) -> bool:
        given = self.headers.get("Authorization", "").encode()
        if hmac.compare_digest(given, f"Bearer {self.server.token}".encode()):
            return True
        self._answer(401, "wrong or missing token")
        return False

    def _answer(self, status: int, body: Any) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(body, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Silence: one line a task would be too many."""


def _read(body: Any) -> tuple[Task, Limits, bool]:
    """The task and its limits in a request, none above the ceiling."""
    task, limits = Task(**body["task"]), Limits(**body["limits"])
    if task.kind not in KINDS or not isinstance(task.tests, list) or not isinstance(task.program, str):
        raise ValueError("unknown kind, or no tests, or no program")
    for field in dataclasses.fields(Limits):
        asked, most = getattr(limits, field.name), getattr(CEILING, field.name)
        if not isinstance(asked, (int, float)) or not 0 < asked <= most:
            raise ValueError(f"{field.name} should be above 0 and at most {most}, got {asked}")
    return task, limits, bool(body["partial"])
