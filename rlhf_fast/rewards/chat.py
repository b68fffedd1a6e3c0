"""Models that are asked in words, in this process or behind a URL; the AI judge and the constitution ask through this.

Every answer goes into a :class:`Ledger` as it comes, under a hash of all that it depends on: the model, the conversation and
how to sample. What is there already is never asked again, so that an interrupted command goes on where it was.
"""

from __future__ import annotations

import asyncio
import email.utils
import inspect
import itertools
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import httpx2

from rlhf_fast.data.sources import BadRow
from rlhf_fast.data.templates import Encoder
from rlhf_fast.errors import UserError
from rlhf_fast.models import Policy, load
from rlhf_fast.models.fingerprint import digest
from rlhf_fast.rewards.faults import Fault
from rlhf_fast.rewards.ledger import Ledger, key_of
from rlhf_fast.rollout import Request, context_length, decode, end_of_sequence_ids, engine_for

API_KEY = "RLHF_FAST_JUDGE_API_KEY"  # environment variable; never a setting, which a run would save
LONGEST_PAUSE = 60.0  # seconds between two tries, unless the server asks for more
HOPELESS = (401, 403, 404, 405)  # no other conversation would fare better
TEMPORARY = (408, 409, 425, 429)  # and every 5xx

Conversation: TypeAlias = "Sequence[Mapping[str, Any]]"


@dataclass(frozen=True)
class Reply:
    """What a model said."""

    text: str
    complete: bool = True  # False: cut at ``max_new_tokens``
    prompt_tokens: int = 0  # read and written, as far as known
    completion_tokens: int = 0


@dataclass(frozen=True)
class Wording:
    """How replies are sampled."""

    temperature: float = 0.0  # 0 is greedy
    max_new_tokens: int = 1024  # tokens of a reply
    seed: int = 0  # of the sampling, where the temperature is above 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf") or self.max_new_tokens < 1:
            raise UserError(
                f"chat: needs temperature >= 0 and max_new_tokens >= 1, got {self.temperature} and {self.max_new_tokens}"
            )


class Chat:
    """A model that answers conversations, each of them once.

    Args:
        name: of the model, for people.
        identity: of the model, for the ledger: its name at a server, a hash of its weights here.
        cache: file of the answers; None keeps them in memory.
        give_up_after: so many failures in a row, with no answer between them, end the call with an error; 0 never does.
    """

    def __init__(self, name: str, identity: str, wording: Wording, cache: Any = None, give_up_after: int = 0) -> None:
        self.name, self.identity, self.wording, self.give_up_after = name, identity, wording, give_up_after
        self.ledger = Ledger(cache)
        self.asked = 0  # calls answered anew since the start
        self.failed = 0  # calls that failed for good
        self.tokens = [0, 0]  # of prompts and replies, of the calls made
        self._failures_in_a_row = 0

    async def answer(
        self, conversations: Sequence[Conversation], progress: Callable[[int], None] | None = None
    ) -> list[Reply | Fault]:
        """The reply to every conversation, or why there is none. Equal conversations are asked once.

        Args:
            progress: called with the number of different conversations settled so far.
        Raises:
            UserError: nothing would be answered: wrong key, nobody there, ``give_up_after`` failures in a row. What was
                answered until then is kept.
        """
        keys = [key_of(self.call(conversation)) for conversation in conversations]
        outcomes: dict[str, Reply | Fault] = {
            k: Reply(**known) for k in keys if (known := self.ledger.get(k)) is not None
        }
        pending = {k: c for k, c in zip(keys, conversations) if k not in outcomes}

        def settle(key: str, outcome: Reply | Fault) -> None:
            outcomes[key] = outcome
            if isinstance(outcome, Reply):
                self.ledger.put(key, asdict(outcome))
            self._count(outcome)
            if progress:
                progress(len(outcomes))

        if progress:
            progress(len(outcomes))
        await self._ask(pending, settle)
        return [outcomes[key] for key in keys]

    def call(self, conversation: Conversation) -> dict[str, Any]:
        """All that the reply to a conversation depends on."""
        return {"model": self.identity, "messages": [dict(m) for m in conversation], **asdict(self.wording)}

    def figures(self) -> dict[str, float]:
        """What was asked since the start."""
        tokens = {"tokens/read": self.tokens[0], "tokens/written": self.tokens[1]}
        return {"calls/answered now": self.asked, "calls/failed": self.failed, **tokens}

    async def _ask(self, pending: Mapping[str, Conversation], settle: Callable[[str, Reply | Fault], None]) -> None:
        """Call ``settle`` once for every pending conversation, as soon as its outcome is known."""
        raise NotImplementedError

    def _count(self, outcome: Reply | Fault) -> None:
        if not isinstance(outcome, Fault):
            self.asked += 1
            self._failures_in_a_row = 0
            self.tokens[0] += outcome.prompt_tokens
            self.tokens[1] += outcome.completion_tokens
            return
        self.failed += 1
        self._failures_in_a_row += 1
        if self.give_up_after and self._failures_in_a_row >= self.give_up_after:
            raise UserError(
                f"{self.give_up_after} calls in a row failed, the last one because it {outcome.reason}; "
                "what was answered is kept: run the same command again when this is put right"
            )


