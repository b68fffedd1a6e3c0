"""What the cells must show: a claim, its figure over seeds, and whether it holds. Differences are within seeds."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .cells import FROZEN, RANDOM, STOPS

NAMES = {
    "sft": "SFT",
    "reward": "reward model",
    "ranked": "ranked reward model",
    "dpo": "DPO",
    "ppo": "PPO",
    "grpo": "GRPO",
}
LIBRARIES = {"rlhf_fast": "rlhf_fast", "trl": "TRL"}
LEAST = 0.10  # that a gain must be, besides two standard errors

Found = list[dict[str, Any]]  # what cells keep in their files
Measure = Callable[[dict[str, Any]], float]  # of one cell


@dataclass(frozen=True)
class Claim:
    what: str
    figure: str
    holds: bool | None  # None: one seed says nothing


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error; one seed has none."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def curve(cell: dict[str, Any], metric: str) -> list[tuple[float, float]]:
    return [(samples, value) for samples, name, value in cell["points"] if name == metric]


def final(cell: dict[str, Any], metric: str) -> float:
    points = curve(cell, metric)
    return points[-1][1] if points else math.nan


def gain(cell: dict[str, Any], metric: str) -> float:
    """Last less first, which is the SFT policy's."""
    return final(cell, metric) - curve(cell, metric)[0][1]


def late_gain(cell: dict[str, Any], metric: str) -> float:
    """Mean of the last quarter of a noisy curve, less its first value."""
    values = [value for _, value in curve(cell, metric)]
    return statistics.fmean(values[-max(len(values) // 4, 1) :]) - values[0]


def chosen(found: Found, task: str, trainer: str, variant: str = "", library: str = "rlhf_fast") -> Found:
    wanted = {"task": task, "trainer": trainer, "variant": variant, "library": library}
    return sorted((c for c in found if wanted.items() <= c.items()), key=lambda c: c["seed"])


def text(value: float, error: float = math.nan, signed: bool = False) -> str:
    if math.isnan(value):
        return ""
    sign = "+" if signed else ""
    return f"{value:{sign}.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


# ---- claims


def claims(found: Found) -> list[Claim]:
    """All that the cells which are there can support or refute."""
    made = [*of_sft(found)]
    right = ("reward", "greedy accuracy")
    for task, metrics in {"addition": right, "stories": right, "preference": ("reward", "quality")}.items():
        made += [
            c for trainer in ("ppo", "grpo") for metric in metrics for c in of_a_gain(found, task, trainer, metric)
        ]
        made += of_ppo(found, task)
        made += [*beside_trl(found, task, "grpo", "reward"), *beside_trl(found, task, "dpo", metrics[-1])]
        preferred = chosen(found, task, "dpo")
        what = f"{task}: DPO's answers are preferred to SFT's, more than half"
        made += claim(what, preferred, lambda c: final(c, "preferred to SFT") - 0.5, lambda m, e: m > 2 * e)
    return [*made, *of_reward_models(found), *of_controls(found)]


def claim(what: str, cells: Found, measure: Measure, holds: Callable[[float, float], bool], signed=True) -> list[Claim]:
    """None where there are no cells. ``holds`` is asked with mean and standard error."""
    if not cells:
        return []
    mean, error = mean_and_error([measure(cell) for cell in cells])
    return [Claim(what, text(mean, error, signed), None if math.isnan(error) else holds(mean, error))]


def of_sft(found: Found) -> list[Claim]:
    made = []
    for task in STOPS:
        cells = chosen(found, task, "sft")
        room, ends = "SFT's greedy accuracy leaves room, 0.30 to 0.70", "SFT's greedy answers end, more than 99%"
        made += claim(
            f"{task}: {room}", cells, lambda c: final(c, "greedy accuracy"), lambda m, e: 0.3 <= m <= 0.7, False
        )
        made += claim(f"{task}: {ends}", cells, lambda c: final(c, "eos rate"), lambda m, e: m > 0.99, False)
    return made


def of_a_gain(found: Found, task: str, trainer: str, metric: str) -> list[Claim]:
    what = f"{task}: {NAMES[trainer]} raises {metric} by {LEAST:.2f} and 2 standard errors"
    return claim(what, chosen(found, task, trainer), lambda c: gain(c, metric), lambda m, e: m >= LEAST and m > 2 * e)


def of_ppo(found: Found, task: str) -> list[Claim]:
    ppo, grpo = chosen(found, task, "ppo"), chosen(found, task, "grpo")
    rises = f"{task}: PPO's explained variance rises"
    made = claim(rises, ppo, lambda c: late_gain(c, "explained variance"), lambda m, e: m > 2 * e)
    what = f"{task}: PPO's reward less GRPO's at equal samples is not below 0"
    return made + claim(what, pairable(ppo, grpo), less(grpo, "reward"), lambda m, e: m >= 0)


def beside_trl(found: Found, task: str, trainer: str, metric: str) -> list[Claim]:
    ours, theirs = chosen(found, task, trainer), chosen(found, task, trainer, library="trl")
    what = f"{task}: {NAMES[trainer]}'s {metric} less TRL's is not below 0 by more than 2 standard errors"
    return claim(what, pairable(ours, theirs), less(theirs, metric), lambda m, e: m >= -2 * e)


def of_reward_models(found: Found) -> list[Claim]:
    made = []
    for trainer in ("reward", "ranked"):
        what = f"preference: the {NAMES[trainer]} orders 95% of held-out pairs, one label in ten false"
        cells = chosen(found, "preference", trainer)
        made += claim(what, cells, lambda c: final(c, "pair accuracy"), lambda m, e: m >= 0.95, False)
    return made


def of_controls(found: Found) -> list[Claim]:
    made = []
    for metric in ("reward", "greedy accuracy"):
        measure = functools.partial(gain, metric=metric)
        frozen = chosen(found, "addition", "ppo", FROZEN)
        what = f"addition: PPO with {FROZEN} leaves {metric} within 0.05"
        made += claim(what, frozen, measure, lambda m, e: abs(m) < 0.05)
        for trainer, library in (("ppo", "rlhf_fast"), ("grpo", "rlhf_fast"), ("grpo", "trl")):
            cells = chosen(found, "addition", trainer, RANDOM, library)
            what = f"addition: a {RANDOM} does not raise {metric} ({NAMES[trainer]}, {LIBRARIES[library]})"
            made += claim(what, cells, measure, lambda m, e: m <= max(2 * e, 0.02))
    return made


def less(others: Found, metric: str) -> Measure:
    """The final value less that of the other cell with the same seed."""
    by_seed = {cell["seed"]: cell for cell in others}
    return lambda cell: final(cell, metric) - final(by_seed[cell["seed"]], metric)


def pairable(cells: Found, others: Found) -> Found:
    """Those with a seed that the others have too."""
    seeds = {cell["seed"] for cell in others}
    return [cell for cell in cells if cell["seed"] in seeds]
