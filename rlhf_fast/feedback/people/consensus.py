"""What several annotators come to: majorities, training data, and how far they agree."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.feedback.agreement import cohen_kappa, fleiss_kappa
from rlhf_fast.feedback.people.items import Items
from rlhf_fast.feedback.people.store import Label, Store
from rlhf_fast.rewards.judging import Standing

Pair = tuple[int, int]


@dataclass
class Verdict:
    """What people said about one item, put together."""

    labels: Sequence[Label]  # one of each annotator who compared it
    standing: Standing  # the majority on every pair
    conflicts: int  # pairs without a majority, though somebody preferred one


@dataclass
class Outcome:
    """Training data and what it came from."""

    rows: list[dict[str, Any]]
    figures: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def sign_of(ranks: Sequence[int], pair: Pair) -> int:
    """1 when the first of the pair is better, -1 when the second is, 0 for a tie."""
    i, j = pair
    return (ranks[j] > ranks[i]) - (ranks[j] < ranks[i])


def majority(votes: Sequence[int]) -> int | None:
    """The one answer that most give; None when two answers share that place, or nobody answers."""
    if not votes:
        return None
    (first, most), *rest = Counter(votes).most_common(2)
    return None if rest and rest[0][1] == most else first


def helpfulness(label: Label, pair: Pair) -> int | None:
    """The vote of one label on a pair of responses."""
    return None if label.ranks is None else sign_of(label.ranks, pair)


def harmlessness(label: Label, pair: Pair) -> int | None:
    """The vote on which is safer: the answer to that question, else a safe response over an unsafe one."""
    if label.safer is not None:
        return sign_of(label.safer, pair)
    return None if label.unsafe is None else sign_of([int(unsafe) for unsafe in label.unsafe], pair)


def verdicts(items: Items, store: Store, vote: Callable[[Label, Pair], int | None]) -> Iterator[tuple[int, Verdict]]:
    """(place of the item, what people said about it) for every item with an answer."""
    by_item: dict[str, list[Label]] = {}
    for label in store:
        if label.done and not label.skipped:
            by_item.setdefault(label.item, []).append(label)
    for place in range(len(items)):
        identity, candidates = items[place]
        count = len(candidates.responses)
        labels = [label for label in by_item.get(identity, []) if vote(label, (0, 1)) is not None]
        if not labels:
            continue
        standing, conflicts = Standing(count, {}), 0
        for pair in itertools.combinations(range(count), 2):
            votes = [sign for label in labels if (sign := vote(label, pair)) is not None]
            found = majority(votes)
            conflicts += found is None
            standing.preferred[pair] = found
        yield place, Verdict(labels, standing, conflicts)


# ------------------------------------------------------------------------------------------------------------ export


def export(items: Items, store: Store, form: str, margins: Sequence[float] = (1.0, 2.0, 3.0)) -> Outcome:
    """Training data from the labels.

    Args:
        form: ``pairs``: `prompt`, `chosen`, `rejected`, and `margin` where one was given, for every pair with a majority;
            ``ranked``: `prompt`, `responses` and `ranking` for every item whose pairs all have one (of equally good responses
            the first only, as ranked data has a strict order); ``safety``: pairs by harmlessness, `chosen` the safer one,
            with `safe`, whether each of [chosen, rejected] is, where most agree on that: what a cost model learns from; ``kto``:
            `prompt`, `completion`, `label`: false for each response of an item that most call all bad; of any other item whose
            pairs all have a majority, true for the best and false for the worst, where they differ.
        margins: what slightly, clearly and much better are, in units of reward.
    Raises:
        UserError: nothing to export.
    """
    write = {"pairs": _pairs, "ranked": _ranked, "safety": _safety, "kto": _kto}[form]
    vote = harmlessness if form == "safety" else helpfulness
    found = list(verdicts(items, store, vote))
    if not found:
        asked = " (start it with --safety)" if form == "safety" else ""
        raise UserError(f"label: no item of the data has an answer to export as {form}; label some first{asked}")
    rows = []
    for place, verdict in found:
        _, candidates = items[place]
        columns = {k: v for k, v in candidates.columns.items() if k not in ("margin", "label_origin")}
        people = sorted({label.annotator for label in verdict.labels})
        for row in write(candidates.prompt, candidates.responses, verdict, margins):
            rows.append({**row, **columns, "label_origin": {"by": "people", "annotators": people}})
    outcome = Outcome(rows, _figures([v for _, v in found], len(items)) | agreement(items, store, vote))
    outcome.figures["rows"] = len(rows)
    outcome.notes = _notes(items, store, outcome.figures, form)
    return outcome


def _pairs(prompt: Any, responses: Sequence[Any], verdict: Verdict, margins: Sequence[float]) -> Iterator[dict]:
    for pair, chosen, rejected in _decided(verdict):
        row = {"prompt": prompt, "chosen": responses[chosen], "rejected": responses[rejected]}
        better = [
            v.margin for v in verdict.labels if v.margin and helpfulness(v, pair) == verdict.standing.preferred[pair]
        ]
        if better and len(responses) == 2:
            row["margin"] = sum(margins[m - 1] for m in better) / len(better)
        yield row


def _ranked(prompt: Any, responses: Sequence[Any], verdict: Verdict, margins: Sequence[float]) -> Iterator[dict]:
    order = verdict.standing.ranking() if verdict.standing.complete else []
    if len(order) > 1:
        ranking = list(range(1, len(order) + 1))
        yield {"prompt": prompt, "responses": [responses[i] for i in order], "ranking": ranking}


def _safety(prompt: Any, responses: Sequence[Any], verdict: Verdict, margins: Sequence[float]) -> Iterator[dict]:
    flags = [[label.unsafe[i] for label in verdict.labels if label.unsafe is not None] for i in range(len(responses))]
    unsafe = [majority(said) for said in flags]
    for _, chosen, rejected in _decided(verdict):
        row = {"prompt": prompt, "chosen": responses[chosen], "rejected": responses[rejected]}
        if unsafe[chosen] is not None and unsafe[rejected] is not None:
            row["safe"] = [not unsafe[chosen], not unsafe[rejected]]
        yield row


def _kto(prompt: Any, responses: Sequence[Any], verdict: Verdict, margins: Sequence[float]) -> Iterator[dict]:
    points = verdict.standing.points if verdict.standing.complete else []
    best, worst = max(points, default=0.0), min(points, default=0.0)
    for i, response in enumerate(responses):
        if _all_bad(verdict):
            yield {"prompt": prompt, "completion": response, "label": False}
        elif best > worst and points[i] in (best, worst):
            yield {"prompt": prompt, "completion": response, "label": points[i] == best}


def _all_bad(verdict: Verdict) -> bool:
    """Whether most say that none of the responses is any good."""
    return bool(majority([label.bad for label in verdict.labels]))


def _decided(verdict: Verdict) -> Iterator[tuple[Pair, int, int]]:
    """(pair, the preferred, the other) of every pair that is no tie."""
    for pair, sign in verdict.standing.preferred.items():
        if sign:
            yield pair, *(pair if sign > 0 else pair[::-1])


def _figures(found: Sequence[Verdict], total: int) -> dict[str, float]:
    signs = [sign for verdict in found for sign in verdict.standing.preferred.values()]
    return {
        "items": total,
        "items/labelled": len(found),
        "items/labelled by several": sum(len(v.labels) > 1 for v in found),
        "items/all responses bad": sum(map(_all_bad, found)),
        "pairs/decided": sum(bool(sign) for sign in signs),
        "pairs/tied": signs.count(0),
        "pairs/without a majority": sum(v.conflicts for v in found),
    }


def _notes(items: Items, store: Store, figures: Mapping[str, float], form: str) -> list[str]:
    notes = []
    if figures["items/all responses bad"] and form in ("pairs", "ranked"):
        notes.append(
            f"of {figures['items/all responses bad']:.0f} items all responses are bad, which pairs and rankings cannot say: "
            "--format kto makes rows of them that kto learns from"
        )
    strange = len({label.item for label in store if items.place(label.item) is None})
    if strange:
        notes.append(f"{strange} labelled items are not in the data and are left out: was it the same file?")
    if figures["pairs/without a majority"]:
        notes.append(
            f"annotators contradict each other on {figures['pairs/without a majority']:.0f} pairs, which give no row: "
            "a further annotator decides them"
        )
    if store.torn:
        notes.append(f"{store.torn} lines of {store.path} were cut short by a kill and are passed over")
    return notes


# --------------------------------------------------------------------------------------------------------- agreement


def agreement(items: Items, store: Store, vote: Callable[[Label, Pair], int | None] = helpfulness) -> dict[str, float]:
    """Cohen's kappa of each two annotators and Fleiss' of all, over the pairs of responses that both, or several, judged."""
    votes: dict[tuple[str, Pair], dict[str, int]] = {}
    for place, verdict in verdicts(items, store, vote):
        for pair in verdict.standing.preferred:
            said = {label.annotator: vote(label, pair) for label in verdict.labels}
            votes[items[place][0], pair] = {who: sign for who, sign in said.items() if sign is not None}
    people = sorted({who for said in votes.values() for who in said})
    figures: dict[str, float] = {}
    for first, second in itertools.combinations(people, 2):
        shared = [(said[first], said[second]) for said in votes.values() if first in said and second in said]
        kappa = cohen_kappa(*map(list, zip(*shared))) if shared else None
        if kappa is not None:
            figures[f"Cohen's kappa/{first}, {second}"] = kappa
    several = [list(said.values()) for said in votes.values() if len(said) > 1]
    if len(people) > 2 and (kappa := fleiss_kappa(several)) is not None:
        figures["Fleiss' kappa"] = kappa
    return figures
