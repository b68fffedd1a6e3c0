"""The routes of the page: its files, items a few at a time, and what annotators answer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rlhf_fast.errors import UserError
from rlhf_fast.feedback.people.consensus import agreement
from rlhf_fast.feedback.people.guard import PageGuard
from rlhf_fast.feedback.people.items import Items, annotator_name, shown_order, turns
from rlhf_fast.feedback.people.store import MARGINS, Label, Store
from rlhf_fast.rewards.verifiers import text_of
from rlhf_fast.rollout.serving.protocol import ApiError

PAGE = Path(__file__).with_name("page")
FILES = {"": "text/html", "label.css": "text/css", "label.js": "text/javascript", "icon.svg": "image/svg+xml"}
# for uvicorn: one strict parser, nothing but HTTP, and no word about itself
SERVER = {"log_level": "warning", "lifespan": "off", "http": "h11", "ws": "none", "server_header": False}
AT_ONCE = 20  # items of one answer
FIRST = 4  # that come with the start
LONGEST_REASON = 10_000  # characters
FIELDS = ("annotator", "item", "ranks", "margin", "bad", "reason", "safer", "unsafe", "done", "skipped")


class Desk:
    """What the routes share.

    Args:
        items: what is compared; may grow.
        store: of the labels, open for writing.
        title: over the page, such as the name of the data.
        safety: ask which response is safer too, and which are unsafe.
    """

    def __init__(self, items: Items, store: Store, title: str = "", safety: bool = False) -> None:
        self.items, self.store, self.title, self.safety = items, store, title, safety

    # ---- reading

    async def start(self, request: Request) -> Response:
        """Who is there, how far this annotator is, and the items to go on with."""
        who = _annotator(request.query_params.get("annotator"))
        settings = {"title": self.title, "safety": self.safety, "annotator": who}
        progress = self._progress(who, -1)
        rows = [] if progress["next"] is None else self._rows(progress["next"], FIRST, who)
        return JSONResponse({**settings, **progress, "items": rows})

    async def page(self, request: Request) -> Response:
        """A few items from a place on, with what this annotator said about them."""
        who = _annotator(request.query_params.get("annotator"))
        first = _whole(request.query_params.get("from", "0"), "from", len(self.items))
        count = _whole(request.query_params.get("count", "8"), "count", AT_ONCE)
        return JSONResponse({"items": self._rows(first, count, who), "total": len(self.items)})

    async def people(self, request: Request) -> Response:
        """How far everybody is, and how far they agree."""
        who = [{"name": name, **self.store.counts(name)} for name in self.store.annotators()]
        return JSONResponse({"people": who, "agreement": agreement(self.items, self.store), "total": len(self.items)})

    def _rows(self, first: int, count: int, who: str) -> list[dict[str, Any]]:
        return [self._row(place, who) for place in range(first, min(first + count, len(self.items)))]

    def _row(self, place: int, who: str) -> dict[str, Any]:
        identity, item = self.items[place]
        order = shown_order(identity, who, len(item.responses))
        label = self.store.get(who, identity)
        responses = [text_of(item.responses[i]) for i in order]
        row = {"place": place, "id": identity, "prompt": turns(item.prompt), "responses": responses}
        return {**row, "label": None if label is None else _shown(label, order)}

    def _progress(self, who: str, after: int) -> dict[str, Any]:
        """Counts, and the next item without an answer: beyond ``after``, else the first one."""
        total = len(self.items)
        places = itertools.chain(range(after + 1, total), range(after + 1))
        return {
            **self.store.counts(who),
            "total": total,
            "expected": max(total, self.items.expected),
            "fault": self.items.fault,
            "next": next((place for place in places if not self._done(place, who)), None),
        }

    def _done(self, place: int, who: str) -> bool:
        label = self.store.get(who, self.items[place][0])
        return label is not None and label.done

    # ---- writing

    async def label(self, request: Request) -> Response:
        """Keep a click. What is answered is on the disk."""
        body = await _json(request)
        if set(body) - set(FIELDS):
            raise ApiError(400, f"unknown fields; a label has {', '.join(FIELDS)}")
        who = _annotator(body.get("annotator"))
        place = self.items.place(body["item"]) if isinstance(body.get("item"), str) else None
        if place is None:
            raise ApiError(404, "there is no such item", "item")
        identity, item = self.items[place]
        self.store.put(_label(body, identity, who, shown_order(identity, who, len(item.responses))))
        return JSONResponse(self._progress(who, place))

    async def undo(self, request: Request) -> Response:
        """Take the latest item back, and say where it stands."""
        who = _annotator((await _json(request)).get("annotator"))
        identity = self.store.undo(who)
        place = None if identity is None else self.items.place(identity)
        return JSONResponse({**self._progress(who, -1), "place": place})


def _label(body: dict[str, Any], identity: str, who: str, order: list[int]) -> Label:
    """A checked label; what the page says of places becomes what is said of responses.

    Raises:
        ApiError: a field of a wrong type or size.
    """
    count = len(order)
    flags = {name: _typed(body, name, bool, False) for name in ("bad", "done", "skipped")}
    reason = _typed(body, "reason", str, "")
    if len(reason) > LONGEST_REASON:
        raise ApiError(400, f"the reason is longer than {LONGEST_REASON} characters", "reason")
    margin = _typed(body, "margin", int, None)
    if margin is not None and not 1 <= margin <= len(MARGINS):
        raise ApiError(400, f"margin must be 1 to {len(MARGINS)}, got {margin}", "margin")
    lists = {}
    for name, kind in (("ranks", int), ("safer", int), ("unsafe", bool)):
        given = _typed(body, name, list, None)
        if given is not None and (len(given) != count or any(type(v) is not kind for v in given)):
            raise ApiError(400, f"{name} must hold one {kind.__name__} for each of the {count} responses", name)
        if given is not None and kind is int:
            levels = sorted(set(given))
            given = [levels.index(value) + 1 for value in given]
        lists[name] = None if given is None else tuple(given[order.index(i)] for i in range(count))
    if flags["done"] and not flags["skipped"] and lists["ranks"] is None:
        raise ApiError(400, "an answer that is done has ranks; to pass over the item, set skipped", "ranks")
    return Label(identity, who, tuple(order), margin=margin, reason=reason, **lists, **flags)


def _shown(label: Label, order: list[int]) -> dict[str, Any]:
    """The label in the places of the screen, the inverse of `_label`."""

    def placed(values: tuple | None) -> list | None:
        return None if values is None else [values[i] for i in order]

    plain = {name: getattr(label, name) for name in ("margin", "bad", "reason", "done", "skipped")}
    return {**plain, **{name: placed(getattr(label, name)) for name in ("ranks", "safer", "unsafe")}}


def _typed(body: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = body.get(name, default)
    if value is default or value is None:
        return default
    if type(value) is not kind:
        raise ApiError(400, f"{name} must be of type {kind.__name__}, got {type(value).__name__}", name)
    return value


def _annotator(name: Any) -> str:
    try:
        return annotator_name(name)
    except UserError as error:
        raise ApiError(400, str(error), "annotator") from error


def _whole(text: str, name: str, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ApiError(400, f"{name} must be a whole number", name)
    return min(int(text), most)


async def _json(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {str(error)[:100]}") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a JSON object, got {type(body).__name__}")
    return body


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), status_code=error.status)


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own, such as an unknown path; what was asked for is not repeated."""
    assert isinstance(error, HTTPException)
    return JSONResponse(ApiError(error.status_code, str(error.detail)).body(), error.status_code, error.headers)


def _file(name: str, kind: str) -> Callable:
    content = (PAGE / (name or "index.html")).read_bytes()

    async def serve(request: Request) -> Response:
        return Response(content, media_type=kind)

    return serve


def build_app(desk: Desk, token: str, hosts: Collection[str] = ()) -> PageGuard:
    """The ASGI application: every path begins with ``/token/``."""
    routes = [Route(f"/{name}", _file(name, kind), methods=["GET"]) for name, kind in FILES.items()]
    routes += [
        Route("/api/start", desk.start, methods=["GET"]),
        Route("/api/items", desk.page, methods=["GET"]),
        Route("/api/people", desk.people, methods=["GET"]),
        Route("/api/label", desk.label, methods=["POST"]),
        Route("/api/undo", desk.undo, methods=["POST"]),
    ]
    app = Starlette(routes=routes, exception_handlers={ApiError: _api_error, HTTPException: _http_error})
    app.router.redirect_slashes = False  # its redirects would go to the Host that was sent, without the token
    return PageGuard(app, token, hosts)
