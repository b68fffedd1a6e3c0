"""Reward functions: finding them by name, calling them with what they accept, and never mistaking a fault for a score.

A reward function is ``f(prompts, completions, completion_ids, **columns) -> list[float | None]``, one entry per sample, plain
or ``async``. It may take any subset of these by name; ``columns`` are the data set's other columns and ``prompt_ids``, each a
list with one entry per sample. None means "not scored" (for example, a row of another task).
"""

from __future__ import annotations

import asyncio
import difflib
import functools
import importlib
import inspect
import json
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rlhf_fast.errors import RolloutError, UserError
from rlhf_fast.rewards import deadline
from rlhf_fast.rewards.code import Code
from rlhf_fast.rewards.faults import Fault
from rlhf_fast.rewards.isolated import Isolated, isolate
from rlhf_fast.rewards.judge import Judge
from rlhf_fast.rewards.math_answers import Math
from rlhf_fast.rewards.model import RewardModel
from rlhf_fast.rewards.verifiers import Answer, Exact, Format, Length, Random
from rlhf_fast.rewards.workers import WorkerFault

Scores: TypeAlias = "Sequence[float | Fault | None] | Tensor"
RewardFunction: TypeAlias = "Callable[..., Scores | Awaitable[Scores]]"

BUILT_IN: dict[str, Callable[..., RewardFunction]] = {
    "answer": Answer,
    "code": Code,
    "exact": Exact,
    "format": Format,
    "judge": Judge,
    "length": Length,
    "math": Math,
    "random": Random,
    "model": RewardModel,
}


# ---------------------------------------------------------------------------------------------------- by name


def resolve(spec: Any) -> RewardFunction:
    """The reward function that ``spec`` names.

    Args:
        spec: one of
            a callable, returned as it is;
            a built-in's name, such as ``answer`` (see ``BUILT_IN``);
            a mapping with its parameters, such as ``{"name": "length", "max": 64}`` (on a command line, the same as JSON);
            the folder of a trained reward model;
            ``package.module:function`` for any Python function, which is then run in a process of its own (see
            :func:`rlhf_fast.rewards.isolated.isolate`).
    Raises:
        UserError: nothing has this name, or a parameter is unknown, missing or wrong.
    """
    if callable(spec):
        return spec
    if isinstance(spec, str) and spec.lstrip().startswith("{"):
        spec = _from_json(spec)
    if isinstance(spec, Mapping):
        return _with_parameters(dict(spec))
    if not isinstance(spec, str):
        raise UserError(f"reward: expected a name, a mapping or a function, got {type(spec).__name__} {spec!r}.")
    if spec in BUILT_IN:
        return _with_parameters({"name": spec})
    if Path(spec).is_dir():
        return RewardModel(spec)
    if ":" in spec:
        return isolate(spec, import_callable(spec, "reward"))
    guess = difflib.get_close_matches(spec, BUILT_IN, n=1)
    raise UserError(
        f"reward: nothing is called '{spec}'. "
        + (f"Did you mean '{guess[0]}'? " if guess else "")
        + f"Built in: {', '.join(BUILT_IN)}; otherwise give package.module:function or the folder of a reward model."
    )


def resolve_all(specs: Any) -> tuple[list[RewardFunction], list[str]]:
    """Resolve one spec or a list of them; returns the functions and a distinct name for each, as metrics show it."""
    functions = [resolve(spec) for spec in (specs if isinstance(specs, (list, tuple)) else [specs])]
    names: list[str] = []
    for function in functions:
        name, copies = reward_name(function), 1
        while name in names:
            copies += 1
            name = f"{reward_name(function)}_{copies}"
        names.append(name)
    return functions, names


def reward_name(function: RewardFunction) -> str:
    """What metrics call a reward function."""
    if isinstance(function, functools.partial):
        return reward_name(function.func)
    return getattr(function, "__name__", None) or type(function).__name__.lower()


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"reward: {text} is not valid JSON ({error.msg} at character {error.pos}).") from None


def _with_parameters(spec: dict[str, Any]) -> RewardFunction:
    name = spec.pop("name", None)
    if name not in BUILT_IN:
        raise UserError(f"reward: the mapping needs a `name` among {', '.join(BUILT_IN)}, got {name!r}.")
    known = inspect.signature(BUILT_IN[name]).parameters
    if unknown := [key for key in spec if key not in known]:
        raise UserError(f"reward: '{name}' has no parameter '{unknown[0]}'; it has {', '.join(known) or 'none'}.")
    if missing := [key for key, p in known.items() if p.default is p.empty and key not in spec]:
        raise UserError(f"reward: '{name}' needs a value for `{missing[0]}`: {{name: {name}, {missing[0]}: ...}}.")
    return BUILT_IN[name](**spec)