def connect(
    model: Any = None,
    url: str | None = None,
    *,
    temperature: float = 0.0,
    max_new_tokens: int = 1024,
    seed: int = 0,
    cache: Any = None,
    give_up_after: int = 0,
    batch_size: int = 64,
    **options: Any,
) -> Chat:
    """The model behind ``url``, or, without one, a local model.

    Args:
        model: its name at the URL (None: the first that is listed there), or a folder, a Hugging Face name or a Policy.
        batch_size: replies that a local model writes at once.
        options: of :class:`UrlChat`.
    Raises:
        UserError: nothing to ask, nobody there, or an option that a local model does not have.
    """
    wording, keep = Wording(temperature, max_new_tokens, seed), {"cache": cache, "give_up_after": give_up_after}
    known = [n for n, p in inspect.signature(UrlChat).parameters.items() if p.kind is p.KEYWORD_ONLY]
    if unknown := [name for name in options if name not in known]:
        raise UserError(f"chat: has no option '{unknown[0]}'; of a server it has {', '.join(known)}")
    if url is not None:
        return UrlChat(url, model, wording, **keep, **options)
    if model is None:
        raise UserError("chat: name a model to ask: a folder or a Hugging Face name, or the URL of a server")
    if options:
        raise UserError(f"chat: '{next(iter(options))}' is an option of servers, and there is no url")
    return LocalChat(model, wording, batch_size=batch_size, **keep)


class LocalChat(Chat):
    """A model in this process, through the slot engine. It writes with its chat template, or the plain one without any."""

    def __init__(self, model: Any, wording: Wording, *, batch_size: int = 64, **keep: Any) -> None:
        self.policy = model if isinstance(model, Policy) else load(model).requires_grad_(False)
        if self.policy.role != "policy":
            raise UserError(f"{model} is a {self.policy.role} model, which scores responses and writes none")
        name = str(model) if isinstance(model, (str, Path)) else self.policy.model.config.name_or_path
        super().__init__(name, digest(dict(self.policy.model.named_parameters())), wording, **keep)
        self.batch_size = batch_size
        self.encoder = Encoder(
            self.policy.tokenizer, stop_ids=end_of_sequence_ids(self.policy.model, self.policy.tokenizer)
        )
        self.engine = engine_for(self.policy, slots=batch_size)

    async def _ask(self, pending: Mapping[str, Conversation], settle: Callable[[str, Reply | Fault], None]) -> None:
        # blocks of four replies a slot: few slots are ever empty, and a kill loses no more than a block
        keys = list(pending)
        for start in range(0, len(keys), 4 * self.batch_size):
            requests = {}
            for key in keys[start : start + 4 * self.batch_size]:
                request = self._request(key, pending[key])
                settle(key, request) if isinstance(request, Fault) else requests.update({key: request})
            groups = self.engine.generate(list(requests.values()))
            texts = decode([samples[0] for samples in groups], self.policy.tokenizer)
            for (key, request), (sample,), text in zip(requests.items(), groups, texts):
                lengths = (len(request.prompt_ids), len(sample.ids))
                settle(key, Reply(text, sample.finish_reason == "stop", *lengths))

    def _request(self, key: str, conversation: Conversation) -> Request | Fault:
        try:
            ids = self.encoder.prompt([dict(m) for m in conversation])
        except BadRow as error:
            return Fault(f"cannot be asked: {error}")
        context = context_length(self.policy.model)
        if context is not None and len(ids) >= context:
            return Fault(f"was asked {len(ids)} tokens, which fills the model's context of {context}")
        w = self.wording
        seed = (w.seed + int(key[:12], 16)) % 2**63  # its own, whatever else is asked
        return Request(ids, max_new_tokens=w.max_new_tokens, temperature=w.temperature, seed=seed)


