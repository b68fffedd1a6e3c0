"""Label data with an AI judge (RLAIF): pairs or rankings from responses, and how far the judge agrees with people."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_fast.data import normalise
from rlhf_fast.data.sources import Records
from rlhf_fast.errors import UserError
from rlhf_fast.feedback.agreement import cohen_kappa
from rlhf_fast.rewards.judge import Item, Panel
from rlhf_fast.rewards.judging import Standing
from rlhf_fast.rewards.ledger import key_of

FORMATS = ("pairs", "ranked")


@dataclass
class Candidates(Item):
    """Responses to compare, in an order that says nothing about them."""

    ranks: Sequence[int] | None = None  # what people said, 0 = best; None: nothing


@dataclass
class Labels:
    """What a judge said about a data set."""

    rows: list[dict[str, Any]]  # in the format asked for
    figures: dict[str, float]
    notes: list[str]  # what went wrong, in words


def read_candidates(records: Records) -> tuple[list[Candidates], int]:
    """Two or more different responses to each prompt, and how many prompts have fewer and are left out.

    Rows are preferences (``chosen`` and ``rejected``, or ``responses`` and ``ranking``), which say what people thought, or
    ``prompt`` with ``responses``, or ``prompt`` with ``completion`` in several rows, as ``rlhf-fast generate --n 4`` writes.

    Raises:
        UserError: other columns, or a malformed row.
    """
    columns = set(records[0])
    if {"prompt", "responses"} <= columns and "ranking" not in columns:
        groups = [_listed(records, i, row) for i, row in enumerate(records)]
    elif {"prompt", "completion"} <= columns:
        groups = list(_gathered(normalise(records, "sft")))
    else:
        groups = [
            Candidates(row.pop("prompt"), responses, row, range(len(responses)))
            for row in normalise(records, "preferences")
            if (responses := row.pop("responses"))
        ]
    candidates = [shuffled for group in groups if (shuffled := _shuffled(group)) is not None]
    if not candidates:
        raise UserError(f"{records.source}: no prompt has two different responses, so there is nothing to compare")
    return candidates, len(groups) - len(candidates)


def _listed(records: Records, i: int, row: dict[str, Any]) -> Candidates:
    responses = row["responses"]
    if not isinstance(responses, list) or not responses:
        raise UserError(f"{records.where(i)}: `responses` must be a list of responses, got {str(responses)[:40]!r}")
    # the checks of one response each, and its form after a conversation
    checked = [
        normalise(Records([{"prompt": row["prompt"], "completion": r}], records.where(i), ["`responses`"]), "sft")[0]
        for r in responses
    ]
    rest = {k: v for k, v in row.items() if k not in ("prompt", "responses")}
    return Candidates(checked[0]["prompt"], [c["completion"] for c in checked], rest)


def _gathered(rows: Sequence[dict[str, Any]]) -> Iterator[Candidates]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(repr(row["prompt"]), []).append(row)
    for group in groups.values():
        own = ("prompt", "completion", "finish_reason", "tokens")
        rest = {k: v for k, v in group[0].items() if k not in own and all(row.get(k) == v for row in group)}
        yield Candidates(group[0]["prompt"], [row["completion"] for row in group], rest)


def _shuffled(group: Candidates) -> Candidates | None:
    """Without doubles, and in an order drawn from what the responses say: the place of one must not tell its label."""
    different = {repr(response): i for i, response in reversed(list(enumerate(group.responses)))}
    if len(different) < 2:
        return None
    order = [different[text] for text in sorted(different)]
    random.Random(key_of([group.prompt, sorted(different)])).shuffle(order)
    ranks = None if group.ranks is None else [group.ranks[i] for i in order]
    columns = {k: v for k, v in group.columns.items() if k != "margin"}  # people's, about the other label
    return Candidates(group.prompt, [group.responses[i] for i in order], columns, ranks)


async def label(
    panel: Panel,
    candidates: Sequence[Candidates],
    form: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Labels:
    """Have all candidates compared.

    Args:
        form: ``pairs`` gives a row for every decided pair, ``ranked`` one for every prompt whose pairs all have a verdict (of
            responses that are equally good it keeps the first); None takes pairs where all prompts have two responses.
    """
    if form is None:
        form = "pairs" if all(len(c.responses) == 2 for c in candidates) else "ranked"
    standings = await panel.compare(candidates, progress)
    orders = 2 if panel.swap else 1
    origin = {"by": "judge", "model": panel.chat.name, "rubric": panel.rubric.name, "orders": orders}
    write = _pairs if form == "pairs" else _ranked
    rows = [
        {**row, **c.columns, "label_origin": origin}
        for c, standing in zip(candidates, standings)
        for row in write(c, standing)
    ]
    return Labels(rows, _figures(panel, candidates, standings) | {"rows": len(rows)}, _notes(panel))


def _pairs(item: Candidates, standing: Standing) -> Iterator[dict[str, Any]]:
    for pair, sign in standing.preferred.items():
        if sign:
            chosen, rejected = pair if sign > 0 else pair[::-1]
            yield {"prompt": item.prompt, "chosen": item.responses[chosen], "rejected": item.responses[rejected]}


def _ranked(item: Candidates, standing: Standing) -> Iterator[dict[str, Any]]:
    order = standing.ranking() if standing.complete else []
    if len(order) > 1:
        responses = [item.responses[i] for i in order]
        yield {"prompt": item.prompt, "responses": responses, "ranking": list(range(1, len(order) + 1))}


def _figures(panel: Panel, candidates: Sequence[Candidates], standings: Sequence[Standing]) -> dict[str, float]:
    signs = [sign for standing in standings for sign in standing.preferred.values()]
    first, last = (sum(getattr(s, name) for s in standings) for name in ("first_won", "last_won"))
    figures: dict[str, float] = {
        "prompts": len(candidates),
        "pairs": len(signs),
        "pairs/decided": sum(bool(sign) for sign in signs),
        "pairs/tied": signs.count(0),
        "pairs/tied because the orders disagree": sum(s.disagreed for s in standings),
        "pairs/without a verdict": signs.count(None),
        "replies without a verdict": panel.unread,
        **panel.chat.figures(),
    }
    if first + last:
        figures["first shown preferred"] = first / (first + last)
    return figures | _agreement(candidates, standings)


def _agreement(candidates: Sequence[Candidates], standings: Sequence[Standing]) -> dict[str, float]:
    """With people's labels, over the pairs that have both: ties count as a third answer in kappa, and not in accuracy."""
    both = [
        (1 if c.ranks[i] < c.ranks[j] else -1, sign)
        for c, standing in zip(candidates, standings)
        if c.ranks is not None
        for (i, j), sign in standing.preferred.items()
        if sign is not None
    ]
    decided = [human == judge for human, judge in both if judge]
    if not both:
        return {}
    figures: dict[str, float] = {"people/pairs": len(both)}
    if decided:
        figures["people/accuracy on decided pairs"] = sum(decided) / len(decided)
    kappa = cohen_kappa(*map(list, zip(*both)))
    return figures | ({} if kappa is None else {"people/Cohen's kappa, ties a third answer": kappa})


def _notes(panel: Panel) -> list[str]:
    notes = [f"{count} calls failed: the judge {reason}" for reason, count in panel.faults.most_common(3)]
    if panel.unread:
        start = " ".join((panel.example or "").split())
        shown = repr(start if len(start) <= 160 else "..." + start[-157:])
        notes.append(f"{panel.unread} replies ended without a readable verdict in [[ ]], for example: {shown}")
    return notes
