"""The three tasks: what is demonstrated, compared, asked and held out, and what a good response is."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rlhf_fast.data.tasks import Rows, addition, preferences, quality

# answers with the units first: carries are then known when they are needed, and a model of two layers can learn them
FORMAT = {"width": 2, "reverse": True}
# a right answer, a right answer said several times, one with a sign in it; quality() gives them 4, 3 and 0
STYLES = ("correct", "repeated", "malformed")
HELD_OUT = 300  # prompts; of one seed both tasks of sums have the same


@dataclass
class Task:
    """Rows of one seed. No held-out sum, nor its mirror image, is among any of the others; nor a held-out story's numbers.

    ``verifier`` is the reward that says whether an answer is right. It is what reinforcement learning maximises, unless a model of
    comparisons is.
    """

    demonstrations: Rows  # prompt, completion
    prompts: Rows  # prompt, answer
    held_out: Rows  # prompt, answer
    pairs: Rows = field(default_factory=list)  # prompt, chosen, rejected; some labels false
    rankings: Rows = field(default_factory=list)  # prompt, responses, ranking; some labels false
    held_out_rankings: Rows = field(default_factory=list)  # one response of each style, best first; labels true
    verifier: str = "exact"


def sums(seed: int, scale: float = 1.0) -> Task:
    """Few demonstrations, so that imitation stays at about half; many more prompts, whose answers a verifier checks."""
    few, many = round(1_000 * scale), round(8_000 * scale)
    train, held_out = addition(few + many, held_out=round(HELD_OUT * scale), seed=seed, **FORMAT)
    return Task(
        [{key: row[key] for key in ("prompt", "completion")} for row in train[:few]],
        [asked(row) for row in train[few:]],
        [asked(row) for row in held_out],
    )


NAMES = ("Ann", "Ben", "Eva", "Kim", "Leo", "Mia", "Sam", "Tom")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps")
GAINS, LOSSES = ("buys", "finds", "gets", "wins"), ("eats", "gives away", "loses", "sells")
LONGEST_STORY = 3  # steps; held-out stories are of each length alike


def stories(seed: int, scale: float = 1.0) -> Task:
    """Arithmetic word problems in stages: one, two and three steps, worked out one after the other, and only the end is checked.

    No held-out problem has the numbers and operations of another row: only the words around them recur.
    """
    few, many, held_out = (round(n * scale) for n in (2_000, 6_000, HELD_OUT))
    rng = random.Random(f"stories/{seed}")
    seen: set[tuple[int, ...]] = set()  # held out
    rows = []
    while len(rows) < few + many + held_out:
        numbers = _changes(rng, 1 + len(rows) % LONGEST_STORY)
        if len(rows) < held_out:  # these come first
            seen.add(numbers)
        elif numbers in seen:
            continue
        rows.append(_story(numbers, rng))
    test, train = rows[:held_out], rows[held_out:]
    shown = [{key: row[key] for key in ("prompt", "completion")} for row in train[:few]]
    return Task(shown, [asked(row) for row in train[few:]], [asked(row) for row in test], verifier="answer")


def _changes(rng: random.Random, steps: int) -> tuple[int, ...]:
    """What there is at first, and what is added to it, or taken off where below 0; never less than nothing is left."""
    numbers = [rng.randint(2, 20)]
    while len(numbers) <= steps:
        change = rng.choice((-1, 1)) * rng.randint(2, 20)
        if sum(numbers) + change >= 0:
            numbers.append(change)
    return tuple(numbers)


def _story(numbers: tuple[int, ...], rng: random.Random) -> dict[str, Any]:
    name, thing, left = rng.choice(NAMES), rng.choice(THINGS), numbers[0]
    told, worked = [f"{name} has {left} {thing}."], []
    for change in numbers[1:]:
        told.append(f"{name} {rng.choice(GAINS if change > 0 else LOSSES)} {abs(change)}.")
        worked.append(f"{left}{change:+}={left + change}")
        left += change
    return {"prompt": f"{' '.join(told)} How many?", "completion": " " + ", ".join(worked), "answer": str(left)}


def styles(seed: int, scale: float = 1.0) -> Task:
    """Responses in three styles, which the demonstrations show alike and the comparisons tell apart, one in ten falsely."""
    options = {"kinds": STYLES, "held_out": round(HELD_OUT * scale), "seed": seed, **FORMAT}
    rows = round(8_000 * scale)
    pairs, _ = preferences(rows, noise=0.1, **options)
    rankings, _ = preferences(rows, k=3, noise=0.1, **options)
    _, held_out = preferences(1, k=3, **options)
    return Task(
        [{"prompt": row["prompt"], "completion": row["responses"][0]} for row in rankings],
        [asked(row) for row in pairs],
        [asked(row) for row in held_out],
        [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in pairs],
        [{key: row[key] for key in ("prompt", "responses", "ranking")} for row in rankings],
        [{"prompt": row["prompt"], "responses": in_order(row), "ranking": [1, 2, 3]} for row in held_out],
    )


def asked(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": row["prompt"], "answer": row["answer"]}


def in_order(row: dict[str, Any]) -> list[str]:
    """The responses of a ranking, best first."""
    return [response for _, response in sorted(zip(row["ranking"], row["responses"]))]


def true_quality(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """The hidden quality as a reward function; no trainer sees it."""
    return [quality(completion, right) for completion, right in zip(completions, answer)]


TASKS: dict[str, Callable[..., Task]] = {"addition": sums, "stories": stories, "preference": styles}
