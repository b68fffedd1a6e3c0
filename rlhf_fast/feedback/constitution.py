"""Constitutional AI (Bai et al. 2022, arXiv:2212.08073): principles, and its supervised half, in which a model criticises
and rewrites responses. Its other half, preferences by a principle, is ``judge --constitution``, see ``judge.py``.

Each round asks for a critique of the response by one principle, then, with that critique in view, for a revision, which the
next round starts from. The revisions are demonstrations for ``sft``; preferred to the originals, pairs for ``reward`` and ``dpo``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_fast.data import normalise
from rlhf_fast.data.sources import Records
from rlhf_fast.errors import UserError
from rlhf_fast.rewards.chat import Chat, Reply
from rlhf_fast.rewards.faults import Fault
from rlhf_fast.rewards.ledger import key_of
from rlhf_fast.rewards.verifiers import text_of

DEFAULT = Path(__file__).with_name("constitutions") / "default.yaml"
KEYS = ("critique_request", "revision_request", "principles")
PARTS = ("name", "critique", "revision")  # of a principle


@dataclass(frozen=True)
class Principle:
    """One thing that responses should be."""

    name: str
    critique: str  # what to look for
    revision: str  # what to make of it

    @property
    def question(self) -> str:
        """The principle for somebody who compares responses: what counts against one, and what would be better."""
        return f"The principle ({self.name}): {self.critique}\nWhere a response goes against it, better would be this: {self.revision}"


@dataclass(frozen=True)
class Constitution:
    """Principles, and how a model is asked to apply one."""

    name: str  # of the file, with a hash of what it says
    principles: tuple[Principle, ...]
    critique_request: str  # holds {critique}
    revision_request: str  # holds {revision}

    @classmethod
    def read(cls, values: Mapping[str, Any], source: str | Path) -> Constitution:
        """The constitution in a YAML file's values (see ``constitutions/default.yaml``).

        Raises:
            UserError: a key is missing, unknown or empty, or two principles have one name.
        """
        _check_keys(values, KEYS, str(source))
        for key, place in (("critique_request", "{critique}"), ("revision_request", "{revision}")):
            if not isinstance(values[key], str) or place not in values[key]:
                raise UserError(f"{source}: `{key}` must be a text with {place} in it, got {str(values[key])[:60]!r}")
        listed = values["principles"]
        if not isinstance(listed, list) or not listed:
            raise UserError(f"{source}: `principles` must be a list of at least one, got {str(listed)[:60]!r}")
        principles = [_principle(value, f"{source}, principle {i}") for i, value in enumerate(listed, start=1)]
        names = [p.name for p in principles]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{source}: two principles are called '{twice[0]}'")
        name = f"{Path(source).stem}-{key_of(values)[:8]}"
        return cls(name, tuple(principles), values["critique_request"], values["revision_request"])

    def draw(self, about: Any, rounds: int, seed: int) -> list[Principle]:
        """A principle for each round, drawn for ``about`` alone; none twice before all have been."""
        draw = random.Random(key_of([seed, about]))
        drawn: list[Principle] = []
        while len(drawn) < rounds:
            drawn += draw.sample(self.principles, len(self.principles))
        return drawn[:rounds]


def _principle(value: Any, where: str) -> Principle:
    _check_keys(value, PARTS, where)
    for key in PARTS:
        if not isinstance(value[key], str) or not value[key].strip():
            raise UserError(f"{where}: `{key}` must be a text, got {str(value[key])[:60]!r}")
    return Principle(**value)


def _check_keys(values: Any, keys: Sequence[str], where: str) -> None:
    found = set(values) if isinstance(values, Mapping) else {str(values)[:60]}
    if wrong := sorted(found ^ set(keys), key=str):
        problem = "is missing" if wrong[0] in keys else "is unknown"
        raise UserError(f"{where}: `{wrong[0]}` {problem}; it has {', '.join(keys)}")


@dataclass
class Chain:
    """One prompt's response and what became of it."""

    prompt: Any
    columns: dict[str, Any]
    response: str | None  # None: still to be written
    steps: list[dict[str, str]] = field(default_factory=list)  # a round each: principle, requests, critique, revision
    fault: str | None = None  # why it goes no further

    @property
    def current(self) -> str:
        """What the next round starts from."""
        return self.steps[-1]["revision"] if self.steps else str(self.response)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The prompt as a conversation."""
        return [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else list(self.prompt)

    def row(self) -> dict[str, Any]:
        """All of it, for reading."""
        ended = {"fault": self.fault} if self.fault else {"revised": self.current}
        return {"prompt": self.prompt, "response": self.response, "steps": self.steps, **ended, **self.columns}


def read_chains(records: Records) -> list[Chain]:
    """Chains to work on: rows with a ``prompt`` (in any form that training takes), and their ``completion`` if they have one.

    Raises:
        UserError: other columns, or a malformed row.
    """
    if {"prompt", "completion"} <= set(records[0]):
        rows = normalise(records, "sft")
    else:
        rows = normalise(records, "prompts")
    own = ("prompt", "completion", "finish_reason", "tokens")
    return [
        Chain(
            row["prompt"],
            {k: v for k, v in row.items() if k not in own},
            text_of(row["completion"]) if "completion" in row else None,
        )
        for row in rows
    ]


async def revise(
    chat: Chat,
    constitution: Constitution,
    chains: Sequence[Chain],
    rounds: int = 1,
    seed: int = 0,
    after: Callable[[str], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write what is missing, then criticise and revise, ``rounds`` times, in place.

    Args:
        seed: of the principles; a chain's do not depend on the others.
        after: called with what was just done, after each stage: a good time to save.
        progress: called with the number of conversations settled in this stage.
    """
    drawn = [constitution.draw([chain.prompt, chain.response], rounds, seed) for chain in chains]
    after = after or (lambda what: None)

    async def ask(which: Sequence[Chain], conversations: Sequence[list[dict[str, Any]]]) -> list[str | None]:
        replies = await chat.answer(conversations, progress)
        return [_text(chain, reply) for chain, reply in zip(which, replies)]

    if unanswered := [chain for chain in chains if chain.response is None]:
        for chain, text in zip(unanswered, await ask(unanswered, [chain.messages for chain in unanswered])):
            chain.response = text
        after("responses")
    for number in range(rounds):
        going = [(chain, drawn[i][number]) for i, chain in enumerate(chains) if chain.fault is None]
        steps = [
            {
                "principle": principle.name,
                "critique_request": constitution.critique_request.replace("{critique}", principle.critique),
                "revision_request": constitution.revision_request.replace("{revision}", principle.revision),
            }
            for _, principle in going
        ]
        for part in ("critique", "revision"):
            asked = [(chain, step) for (chain, _), step in zip(going, steps) if chain.fault is None]
            texts = await ask([chain for chain, _ in asked], [_conversation(chain, step) for chain, step in asked])
            for (chain, step), text in zip(asked, texts):
                if text is not None:
                    step[part] = text
        for (chain, _), step in zip(going, steps):
            if chain.fault is None:
                order = ("principle", "critique_request", "critique", "revision_request", "revision")
                chain.steps.append({name: step[name] for name in order})
        after(f"round {number + 1}")


