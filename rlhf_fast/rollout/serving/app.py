"""The routes: OpenAI's ``/v1/completions``, ``/v1/chat/completions`` and ``/v1/models``; vLLM's ``/health``,
``/v1/load_lora_adapter``, ``/v1/unload_lora_adapter``, ``/reset_prefix_cache``, ``/sleep``, ``/wake_up``, ``/is_sleeping``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from rlhf_fast.rollout.engine import Sample
from rlhf_fast.rollout.generate import context_length

from .answer import Answer, TextStream, model_card
from .guard import Guard
from .protocol import ApiError, Call, Limits, parse
from .worker import Job, ServedModels, Worker

ADAPTER_NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,64}")


class Service:
    """What the routes share.

    Args:
        worker: the engine's thread, not started yet.
        models: what is served.
        max_tokens: new tokens of one sample.
    """

    def __init__(self, worker: Worker, models: ServedModels, max_tokens: int = 32_768) -> None:
        self.worker, self.models = worker, models
        policy = models.policy
        self.tokenizer = policy.tokenizer
        vocabulary = policy.model.get_input_embeddings().num_embeddings
        self.limits = Limits(context_length(policy.model), vocabulary, max_tokens, room=worker.engine.max_tokens)
        self.started = int(time.time())

    # ---- generation

    async def completions(self, request: HttpRequest) -> Response:
        return await self._respond(request, chat=False)

    async def chat(self, request: HttpRequest) -> Response:
        return await self._respond(request, chat=True)

    async def _respond(self, request: HttpRequest, chat: bool) -> Response:
        call = parse(await _json(request), self.limits, self.tokenizer, chat=chat)
        role = self.models.role(call.model)
        name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        answer = Answer(name, int(time.time()), call.model or self.models.name, call, self.tokenizer)
        running = Running(self.worker, call, role)
        if call.stream:
            return StreamingResponse(_events(answer, running), media_type="text/event-stream")
        return JSONResponse(answer.whole(await _unless_gone(request, running)))

    # ---- models and engine

    async def list_models(self, request: HttpRequest) -> Response:
        cards = [
            model_card(
                name, self.models.folders.get(name, name), None if name == self.models.name else self.models.name
            )
            | {"created": self.started, "max_model_len": self.limits.context}
            for name in list(self.models.roles)
        ]
        return JSONResponse({"object": "list", "data": cards})

    async def load_adapter(self, request: HttpRequest) -> Response:
        body = await _json(request)
        name, folder = _field(body, "lora_name"), _field(body, "lora_path")
        if not ADAPTER_NAME.fullmatch(name):
            raise ApiError(
                400, f"lora_name is {name!r:.80}; use 1 to 64 of A-Z a-z 0-9 . _ -, no dot first", "lora_name"
            )
        await _done(self.worker.call(lambda: self.models.load(name, folder)))
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload_adapter(self, request: HttpRequest) -> Response:
        name = _field(await _json(request), "lora_name")
        await _done(self.worker.call(lambda: self.models.unload(name)))
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def reset_cache(self, request: HttpRequest) -> Response:
        await _done(self.worker.call(self.worker.engine.reset_cache))
        return JSONResponse({"success": True})

    async def sleep(self, request: HttpRequest) -> Response:
        await _done(self.worker.sleep())
        return Response()

    async def wake(self, request: HttpRequest) -> Response:
        await _done(self.worker.wake())
        return Response()

    async def is_sleeping(self, request: HttpRequest) -> Response:
        return JSONResponse({"is_sleeping": self.worker.asleep})

    async def health(self, request: HttpRequest) -> Response:
        return Response(status_code=200 if self.worker.is_alive() else 503)


class Running:
    """The jobs of one call, and what comes of them."""

    def __init__(self, worker: Worker, call: Call, role: str) -> None:
        self.call = call
        self.events: asyncio.Queue[tuple[int, int, Sample | ApiError]] = asyncio.Queue()
        self.jobs = [Job(r, role, self._deliverer(i), call.stream) for i, r in enumerate(call.requests)]
        try:
            for job in self.jobs:
                worker.submit(job)
        except ApiError:
            self.cancel()
            raise

    def _deliverer(self, number: int) -> Callable[[int, Sample | ApiError], None]:
        loop = asyncio.get_running_loop()

        def deliver(index: int, what: Sample | ApiError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever asked
                loop.call_soon_threadsafe(self.events.put_nowait, (number, index, what))

        return deliver

    def cancel(self) -> None:
        """Let the engine drop what has not ended. Harmless when everything has."""
        for job in self.jobs:
            job.cancelled = True

    async def parts(self) -> AsyncIterator[tuple[int, int, Sample]]:
        """(request, index of the sample, what it gained) until all samples have ended."""
        left = sum(r.n for r in self.call.requests)
        while left:
            number, index, what = await self.events.get()
            if isinstance(what, ApiError):
                raise what
            left -= bool(what.finish_reason)
            yield number, index, what

    async def groups(self) -> list[list[Sample]]:
        """All samples of every request."""
        groups: list[list[Any]] = [[None] * r.n for r in self.call.requests]
        async for number, index, sample in self.parts():
            groups[number][index] = sample
        return groups


async def _unless_gone(request: HttpRequest, running: Running) -> list[list[Sample]]:
    """The samples; the work is dropped when the client leaves."""
    work, gone = asyncio.ensure_future(running.groups()), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ApiError(499, "the client has gone")
        return work.result()
    finally:
        running.cancel()
        work.cancel()
        gone.cancel()


async def _gone(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(answer: Answer, running: Running) -> AsyncIterator[str]:
    """Server-sent events: a chunk per token, the usage if it was asked for, and [DONE]."""
    texts: dict[tuple[int, int], TextStream] = {}
    tokens = 0
    try:
        async for number, index, part in running.parts():
            request, key = running.call.requests[number], (number, index)
            first = key not in texts
            text = texts.setdefault(key, answer.text_stream(request))
            choice = sum(r.n for r in running.call.requests[:number]) + index
            tokens += len(part.ids)
            yield _event(answer.chunk(choice, request, part, text, first))
        if running.call.usage_in_stream:
            yield _event(answer.usage_chunk(tokens))
    except ApiError as error:
        yield _event(error.body())
    finally:
        running.cancel()
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _json(request: HttpRequest) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}") from error


def _field(body: Any, name: str) -> str:
    value = body.get(name) if isinstance(body, dict) else None
    if not isinstance(value, str) or not value:
        raise ApiError(400, f"{name} must be given, as a string", name)
    return value


async def _done(future: Future) -> Any:
    return await asyncio.wrap_future(future)


async def _api_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), status_code=error.status)


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    """Starlette's own, such as an unknown path."""
    assert isinstance(error, HTTPException)
    found = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(found.body(), status_code=error.status_code, headers=error.headers)


def build_app(service: Service, api_key: str | None = None) -> Guard:
    """The ASGI application. Its lifespan starts the engine's thread and ends it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.worker.close)

    s = service
    routes: Sequence[tuple[str, str, Any]] = (
        ("POST", "/v1/completions", s.completions),
        ("POST", "/v1/chat/completions", s.chat),
        ("GET", "/v1/models", s.list_models),
        ("GET", "/health", s.health),
        ("POST", "/v1/load_lora_adapter", s.load_adapter),
        ("POST", "/v1/unload_lora_adapter", s.unload_adapter),
        ("POST", "/reset_prefix_cache", s.reset_cache),
        ("POST", "/sleep", s.sleep),
        ("POST", "/wake_up", s.wake),
        ("GET", "/is_sleeping", s.is_sleeping),
    )
    app = Starlette(
        routes=[Route(path, endpoint, methods=[method]) for method, path, endpoint in routes],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error},
        lifespan=lifespan,
    )
    return Guard(app, api_key)
