"""The reward ``code``: does the program in a completion pass its row's tests?"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from rlhf_fast.errors import UserError
from rlhf_fast.rewards.faults import Fault
from rlhf_fast.rewards.grading import Grader, LocalGrader, Task, task_from
from rlhf_fast.rewards.remote import RemoteGrader
from rlhf_fast.rewards.sandbox import Bwrap, Docker, Limits, SandboxFault, check_sandbox
from rlhf_fast.rewards.verifiers import text_of

FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


class Code:
    """1 when a completion's program passes all its tests, else 0; None for rows without tests. Python, standard library only.

    The program is the last fenced block of the completion, else all of it; a prompt that is itself Python and defines
    ``entry_point`` (HumanEval) goes before it. The column ``tests`` (or ``test``) holds, as JSON or as a string of JSON,
        Python with asserts: a string or a list of them; ``check(candidate)`` is called where it is only defined;
        ``[{"input": "1 2", "output": "3"}]``: standard input and output;
        ``[{"args": [1, 2], "kwargs": {}, "expected": 3}]``: calls of the function in the column ``entry_point``.
    Results are compared strictly: types count (a tuple is no list), floats to 1e-9. Tests never enter the sandbox of the program;
    see :mod:`rlhf_fast.rewards.grading`.

    Args:
        sandbox: ``bwrap``; ``docker`` or ``docker:IMAGE``; or the URL of a machine that runs ``rlhf-fast code-runner``.
        timeout: seconds for a run: one test, or all asserts of a row.
        memory_mb: address space of a run.
        partial: score the share of tests that pass.
        workers: runs at a time; None: one per core.
        python: interpreter inside bwrap; None: the one that runs this, see :class:`Bwrap`.
    Raises:
        UserError: the sandbox is missing, or fails its self-test. Nothing else is tried in its place.
    """

    needs_one_of: ClassVar[tuple[str, ...]] = ("tests", "test")

    def __init__(
        self,
        sandbox: str = "bwrap",
        *,
        timeout: float = 5.0,
        memory_mb: int = 512,
        partial: bool = False,
        workers: int | None = None,
        python: str | None = None,
    ) -> None:
        if not timeout > 0 or memory_mb < 64 or (workers is not None and workers < 1):
            raise UserError(
                f"reward 'code': needs timeout > 0, memory_mb >= 64 and workers >= 1, got {timeout}, {memory_mb}, {workers}."
            )
        self.limits = Limits(timeout=timeout, memory_mb=memory_mb)
        self.partial = partial
        self.grader = _grader(sandbox, python, self.limits)
        self._threads = ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)), "code-reward")

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        tests: Sequence[Any] | None = None,
        test: Sequence[Any] | None = None,
        entry_point: Sequence[Any] | None = None,
        **_: Any,
    ) -> list[float | Fault | None]:
        """Scores of B completions, all cores at work."""
        none = [None] * len(completions)
        wanted = [a if a is not None else b for a, b in zip(tests or none, test or none)]
        return list(self._threads.map(self._score, prompts, completions, wanted, entry_point or none))

    def _score(self, prompt: Any, completion: Any, tests: Any, entry_point: str | None) -> float | Fault | None:
        if tests is None:
            return None
        try:
            task = _task(prompt, text_of(completion), tests, entry_point)
        except (ValueError, TypeError, SyntaxError) as error:
            return Fault(f"cannot read a row's tests: {error}")
        try:
            grade = self.grader.grade(task, self.limits, self.partial)
        except SandboxFault as fault:
            return Fault(f"could not run: {fault}")
        return grade.passed / grade.total if self.partial else float(grade.passed == grade.total)


def program_of(completion: str) -> str:
    """The last fenced block of a text, closed or not, else the text."""
    blocks = FENCED.findall(completion)
    return blocks[-1] if blocks else completion


def _task(prompt: Any, completion: str, tests: Any, entry_point: str | None) -> Task:
    program = program_of(completion)
    if not (isinstance(prompt, str) and entry_point and _defines(prompt, entry_point)):
        return task_from(program, tests, entry_point)
    return task_from(f"{prompt}{program}", tests, entry_point, setup=prompt)


def _defines(source: str, name: str) -> bool:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body)


def _grader(sandbox: str, python: str | None, limits: Limits) -> Grader:
    if python is not None and sandbox != "bwrap":
        raise UserError(f"reward 'code': `python` chooses the interpreter of sandbox 'bwrap' only, not of {sandbox!r}.")
    if sandbox.startswith(("http://", "https://")):
        return RemoteGrader(sandbox)
    name, _, image = sandbox.partition(":")
    if name == "bwrap" and not image:
        local = Bwrap(python)
    elif name == "docker":
        local = Docker(image) if image else Docker()
    else:
        raise UserError(f"reward 'code': sandbox is 'bwrap', 'docker', 'docker:IMAGE' or a URL, got {sandbox!r}.")
    check_sandbox(local, limits)
    return LocalGrader(local)