class _Unanswered(Exception):
    """A call that came to nothing, in words; another try may help, after ``pause`` seconds if the server named some."""

    def __init__(self, what: str, pause: float | None = None) -> None:
        super().__init__(what)
        self.pause = pause


class _Refused(Exception):
    """This one conversation is refused, in words, and would be again."""


class UrlChat(Chat):
    """A model behind an OpenAI-compatible ``/chat/completions``: OpenAI's own, vLLM's, ``rlhf-fast serve``, and many more.

    What fails (no connection, no answer in time, 408, 409, 429, 5xx, a malformed answer) is tried again after a pause that
    doubles, or the one that ``Retry-After`` names; while a server asks everybody to wait, nobody is sent. The key comes from
    the environment, goes to this URL only (redirects are not followed), and is cut out of every message.

    Args:
        url: such as ``https://api.openai.com/v1`` or ``http://127.0.0.1:8000``.
        model: name of the model there; None takes the first that is listed.
        api_key_env: the environment variable that holds the key; without one no key is sent.
        concurrency: calls in flight.
        timeout: seconds for one call.
        retries: further tries of a call.
        backoff: seconds before the first of them.
        deadline: seconds for a conversation, all tries and pauses together.
        extra: fields of the request body besides, or instead of, ours; None leaves a field out.
    Raises:
        UserError: a wrong option, nobody there, or the key is refused.
    """

    def __init__(
        self,
        url: str,
        model: str | None,
        wording: Wording,
        *,
        api_key_env: str = API_KEY,
        concurrency: int = 16,
        timeout: float = 120.0,
        retries: int = 6,
        backoff: float = 1.0,
        deadline: float = 600.0,
        extra: Mapping[str, Any] | None = None,
        **keep: Any,
    ) -> None:
        if concurrency < 1 or retries < 0 or not min(timeout, deadline) > 0 or backoff < 0:
            raise UserError(
                "chat: needs concurrency >= 1, retries >= 0, backoff >= 0, timeout and deadline above 0, got "
                f"{concurrency}, {retries}, {backoff}, {timeout} and {deadline}"
            )
        self.url = _base(url)
        self._key = os.environ.get(api_key_env, "").strip()
        self.api_key_env = api_key_env
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.backoff, self.deadline = backoff, deadline
        self.extra = dict(extra or {})
        self.model = self._find(model)
        self._resume_at = 0.0  # by time.monotonic(): when the server wants to hear from us again
        super().__init__(self.model, self.model, wording, **keep)

    def call(self, conversation: Conversation) -> dict[str, Any]:
        return super().call(conversation) | ({"extra": self.extra} if self.extra else {})

    async def _ask(self, pending: Mapping[str, Conversation], settle: Callable[[str, Reply | Fault], None]) -> None:
        waiting, errors = iter(pending.items()), []
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=self.concurrency)

        async def work() -> None:
            for key, conversation in waiting:  # shared: each takes the next
                if errors:
                    return
                try:
                    settle(key, await self._insist(client, conversation))
                except UserError as error:
                    errors.append(error)

        # our own deadline covers a whole exchange, a server that trickles included
        async with httpx2.AsyncClient(headers=self._headers(), timeout=None, limits=limits) as client:
            # an error lets the calls in flight end: they are paid for
            await asyncio.gather(*(work() for _ in range(min(self.concurrency, len(pending)))))
        if errors:
            raise errors[0]

    async def _insist(self, client: httpx2.AsyncClient, conversation: Conversation) -> Reply | Fault:
        """The reply to one conversation, within its deadline and tries."""
        end = time.monotonic() + self.deadline
        for attempt in itertools.count(1):
            await asyncio.sleep(max(0.0, min(self._resume_at, end) - time.monotonic()))
            try:
                return await self._post(client, conversation, min(self.timeout, max(0.001, end - time.monotonic())))
            except _Refused as error:
                return Fault(str(error))
            except _Unanswered as error:
                # jitter: those that failed together do not come back together
                pause = min(self.backoff * 2 ** (attempt - 1), LONGEST_PAUSE) * random.uniform(0.75, 1.25)
                if error.pause is not None:
                    pause = error.pause
                    self._resume_at = max(self._resume_at, time.monotonic() + pause)
                if attempt > self.retries or time.monotonic() + pause >= end:
                    return Fault(f"{error} (after {attempt} {'try' if attempt == 1 else 'tries'})")
            await asyncio.sleep(pause)
        raise AssertionError

    async def _post(self, client: httpx2.AsyncClient, conversation: Conversation, timeout: float) -> Reply:
        w = self.wording
        body = {"model": self.model, "messages": [dict(m) for m in conversation], "temperature": w.temperature}
        body |= {"max_tokens": w.max_new_tokens} | ({"seed": w.seed} if w.temperature else {}) | self.extra
        body = {name: value for name, value in body.items() if value is not None}
        try:
            exchange = client.post(f"{self.url}/chat/completions", json=body)
            response = await asyncio.wait_for(exchange, timeout)
        except asyncio.TimeoutError:
            raise _Unanswered(f"gave no answer within {timeout:.3g} s") from None
        except httpx2.HTTPError as error:
            raise _Unanswered(f"could not be reached ({type(error).__name__})") from None
        except UnicodeEncodeError:
            raise _Refused("was given text with half a character in it (a lone surrogate)") from None
        if response.status_code == 200:
            return _read(response)
        said = f"answered {response.status_code} ({self._excerpt(response)})"
        if response.status_code in HOPELESS:
            raise UserError(f"{self.url} {said}; {self._remedy(response.status_code)}")
        if response.status_code in TEMPORARY or response.status_code >= 500:
            raise _Unanswered(said, _retry_after(response.headers.get("retry-after")))
        raise _Refused(said)

    def _find(self, model: str | None) -> str:
        """The model's name; asks for the list of models, which costs nothing and tells a wrong key or URL at once."""
        try:
            response = httpx2.get(f"{self.url}/models", headers=self._headers(), timeout=min(30.0, self.timeout))
        except httpx2.HTTPError as error:
            raise UserError(
                f"{self.url} cannot be reached ({type(error).__name__}); start the server, or correct the URL"
            ) from None
        if response.status_code in (401, 403):
            raise UserError(
                f"{self.url} answered {response.status_code} ({self._excerpt(response)}); {self._remedy(401)}"
            )
        if model:
            return model  # not every server lists all that it answers to
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, KeyError, TypeError, IndexError):
            raise UserError(f"{self.url} lists no models; name the one to ask") from None

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def _remedy(self, status: int) -> str:
        if status in (401, 403):
            return f"{self.api_key_env} is {'not accepted' if self._key else 'not set: put the key there'}"
        return f"is the model {self.model!r} there, and is the URL right?"

    def _excerpt(self, response: httpx2.Response) -> str:
        """What the server said, short and without the key, which some repeat."""
        try:
            error = response.json()["error"]
            text = error["message"] if isinstance(error, dict) else error
        except (ValueError, KeyError, TypeError):
            text = response.text
        text = str(text).replace(self._key, "***") if self._key else str(text)
        return " ".join(text.split())[:200] or "no text"


