"""Who may call the page: `rollout.serving`'s guard of hosts, origins and sizes, with what a browser needs on top."""

from __future__ import annotations

import hmac
import re
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from rlhf_fast.rollout.serving.guard import Guard
from rlhf_fast.rollout.serving.protocol import ApiError

MAX_BODY = 128 << 10  # bytes: a label with a long reason has some 40 kB
HOST = re.compile(rb"([A-Za-z0-9.-]+|\[[0-9a-fA-F:.]+\])(:[0-9]{1,5})?")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


class PageGuard:
    """Every route lies under ``/TOKEN/``: the link is the key, no cookie ever is, so no other page can borrow it.

    On top of `Guard` (Host, Origin, size), what changes something must come from this page and be JSON, and every answer,
    refusals too, carries the headers that keep it out of frames, caches and other pages.

    Args:
        app: what it guards; sees paths without the token.
        token: of this start.
        hosts: names it may be called by besides loopback.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], token: str, hosts: Collection[str] = ()) -> None:
        self.app, self.token, self.hosts = app, token, hosts
        self._guard = Guard(self._page, max_body=MAX_BODY, hosts=hosts)

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return

        async def sealed(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *headers]}
            await send(message)

        await self._guard(scope, receive, sealed)

    async def _page(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] == "http":
            if not all(HOST.fullmatch(value) for name, value in scope["headers"] if name == b"host"):
                raise ApiError(400, "the Host header is no single name with a port")
            given, slash, rest = scope["path"].removeprefix("/").partition("/")
            if not slash or not hmac.compare_digest(given.encode(), self.token.encode()):
                raise ApiError(403, "open the link that rlhf-fast label printed, whole: it carries the key")
            if scope["method"] not in ("GET", "HEAD"):
                self._check_sender({name.decode("latin-1"): v.decode("latin-1") for name, v in scope["headers"]})
            scope = {**scope, "path": f"/{rest}", "raw_path": f"/{rest}".encode(), "root_path": ""}
        await self.app(scope, receive, send)

    def _check_sender(self, headers: dict[str, str]) -> None:
        """What changes something is sent by our own page, in a form that no plain HTML form can send."""
        host = headers.get("host", "")
        # a name of ours may stand for a proxy that speaks TLS; on loopback there is none
        schemes = ("http", "https") if host.rpartition(":")[0] in self.hosts or host in self.hosts else ("http",)
        if headers.get("origin") not in [f"{scheme}://{host}" for scheme in schemes]:
            raise ApiError(403, "the Origin header must name this page: labels are taken from it alone")
        if headers.get("sec-fetch-site", "same-origin") != "same-origin":
            raise ApiError(403, "the request comes from another site")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"the body must be application/json, got {kind[:40] or 'nothing'!r}")
