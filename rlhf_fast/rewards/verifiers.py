"""Built-in rewards that need no model: answers, formats, lengths, and the random control.

Each is a small callable object, so that its parameters are named where it is made: ``Length(max=64)``, or in YAML
``{name: length, max: 64}``. Scores lie in [0, 1].
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch

from rlhf_fast.errors import UserError

# a sign counts only where it cannot be a subtraction or a range; digits may be grouped by commas in threes; the
# exponent has at most two digits, because a model may write any number and it is compared exactly
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}])[-+\u2212])?\$?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\w)\.\d+)"
    r"(?P<exponent>[eE][-+]?\d{1,2}(?!\d))?"
    r"(?:/(?P<denominator>\d+)(?!\d|/|\.\d))?",
    re.ASCII,
)
# what may stand around a number that is the whole answer: `x =`, a unit, a full stop
ALONE = re.compile(rf"\s*(?:[A-Za-z]\w*\s*=\s*)?{NUMBER.pattern}(?:\s*[%°]|\s+[A-Za-z][A-Za-z /]*)?\s*\.?\s*", re.ASCII)
LONGEST_NUMBER = 100  # characters; longer ones are no answer anybody meant
LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
BEFORE_FRACTION = re.compile(r"(?<=\d)(?=\\[dt]?frac\{)")  # of a mixed number
LATEX_NOISE = re.compile(r"\\(?:left|right|!|,|;|:|\s)|\\text\{([^{}]*)\}|(?<=\d)\{,\}(?=\d)|\\(?=[$%])")


@dataclass(frozen=True)
class Answer:
    r"""1 when the final answer of a completion is that of its row, else 0; None where the row has none.

    A row's answer is in the column ``answer`` (bare, or a worked text that marks it) or, worked, in ``solution``. A completion's
    is what follows its last ``####``, else its last ``\boxed{}``, else its last number. Numbers are compared exactly and by
    value (72 = 72.0 = $72. and 1,000 = 1000 and 1/2 = 0.5); other answers as text, without case and spaces.
    """

    needs_one_of: ClassVar[tuple[str, ...]] = ("answer", "solution")

    def __call__(
        self,
        completions: Sequence[Any],
        answer: Sequence[Any] | None = None,
        solution: Sequence[Any] | None = None,
        **_: Any,
    ) -> list[float | None]:
        rows = len(completions)
        scores: list[float | None] = []
        for completion, short, worked in zip(completions, answer or [None] * rows, solution or [None] * rows):
            wanted = worked_answer(str(worked)) if short is None else bare_answer(str(short))
            known = (short is not None or worked is not None) and wanted is not None
            scores.append(float(answers_with(text_of(completion), wanted)) if known else None)
        return scores


@dataclass(frozen=True)
class Exact:
    """1 when a completion is its row's ``answer`` to the letter, spaces around both left out, else 0."""

    def __call__(self, completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float | None]:
        return [
            None if wanted is None else float(text_of(completion).strip() == str(wanted).strip())
            for completion, wanted in zip(completions, answer)
        ]


@dataclass(frozen=True)
class Format:
    """1 when ``pattern`` is found in a completion, else 0. The default wants ``#### number`` as its end.

    Raises:
        UserError: the pattern is no regular expression.
    """

    pattern: str = r"####\s*-?\$?\d[\d,]*(?:\.\d+)?\s*\Z"

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(f"reward 'format': {self.pattern!r} is no regular expression: {error}.") from None

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        return [float(re.search(self.pattern, text_of(c)) is not None) for c in completions]


@dataclass(frozen=True)
class Length:
    """1 while a completion has ``min`` to ``max`` tokens (EOS included), falling linearly to 0 over ``slack`` tokens outside.

    Raises:
        UserError: the bounds are out of order.
    """

    max: int
    _: KW_ONLY
    min: int = 0
    slack: int | None = None  # tokens; None: a quarter of max

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.max or (self.slack is not None and self.slack < 0):
            raise UserError(
                f"reward 'length': needs 0 <= min <= max and slack >= 0, got min {self.min}, max {self.max}, slack {self.slack}."
            )

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        slack = self.max / 4 if self.slack is None else self.slack
        scores = []
        for ids in completion_ids:
            outside = max(len(ids) - self.max, self.min - len(ids), 0)
            scores.append(1.0 if outside == 0 else max(0.0, 1 - outside / slack) if slack else 0.0)
        return scores


@dataclass
class Random:
    """A uniform score that has nothing to do with the completion: the control that must teach a policy nothing.

    Without a seed it draws from torch's global generator, which a run seeds and its checkpoints restore.
    """

    seed: int | None = None

    def __post_init__(self) -> None:
        self._generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        return torch.rand(len(completions), generator=self._generator).tolist()


# ---------------------------------------------------------------------------------------------------- final answers


def text_of(completion: Any) -> str:
    """A completion's text: the string itself, or what its messages say."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message.get("content") or "") for message in completion)


def bare_answer(text: str) -> Fraction | str | None:
    """The answer in a data set's ``answer`` column: what is marked in it, else the whole of it."""
    marked = marked_answer(text)
    return _value(text if marked is None else marked)


def worked_answer(text: str) -> Fraction | str | None:
    """The answer of a worked solution: what is marked in it, else its last number, else the whole of it."""
    marked = marked_answer(text)
    if marked is not None:
        return _value(marked)
    number = last_number(text)
    return _value(text) if number is None else number


def answers_with(text: str, wanted: Fraction | str) -> bool:
    """Whether a completion's final answer is ``wanted``."""
    marked = marked_answer(text)
    if marked is not None:
        return _value(marked) == wanted
    return (last_number(text) if isinstance(wanted, Fraction) else _value(text)) == wanted


def marked_answer(text: str) -> str | None:
    r"""What follows the last ``####`` on its line, else what the last ``\boxed{}`` holds, else None."""
    _, mark, rest = text.rpartition("####")
    if mark:
        return rest.strip().partition("\n")[0]
    _, mark, rest = text.rpartition(r"\boxed{")
    if not mark:
        return None
    depth = 1
    for i, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:i]
    return rest


def last_number(text: str) -> Fraction | None:
    """The last number in a text, by value."""
    last = None
    for last in NUMBER.finditer(_plain(text)):
        pass
    return None if last is None else _fraction(last)


def _value(text: str) -> Fraction | str | None:
    """A number when the text is one (a unit may follow), else the text without case and spaces; None when empty."""
    text = _plain(text)
    match = ALONE.fullmatch(text)
    if match and (number := _fraction(match)) is not None:
        return number
    return "".join(text.split()).strip("$.").casefold() or None


def _plain(text: str) -> str:
    """LaTeX's fractions as a/b, without its spacing and escapes."""
    return LATEX_NOISE.sub(r"\1", LATEX_FRACTION.sub(r"\1/\2", BEFORE_FRACTION.sub(" ", text)))


def _fraction(match: re.Match[str]) -> Fraction | None:
    denominator = match["denominator"] or "1"
    if len(match[0]) > LONGEST_NUMBER or not int(denominator):
        return None
    value = Fraction(match["digits"].replace(",", "") + (match["exponent"] or "")) / int(denominator)
    return -value if match["sign"] in ("-", "\u2212") else value
