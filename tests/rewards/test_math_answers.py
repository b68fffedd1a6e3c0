"""The reward `math`: a table of tricky answers with verdicts by hand, and properties of the extraction."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.errors import UserError
from rlhf_fast.rewards import Fault, Math, check_columns, resolve
from rlhf_fast.rewards.math_answers import compare, final_answer

pytest.importorskip("math_verify", reason='needs math-verify: pip install "rlhf-fast[math]"')


@pytest.fixture(scope="module")
def math():
    return Math(workers=1, timeout=20.0)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She has 48 + 24 = 72 clips.\n#### 72", "72"),
        ("#### $1,234.50 \nthank you", "$1,234.50"),
        (r"so \boxed{\frac{1}{2}} of 3", r"\frac{1}{2}"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"#### \boxed{5}", "5"),
        ("7 * 2 = 14\nA: 14", "14"),
        ("The answer is 12.", "12"),
        ("The final answer is: 12, because 3 * 4 = 12.", "12"),
        ("**Answer:** 12 apples", "12 apples"),
        (r"The answer is $\frac{\pi}{2}$. I hope it is correct.", r"\frac{\pi}{2}"),
        ("the answer is (B)", "(B)"),
        ("The answer is 3, no: the answer is 4", "4"),
        ("answer: 3.5", "3.5"),
        ("So the area is $x^2 + 1$.", "x^2 + 1"),
        (r"So \(x = 3\).", "x = 3"),
        ("He pays $5 and she pays $6.", "$6"),
        ("about 3 1/2", "3 1/2"),
        (r"\frac{3}{4} of it, \frac{1}{4} is left", r"\frac{1}{4}"),
        ("It rose by 12%.", "12%"),
        ("minus -7 degrees", "-7"),
        ("no answer at all", None),
        ("", None),
        ("####", None),
        ("####\n5", "5"),
    ],
)
def test_the_final_answer_of_a_text(text, answer):
    assert final_answer(text) == answer


# gold, answer, and whether they are worth the same
TABLE = [
    # numbers
    ("72", "72.0", 1), ("1,000", "1000", 1), ("1000", r"1{,}000", 1), ("72", "72 clips", 1), ("$72", "72", 1), ("72", "€72", 1),
    ("0.5", "1/2", 1), (r"\frac12", "0.5", 1), ("-3", r"-\frac{6}{2}", 1), ("3.5", "3 1/2", 1), ("3.5", r"3\frac{1}{2}", 1),
    (r"\frac{7}{2}", "3 1/2", 1), ("15.5", r"3\frac{1}{2}", 0), ("-5", "5", 0), ("1/3", "0.333", 0), ("72", "73", 0), ("2", "1.8 billion", 0),
    ("5000", r"5 \times 10^3", 1), ("1000000", "10^6", 1), ("1024", "2^{10}", 1), ("6", "3!", 1), ("2", r"\frac{4}{0}", 0),
    # percentages and units
    ("12%", "12", 1), ("12", r"12\%", 1), ("12%", "0.12", 1), ("12%", "1.2", 0), ("5 cm", "5", 1), ("5", r"5 \text{ cm}", 1),
    ("90", r"90^\circ", 1), ("5 cm", "6 cm", 0),
    # roots, expressions, equations
    (r"2\sqrt{2}", r"\sqrt{8}", 1), (r"\frac{\sqrt{3}}{2}", r"\frac{3}{2\sqrt{3}}", 1), ("x^2+2x+1", "(x+1)^2", 1), ("2x", "x+x", 1),
    ("y", "x", 0), ("5", "x = 5", 1), ("x=5", "5", 1), (r"\pi", "3.14", 0), ("x^2", "x^3", 0),
    # intervals, tuples, sets
    ("[1,2)", "[1, 2)", 1), ("[1,2)", "(1,2)", 0), ("[1,2)", "[1,2]", 0), (r"x \in [1,2]", "[1,2]", 1), (r"(-\infty, 3)", "x < 3", 1),
    ("x>3", r"(3,\infty)", 1), (r"(1,2)\cup(3,4)", r"(3,4) \cup (1,2)", 1), ("(1,2)", "(2,1)", 0), ("(3,1)", "(2,1)", 0),
    (r"\left(\frac12, 3\right)", "(0.5, 3)", 1), ("(1,2,3)", "(1,2,4)", 0), (r"\{1,2\}", r"\{2,1\}", 1), ("1, 2", "2, 1", 1),
    (r"\emptyset", r"\{\}", 1), ("1, 2", "1", 0), (r"1 \pm \sqrt{2}", r"1 - \sqrt{2}, 1 + \sqrt{2}", 1),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", 1),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", 0),
    # words, choices, clocks: algebra would read them as products and quotients
    ("Paris", r"\text{Paris}", 1), ("Paris", "pairs", 0), ("yes", "no", 0), ("B", "(B)", 1), ("B", r"\textbf{(B)}", 1), ("B", "B. 12 apples", 1),
    ("B", "(C)", 0), ("A", "72", 0), ("10:30", "10:30", 1), ("10:30", "1:3", 0),
    # more than one answer is none
    ("72", "72, 73", 0), ("72", r"72 \text{ or } 73", 0), ("72", "72 = 73", 0), ("72", r"72} + \boxed{1", 0),
    ("72", "$72$ $73$", 0),
]  # fmt: skip


def test_answers_are_compared_by_value(math):
    """All of the table in one call, so that the worker is started once."""
    golds, answers, _ = zip(*TABLE)
    scores = math(completions=[f"#### {a}" for a in answers], answer=list(golds))
    wrong = [(gold, answer, score) for (gold, answer, want), score in zip(TABLE, scores) if score != want]
    assert not wrong


def test_numbers_and_words_need_no_worker():
    for gold, answer, wanted in [
        ("72", "72.0", 1),
        ("72", "73", 0),
        ("Paris", "paris", 1),
        ("B", "(B)", 1),
        ("1/2", "0.5", 1),
    ]:
        assert compare(gold, answer) == wanted
    assert compare("72", "9" * 1000) == 0.0  # too long to be meant


numbers = st.integers(-(10**9), 10**9) | st.fractions(max_denominator=999) | st.decimals(-(10**6), 10**6, places=3)


@settings(max_examples=200, deadline=None)
@given(number=numbers, other=numbers, words=st.text("abcdefgh ,.!?\n", max_size=40))
def test_every_way_to_write_a_number_is_worth_that_number(number, other, words):
    """Marked, boxed, said or last; with separators, a currency, a unit; as a fraction in LaTeX. And no other number is."""
    value, written = Fraction(number), str(number)
    ways = [
        f"{words}\n#### {written}",
        rf"{words}\boxed{{{written}}} {words}",
        f"{words}\nThe answer is {written}.",
        f"{words} = {written}",
    ]
    if value.denominator == 1 and isinstance(number, int):
        ways += [f"#### {number:,}", f"#### {number} apples", rf"\boxed{{{number}.0}}"]
    elif isinstance(number, Fraction):
        sign = "-" if value < 0 else ""
        ways.append(rf"\boxed{{{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}}}")
    for text in ways:
        assert compare(written, final_answer(text)) == 1.0, text
        assert compare(str(Fraction(other)), final_answer(text)) == float(Fraction(other) == value), text


@settings(max_examples=200, deadline=None)
@given(text=st.text("0123456789#\\boxed{}$()[]answeris:,./%-+ \n=", max_size=200))
def test_any_text_is_read_quickly_and_without_an_error(text):
    found = final_answer(text)
    assert found is None or (found and found == found.strip())
    assert compare("72", found) in (0.0, 1.0, None)


@pytest.mark.parametrize(
    "part", ["1 ", "1,111", "$", "$1", "answer is ", "\\frac{1}", "####", "\\boxed{", "(", "1/", "-", "A:\n", ". "]
)
def test_a_long_text_takes_no_quadratic_time(part):
    """A model may repeat anything up to its limit; 40,000 characters in less than a second, by a wide margin."""
    start = time.process_time()
    compare("72", final_answer(part * (40_000 // len(part))))
    assert time.process_time() - start < 5


def test_what_cannot_be_computed_is_a_fault_and_the_next_answer_is_scored():
    math = Math(workers=1, timeout=1.5)
    assert math(completions=[r"\boxed{x+x}"], answer=["2x"]) == [1.0]
    hung, fine = math(completions=[r"\boxed{9^{9^{9^9}}}", r"\boxed{x+x}"], answer=["72", "2x"])
    assert isinstance(hung, Fault) and fine == 1.0


def test_a_worked_solution_gives_the_answer_where_there_is_no_short_one(math):
    solutions = ["so 3 + 4 = 7\nA: 7", r"hence \boxed{\sqrt{8}}", "nothing here"]
    assert math(completions=["7", r"$2\sqrt{2}$", "1"], answer=[None] * 3, solution=solutions) == [1.0, 1.0, None]
    assert math(completions=["7", "8"], answer=["6 + 1 = 7\n#### 7", None]) == [1.0, None]


def test_it_is_found_by_name_and_says_what_it_needs(monkeypatch):
    reward = resolve({"name": "math", "timeout": 2, "workers": 1})
    with pytest.raises(UserError, match="'math' needs a column 'answer' or 'solution'"):
        check_columns([reward], ["math"], ["text"])
    with pytest.raises(UserError, match="timeout > 0"):
        Math(timeout=0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "rlhf-fast\[math\]"'):
        Math()