def import_callable(spec: str, what: str) -> Callable[..., Any]:
    """The function or class that ``package.module:name`` names; the current folder's modules are found too.

    Args:
        what: it is, in messages.
    Raises:
        UserError: the module cannot be imported, or has no such function.
    """
    module_name, _, attribute = spec.partition(":")
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)  # a file beside the config; last, so that it shadows no installed package
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may fail in any way
        raise UserError(
            f"{what}: cannot import '{module_name}' ({type(error).__name__}: {_short(str(error))})."
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        have = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        guess = difflib.get_close_matches(attribute, have, n=1)
        raise UserError(
            f"{what}: module '{module_name}' has no function '{attribute}'."
            + (f" Did you mean '{guess[0]}'?" if guess else "")
        )
    return found


# ---------------------------------------------------------------------------------------------------- calling


@dataclass
class RewardTable:
    """B samples scored by F functions."""

    names: list[str]  # F
    values: Tensor  # (B, F) float32, NaN where there is no score
    faulted: Tensor  # (B, F) bool, True where the function failed rather than declined
    faults: dict[str, int] = field(default_factory=dict)  # name -> samples lost to faults; only those that had some
    messages: list[str] = field(default_factory=list)  # one readable line per kind of fault

    def total(self, weights: Sequence[float] | None = None) -> Tensor:
        """Weighted sum over the functions that scored. (B,) float32.

        NaN where no function scored, and where one failed: a sum without the missing part would be a wrong score.
        """
        weights = torch.ones(len(self.names)) if weights is None else torch.tensor(weights, dtype=torch.float32)
        if len(weights) != len(self.names):
            raise UserError(f"reward_weights: {len(weights)} weights for {len(self.names)} reward functions.")
        sums = (self.values.nan_to_num(0.0) * weights).sum(1)
        return sums.masked_fill(self.values.isnan().all(1) | self.faulted.any(1), torch.nan)

    def part(self, first: int) -> tuple[RewardTable, RewardTable]:
        """The scores of the ``first`` functions, and those of the others; without messages."""
        return tuple(
            RewardTable(self.names[at], self.values[:, at], self.faulted[:, at])
            for at in (slice(None, first), slice(first, None))
        )


def check_columns(functions: Sequence[RewardFunction], names: Sequence[str], columns: Sequence[str]) -> None:
    """Refuse at the start a reward function that needs a column the data set does not have.

    Raises:
        UserError: names the function and the column.
    """
    for function, name in zip(functions, names):
        if missing := _missing(function, columns):
            have = ", ".join(c for c in columns if c != "prompt_ids") or "none besides the prompt"
            raise UserError(f"reward '{name}' needs a column {missing}; the prompts' columns are: {have}.")


def score(
    functions: Sequence[RewardFunction],
    names: Sequence[str],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> RewardTable:
    """Score B samples with every function. Async functions run concurrently, after the others.

    Hardly ever raises for what a function does: an exception or a list of the wrong length masks all its scores of this call;
    NaN, infinity, a ``Fault`` or something else that is no number masks that sample. Each is counted and described.

    Args:
        prompts: B strings or message lists.
        completions: B strings or message lists, as the prompts.
        completion_ids: B lists of token ids, as sampled.
        columns: name -> B values.
    Raises:
        RolloutError: a function of the user's that runs in this process passed its deadline, see :mod:`.deadline`.
        KeyboardInterrupt: a function raised it, or Ctrl-C did while it ran.
    """
    given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **(columns or {})}
    outcomes = _call_all(functions, names, given)
    size = len(prompts)
    table = RewardTable(
        list(names), torch.full((size, len(names)), torch.nan), torch.zeros(size, len(names), dtype=torch.bool)
    )
    for f, (name, outcome) in enumerate(zip(names, outcomes)):
        values, problems = _checked(outcome, size)
        table.values[:, f] = values
        for problem, samples in problems.items():
            table.faulted[samples, f] = True
            lost = f"{len(samples)} of {size} samples not scored, first: sample {samples[0]}"
            table.messages.append(f"reward '{name}' {problem} ({lost})")
        if count := int(table.faulted[:, f].sum()):
            table.faults[name] = count
    return table


def _call_all(functions: Sequence[RewardFunction], names: Sequence[str], given: Mapping[str, Any]) -> list[Any]:
    """What each function returned, or the exception it raised."""
    outcomes = [_outcome(function, name, given) for function, name in zip(functions, names)]
    waiting = [i for i, outcome in enumerate(outcomes) if inspect.isawaitable(outcome)]
    if waiting:
        limits = [_timeout(functions[i]) for i in waiting]
        who = "', '".join(names[i] for i in waiting)
        results = deadline.call(
            lambda: _run_together([outcomes[i] for i in waiting], limits), who, max(limits) + deadline.COMES_OUT
        )
        for i, outcome in zip(waiting, results):
            outcomes[i] = outcome
    return outcomes


def _outcome(function: RewardFunction, name: str, given: Mapping[str, Any]) -> Any:
    """What one function returned (of an async one, its awaitable), or the exception it raised."""
    try:
        arguments = _accepted(function, given)
        if isinstance(function, (Isolated, *BUILT_IN.values())):  # with deadlines of their own, where they need any
            return function(**arguments)
        return deadline.call(lambda: function(**arguments), name, _timeout(function))
    except (KeyboardInterrupt, RolloutError):
        raise
    except BaseException as error:  # noqa: BLE001 (whatever a user's function does, sys.exit() too, must not end the run)
        return error


def _timeout(function: RewardFunction) -> float:
    """Seconds that a call in this process may take."""
    return float(getattr(function, "timeout", deadline.TIMEOUT))


def _accepted(function: RewardFunction, given: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """The arguments that the function takes, as lists of its own."""
    if missing := _missing(function, list(given)):
        raise UserError(f"needs a column {missing}")
    parameters = _parameters(function)
    takes_all = parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {key: list(value) for key, value in given.items() if takes_all or key in parameters}


def _missing(function: RewardFunction, columns: Sequence[str]) -> str | None:
    """The column (or the alternatives, in words) that the function needs and does not get."""
    alternatives = getattr(function, "needs_one_of", ())
    if alternatives and not any(name in columns for name in alternatives):
        return " or ".join(f"'{name}'" for name in alternatives)
    for name in getattr(function, "needs", ()):
        if name not in columns:
            return f"'{name}'"
    available = {"prompts", "completions", "completion_ids", *columns}
    for name, parameter in (_parameters(function) or {}).items():
        required = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if required and name not in available:
            return f"'{name}'"
    return None


def _parameters(function: RewardFunction) -> Mapping[str, inspect.Parameter] | None:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # some functions written in C have no signature: give them everything
        return None


def _run_together(waiting: Sequence[Awaitable[Any]], limits: Sequence[float]) -> list[Any]:
    """Results or exceptions of awaitables run concurrently, also when an event loop already runs (a notebook)."""

    async def gather() -> list[Any]:
        async def one(awaitable: Awaitable[Any], seconds: float) -> Any:
            try:
                return await asyncio.wait_for(awaitable, seconds)
            except asyncio.TimeoutError:
                return WorkerFault(f"gave no answer in {seconds:g} s")
            except SystemExit as stop:  # gather would let it end the loop
                return stop

        return await asyncio.gather(*map(one, waiting, limits), return_exceptions=True)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        results = asyncio.run(gather())
        if late := [r for r in results if isinstance(r, deadline.Overdue)]:  # a task has caught it
            raise late[0] from None
        return results
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.extend(asyncio.run(gather())))
    thread.start()
    thread.join()
    return results


def _checked(outcome: Any, size: int) -> tuple[Tensor, dict[str, list[int]]]:
    """(B,) float32 scores, NaN where there is none, and problem -> the samples it concerns."""
    try:
        return _read(outcome, size)
    except Exception as error:  # noqa: BLE001 (the objects are the user's, and so are their methods)
        problem = f"gave what cannot be read ({type(error).__name__})"
        return torch.full((size,), torch.nan), {problem: list(range(size))}


def _read(outcome: Any, size: int) -> tuple[Tensor, dict[str, list[int]]]:
    values, everyone = torch.full((size,), torch.nan), list(range(size))
    if isinstance(outcome, WorkerFault):
        return values, {_short(str(outcome)): everyone}
    if isinstance(outcome, BaseException):
        return values, {f"raised {type(outcome).__name__}: {_short(str(outcome))}": everyone}
    if isinstance(outcome, Tensor) or hasattr(outcome, "tolist"):
        outcome = outcome.tolist()
    if not isinstance(outcome, (list, tuple)):
        return values, {f"returned {type(outcome).__name__} where a list is due": everyone}
    if len(outcome) != size:
        return values, {f"returned {len(outcome)} scores for {size} samples": everyone}
    problems: dict[str, list[int]] = {}
    for i, value in enumerate(outcome):
        problem = None
        if isinstance(value, Fault):
            problem = value.reason
        elif value is not None:
            values[i], problem = _number(value)
        if problem:
            problems.setdefault(problem, []).append(i)
    return values, problems


def _number(value: Any) -> tuple[float, str | None]:
    """The value as a finite number, or NaN and what is wrong with it."""
    if getattr(value, "ndim", None) == 0:  # a numpy or torch scalar
        value = value.item()
    if not isinstance(value, (int, float)):
        return torch.nan, f"returned {type(value).__name__} {_short(repr(value))} as a score"
    if not abs(value) <= torch.finfo(torch.float32).max:
        # Python writes no integers of more than 4300 digits
        shown = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else str(value)
        return torch.nan, f"returned {shown} as a score"
    return float(value), None


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 120 else line[:117] + "..."
