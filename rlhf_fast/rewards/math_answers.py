r"""The reward ``math``: is a completion's final answer worth the same as its row's?

What numbers and words can settle is settled here and exactly. The rest, from `\frac{\sqrt{3}}{2}` to unions of intervals,
goes to math-verify (https://github.com/huggingface/Math-Verify) in a process that may be killed.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

from rlhf_fast.errors import UserError
from rlhf_fast.rewards.faults import Fault
from rlhf_fast.rewards.verifiers import NUMBER, bare_answer, marked_answer, text_of
from rlhf_fast.rewards.workers import WorkerPool

WORKER = Path(__file__).with_name("math_worker.py")
LONGEST_ANSWER = 500  # characters; nobody means a longer one, and SymPy would read it for minutes
# "the answer is 5.", "**Answer:** 5", and "A: 5" on a line of its own
SAID = re.compile(r"(?:\banswer\b[*_\s]*(?:is\b[*_\s]*:?|[:=])|^\s*A:)[*_\s]*(?=\S)", re.IGNORECASE | re.MULTILINE)
SENTENCE_END = re.compile(r"[.,;]\**\s+(?=[A-Za-z])|[.;]?[*\s]*\Z")
FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$([^$\n]+)(?<!\\)\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
MIXED = re.compile(r"(?<![\d/.^{])(\d+)\s+(\d+)/(\d+)(?![\d/])")  # 3 1/2
LAST_NUMBER = re.compile(
    rf"[-\u2212]?\\[dt]?frac\{{\d+\}}\{{\d+\}}|(?:\d+\s+(?=\d+/\d))?{NUMBER.pattern}(?:\s*\\?%)?", re.ASCII
)
CHOICE = re.compile(r"\(?(?P<letter>[A-J])\)?(?:[.):].*)?", re.DOTALL)  # B, (B), B. 12 apples
WORDS = re.compile(r"(?=.*[A-Za-z]{3})[A-Za-z][A-Za-z .,'-]*")  # algebra would read Paris as P*a*r*i*s
CLOCK = re.compile(r"\d{1,2}:\d\d(?::\d\d)?(?:\s*[AaPp]\.?[Mm]\.?)?")
TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\{([^{}]*)\}")


class Math:
    r"""1 when the final answer of a completion is worth the same as its row's, else 0; None for rows without one.

    A row's answer is its column ``answer``, bare or in a worked text that marks it, else that of its column ``solution``. An answer
    is what follows the last ``####``, else what the last ``\boxed{}`` holds, else what follows the last "answer is" (or ``A:``), else
    the last formula or number. Numbers, fractions, percentages (12% is 12 and 0.12), expressions, equations, intervals, tuples,
    sets (in any order) and matrices are compared by value; units are read over; words and choices (``(B)``) as text.
    What could not be compared, in time or at all, is a fault and no score.

    Args:
        timeout: seconds for one comparison.
        workers: processes that compare; None: one per core. They start when the first answer needs one.
    Raises:
        UserError: math-verify is not installed.
    """

    needs_one_of: ClassVar[tuple[str, ...]] = ("answer", "solution")

    def __init__(self, *, timeout: float = 5.0, workers: int | None = None) -> None:
        if not timeout > 0 or (workers is not None and workers < 1):
            raise UserError(f"reward 'math': needs timeout > 0 and workers >= 1, got {timeout} and {workers}.")
        if importlib.util.find_spec("math_verify") is None:
            raise UserError(
                "reward 'math' needs math-verify: pip install \"rlhf-fast[math]\" (reward `answer` needs nothing)."
            )
        self._pool = WorkerPool(WORKER, workers, timeout)

    def __call__(
        self,
        completions: Sequence[Any],
        answer: Sequence[Any] | None = None,
        solution: Sequence[Any] | None = None,
        **_: Any,
    ) -> list[float | Fault | None]:
        """Scores of B completions."""
        none = [None] * len(completions)
        scores: list[float | Fault | None] = []
        hard: list[tuple[int, tuple[str, str]]] = []  # sample and the two answers that a worker has to compare
        for i, (completion, short, worked) in enumerate(zip(completions, answer or none, solution or none)):
            wanted = wanted_answer(short, worked)
            found = final_answer(text_of(completion))
            scores.append(None if wanted is None else compare(wanted, found))
            if wanted is not None and scores[-1] is None:
                hard.append((i, (_latex(wanted), _latex(found))))
        for (i, _), outcome in zip(hard, self._pool.map(pair for _, pair in hard)):
            scores[i] = _score(outcome)
        return scores


def wanted_answer(short: Any, worked: Any) -> str | None:
    """A row's answer: the short one, less what surrounds its mark; else the worked one's final answer."""
    if short is not None:
        text = str(short)
        marked = marked_answer(text)
        return (text if marked is None else marked).strip() or None
    return None if worked is None else final_answer(str(worked))


def final_answer(text: str) -> str | None:
    """What a text says in the end, or None."""
    marked = marked_answer(text)
    if marked is not None:
        inner = marked_answer(marked)  # `#### \boxed{5}`
        return (marked if inner is None else inner).strip() or None
    if said := _last(SAID, text):
        answer = text[said.end() :].partition("\n")[0]
        if formula := FORMULA.match(answer):
            return _inside(formula)
        return answer[: SENTENCE_END.search(answer).start()].strip() or None
    formula, number = _last(FORMULA, text), _last(LAST_NUMBER, text)
    if formula and (number is None or number.end() <= formula.end()):
        return _inside(formula)
    return number and number[0].strip()


def compare(wanted: str, found: str | None) -> float | None:
    """1 or 0 where numbers or words settle it, else None: only algebra can tell."""
    if found is None or len(found) > LONGEST_ANSWER or not _one_expression(found):
        return 0.0
    wanted, found = (TEXT.sub(r"\1", text).strip("$€£¥₹₩* ") for text in (wanted, found))
    if choice := CHOICE.fullmatch(wanted):
        given = CHOICE.fullmatch(found.upper())
        return float(given is not None and given["letter"] == choice["letter"])
    ours, theirs = bare_answer(wanted), bare_answer(found)
    if ours == theirs:
        return 1.0
    exact = isinstance(ours, Fraction) and isinstance(theirs, Fraction) and "%" not in wanted + found
    return 0.0 if exact or CLOCK.fullmatch(wanted) or WORDS.fullmatch(wanted) or WORDS.fullmatch(found) else None


def _one_expression(text: str) -> bool:
    """Whether braces balance and no box is inside, so that the answer stays one when it is put into a box."""
    depth = 0
    for character in text:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth < 0:
            return False
    return depth == 0 and r"\boxed" not in text and r"\fbox" not in text


def _latex(text: str) -> str:
    r"""An answer as math-verify reads it: 3 1/2 as 3\frac{1}{2}, no dollars, no full stop."""
    return MIXED.sub(r"\1\\frac{\2}{\3}", text.strip().strip("$").rstrip("."))


def _score(outcome: Any) -> float | Fault:
    if isinstance(outcome, Fault):
        return outcome
    return Fault(f"could not compare: {outcome['fault']}") if "fault" in outcome else float(outcome["equal"])


def _inside(formula: re.Match[str]) -> str:
    return next(group for group in formula.groups() if group is not None).strip()


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    match = None
    for match in pattern.finditer(text):
        pass
    return match
