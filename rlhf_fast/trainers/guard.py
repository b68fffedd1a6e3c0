"""The guard against reward hacking: a policy that learns what the reward pays for, and not what was meant by it.

It watches every batch of responses, compares the last few hundred with the first (or the best) few hundred, and says in a
sentence what is odd. Over-optimization of a learned reward is the rule and not the exception (Gao et al. 2022,
arXiv:2210.10760): the reward goes on rising while what it stands for falls.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from rlhf_fast.data.batch import Experience
from rlhf_fast.data.diversity import distinct
from rlhf_fast.errors import UserError
from rlhf_fast.rewards.model import RewardModel

from .callbacks import Callback
from .measures import Gap, Moments, by_group, longest_repeat, variety, within_groups

if TYPE_CHECKING:
    from .rl import RLTrainer

logger = logging.getLogger(__name__)

ACTIONS = ("warn", "stop", "rollback", "off")
# what trips the guard, and when
LIMITS = {
    "held_out": 4.0,  # standard errors that the held-out reward may fall below its best while the reward rises
    "kl": 100.0,  # nats per response from the reference
    "length": 0.6,  # correlation of reward and length, in responses grown by half
    "repeat": 0.3,  # share of a response that is one piece back to back, more than at the start
    "distinct": 0.5,  # of the share of different pairs of tokens at the start that may be left
    "entropy": 0.1,  # of the nats in a response at the start
    "diversity": 0.4,  # of the share of different responses to a prompt at the start
    "disagreement": 3.0,  # times as much between the heads of a reward model as at the start
}
WINDOW = 256  # responses that are compared at least
GROWN = 1.5
RISEN = 2.0  # standard errors by which the reward must have risen for a fall of the held-out reward to be its doing
# a short answer becomes certain when it becomes right; responses with more choice than this are not meant to lose it
FREE_NATS = 8.0
FEWEST = 30  # prompts of an evaluation whose mean has a standard error worth the name
FIGURES = ("reward", "held_out", "kl", "length", "repeat", "distinct", "entropy", "diversity", "disagreement", "pays")
Window = dict[str, Moments]


def check_limits(limits: Iterable[str], known: Iterable[str] = LIMITS, setting: str = "guard_limits") -> None:
    """Raise UserError for a limit that there is not, naming the nearest."""
    for name in limits:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"{setting} has no {name!r}; {hint}There are {', '.join(known)}")


class Guard(Callback):
    """Says what is odd about the responses of a run, once for each kind, and stops it if asked to.

    Args:
        action: ``warn``; ``stop`` the run; ``rollback``: stop, and keep the model of the best evaluation.
        limits: in place of ``LIMITS``.
    """

    def __init__(self, action: str, limits: dict[str, float]):
        self.action, self.limits = action, {**LIMITS, **limits}
        self.first: Window = {}  # sums over the first responses
        self.rounds: list[Window] = []  # of the last ones, no more than make a window
        self.best: Window = {}  # when the held-out reward was best
        self.best_evaluation: dict[
            str, list[float]
        ] = {}  # reward and held-out reward of each prompt when that was best
        self.tripped: dict[str, int] = {}  # kind -> step

    def on_rollout(self, trainer: RLTrainer, experiences: list[Experience]) -> None:
        rows, doubted = trainer.ranks.gather(measure(experiences)), trainer.ranks.gather(doubts(trainer))
        if not rows:
            return
        self.watch(sums(rows, doubted))
        recent = self.recent
        figures = {f"guard/{name}": recent[name].mean for name in FIGURES if name != "pays" and recent[name].count}
        if recent["pays"].count:
            figures["guard/length_correlation"] = recent["pays"].correlation
        trainer.metrics.add(figures, 1.0)
        for kind, sentence in self.findings().items():
            self.trip(trainer, kind, sentence)

    def on_evaluate(self, trainer: RLTrainer, figures: dict[str, float]) -> None:
        """The same prompts are answered each time, so that small changes show."""
        if "held_out" not in trainer.judged:
            return
        now, best = {name: x.tolist() for name, x in trainer.judged.items()}, self.best_evaluation
        if not best or (fallen := _gain(now["held_out"], best["held_out"])).mean < 0:
            self.best_evaluation = now
        elif fallen.count >= FEWEST and self.cheats(fallen, _gain(best["reward"], now["reward"])):
            means = [Moments.of(x[name]).mean for name in ("reward", "held_out") for x in (best, now)]
            self.trip(trainer, "held_out", _cheating(*means, fallen))

    def cheats(self, fallen: Moments | Gap, risen: Moments | Gap) -> bool:
        """Whether the held-out reward fell while the reward rose, by more than chance."""
        return fallen.mean > self.limits["held_out"] * fallen.error and risen.mean > RISEN * risen.error

    def watch(self, batch: Window) -> None:
        """Take in a batch of all ranks' responses."""
        if not self.first or self.first["length"].count < WINDOW:
            self.first = merged([self.first, batch]) if self.first else batch
        self.rounds.append(batch)
        while len(self.rounds) > 1 and merged(self.rounds[1:])["length"].count >= WINDOW:
            self.rounds.pop(0)
        held_out = self.recent["held_out"]
        if self.full and held_out.count and (not self.best or held_out.mean > self.best["held_out"].mean):
            self.best = self.recent

    @property
    def recent(self) -> Window:
        return merged(self.rounds)

    @property
    def full(self) -> bool:
        return self.recent["length"].count >= WINDOW

    def findings(self) -> dict[str, str]:
        """What is odd now: kind -> a sentence. Nothing before there is a window to compare."""
        if not self.full:
            return {}
        said = {name: check(self) for name, check in CHECKS.items()}
        return {name: sentence for name, sentence in said.items() if sentence}

    def trip(self, trainer: RLTrainer, kind: str, sentence: str) -> None:
        if kind in self.tripped:
            return
        self.tripped[kind] = trainer.step
        if trainer.accelerator.is_main_process:
            logger.warning("guard at step %d: %s", trainer.step, sentence)
        trainer.metrics.add({f"guard/tripped/{kind}": 1.0}, 1.0)
        if self.action != "warn":
            trainer.stop(f"guard: {sentence}", roll_back=self.action == "rollback")

    def state(self) -> dict[str, Any]:
        windows = {"first": [self.first], "rounds": self.rounds, "best": [self.best]}
        packed = {name: [{k: m.sums for k, m in w.items()} for w in many] for name, many in windows.items()}
        return {**packed, "best_evaluation": self.best_evaluation, "tripped": dict(self.tripped)}

    def load_state(self, state: dict[str, Any]) -> None:
        windows = {n: [{k: Moments(s) for k, s in w.items()} for w in state[n]] for n in ("first", "rounds", "best")}
        (self.first,), self.rounds, (self.best,) = windows["first"], windows["rounds"], windows["best"]
        self.best_evaluation, self.tripped = state["best_evaluation"], dict(state["tripped"])