def _conversation(chain: Chain, step: Mapping[str, str]) -> list[dict[str, Any]]:
    """What the model is asked next: for a critique, or with the critique there, for a revision."""
    turns = [("assistant", chain.current), ("user", step["critique_request"])]
    if "critique" in step:
        turns += [("assistant", step["critique"]), ("user", step["revision_request"])]
    return chain.messages + [{"role": role, "content": text} for role, text in turns]


def _text(chain: Chain, reply: Reply | Fault) -> str | None:
    """What was said; nothing, or half of something, ends the chain."""
    if isinstance(reply, Fault):
        chain.fault = f"the model {reply.reason}"
    elif not reply.complete:
        chain.fault = "a reply was cut at max_new_tokens"
    elif not reply.text.strip():
        chain.fault = "a reply was empty"
    return reply.text.strip() if chain.fault is None else None


# ---------------------------------------------------------------------------------------------------- what comes out


def demonstrations(chains: Sequence[Chain], constitution: Constitution, model: str) -> list[dict[str, Any]]:
    """Rows for ``sft``: every finished chain's prompt and its last revision."""
    origin = _origin(constitution, model)
    finished = [chain for chain in chains if chain.fault is None]
    return [{"prompt": c.prompt, "completion": c.current, **c.columns, "label_origin": origin} for c in finished]


def preferences(chains: Sequence[Chain], constitution: Constitution, model: str) -> list[dict[str, Any]]:
    """Rows for ``reward`` and ``dpo``: the last revision is preferred to the original, where they differ."""
    origin = _origin(constitution, model)
    changed = [chain for chain in chains if chain.fault is None and _changed(chain)]
    return [
        {"prompt": c.prompt, "chosen": c.current, "rejected": c.response, **c.columns, "label_origin": origin}
        for c in changed
    ]


def figures(chains: Sequence[Chain], chat: Chat) -> dict[str, float]:
    """Counts, and how long responses were before and after."""
    finished = [chain for chain in chains if chain.fault is None]
    found: dict[str, float] = {
        "prompts": len(chains),
        "finished": len(finished),
        "finished/changed": sum(map(_changed, finished)),
        "unfinished": len(chains) - len(finished),
    }
    if finished:
        found["characters/response"] = sum(len(str(c.response)) for c in finished) / len(finished)
        found["characters/revision"] = sum(len(c.current) for c in finished) / len(finished)
    return found | chat.figures()


def _changed(chain: Chain) -> bool:
    return chain.current.strip() != str(chain.response).strip()


def _origin(constitution: Constitution, model: str) -> dict[str, str]:
    return {"by": "constitution", "model": model, "constitution": constitution.name}
