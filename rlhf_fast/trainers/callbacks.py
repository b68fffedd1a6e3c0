"""What else happens at a step, a rollout, an evaluation and a save: early stopping, and code of the user's own.

``callbacks: [module:name]`` in a config, or objects given to a trainer. A class is made without arguments, or with those of a
mapping ``{name: module:class, ...}``, and its methods of :class:`Callback` are called; a plain function is called at every
event as ``f(event, trainer, what)``. What a callback raises ends the run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_fast.errors import UserError
from rlhf_fast.rewards import import_callable

from .best import Best

if TYPE_CHECKING:
    from rlhf_fast.data.batch import Experience

    from .trainer import Trainer


class Callback:
    """What a callback may have; it need not inherit. Each method is called on every process of a run.

    ``trainer.stop(why)`` ends the run after the step, ``trainer.metrics.add(figures, weight)`` adds to the next log line.
    """

    def on_step(self, trainer: Trainer, figures: dict[str, float]) -> None:
        """After an optimizer step. ``figures`` are those of its log line, none where a step is not logged."""

    def on_rollout(self, trainer: Trainer, experiences: list[Experience]) -> None:
        """After this process's responses were sampled and scored, before they are learned from."""

    def on_evaluate(self, trainer: Trainer, figures: dict[str, float]) -> None:
        """After an evaluation."""

    def on_save(self, trainer: Trainer, folder: Path) -> None:
        """After a checkpoint was written to ``folder``."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold: numbers, strings, tensors, lists and dicts of them. The first process's is kept."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state` was taken."""


EVENTS = tuple(name for name in vars(Callback) if name.startswith("on_"))


class EarlyStopping(Callback):
    """Stop after ``patience`` evaluations in a row of which none beats the best before it by more than ``threshold``."""

    def __init__(self, metric: str, patience: int, threshold: float = 0.0, greater_is_better: bool | None = None):
        self.best, self.patience, self.since = Best(metric, greater_is_better, threshold), patience, 0

    def on_evaluate(self, trainer: Trainer, figures: dict[str, float]) -> None:
        self.since = 0 if self.best.update(trainer.step, figures) else self.since + 1
        if self.since >= self.patience:
            trainer.stop(f"no better {self.best.metric} than {self.best.value:.4g} of step {self.best.step}")

    def state(self) -> dict[str, Any]:
        return {"best": self.best.state(), "since": self.since}

    def load_state(self, state: dict[str, Any]) -> None:
        self.best.load_state(state["best"])
        self.since = state["since"]


class Callbacks:
    """The callbacks of a run, called in their order.

    Args:
        specs: objects, classes, functions, or what names them, see the module.
    Raises:
        UserError: one cannot be found or made, or has none of the methods.
    """

    def __init__(self, specs: Sequence[Any]):
        self.members = [_resolve(spec) for spec in specs]

    def call(self, event: str, trainer: Trainer, what: Any) -> None:
        """Tell them all, and let all ranks know when one of them stops the run. Collective."""
        for member in self.members:
            if inspect.isroutine(member):
                member(event, trainer, what)
            elif method := getattr(member, event, None):
                method(trainer, what)
        if self.members and trainer.ranks.any(bool(trainer.stopped)):
            trainer.stopped = trainer.stopped or "another process stopped"

    def state(self) -> dict[str, Any]:
        """Of every callback that offers one, by its place and class."""
        return {name: member.state() for name, member in self._named().items() if hasattr(member, "state")}

    def load_state(self, state: dict[str, Any]) -> None:
        """Give each its own back; one that is new to the run begins afresh."""
        for name, member in self._named().items():
            if name in state and hasattr(member, "load_state"):
                member.load_state(state[name])

    def _named(self) -> dict[str, Any]:
        kinds = [type(member).__name__ for member in self.members]
        return {f"{kind}/{kinds[:i].count(kind)}": member for i, (kind, member) in enumerate(zip(kinds, self.members))}


def watchers(trainer: Trainer, more: Sequence[Any]) -> tuple[Best, Callbacks]:
    """What keeps the best evaluation of a run, and its callbacks: early stopping, the algorithm's, the config's, ``more``.

    Raises:
        UserError: evaluations are to be watched, and there are none.
    """
    a = trainer.args
    if a.watches_evaluations and trainer.eval_records is None:
        raise UserError("the best evaluation is asked for, and there is none without an eval_dataset")
    metric = a.metric_for_best_model or trainer.best_metric
    specs = [*trainer.own_callbacks(), *a.callbacks, *more]
    if a.early_stopping_patience is not None:
        stopping = (metric, a.early_stopping_patience, a.early_stopping_threshold, a.greater_is_better)
        specs.insert(0, EarlyStopping(*stopping))
    return Best(metric, a.greater_is_better), Callbacks(specs)


def _resolve(spec: Any) -> Any:
    arguments: dict[str, Any] = {}
    if isinstance(spec, Mapping):
        arguments = dict(spec)
        spec = arguments.pop("name", None)
    if isinstance(spec, str) and ":" in spec:
        spec = import_callable(spec, "callback")
    if isinstance(spec, type):
        spec = _made(spec, arguments)
    elif arguments:
        raise UserError(f"callbacks: {spec!r} takes no arguments, got {', '.join(arguments)}; only a class does")
    if not inspect.isroutine(spec) and not any(hasattr(spec, event) for event in EVENTS):
        raise UserError(
            f"callbacks: {spec!r} is none; give module:name of a function f(event, trainer, what), or of a class with "
            f"any of {', '.join(EVENTS)}"
        )
    return spec


def _made(kind: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    try:
        return kind(**arguments)
    except TypeError as error:
        raise UserError(f"callbacks: cannot make a {kind.__name__}: {error}") from error
