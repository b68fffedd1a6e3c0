"""Requests as bytes on a socket: attackers send what no client library would."""

from __future__ import annotations

import json
import socket
from typing import NamedTuple


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self):
        return json.loads(self.body)


def send(port, request: bytes) -> Answer:
    """One request on a connection of its own, and all that comes back."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        try:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # refused before all of it was sent
        data = b""
        while True:
            try:
                more = connection.recv(1 << 16)
            except ConnectionResetError:
                break
            if not more:
                break
            data += more
    head, _, body = data.partition(b"\r\n\r\n")
    first, *rest = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in rest if ": " in line)
    return Answer(int(first.split(" ")[1]), headers, body)


def request(method, path, headers, body=b"") -> bytes:
    """Headers are (name, value) pairs, so that one may stand there twice."""
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers), "Connection: close", "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def ask(served, method, path, body=None, **headers) -> Answer:
    """As the page does it: the token before the path, and its own origin."""
    content = b"" if body is None else json.dumps(body).encode()
    own = {"Host": f"127.0.0.1:{served.port}"}
    if body is not None:
        own |= {"Origin": served.origin, "Content-Type": "application/json", "Content-Length": str(len(content))}
    path = f"/{served.url.split('/')[3]}/{path}"
    return send(served.port, request(method, path, [*{**own, **headers}.items()], content))
