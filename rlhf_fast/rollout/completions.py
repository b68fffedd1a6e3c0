"""A request and its answer in vLLM's dialect of OpenAI's completions API; ``rlhf-fast serve`` speaks it too.

What is relied on was looked up in vLLM's documentation (OpenAI-compatible server, LoRA adapters, sleep mode, engine
arguments) and in its request and response schemas; not run against vLLM itself, which cannot be installed here.

- ``POST /v1/completions``: ``prompt`` is a list of token ids; ``n``, ``seed``, ``stop``, ``stop_token_ids``, ``max_tokens``,
  ``temperature``, ``top_p``, ``top_k`` (0 is off), ``min_p``, ``repetition_penalty``. All of them are always sent: a server
  fills what is missing from the model's generation_config.json. A sample j draws with seed + j in vLLM.
- ``return_token_ids`` adds ``token_ids`` (every sampled token: EOS and stop strings too) and ``prompt_token_ids`` to each
  choice; ``logprobs: 0`` adds ``logprobs.token_logprobs``, one number per token, -9999 for minus infinity.
- These are RAW log-probabilities unless vLLM runs with ``--logprobs-mode processed_logprobs``: at temperature 1, before
  filters. At temperature 1 both are what ``Sample.logprobs`` promises. The answer does not say which it holds, so nobody
  has to believe it: :func:`rlhf_fast.rollout.canary.check_logprobs` measures it after every sync.
- ``model`` of the answer echoes the name that was asked for, an adapter's included.
- ``POST /v1/load_lora_adapter`` (``lora_name``, ``lora_path``: a folder that the server can read) and
  ``/v1/unload_lora_adapter``, where vLLM runs with ``--enable-lora`` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1.
- ``/reset_prefix_cache``, ``/sleep?level=1``, ``/wake_up`` exist with VLLM_SERVER_DEV_MODE=1, and sleep needs
  ``--enable-sleep-mode``. A cache never outlives its weights here: every version has a name of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rlhf_fast.rollout.engine import Request, Sample
from rlhf_fast.rollout.sampling import SEEDS


class Unusable(Exception):
    """What one server answered, or that it did not, in words; another try may help."""


def sampling_fields(request: Request, seed: int, stop_ids: Sequence[int] = ()) -> dict[str, Any]:
    """How to sample, under the names that vLLM's completions API and its ``SamplingParams`` share.

    Args:
        stop_ids: tokens that end a sample besides those of the request.
    """
    return {
        "n": request.n,
        "seed": seed % SEEDS,
        "max_tokens": request.max_new_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "stop": list(request.stop),
        "stop_token_ids": list(dict.fromkeys([*request.stop_ids, *stop_ids])),
        "include_stop_str_in_output": True,
        "logprobs": 0,
    }


def completion_body(request: Request, model: str, seed: int, stop_ids: Sequence[int] = ()) -> dict[str, Any]:
    """The body of ``/v1/completions`` that asks for ``request``."""
    prompt = [int(t) for t in request.prompt_ids]
    answer = {"model": model, "prompt": prompt, "return_token_ids": True, "stream": False}
    return {**answer, **sampling_fields(request, seed, stop_ids)}


def read_completion(payload: Any, request: Request, model: str, version: int) -> list[Sample]:
    """The samples in an answer of ``/v1/completions``, in order of their index.

    Raises:
        Unusable: it is not an answer to ``request`` by ``model``; says in what.
    """
    try:
        named, choices = payload["model"], sorted(payload["choices"], key=lambda c: c["index"])
    except (KeyError, TypeError) as error:
        raise Unusable(f"answered without {error}") from error
    if named != model:
        raise Unusable(f"answered as {named!r} where {model!r} was asked: other weights wrote this")
    if [c["index"] for c in choices] != list(range(request.n)):
        raise Unusable(f"gave {len(choices)} samples where {request.n} were asked")
    return [_read_choice(choice, request, version) for choice in choices]


def _read_choice(choice: dict[str, Any], request: Request, version: int) -> Sample:
    try:
        ids, logprobs, reason = choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"]
        prompt, lengths = choice.get("prompt_token_ids"), (len(ids), len(logprobs))
    except (KeyError, TypeError) as error:
        raise Unusable(f"answered without {error}; it must know return_token_ids and logprobs") from error
    if lengths[0] != lengths[1] or not 1 <= lengths[0] <= request.max_new_tokens:
        raise Unusable(
            f"gave {lengths[0]} tokens with {lengths[1]} log-probabilities where 1 to {request.max_new_tokens} were asked"
        )
    if prompt is not None and list(prompt) != list(request.prompt_ids):
        raise Unusable("continued another prompt than it was sent")
    if reason not in ("stop", "length"):
        raise Unusable(f"ended a sample with {reason!r}")
    if not all(isinstance(t, int) and t >= 0 for t in ids) or not all(_is_logprob(x) for x in logprobs):
        raise Unusable("gave tokens or log-probabilities that are none")
    return Sample(ids, [float(x) for x in logprobs], reason, version)


def _is_logprob(x: Any) -> bool:
    return isinstance(x, (int, float)) and math.isfinite(x) and x <= 1e-3
