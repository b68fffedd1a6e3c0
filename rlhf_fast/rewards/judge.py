"""The reward ``judge``: a language model says how good a completion is; and the panel that labels data with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.models import Policy
from rlhf_fast.rewards.chat import Chat, Reply, connect
from rlhf_fast.rewards.faults import Fault
from rlhf_fast.rewards.judging import LABELS, Rubric, Standing, parse_ranking, parse_score, presentations, vote

ALL = len(LABELS)  # responses shown together at most


@dataclass
class Item:
    """Responses to one prompt, to be compared with each other."""

    prompt: Any
    responses: Sequence[Any]
    columns: Mapping[str, Any] = field(default_factory=dict)


class Panel:
    """A judge with its rubric.

    Args:
        together: responses shown at once: 2 compares every pair, more need fewer calls.
        swap: show every order's reverse too, and count only what both say.
    """

    def __init__(self, chat: Chat, rubric: Rubric, together: int = 2, swap: bool = True) -> None:
        if not 2 <= together <= ALL:
            raise UserError(f"judge: shows 2 to {ALL} responses together, got {together}")
        self.chat, self.rubric, self.together, self.swap = chat, rubric, together, swap
        self.unread = 0  # replies without a verdict
        self.example: str | None = None  # the first of them
        self.faults: Counter[str] = Counter()  # why calls came to nothing

    def orders(self, count: int) -> list[tuple[int, ...]]:
        """The orders in which ``count`` responses are shown, a call each."""
        return presentations(count, self.together, self.swap)

    async def compare(self, items: Sequence[Item], progress: Callable[[int], None] | None = None) -> list[Standing]:
        """How the responses of each item stand to each other."""
        orders = [self.orders(len(item.responses)) for item in items]
        asked = [
            self.rubric.ask(item.prompt, [item.responses[i] for i in order], item.columns)
            for item, shown in zip(items, orders)
            for order in shown
        ]
        replies = iter(await self.chat.answer(asked, progress))
        return [
            vote(len(item.responses), [(o, self._read(next(replies), parse_ranking, len(o))) for o in shown])
            for item, shown in zip(items, orders)
        ]

    async def grade(self, items: Sequence[Item]) -> list[float | Fault]:
        """A score from 0 to 1 for each item's only response, or why there is none."""
        replies = await self.chat.answer([self.rubric.ask(i.prompt, i.responses, i.columns) for i in items])
        scores = [self._read(reply, parse_score) for reply in replies]
        return [_fault(reply) if score is None else score for reply, score in zip(replies, scores)]

    def _read(self, reply: Reply | Fault, parse: Callable[..., Any], *arguments: Any) -> Any | None:
        """The verdict in a reply, or None, counted: a reply that was cut may not have come to it."""
        if isinstance(reply, Fault):
            self.faults[reply.reason] += 1
            return None
        verdict = parse(reply.text, *arguments)
        if verdict is None:
            self.unread += 1
            self.example = reply.text if self.example is None else self.example
        return verdict


def _fault(reply: Reply | Fault) -> Fault:
    if isinstance(reply, Fault):
        return reply
    return Fault(
        "gave no verdict in [[ ]]" if reply.complete else "gave no verdict before it was cut at max_new_tokens"
    )


class Judge:
    """Score completions by a language model's verdict. 0 to 1; a fault is no score.

    Args:
        model, url: whom to ask: a name at the URL of an OpenAI-compatible server, or a folder, a Hugging Face name or a Policy.
        mode: ``score`` grades each completion by itself (1 to 10, brought to 0 to 1); ``group`` compares the completions of a
            prompt with each other: a score is the share of the others that it beats, ties half.
        rubric: ``score``, ``compare`` or a template file; by default the mode's.
        together: in a group, completions shown at once: 2 compares every pair (K (K - 1) calls), K needs 2 calls.
        swap: in a group, show the reverse of every order too and count only what both say.
        cache: file in which every verdict is kept and looked up; None keeps them in memory.
        the rest: options of :func:`rlhf_fast.rewards.chat.connect`; None leaves its default.
    Raises:
        UserError: nobody to ask, or a wrong option.
    """

    __name__ = "judge"

    def __init__(
        self,
        model: Any = None,
        url: str | None = None,
        *,
        mode: str = "score",
        rubric: str | None = None,
        together: int = 2,
        swap: bool = True,
        cache: str | None = None,
        temperature: float = 0.0,
        max_new_tokens: int = 1024,
        seed: int = 0,
        batch_size: int = 64,
        api_key_env: str | None = None,
        concurrency: int | None = None,
        timeout: float | None = None,
        retries: int | None = None,
        backoff: float | None = None,
        deadline: float | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        if mode not in ("score", "group"):
            raise UserError(f"reward 'judge': mode is score or group, got {mode!r}")
        self.mode = mode
        server = {"api_key_env": api_key_env, "concurrency": concurrency, "timeout": timeout, "retries": retries}
        server |= {"backoff": backoff, "deadline": deadline, "extra": extra}
        options: dict[str, Any] = {name: value for name, value in server.items() if value is not None}
        options |= {
            "temperature": temperature,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
            "batch_size": batch_size,
        }
        rules = Rubric(rubric or ("score" if mode == "score" else "compare"))
        self.needs = tuple(rules.columns)
        self.panel = Panel(connect(model, url, cache=cache, **options), rules, together, swap)

    @property
    def policy(self) -> Policy | None:
        """The model that answers, where it runs in this process."""
        return getattr(self.panel.chat, "policy", None)

    async def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]
    ) -> list[float | Fault | None]:
        """Scores of B completions."""
        rows = [{name: values[i] for name, values in columns.items()} for i in range(len(prompts))]
        if self.mode == "score":
            return await self.panel.grade([Item(p, [c], row) for p, c, row in zip(prompts, completions, rows)])
        groups: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            groups.setdefault(repr((prompt, [rows[i].get(name) for name in self.panel.rubric.columns])), []).append(i)
        several = [group for group in groups.values() if len(group) > 1]
        items = [Item(prompts[g[0]], [completions[i] for i in g], rows[g[0]]) for g in several]
        scores: list[float | Fault | None] = [
            Fault("has nothing to compare: mode group needs several completions")
        ] * len(prompts)
        for group, standing in zip(several, await self.panel.compare(items)):
            for i, points in zip(group, standing.points):
                scores[i] = Fault("gave no readable verdict") if points is None else points
        return scores
