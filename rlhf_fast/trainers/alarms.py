"""Alarms: an update of the policy or its critic that has gone wildly out of range.

A healthy step leaves the policy within some hundredths of a nat per token of where it sampled, and ratios near 1: quickstart's PPO
stays within 0.003 nats, 0.997 to 1.002 and a squared error of 1.01, its GRPO with four steps a batch within 0.008 nats. At 25 times
the learning rate PPO is 1.1 to 1.5 nats away after a step, and its ratio at 1.47. What it says no to is not put into the weights: the run is saved as it was before the step, and stops. The
reward-hacking guard (:mod:`.guard`) looks at what is sampled over hundreds of responses; this at each step, before it is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_fast.errors import UserError

from .guard import check_limits

ACTIONS = ("stop", "warn", "off")


@dataclass(frozen=True)
class Alarm:
    """A figure of an optimizer step: the mean over its response tokens, of all ranks."""

    limit: float  # outside of [1 / limit, limit], or above it
    what: str  # with {value:.3g}
    fix: str
    both: bool = False  # the figure is a factor: too small is as bad as too large

    def rings(self, value: float, limit: float) -> bool:
        """Also where the figure is not a number."""
        return not (value <= limit and (not self.both or value >= 1 / limit))


POLICY_FIX = "lower learning_rate, take fewer steps on a batch of responses, or set target_kl (PPO)"
ALARMS = {
    "kl": Alarm(
        1.0,
        "the policy is {value:.3g} nats per token (approximate KL) away from where it sampled this batch",
        POLICY_FIX,
    ),
    "ratio": Alarm(
        2.0,
        "the ratio of new to old probabilities is {value:.3g} in the mean of this batch's tokens",
        POLICY_FIX,
        both=True,
    ),
    "value": Alarm(
        25.0,
        "a critic's mean squared error is {value:.3g} times the largest mean square of returns so far (at least 1)",
        "lower learning_rate or vf_coef, or bound the scores with reward_clip",
    ),
}


def check_alarm_limits(limits: Mapping[str, float]) -> None:
    """Raise UserError for a limit that no alarm has, naming the nearest, or that cannot be."""
    check_limits(limits, ALARMS, "alarm_limits")
    for name, limit in limits.items():
        least = 1 if ALARMS[name].both else 0
        if not limit > least:
            raise UserError(f"alarm_limits: {name} is {limit:g}; it must be above {least}")


def alarms_of(figures: Mapping[str, float], limits: Mapping[str, float]) -> dict[str, str]:
    """Which alarms the figures of a step ring: name -> what was found, and what is allowed."""
    rung = {}
    for name, value in figures.items():
        alarm, limit = ALARMS[name], limits.get(name, ALARMS[name].limit)
        if alarm.rings(value, limit):
            bounds = f"{1 / limit:.3g} to {limit:g}" if alarm.both else f"{limit:g}"
            rung[name] = f"{alarm.what.format(value=value)} (alarm_limits {name}: {bounds})"
    return rung


def sentence(rung: Mapping[str, str]) -> str:
    """What :func:`alarms_of` found, and what to do about it."""
    fixes = dict.fromkeys(ALARMS[name].fix for name in rung)
    return f"{', and '.join(rung.values())}: {', and '.join(fixes)}; or raise the limit"
