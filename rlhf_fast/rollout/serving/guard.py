"""Who may call: an ASGI middleware before every route.

With an API key, every route wants it. Without one the server listens on loopback only, where a web page could still reach
it through a name of its own that it points at 127.0.0.1 (DNS rebinding), or send requests blindly: so the Host must be a
loopback name, and whatever a page of another origin sends is refused.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, Collection
from typing import Any
from urllib.parse import SplitResult, urlsplit

from .protocol import ApiError

App = Callable[[dict[str, Any], Callable, Callable], Awaitable[None]]


def is_loopback(host: str) -> bool:
    """Whether ``host``, a name or an address, is this machine and nobody else can reach it."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """Refuse calls that do not belong here, before their body is read.

    Args:
        app: what it guards.
        api_key: wanted as ``Authorization: Bearer KEY``; None wants none, and then Host must be loopback.
        max_body: bytes of a request's body.
        hosts: names that Host may be besides loopback where no key is wanted.
    """

    def __init__(
        self, app: App, api_key: str | None = None, max_body: int = 32 << 20, hosts: Collection[str] = ()
    ) -> None:
        self.app, self.api_key, self.max_body, self.hosts = app, api_key, max_body, hosts

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check(headers)
            await self.app(scope, self._limited(receive), send)
        except ApiError as error:
            await _refuse(send, error)

    def _check(self, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        name = _place(f"//{host}").hostname or ""
        if self.api_key is None and not is_loopback(name) and name not in self.hosts:
            raise ApiError(403, f"the Host header is {host!r}, and this server answers to localhost only")
        origin = headers.get("origin")
        if origin is not None and _place(origin).netloc != host:
            raise ApiError(403, f"the request comes from a page of {origin}, which may not call this server")
        if self.api_key is not None:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode("latin-1"), self.api_key.encode())
            if scheme.lower() != "bearer" or not same:
                raise ApiError(401, "this server wants its API key: send the header Authorization: Bearer KEY")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.max_body:
            raise self._too_large()

    def _limited(self, receive: Callable) -> Callable:
        """``receive``, counting: a body that is sent in chunks names no length."""
        read = 0

        async def counting() -> dict[str, Any]:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_body:
                raise self._too_large()
            return message

        return counting

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.max_body} bytes; split the request")


def _place(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as error:  # such as a bracket that is never closed
        raise ApiError(400, f"{url!r:.80} in the Host or Origin header is no place") from error


async def _refuse(send: Callable, error: ApiError) -> None:
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
