"""An OpenAI-compatible server whose answers are a function: stands in for a paid model in tests and in bench.constitution."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HANG, DROP, GARBAGE = "hang", "drop", "garbage"  # never answer; close the connection; answer what is no JSON


class ScriptedServer(ThreadingHTTPServer):
    """Serves ``/v1/models`` and ``/v1/chat/completions`` on loopback. Use as a context manager.

    Args:
        reply: the text to answer, from the messages.
        plan: what happens to the first calls instead: a status, (status, headers) in which a function is called for its
            value, HANG, DROP, GARBAGE, a dict (an odd answer), or None for the usual reply.
        key: the bearer token to demand; None lets everybody in.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, reply: Callable[[list[dict[str, Any]]], str], plan: Iterable[Any] = (), key: str | None = None
    ) -> None:
        self.reply, self.plan, self.key = reply, deque(plan), key
        self.calls: list[dict[str, Any]] = []  # bodies, in the order of arrival
        self.answered: list[dict[str, Any]] = []  # those whose answer was sent whole
        self.in_flight, self.most_in_flight = 0, 0
        self.before = lambda count: None  # called with the number of calls so far, before each is answered
        self.released = threading.Event()  # lets calls that hang end
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> ScriptedServer:  # noqa: PYI034
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: Any) -> None:
        """Silence: clients that are killed leave broken pipes."""


class _Handler(BaseHTTPRequestHandler):
    server: ScriptedServer
    protocol_version = "HTTP/1.1"  # connections stay open, as with real servers
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if self._allowed():
            self._answer(200, {"data": [{"id": "scripted"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return
        server = self.server
        with server.lock:
            server.calls.append(body)
            count = len(server.calls)
            fault = server.plan.popleft() if server.plan else None
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        try:
            server.before(count)
            self._respond(body, fault)
        finally:
            with server.lock:
                server.in_flight -= 1

    def _respond(self, body: dict[str, Any], fault: Any) -> None:
        if fault in (HANG, DROP):
            if fault == HANG:
                self.server.released.wait()
            self.close_connection = True
        elif fault == GARBAGE:
            self._answer(200, b"<html>")
        elif isinstance(fault, dict):
            self._answer(200, fault)
        elif fault is not None:
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            told = self.headers.get("Authorization", "")
            self._answer(status, {"error": {"message": f"broken on purpose {told}"}}, headers)
        else:
            message = {"role": "assistant", "content": self.server.reply(body["messages"])}
            usage = {"prompt_tokens": 10, "completion_tokens": 5}
            self._answer(200, {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage})
            with self.server.lock:
                self.server.answered.append(body)

    def _allowed(self) -> bool:
        if self.server.key is None or self.headers.get("Authorization") == f"Bearer {self.server.key}":
            return True
        self._answer(401, {"error": {"message": f"wrong key {self.headers.get('Authorization', '')}"}})
        return False

    def _answer(self, status: int, body: Any, headers: Any = ()) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value() if callable(value) else value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        """Silence."""
