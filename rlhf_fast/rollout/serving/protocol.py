"""What a call may ask, in the dialect of OpenAI's completions and chat API with vLLM's additions: JSON to requests.

Looked up in vLLM's documentation of online serving and in its request schema: token-id prompts, ``top_k``, ``min_p``,
``repetition_penalty``, ``stop_token_ids``, ``include_stop_str_in_output`` and ``return_token_ids`` are its additions. A
field that asks for something this server cannot do is refused by name, and so is one that nobody knows.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.rollout.engine import Request

# fields that may be there as long as they ask for nothing, and what asks for nothing
NEUTRAL = {
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "ignore_eos": (None, False),
    "min_tokens": (None, 0),
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "use_beam_search": (None, False),
    "prompt_logprobs": (None,),
    "skip_special_tokens": (None, True),
    "top_logprobs": (None, 0),
}
IGNORED = ("user", "request_id", "store", "metadata", "service_tier", "priority", "add_special_tokens", "cache_salt")
SHARED = (
    *("model", "n", "seed", "stop", "stop_token_ids", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("max_tokens", "logprobs", "stream", "stream_options", "return_token_ids", "include_stop_str_in_output"),
)
COMPLETION_FIELDS = (*SHARED, "prompt")
CHAT_FIELDS = (*SHARED, "messages", "max_completion_tokens")


class ApiError(Exception):
    """An answer that is an error: HTTP status, one sentence, and the field it is about."""

    def __init__(self, status: int, message: str, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}


@dataclass(frozen=True)
class Limits:
    """What one call may ask for."""

    context: int | None  # tokens of a prompt and its continuation; None is no limit
    vocabulary: int  # token ids are below it
    max_tokens: int = 32_768  # new tokens of one sample
    room: int | None = None  # tokens held at once; a prompt counts twice when its sample begins
    max_samples: int = 1024  # prompts times n


@dataclass(frozen=True)
class Call:
    """One API call, checked: what to generate and how to answer."""

    model: str | None  # None: whatever is served first
    requests: list[Request]
    chat: bool = False
    stream: bool = False
    usage_in_stream: bool = False
    logprobs: bool = False
    token_ids: bool = False
    include_stop: bool = False


def parse(body: Any, limits: Limits, tokenizer: Any, *, chat: bool) -> Call:
    """Check the body of a call.

    Raises:
        ApiError: 400, naming the field, what it was and what it may be.
    """
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a JSON object, got {type(body).__name__}")
    _check_fields(body, CHAT_FIELDS if chat else COMPLETION_FIELDS)
    prompts = [_chat_prompt(body, tokenizer)] if chat else _prompts(body, tokenizer)
    options = _sampling(body, limits, chat, max(map(len, prompts), default=0))
    _check_sizes(prompts, options, limits)
    stream_options = _get(body, "stream_options", dict, {})
    try:
        requests = [Request(prompt, **options) for prompt in prompts]
    except UserError as error:
        raise ApiError(400, str(error).removeprefix("generation: ")) from error
    return Call(
        model=_get(body, "model", str, None),
        requests=requests,
        chat=chat,
        stream=_get(body, "stream", bool, False),
        usage_in_stream=bool(stream_options.get("include_usage")),
        logprobs=_wants_logprobs(body, chat),
        token_ids=_get(body, "return_token_ids", bool, False),
        include_stop=_get(body, "include_stop_str_in_output", bool, False),
    )


def _check_fields(body: dict[str, Any], known: Sequence[str]) -> None:
    for name, value in body.items():
        if name in NEUTRAL and value not in NEUTRAL[name]:
            raise ApiError(400, f"{name} is {value!r}, which this server cannot do; leave it out", name)
        if name not in (*known, *NEUTRAL, *IGNORED):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it may be {', '.join(known)}"
            raise ApiError(400, f"unknown field {name!r}; {hint}", name)


def _get(body: dict[str, Any], name: str, kind: type | tuple[type, ...], default: Any) -> Any:
    """A field of the right type; null and absent are the default."""
    value = body.get(name)
    if value is None:
        return default
    kinds = kind if isinstance(kind, tuple) else (kind,)
    # to Python True is an int, to JSON it is not
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(
            {"str": "string", "dict": "object", "list": "array"}.get(k.__name__, k.__name__) for k in kinds
        )
        raise ApiError(400, f"{name} must be of type {wanted}, got {value!r:.80}", name)
    return value


def _number(body: dict[str, Any], name: str, default: float) -> float:
    value = _get(body, name, (int, float), default)
    try:
        return float(value)
    except OverflowError as error:  # JSON's integers have no largest
        raise ApiError(400, f"{name} is larger than any float", name) from error


def _sampling(body: dict[str, Any], limits: Limits, chat: bool, longest: int) -> dict[str, Any]:
    """The options of every :class:`Request` of the call, whose longest prompt has ``longest`` tokens."""
    left = limits.max_tokens if limits.room is None else min(limits.max_tokens, max(1, limits.room - 2 * longest))
    default_tokens = left if chat else 16
    tokens = _get(body, "max_completion_tokens", int, _get(body, "max_tokens", int, None))
    stop = _get(body, "stop", (str, list), [])
    stop = [stop] if isinstance(stop, str) else stop
    if not all(isinstance(s, str) for s in stop):
        raise ApiError(400, f"stop must be a string or an array of strings, got {stop!r:.80}", "stop")
    top_k, seed = _get(body, "top_k", int, 0), _get(body, "seed", int, None)
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise ApiError(400, f"seed must be from -2^63 to 2^63 - 1, got {seed}", "seed")
    return {
        "n": _get(body, "n", int, 1),
        "seed": seed,
        "max_new_tokens": default_tokens if tokens is None else tokens,
        "temperature": _number(body, "temperature", 1.0),
        "top_p": _number(body, "top_p", 1.0),
        "top_k": 0 if top_k == -1 else top_k,  # vLLM: -1 is off too
        "min_p": _number(body, "min_p", 0.0),
        "repetition_penalty": _number(body, "repetition_penalty", 1.0),
        "stop": tuple(stop),
        "stop_ids": tuple(_token_ids(_get(body, "stop_token_ids", list, []), "stop_token_ids")),
    }


def _check_sizes(prompts: list[list[int]], options: dict[str, Any], limits: Limits) -> None:
    count = len(prompts) * options["n"]
    if options["max_new_tokens"] > limits.max_tokens:
        asked = options["max_new_tokens"]
        raise ApiError(400, f"max_tokens is {asked}; this server gives at most {limits.max_tokens}", "max_tokens")
    if count > limits.max_samples:
        raise ApiError(400, f"{count} samples in one call; at most {limits.max_samples}: split it", "n")
    for i, prompt in enumerate(prompts):
        if limits.context is not None and len(prompt) >= limits.context:
            raise ApiError(
                400,
                f"prompt {i} has {len(prompt)} tokens, which fills the model's context of {limits.context}",
                "prompt",
            )
        if not prompt:
            raise ApiError(400, f"prompt {i} is empty; it needs at least one token", "prompt")
        if wrong := [t for t in prompt if not 0 <= t < limits.vocabulary]:
            raise ApiError(
                400, f"prompt {i} holds token id {wrong[0]}; ids run from 0 to {limits.vocabulary - 1}", "prompt"
            )


def _prompts(body: dict[str, Any], tokenizer: Any) -> list[list[int]]:
    """A string, an array of strings, an array of token ids, or an array of those."""
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise ApiError(400, f"prompt must be a string, token ids, or an array of them, got {prompt!r:.80}", "prompt")
    if all(isinstance(p, str) for p in prompt):
        return [tokenizer(p)["input_ids"] for p in prompt]
    if all(isinstance(p, list) for p in prompt):
        return [_token_ids(p, "prompt") for p in prompt]
    return [_token_ids(prompt, "prompt")]


def _token_ids(ids: list[Any], name: str) -> list[int]:
    if wrong := [t for t in ids if not isinstance(t, int) or isinstance(t, bool)]:
        raise ApiError(400, f"{name} must hold token ids, got {wrong[0]!r:.80}", name)
    return ids


def _chat_prompt(body: dict[str, Any], tokenizer: Any) -> list[int]:
    """The conversation through the tokenizer's chat template, up to where the answer begins."""
    messages = _get(body, "messages", list, [])
    if not messages:
        raise ApiError(400, "messages must hold at least one message", "messages")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ApiError(
                400, f"messages[{i}] must be an object with role and content, got {message!r:.80}", "messages"
            )
        if not isinstance(message.get("content"), str):
            raise ApiError(
                400, f"messages[{i}].content must be a string, got {message.get('content')!r:.80}", "messages"
            )
    if getattr(tokenizer, "chat_template", None) is None:
        raise ApiError(400, "the model's tokenizer has no chat template; use /v1/completions", "messages")
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template raises what it likes, jinja2's own errors among them
        raise ApiError(400, f"the chat template refuses these messages: {str(error)[:200]}", "messages") from error
    # the template has written the special tokens itself
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _wants_logprobs(body: dict[str, Any], chat: bool) -> bool:
    if chat:
        return _get(body, "logprobs", bool, False)
    count = _get(body, "logprobs", int, None)
    if count not in (None, 0, 1):
        raise ApiError(
            400, f"logprobs is {count}; this server gives that of the sampled token only: ask for 0 or 1", "logprobs"
        )
    return count is not None