def _base(url: str) -> str:
    """The URL that ``/chat/completions`` follows: a bare host gets ``/v1``."""
    match = re.fullmatch(r"(https?://)([^/?#]+)(/[^?#]*)?", url)
    if not match or "@" in match[2]:
        hint = f"put a key into {API_KEY}, not into the URL" if match else "such as http://127.0.0.1:8000"
        raise UserError(f"chat: {re.sub('//.*@', '//***@', url)!r} is no URL of a server; {hint}")
    path = (match[3] or "").rstrip("/").removesuffix("/chat/completions")
    return match[1] + match[2] + (path or "/v1")


def _read(response: httpx2.Response) -> Reply:
    try:
        payload = response.json()
        choice = payload["choices"][0]
        text = choice["message"].get("content") or ""  # null where a model refuses, or thought until it was cut
        usage = payload.get("usage") or {}
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise _Unanswered(f"gave a malformed answer ({type(error).__name__}: {error})") from None
    if not isinstance(text, str):
        raise _Unanswered(f"gave {type(text).__name__} as its reply")
    text = text.encode("utf-8", "replace").decode()  # half a character, cut from an emoji, could not be written
    return Reply(text, choice.get("finish_reason") != "length", *tokens)


def _retry_after(value: str | None) -> float | None:
    """Seconds that the header ``Retry-After`` asks to wait: a number, or a date (RFC 9110, 10.2.3)."""
    if value is None:
        return None
    try:
        return max(0.0, float(value)) if float(value) < float("inf") else None
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
