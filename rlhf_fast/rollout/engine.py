"""What a rollout engine is: token ids in, token ids and exact log-probabilities out.

An engine may run in this process (``GenerateEngine``) or behind a server. Trainers see nothing but this protocol, so the
text a policy wrote is never tokenized a second time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rlhf_fast.errors import RolloutError, UserError

CAPABILITIES = frozenset({"token_ids", "logprobs", "seed", "n", "stop", "lora_swap", "sleep"})
NEEDED_FOR_RL = ("token_ids", "logprobs")


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it.

    Raises:
        UserError: a value that no engine could honour.
    """

    prompt_ids: Sequence[int]  # (P,) token ids, special tokens included; at least one
    n: int = 1  # independent samples
    max_new_tokens: int = 256  # tokens, the final EOS included
    temperature: float = 1.0  # logits are divided by it; 0 is greedy
    top_p: float = 1.0  # keep the smallest set of tokens with this probability; 1 keeps all
    top_k: int = 0  # keep this many tokens; 0 keeps all
    min_p: float = 0.0  # keep tokens at least this share as likely as the likeliest; 0 keeps all
    repetition_penalty: float = 1.0  # logits of tokens seen, prompt included, are made this much smaller; 1 is off
    stop: tuple[str, ...] = ()  # strings that end a sample, in addition to the EOS tokens
    stop_ids: tuple[int, ...] = ()  # tokens that end a sample, in addition to the EOS tokens
    seed: int | None = None  # None draws one from torch's global generator

    def __post_init__(self) -> None:
        limits = {
            "prompt_ids": (len(self.prompt_ids) > 0, "at least one token"),
            "n": (self.n >= 1, "at least 1"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "0 (greedy) or more, and finite"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "min_p": (0 <= self.min_p <= 1, "from 0 (off) to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0 (1 is off), and finite"),
            "stop": (not isinstance(self.stop, str) and all(self.stop), "a tuple of non-empty strings"),
            "stop_ids": (all(isinstance(i, int) and i >= 0 for i in self.stop_ids), "a tuple of token ids"),
        }
        for name, (ok, wanted) in limits.items():
            if not ok:
                raise UserError(f"generation: {name} must be {wanted}, got {getattr(self, name)!r}.")

    @property
    def filtered(self) -> bool:
        """Whether samples come from another distribution than the softmax at ``temperature``."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0 or self.repetition_penalty != 1


@dataclass
class Sample:
    """One continuation of a prompt."""

    ids: list[int]  # (T,) the new tokens, the EOS that ended them included: it is trained like any other
    logprobs: list[float]  # (T,) full-vocabulary log-softmax at the sampling temperature (greedy: at 1)
    finish_reason: str  # "stop": an EOS token, a stop id or a stop string; "length": out of tokens or of context
    policy_version: int = 0  # version of the weights that wrote it
    filtered_logprobs: list[float] | None = None  # (T,) under what was sampled from: filtered, penalised, renormalised


@runtime_checkable
class Engine(Protocol):
    """Anything that continues prompts.

    ``capabilities`` is what the engine really does, a subset of ``CAPABILITIES``: ``token_ids`` (ids come back as
    sampled), ``logprobs`` (exact, over the full vocabulary), ``seed`` (a seeded sample does not depend on what else is
    in the batch), ``n``, ``stop``, ``lora_swap`` (``update`` reads an adapter folder), ``sleep`` (gives memory back).
    """

    capabilities: frozenset[str]

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """Continue every request; entry i holds the ``n`` samples of request i."""

    def update(self, adapter_dir: str | Path | None, version: int) -> None:
        """Take over new weights. An engine that shares the trainer's weights gets None and notes the version."""

    def reset_cache(self) -> None:
        """Forget every key and value computed under older weights."""

    def sleep(self) -> None:
        """Give memory back while the trainer updates."""

    def wake(self) -> None:
        """Undo ``sleep``."""


@contextlib.contextmanager
def awake(engine: Engine) -> Iterator[None]:
    """Wake an engine that can sleep, and let it sleep again afterwards."""
    if "sleep" not in engine.capabilities:
        yield
        return
    engine.wake()
    try:
        yield
    except BaseException:
        # what went wrong inside is what its user must hear of
        with contextlib.suppress(UserError, RolloutError):
            engine.sleep()
        raise
    engine.sleep()


def check_for_rl(
    engine: Engine,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
) -> None:
    """Refuse a rollout that reinforcement learning could not learn from.

    The gradient is that of the policy's own distribution, so samples must come from it, as token ids with their
    log-probabilities. Filters and penalties sample from another distribution; greedy samples do not vary.

    Raises:
        UserError: names the missing capability or the setting to change.
    """
    missing = [name for name in NEEDED_FOR_RL if name not in engine.capabilities]
    if missing:
        raise UserError(
            f"{type(engine).__name__} cannot be used for RL: it does not return {' or '.join(missing)}. "
            "Choose an engine that does (the in-process default does)."
        )
    changes: dict[str, tuple[Any, bool, str]] = {
        "temperature": (temperature, temperature > 0, "above 0"),
        "top_p": (top_p, top_p == 1.0, "1.0"),
        "top_k": (top_k, top_k == 0, "0"),
        "min_p": (min_p, not min_p, "unset"),
        "repetition_penalty": (repetition_penalty, repetition_penalty in (None, 1.0), "1.0"),
    }
    for name, (value, ok, wanted) in changes.items():
        if not ok:
            raise UserError(
                f"{name}={value} would sample from another distribution than the policy that RL trains. "
                f"Set {name} to {wanted}; `rlhf-fast generate` accepts every setting."
            )
