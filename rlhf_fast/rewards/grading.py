"""From a program and its tests to how many pass, without the program ever meeting what is expected of it."""

from __future__ import annotations

import ast
import builtins
import json
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from rlhf_fast.rewards.sandbox import Failed, Guest, Limits, Sandbox, SandboxFault, wire

Failures: TypeAlias = "Generator[str | None, None, None]"  # one a test: None, or why it failed
PROGRAM, CALLS, ASSERTS = "program", "calls", "asserts"


@dataclass(frozen=True)
class Task:
    """One program and what it is tested with; plain JSON values throughout.

    ``kind`` decides what ``tests`` holds:
        program: ``{"input": str, "output": str}``, standard input and output
        calls: ``{"args": [...], "kwargs": {...}, "expected": value}`` of ``entry_point``
        asserts: Python statements, each one test, in order and in one namespace
    """

    kind: str
    program: str
    tests: Sequence[Any]
    entry_point: str | None = None
    setup: str = ""  # trusted code that assert-style tests may use


@dataclass(frozen=True)
class Grade:
    """How many of a task's tests passed, and why the first one that did not failed."""

    passed: int
    total: int
    reason: str = ""


class Grader(Protocol):
    """Grades tasks; several threads may call it at once. A fault of its own raises SandboxFault."""

    def grade(self, task: Task, limits: Limits, partial: bool = False) -> Grade: ...


@dataclass(frozen=True)
class LocalGrader:
    """Grades in sandboxes on this machine.

    ``program`` and ``calls`` start a process per test; ``asserts`` one for the tests and one for the candidate.
    """

    sandbox: Sandbox

    def grade(self, task: Task, limits: Limits, partial: bool = False) -> Grade:
        """Run the tests up to the first that fails, or all of them when ``partial``.

        Raises:
            SandboxFault: a sandbox did not start, or the tests themselves cannot run.
        """
        passed, reason = 0, ""
        with closing(KINDS[task.kind](self.sandbox, task, limits)) as failures:
            for failure in failures:
                passed += failure is None
                reason = reason or failure or ""
                if failure and not partial:
                    break
        return Grade(passed, len(task.tests), reason)


def task_from(program: str, tests: Any, entry_point: str | None = None, setup: str = "") -> Task:
    """The task that a row of a data set describes; ``tests`` as in the columns of ``Code``, a JSON string of it too.

    Raises:
        ValueError: says what is wrong with the tests.
    """
    if isinstance(tests, str) and tests.lstrip()[:1] in ("[", "{"):
        tests = json.loads(tests)
    if isinstance(tests, str):
        tests = [tests]
    if not isinstance(tests, (list, tuple)) or not tests:
        raise ValueError(
            f"tests should be a list or a string of Python, got {type(tests).__name__} {str(tests)[:60]!r}"
        )
    if all(isinstance(test, str) for test in tests):
        return Task(ASSERTS, program, _statements(tests), entry_point, setup)
    if all(isinstance(test, dict) and {"input", "output"} <= test.keys() for test in tests):
        return Task(PROGRAM, program, list(tests))
    if all(isinstance(test, dict) and "expected" in test for test in tests):
        if not entry_point:
            raise ValueError("tests with `expected` need a column `entry_point`, the function to call")
        return Task(CALLS, program, list(tests), entry_point)
    raise ValueError(
        "tests should all be Python strings, or all {input, output}, or all {args, expected}; got " + str(tests)[:80]
    )


def _statements(tests: Sequence[str]) -> list[str]:
    """Test code, and a last test that calls ``check(candidate)`` where it only defines ``check``, as in HumanEval."""
    tests = list(tests)
    trees = [ast.parse(test) for test in tests]
    defined = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    if "check" in defined and not any(_calls(tree, "check") for tree in trees):
        return ["\n".join([*tests, "check(candidate)"])]
    return tests


def _calls(tree: ast.Module, name: str) -> bool:
    names = (n.value.func for n in tree.body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call))
    return any(isinstance(n, ast.Name) and n.id == name for n in names)


# ---------------------------------------------------------------------------------------------------- the three kinds


