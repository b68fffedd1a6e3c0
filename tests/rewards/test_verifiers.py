"""Built-in rewards on cases worked out by hand."""

from __future__ import annotations

import statistics

import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.rewards import Answer, Exact, Format, Length, Random


def answered(completion, wanted) -> float | None:
    return Answer()(completions=[completion], answer=[wanted])[0]


@pytest.mark.parametrize(
    ("completion", "wanted"),
    [
        ("72", "72"),
        ("so 48 + 24 = 72", "72"),
        ("She sold 24. In all: 72.", "72"),
        ("first 5\n#### 72\n", "72"),
        ("#### 5, no, that is wrong\n#### 72", "72"),
        ("#### 72 clips per day.", "72"),
        ("#### x = 72", "72"),
        ("She paid $72.00", "72"),
        ("#### $1,234.50", "1234.5"),
        ("It costs -$5", "-5"),
        ("$-5", "-5"),
        ("x is \u22125", "-5"),
        ("a range of 3-5", "5"),
        ("10 - 3", "3"),
        ("1,234,567", "1234567"),
        ("the numbers 1,2,3", "3"),
        ("1,2345", "2345"),
        ("one half is 1/2", "0.5"),
        ("0.75", "3/4"),
        ("of 12/4", "3"),
        (r"so \boxed{72}", "72"),
        (r"\boxed{\frac{1}{2}}", "0.5"),
        (r"\boxed{-\dfrac{3}{4}}", "-0.75"),
        (r"\boxed{1{,}000}", "1000"),
        (r"\boxed{12\%}", "12"),
        (r"\boxed{x^{2}}", "x^{2}"),
        ("#### 72", "48/2 = 24 and\n48 + 24 = 72\n#### 72"),
        ("007", "7"),
        ("1e3", "1000"),
        ("#### Paris.", "paris"),
        ("  Paris ", "paris"),
        ("#### (1, 2)", "(1,2)"),
        ("72", 72),
        ("0.5", 0.5),
        ([{"role": "assistant", "content": "it is 72"}], "72"),
    ],
)
def test_a_right_answer_scores_1(completion, wanted):
    assert answered(completion, wanted) == 1.0


@pytest.mark.parametrize(
    ("completion", "wanted"),
    [
        ("72.5", "72"),
        ("#### 73 72", "72"),
        ("72 is wrong, it is 73", "72"),
        ("#### 73\nor 72", "73 or 72"),
        ("72\n####", "72"),
        ("", "72"),
        ("no number", "72"),
        ("5", "-5"),
        ("0.333", "1/3"),
        ("3/0", "0"),
        ("1,23", "123"),
        (r"\boxed{x^2}", "x^3"),
        (r"\boxed{2y}", "2"),
        ("The capital is Paris", "paris"),
        ("9" * 5000, "72"),
        ("1e99999999", "72"),
    ],
)
def test_a_wrong_answer_scores_0(completion, wanted):
    assert answered(completion, wanted) == 0.0


def test_a_row_without_an_answer_is_not_scored():
    assert Answer()(completions=["72", "72"], answer=[None, "72"]) == [None, 1.0]


def test_a_worked_solution_gives_the_answer_where_there_is_no_short_one():
    """Its last number, unless it marks the answer; the column `answer` goes first."""
    solutions = ["48/2 = 24, so 72 in all.", "x is 5, so \\boxed{6} of 7", "about 10"]
    assert Answer()(completions=["72", "6", "9"], answer=[None, None, "9"], solution=solutions) == [1.0, 1.0, 1.0]


def test_exact_compares_the_whole_text():
    scores = Exact()(
        completions=[" 72\n", "72.0", [{"role": "assistant", "content": "72"}], "x"], answer=["72", "72", 72, None]
    )
    assert scores == [1.0, 0.0, 1.0, None]


def test_format_wants_an_answer_at_the_end_unless_told_otherwise():
    texts = ["so\n#### 72", "#### -1,234.5 \n", "#### 72 clips", "72"]
    assert Format()(completions=texts) == [1.0, 1.0, 0.0, 0.0]
    assert Format(pattern="clips")(completions=texts) == [0.0, 0.0, 1.0, 0.0]
    with pytest.raises(UserError, match="regular expression"):
        Format(pattern="(")


def test_length_falls_linearly_outside_its_bounds():
    """max 8, min 2, slack 4: 10 tokens are 2 over, so 1 - 2/4; 0 tokens are 2 under."""
    tokens = [[0] * count for count in (0, 2, 8, 10, 12, 99)]
    assert Length(max=8, min=2, slack=4)(completion_ids=tokens) == [0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    assert Length(max=8)(completion_ids=[[0] * 9]) == [0.5]  # a quarter of max: 2 tokens of slack
    assert Length(max=8, slack=0)(completion_ids=[[0] * 9]) == [0.0]
    with pytest.raises(UserError, match="min <= max"):
        Length(max=2, min=3)


def test_random_has_nothing_to_do_with_the_completion_and_can_be_seeded():
    scores = Random(seed=3)(completions=["same"] * 2000)
    assert Random(seed=3)(completions=["other"] * 2000) == scores
    assert abs(statistics.mean(scores) - 0.5) < 0.05 and len(set(scores)) > 1900
    torch.manual_seed(5)
    first = Random()(completions=["a"])
    torch.manual_seed(5)
    assert Random()(completions=["b"]) == first
