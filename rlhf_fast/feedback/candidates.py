"""Responses to compare: what the AI judge and the label page are given, in an order that says nothing about them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_fast.data import normalise
from rlhf_fast.data.sources import Records
from rlhf_fast.errors import UserError
from rlhf_fast.rewards.judge import Item
from rlhf_fast.rewards.ledger import key_of


@dataclass
class Candidates(Item):
    """Responses to compare, in an order that says nothing about them."""

    ranks: Sequence[int] | None = None  # what people said, 0 = best; None: nothing


def read_candidates(records: Records) -> tuple[list[Candidates], int]:
    """Two or more different responses to each prompt, and how many prompts have fewer and are left out.

    Rows are preferences (``chosen`` and ``rejected``, or ``responses`` and ``ranking``), which say what people thought, or
    ``prompt`` with ``responses``, or ``prompt`` with ``completion`` in several rows, as ``rlhf-fast generate --n 4`` writes;
    empty ones among the latter are left out.

    Raises:
        UserError: other columns, or a malformed row.
    """
    columns = set(records[0])
    if {"prompt", "responses"} <= columns and "ranking" not in columns:
        groups = list(_listed(records))
    elif {"prompt", "completion"} <= columns:
        # a model that ended at once has said nothing, which no row of training could hold
        said = [i for i, row in enumerate(records) if row["completion"] or "finish_reason" not in row]
        groups = list(_gathered(normalise(records.select(said), "sft"))) if said else []
    else:
        groups = [
            Candidates(row.pop("prompt"), responses, row, range(len(responses)))
            for row in normalise(records, "preferences")
            if (responses := row.pop("responses"))
        ]
    candidates = [different for group in groups if (different := shuffled(group)) is not None]
    if not candidates:
        raise UserError(f"{records.source}: no prompt has two different responses, so there is nothing to compare")
    return candidates, len(groups) - len(candidates)


def _listed(records: Records) -> Iterator[Candidates]:
    """Each row's list of responses, all of them checked, and brought to their form after a conversation, as single ones."""
    single, lines = [], []
    for i, row in enumerate(records):
        responses = row["responses"]
        if not isinstance(responses, list) or not responses:
            raise UserError(f"{records.where(i)}: `responses` must be a list of responses, got {str(responses)[:40]!r}")
        single += [{"prompt": row["prompt"], "completion": response} for response in responses]
        lines += [f"{records.where(i).removeprefix(f'{records.source}, ')}, `responses`"] * len(responses)
    checked = iter(normalise(Records(single, records.source, lines), "sft"))
    for row in records:
        rest = {k: v for k, v in row.items() if k not in ("prompt", "responses")}
        mine = list(itertools.islice(checked, len(row["responses"])))
        yield Candidates(mine[0]["prompt"], [one["completion"] for one in mine], rest)


def _gathered(rows: Sequence[dict[str, Any]]) -> Iterator[Candidates]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(repr(row["prompt"]), []).append(row)
    for group in groups.values():
        own = ("prompt", "completion", "finish_reason", "tokens")
        rest = {k: v for k, v in group[0].items() if k not in own and all(row.get(k) == v for row in group)}
        yield Candidates(group[0]["prompt"], [row["completion"] for row in group], rest)


def shuffled(group: Candidates) -> Candidates | None:
    """Without doubles, and in an order drawn from what the responses say: the place of one must not tell its label.

    None where fewer than two different responses are left.
    """
    different = {repr(response): i for i, response in reversed(list(enumerate(group.responses)))}
    if len(different) < 2:
        return None
    order = [different[text] for text in sorted(different)]
    random.Random(key_of([group.prompt, sorted(different)])).shuffle(order)
    ranks = None if group.ranks is None else [group.ranks[i] for i in order]
    columns = {k: v for k, v in group.columns.items() if k != "margin"}  # people's, about the other label
    return Candidates(group.prompt, [group.responses[i] for i in order], columns, ranks)
