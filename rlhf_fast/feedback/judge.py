"""Label data with an AI judge (RLAIF): pairs or rankings from responses, and how far the judge agrees with people.

With a constitution these are the labels of Constitutional AI's second half (Bai et al. 2022, arXiv:2212.08073, section 4): the
responses to a prompt are compared by one principle, drawn for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_fast.feedback.agreement import cohen_kappa
from rlhf_fast.feedback.candidates import Candidates
from rlhf_fast.feedback.constitution import Constitution
from rlhf_fast.rewards.judge import Panel
from rlhf_fast.rewards.judging import Standing


@dataclass
class Labels:
    """What a judge said about a data set."""

    rows: list[dict[str, Any]]  # in the format asked for
    figures: dict[str, float]
    notes: list[str]  # what went wrong, in words


async def label(
    panel: Panel,
    candidates: Sequence[Candidates],
    form: str | None = None,
    progress: Callable[[int], None] | None = None,
    constitution: Constitution | None = None,
    seed: int = 0,
) -> Labels:
    """Have all candidates compared.

    Args:
        form: ``pairs`` gives a row for every decided pair, ``ranked`` one for every prompt whose pairs all have a verdict (of
            responses that are equally good it keeps the first); None takes pairs where all prompts have two responses.
        constitution: the rubric's ``{principle}`` is one of these principles, drawn for each prompt with its responses.
        seed: of that draw.
    """
    if form is None:
        form = "pairs" if all(len(c.responses) == 2 for c in candidates) else "ranked"
    origin = {"by": "judge", "model": panel.chat.name, "rubric": panel.rubric.name, "orders": 2 if panel.swap else 1}
    origins, asked = [origin] * len(candidates), list(candidates)
    if constitution is not None:
        drawn = [constitution.draw([c.prompt, list(c.responses)], 1, seed)[0] for c in candidates]
        origins = [{**origin, "constitution": constitution.name, "principle": p.name} for p in drawn]
        asked = [replace(c, columns={**c.columns, "principle": p.question}) for c, p in zip(candidates, drawn)]
    standings = await panel.compare(asked, progress)
    write = _pairs if form == "pairs" else _ranked
    rows = [
        {**row, **c.columns, "label_origin": its}
        for c, its, standing in zip(candidates, origins, standings)
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