def _run_program(sandbox: Sandbox, task: Task, limits: Limits) -> Failures:
    for test in task.tests:
        try:
            with sandbox.start({"role": "program", "source": task.program}, limits) as guest:
                guest.send_input(str(test["input"]).encode())
                output = guest.output(time.monotonic() + limits.timeout).decode(errors="replace")
            yield None if _lines(output) == _lines(str(test["output"])) else f"wrong output {output[:80]!r}"
        except Failed as failure:
            yield str(failure)


def _lines(text: str) -> list[str]:
    """Lines without the spaces at their ends, and without empty ones at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _run_calls(sandbox: Sandbox, task: Task, limits: Limits) -> Failures:
    for test in task.tests:
        try:
            with sandbox.start({"role": "call", "source": task.program}, limits) as guest:
                guest.send((task.entry_point, tuple(test.get("args", ())), dict(test.get("kwargs", {}))))
                kind, *got = _message(guest, time.monotonic() + limits.timeout)
            if kind == "value" and len(got) == 1 and wire.same(got[0], test["expected"]):
                yield None
            else:
                yield f"{'wrong result' if kind == 'value' else kind} {_shown(got)}"
        except Failed as failure:
            yield str(failure)


def _shown(values: list[Any]) -> str:
    try:
        return ": ".join(map(str, values))[:80]
    except (ValueError, RecursionError):  # Python writes no integer of more than 4,300 digits
        return f"of type {type(values[0]).__name__}"


def _run_asserts(sandbox: Sandbox, task: Task, limits: Limits) -> Failures:
    """The tests run in one sandbox, the candidate in another; between them pass calls and plain values, through here.

    One deadline for all of it. When either side breaks, nothing more can pass.
    """
    job = {"role": "tests", "setup": task.setup, "stand_ins": stand_ins(task), "tests": list(task.tests)}
    left = len(task.tests)
    try:
        with (
            sandbox.start({"role": "call", "source": task.program}, limits) as candidate,
            sandbox.start(job, limits) as tests,
        ):
            deadline = time.monotonic() + limits.timeout
            while left:
                kind, *said = _message(tests, deadline)
                if kind == "call":
                    candidate.send(tuple(said))
                    tests.send(_reply(candidate, deadline))
                    continue
                if kind == "broken":
                    raise SandboxFault(f"the tests cannot run, {_shown(said)}")
                left -= 1
                yield None if kind == "passed" else _shown(said)
    except (Failed, wire.Malformed) as failure:
        yield from [str(failure)] * left


def _reply(candidate: Guest, deadline: float) -> tuple[Any, ...]:
    """What a called candidate answered, once it is sure to be of the form that the tests' side expects."""
    match _message(candidate, deadline):
        case ["value", value]:
            return ("value", value)
        case ["raised", str(name), str(text)]:
            return ("raised", name, text)
    raise Failed("answered with no message")


def _message(guest: Guest, deadline: float) -> list[Any]:
    try:
        return wire.message(guest.line(deadline))
    except wire.Malformed as error:
        raise Failed(f"answered with no message ({error})") from None


def stand_ins(task: Task) -> dict[str, str]:
    """Name in the tests -> function of the candidate that it stands for.

    The entry point, ``candidate`` for it, and every name that the tests use and neither they nor the set-up define.
    """
    trees = [ast.parse(source) for source in (task.setup, *task.tests)]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    used = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    bound = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    bound |= {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    bound |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    bound |= {
        (a.asname or a.name).partition(".")[0]
        for n in nodes
        if isinstance(n, (ast.Import, ast.ImportFrom))
        for a in n.names
    }
    bound |= {n.name for n in nodes if isinstance(n, ast.ExceptHandler) and n.name}
    names = {name: name for name in used - bound - set(dir(builtins))}
    if task.entry_point:
        names |= {task.entry_point: task.entry_point, "candidate": task.entry_point}
    return names


KINDS: dict[str, Callable[[Sandbox, Task, Limits], Failures]] = {
    PROGRAM: _run_program,
    CALLS: _run_calls,
    ASSERTS: _run_asserts,
}