# ------------------------------------------------------------------------------------------------------------- measuring


def measure(experiences: Sequence[Experience]) -> list[tuple[float, ...]]:
    """What the guard looks at, of each response that was scored, in the order of ``FIGURES``; NaN where it is not known. The
    last two are reward and length within the group of the prompt."""
    experiences = [e for e in experiences if not math.isnan(e.score) and any(e.example.response_mask)]
    responses = [tuple(i for i, m in zip(e.example.input_ids, e.example.response_mask) if m) for e in experiences]
    prompts = [tuple(e.example.input_ids[: len(e.example) - len(r)]) for e, r in zip(experiences, responses)]
    rewards, lengths = [e.score for e in experiences], [float(len(r)) for r in responses]
    columns = (
        by_group(rewards, prompts),
        by_group([e.held_out for e in experiences], prompts),
        _kls(experiences),
        lengths,
        [longest_repeat(r) for r in responses],
        [distinct([r], 2) for r in responses],
        [-x for x in _sums([e.rollout_logprobs for e in experiences])],
        variety(responses, prompts),
        within_groups(rewards, prompts),
        within_groups(lengths, prompts),
    )
    return list(zip(*columns))


def sums(rows: Sequence[tuple[float, ...]], doubted: Sequence[float] = ()) -> Window:
    """The rows of :func:`measure`, and how much ensembles disagreed about responses, added up."""
    columns = list(zip(*rows))
    window = {name: Moments.of(column) for name, column in zip(FIGURES, columns[:-2])}
    return {**window, "disagreement": Moments.of(doubted), "pays": Moments.of(columns[-2], columns[-1])}


def merged(windows: Sequence[Window]) -> Window:
    """The sums over all ``windows``."""
    return {name: sum((w[name] for w in windows), Moments()) for name in FIGURES}


