"""Rollouts from servers over HTTP: vLLM's, or ``rlhf-fast serve``. What they say is in :mod:`.completions`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx2

from rlhf_fast.errors import RolloutError, UserError
from rlhf_fast.rollout.completions import Unusable, completion_body, read_completion
from rlhf_fast.rollout.engine import CAPABILITIES, Request, Sample
from rlhf_fast.rollout.sampling import draw_seed

logger = logging.getLogger(__name__)
T = TypeVar("T")

# the caller's mistakes, which another try would repeat; 404 may be one server's that was restarted without the adapter
REFUSALS = (400, 401, 403, 405, 413, 422)
START_VLLM = "start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora"
START_SLEEP = "start vLLM with VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode, or leave sleeping off"


@dataclass(eq=False)
class Server:
    """One URL and how it does."""

    url: str
    ready: bool = True  # holds the weights that are asked for
    failures: int = 0  # in a row
    outstanding: int = 0  # samples that it owes

    @contextlib.contextmanager
    def owing(self, samples: int) -> Iterator[None]:
        """Count ``samples`` as its work; what fails inside is held against it."""
        self.outstanding += samples
        try:
            yield
            self.failures = 0
        except Unusable:
            self.failures += 1
            raise
        finally:
            self.outstanding -= samples


class ServerEngine:
    """Continue prompts on one or several servers that hold the same model.

    A request goes to the server that owes the fewest samples. What fails there (no connection, no answer in time, a 5xx,
    malformed JSON, wrong lengths, the name of older weights) is tried again after a pause, on another server if there is
    one. Every prompt is answered exactly once, or the call raises and names those that are not.

    Args:
        urls: of the servers, such as "http://127.0.0.1:8000".
        model: name of the base model there; the first that the server lists when None.
        stop_ids: tokens that end a sample besides those of the request: the policy's EOS ids.
        adapter_name: versions of the weights are loaded as ``{adapter_name}-v{version}``; what else the server holds under
            such names is unloaded, so runs that share a server need different ones.
        api_key: sent as a bearer token.
        max_concurrency: requests in flight, over all servers.
        timeout: seconds that one request may take.
        retries: further tries of a request.
        backoff: seconds before the first of them, doubled each time.
        patience: seconds to wait at the start until the servers are up.
        allow_sleep: the servers can sleep, and may while weights change.

    Raises:
        UserError: a server does not answer, or does not hold ``model``.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        model: str | None = None,
        stop_ids: Sequence[int] = (),
        adapter_name: str = "policy",
        api_key: str | None = None,
        max_concurrency: int = 256,
        timeout: float = 600.0,
        retries: int = 3,
        backoff: float = 0.5,
        patience: float = 240.0,
        allow_sleep: bool = False,
    ) -> None:
        self.capabilities = CAPABILITIES if allow_sleep else CAPABILITIES - {"sleep"}
        self.servers = [_server(url) for url in ([urls] if isinstance(urls, str) else urls)]
        if not self.servers:
            raise UserError("rollout: no server URL was given; such as http://127.0.0.1:8000")
        self.stop_ids, self.adapter_name, self.api_key = tuple(stop_ids), adapter_name, api_key
        self.max_concurrency, self.timeout = max_concurrency, timeout
        self.retries, self.backoff, self.patience = retries, backoff, patience
        self.version = 0
        self.model = _run(self._find_model(model))
        self.serving = self.model  # the name that requests ask for: the base, or a version of the adapter

    # ---- the protocol of engines

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """Continue every request; entry i holds the ``n`` samples of request i.

        Raises:
            UserError: a server refuses a request.
            RolloutError: prompts are left that no server answered; names them and what came instead.
        """
        requests = list(requests)
        seeds = [draw_seed() if r.seed is None else r.seed for r in requests]
        return _run(self._generate(requests, seeds))

    def update(self, adapter_dir: str | Path | None, version: int) -> None:
        """Load the adapter in a folder that the servers can read, and ask for it from now on.

        A server that cannot load it is left out until the next update, with a warning.

        Raises:
            UserError: no server could load it; says why and what to do.
        """
        if adapter_dir is None:
            raise UserError("rollout: a server cannot share the trainer's weights; pass the folder of an adapter")
        name, folder = f"{self.adapter_name}-v{version}", str(Path(adapter_dir).resolve())
        _run(self._everywhere(lambda client, server: self._load(client, server, name, folder), revive=True))
        self.serving, self.version = name, version

    def reset_cache(self) -> None:
        """Forget every cached prefix, where a server lets us: none that matters is left after an update anyway."""
        _run(self._everywhere(self._reset_cache))

    def sleep(self) -> None:
        """Give the servers' GPU memory back until :meth:`wake`."""
        if any(server.ready for server in self.servers):
            _run(self._everywhere(lambda c, s: self._post(c, s, "/sleep?level=1", hint=START_SLEEP)))

    def wake(self) -> None:
        """Undo :meth:`sleep`, also where its answer was missed: a server that was left out may sleep all the same."""
        # one that lacks the current weights says so by their name, and its requests go to another
        _run(self._everywhere(lambda c, s: self._post(c, s, "/wake_up", hint=START_SLEEP), revive=True))

    def holding(self) -> dict[str, Any]:
        """What the servers hold, for :meth:`follow`."""
        return {"serving": self.serving, "version": self.version, "ready": [s.url for s in self.servers if s.ready]}

    def follow(self, holding: dict[str, Any]) -> None:
        """Ask for what another process has put on the same servers, from now on."""
        self.serving, self.version = holding["serving"], holding["version"]
        for server in self.servers:
            server.ready = server.url in holding["ready"]

    def probe(self, request: Request) -> dict[str, Sample]:
        """One sample from every server that holds the current weights, by its URL."""
        samples: dict[str, Sample] = {}

        async def ask(client: httpx2.AsyncClient, server: Server) -> None:
            samples[server.url] = (await self._ask(client, server, request, request.seed or 0))[0]

        _run(self._everywhere(ask))
        return samples

    # ---- one prompt

    async def _generate(self, requests: list[Request], seeds: list[int]) -> list[list[Sample]]:
        limiter = asyncio.Semaphore(self.max_concurrency)
        for server in self.servers:
            server.failures = 0
        async with self._client() as client:
            tasks = [
                asyncio.ensure_future(self._answer(client, limiter, request, seed))
                for request, seed in zip(requests, seeds)
            ]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION) if tasks else None
            finally:
                for task in tasks:
                    task.cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
        pending = [i for i, result in enumerate(results) if isinstance(result, BaseException)]
        errors = [results[i] for i in pending if not isinstance(results[i], asyncio.CancelledError)]
        if errors and isinstance(errors[0], RolloutError):
            raise RolloutError(f"rollout: no samples for {_listed(pending)} of {len(requests)}: {errors[0]}")
        if errors:
            raise errors[0]
        return results

    async def _answer(
        self, client: httpx2.AsyncClient, limiter: asyncio.Semaphore, request: Request, seed: int
    ) -> list[Sample]:
        """The samples of one request, whoever gives them."""
        seen: dict[str, str] = {}
        for attempt in range(1 + self.retries):
            if attempt:
                await asyncio.sleep(self.backoff * 2 ** (attempt - 1))
            async with limiter:
                if not (ready := [s for s in self.servers if s.ready]):
                    raise RolloutError(self._nobody())
                server = min(ready, key=lambda s: (s.failures, s.outstanding))
                try:
                    with server.owing(request.n):
                        return await self._ask(client, server, request, seed)
                except Unusable as error:
                    seen[server.url] = str(error)
        came = "; ".join(f"{url} {what}" for url, what in seen.items())
        raise RolloutError(f"{came}, after {1 + self.retries} tries; look at the server's log and start it again")

    async def _ask(self, client: httpx2.AsyncClient, server: Server, request: Request, seed: int) -> list[Sample]:
        model, version = self.serving, self.version
        body = completion_body(request, model, seed, self.stop_ids)
        response = await self._post(client, server, "/v1/completions", body)
        try:
            payload = response.json()
        except ValueError as error:
            raise Unusable(f"answered with malformed JSON ({error})") from error
        return read_completion(payload, request, model, version)

    async def _post(
        self, client: httpx2.AsyncClient, server: Server, path: str, body: Any = None, hint: str = ""
    ) -> httpx2.Response:
        return await self._call(client, server, "POST", path, body, hint)

    async def _call(
        self, client: httpx2.AsyncClient, server: Server, method: str, path: str, body: Any = None, hint: str = ""
    ) -> httpx2.Response:
        """One exchange, within the deadline.

        Raises:
            UserError: the server refuses; with ``hint``, what to do about it, also for a path that it does not know.
            Unusable: it did not answer, or with an error of its own.
        """
        try:
            exchange = client.request(method, server.url + path, json=body)
            response = await asyncio.wait_for(exchange, self.timeout)
        except asyncio.TimeoutError as error:
            raise Unusable(f"gave no answer within {self.timeout:g} s") from error
        except httpx2.HTTPError as error:
            raise Unusable(f"cannot be reached ({type(error).__name__}: {error})".replace(": )", ")")) from error
        if response.status_code == 200:
            return response
        said = f"answered {response.status_code} to {path.partition('?')[0]} ({_excerpt(response)})"
        if response.status_code in REFUSALS or (hint and response.status_code == 404):
            raise UserError(f"rollout: {server.url} {said}" + (f"; {hint}" if hint else ""))
        raise Unusable(said)

    # ---- all servers

    async def _everywhere(
        self, what: Callable[[httpx2.AsyncClient, Server], Awaitable[Any]], revive: bool = False
    ) -> None:
        """Do something on every server in use at once, with retries. Those that cannot are left out, with a warning.

        Args:
            revive: on those too that were left out; where it succeeds they are in use again.
        """
        servers = [server for server in self.servers if revive or server.ready]
        if not servers:
            raise RolloutError(self._nobody())
        async with self._client() as client:
            results = await asyncio.gather(
                *(self._insist(lambda s=s: what(client, s)) for s in servers), return_exceptions=True
            )
        wrong = {server: result for server, result in zip(servers, results) if result is not None}
        for result in wrong.values():
            if not isinstance(result, (UserError, Unusable)):
                raise result
        for server in servers:
            server.ready = server not in wrong
        if len(wrong) == len(servers):
            told = "; ".join(str(e) if isinstance(e, UserError) else f"rollout: {s.url} {e}" for s, e in wrong.items())
            refused = any(isinstance(e, UserError) for e in wrong.values())
            raise UserError(told) if refused else RolloutError(f"{told}; start it again")
        for server, error in wrong.items():
            logger.warning("rollout: %s is left out until the next update: %s", server.url, error)

    def _nobody(self) -> str:
        urls = ", ".join(server.url for server in self.servers)
        return f"no server is in use, as {urls} failed at the last sync; look at its log and start it again"

    async def _insist(self, what: Callable[[], Awaitable[Any]]) -> None:
        for attempt in range(1 + self.retries):
            try:
                await what()
                return
            except Unusable:
                if attempt == self.retries:
                    raise
            await asyncio.sleep(self.backoff * 2**attempt)

    async def _load(self, client: httpx2.AsyncClient, server: Server, name: str, folder: str) -> None:
        """Make ``name`` the only version of the adapter there. One of that name is from a run that was interrupted."""
        versions = re.compile(re.escape(self.adapter_name) + r"-v\d+")
        held = [m for m in await self._models(client, server) if versions.fullmatch(m)]
        if name in held:
            await self._post(client, server, "/v1/unload_lora_adapter", {"lora_name": name})
        hint = f"{START_VLLM}, and let it read {folder}"
        await self._post(client, server, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder}, hint)
        for old in held:
            if old != name:
                await self._post(client, server, "/v1/unload_lora_adapter", {"lora_name": old})
        await self._reset_cache(client, server)

    async def _reset_cache(self, client: httpx2.AsyncClient, server: Server) -> None:
        try:
            await self._post(client, server, "/reset_prefix_cache", hint="not in development mode")
        except UserError:
            logger.debug("%s has no /reset_prefix_cache", server.url)

    async def _models(self, client: httpx2.AsyncClient, server: Server) -> list[str]:
        response = await self._call(client, server, "GET", "/v1/models")
        try:
            return [str(card["id"]) for card in response.json()["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise Unusable("lists no models at /v1/models") from error

    async def _find_model(self, wanted: str | None) -> str:
        """Wait until every server is up; the name of the model that all hold."""
        names: dict[str, list[str]] = {}

        async def ask(client: httpx2.AsyncClient, server: Server) -> None:
            deadline = time.monotonic() + self.patience
            while True:
                try:
                    names[server.url] = await self._models(client, server)
                    return
                except Unusable:
                    if time.monotonic() > deadline:
                        raise
                await asyncio.sleep(min(1.0, self.patience))

        async with self._client() as client:
            results = await asyncio.gather(*(ask(client, s) for s in self.servers), return_exceptions=True)
        for server, result in zip(self.servers, results):
            if isinstance(result, Unusable):
                raise UserError(
                    f"rollout: {server.url} {result}; start the server (`rlhf-fast serve MODEL`, or vLLM), or correct the URL"
                )
            if result is not None:
                raise result
        model = wanted or next(iter(names[self.servers[0].url]), "")
        for url, held in names.items():
            if model not in held:
                raise UserError(f"rollout: {url} does not hold the model {model!r}, only {', '.join(held) or 'none'}")
        return model

    def _client(self) -> httpx2.AsyncClient:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        # a deadline of our own covers the whole answer; a proxy of the environment is not for these servers
        return httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(None, connect=10.0),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=self.max_concurrency),
            trust_env=False,
        )


def _server(url: str) -> Server:
    if not re.match(r"https?://[^/]", url):
        raise UserError(f"rollout: {url!r} is no server's URL; such as http://127.0.0.1:8000")
    return Server(url.rstrip("/").removesuffix("/v1"))


def _excerpt(response: httpx2.Response) -> str:
    """What the server said, short: the message of OpenAI's error form, or the start of the text."""
    try:
        body = response.json()
        text = body["error"]["message"] if "error" in body else body["message"]
    except (ValueError, KeyError, TypeError):
        text = response.text
    return " ".join(str(text).split())[:200] or "no text"


def _listed(numbers: list[int]) -> str:
    """prompts 3, 5, 8 and 12 more"""
    shown, more = ", ".join(map(str, numbers[:5])), len(numbers) - 5
    return f"prompt{'s' * (len(numbers) > 1)} {shown}" + (f" and {more} more" if more > 0 else "")


def _run(work: Coroutine[Any, Any, T]) -> T:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:  # a notebook's own loop runs in this thread
        return pool.submit(asyncio.run, work).result()