def doubts(trainer: RLTrainer) -> list[float]:
    """How much the heads of the first ensemble among the rewards disagreed about each response of this rank."""
    ensembles = [f for f in trainer.rollouts.functions if isinstance(f, RewardModel) and f.num_heads > 1]
    return ensembles[0].stds if ensembles else []


def _kls(experiences: Sequence[Experience]) -> list[float]:
    if any(e.ref_logprobs is None for e in experiences):
        return [math.nan] * len(experiences)
    mine = _sums([e.rollout_logprobs if e.old_logprobs is None else e.old_logprobs for e in experiences])
    return [a - b for a, b in zip(mine, _sums([e.ref_logprobs for e in experiences]))]


def _sums(entries: Sequence[torch.Tensor | None]) -> list[float]:
    """Each tensor's sum, read from the device at once."""
    if not entries or any(x is None for x in entries):
        return [math.nan] * len(entries)
    return torch.stack([x.sum() for x in entries]).tolist()


# ---------------------------------------------------------------------------------------------------------------- checks


def _gain(then: Sequence[float], now: Sequence[float]) -> Moments:
    """How much less each prompt had then than now."""
    return Moments.of([b - a for a, b in zip(then, now)])


def _cheating(before: float, reward: float, then: float, now: float, fallen: Moments | Gap) -> str:
    return (
        f"the reward rises ({before:.3g} -> {reward:.3g}) and the held-out reward falls ({then:.3g} -> {now:.3g}, "
        f"{fallen.mean / max(fallen.error, 1e-12):.1f} standard errors): the policy learns what the reward pays for and not "
        "what was meant"
    )


def _held_out(g: Guard) -> str | None:
    if not g.best or not g.recent["held_out"].count:
        return None
    fallen = g.best["held_out"].less(g.recent["held_out"])
    if not g.cheats(fallen, g.recent["reward"].less(g.best["reward"])):
        return None
    means = [w[name].mean for name in ("reward", "held_out") for w in (g.best, g.recent)]
    return _cheating(*means, fallen)


def _kl(g: Guard) -> str | None:
    if (kl := g.recent["kl"].mean) > g.limits["kl"]:
        return f"responses are {kl:.0f} nats from the reference, budget {g.limits['kl']:g}; raise kl_coef or beta"
    return None


def _length(g: Guard) -> str | None:
    now, then, pays = g.recent["length"].mean, g.first["length"].mean, g.recent["pays"].correlation
    if now > GROWN * then and pays > g.limits["length"]:
        return (
            f"responses grow ({then:.0f} -> {now:.0f} tokens) and the reward goes with their length (correlation {pays:.2f}); "
            "it may pay for length alone"
        )
    return None


def _repeat(g: Guard) -> str | None:
    now, then = g.recent["repeat"].mean, g.first["repeat"].mean
    if now > then + g.limits["repeat"]:
        return f"{now:.0%} of a response is one piece repeated back to back ({then:.0%} at the start)"
    return None


def _left(name: str, what: str, unit: str, free: bool = False) -> Callable[[Guard], str | None]:
    """A check that a figure keeps its share of what it was at the start; ``free``: of responses with much choice only."""

    def check(g: Guard) -> str | None:
        now, then = g.recent[name].mean, g.first[name].mean
        if now < g.limits[name] * then and not (free and g.first["entropy"].mean < FREE_NATS):
            return f"{what}: {now:.2g} {unit}, {then:.2g} at the start"
        return None

    return check


def _disagreement(g: Guard) -> str | None:
    now, then = g.recent["disagreement"].mean, g.first["disagreement"].mean
    if now > g.limits["disagreement"] * then:
        return (
            f"the heads of the reward model disagree {now / max(then, 1e-12):.1f} times as much as at the start: it has "
            "not seen such responses"
        )
    return None


CHECKS: dict[str, Callable[[Guard], str | None]] = {
    "held_out": _held_out,
    "kl": _kl,
    "length": _length,
    "repeat": _repeat,
    "distinct": _left("distinct", "responses repeat themselves", "of their pairs of tokens differ"),
    "entropy": _left("entropy", "sampling has hardly a choice left", "nats per response", free=True),
    "diversity": _left("diversity", "responses to a prompt are all alike", "of them differ", free=True),
    "disagreement": _disagreement,
}
assert CHECKS.keys() == LIMITS.keys()
