"""The tasks mean what they say: answers right, held-out rows new, noise as large as asked."""

import re

import pytest

from rlhf_fast.data.formats import final_answer, normalise
from rlhf_fast.data.tasks import addition, preferences, quality, word_problems
from rlhf_fast.errors import UserError


def operands(row):
    return tuple(int(n) for n in re.fullmatch(r"(\d+)\+(\d+)=", row["prompt"]).groups())


def test_sums_are_right_and_held_out_ones_are_new_in_either_order():
    train, held_out = addition(3000, held_out=500, seed=1)
    assert (len(train), len(held_out)) == (3000, 500)
    assert all(
        int(row["answer"]) == sum(operands(row)) and row["completion"] == row["answer"] for row in train + held_out
    )
    assert len({operands(row) for row in train + held_out}) == 3500
    assert not {frozenset(operands(row)) for row in train} & {frozenset(operands(row)) for row in held_out}


def test_number_formats_of_sums():
    train, _ = addition(50, held_out=10, low=0, high=20, reverse=True, width=2)
    for row in train:
        assert re.fullmatch(r"\d\d\+\d\d=", row["prompt"]) and len(row["answer"]) == 3
        assert int(row["answer"][::-1]) == sum(operands(row))


def test_tasks_depend_on_the_seed_alone():
    for task in (addition, preferences, word_problems):
        assert task(50, held_out=20, seed=1) == task(50, held_out=20, seed=1) != task(50, held_out=20, seed=2)


def test_the_whole_range_can_be_used():
    for held_out in range(1, 8):
        train, test = addition(16 - held_out - 1, held_out=held_out, low=0, high=3)
        assert len(test) == held_out and len(train) == 15 - held_out
        assert not {frozenset(operands(row)) for row in train} & {frozenset(operands(row)) for row in test}
    with pytest.raises(UserError, match="Operands 0 to 3 make 16 sums"):
        addition(10, held_out=7, high=3)


@pytest.mark.parametrize(
    ("response", "expected"),
    [("46", 4), ("46 46", 3), ("47", 2), ("47 47 47", 1), ("4+6", 0), ("", 0), ("46 ", 0), ("47 46", 1)],
)
def test_quality_by_hand(response, expected):
    assert quality(response, "46") == expected


def test_held_out_preferences_are_true_and_a_tenth_of_the_training_labels_is_false():
    train, held_out = preferences(4000, held_out=500, noise=0.1)
    assert all(row["quality"][0] > row["quality"][1] for row in held_out)
    false = sum(row["quality"][0] < row["quality"][1] for row in train) / 4000
    assert 0.08 < false < 0.12  # 4 standard errors of 10% in 4000 draws
    assert normalise(train, "preferences")[0]["responses"] == [train[0]["chosen"], train[0]["rejected"]]


def test_rankings_agree_with_the_qualities_they_carry():
    train, held_out = preferences(500, held_out=100, k=4, noise=0.0)
    for row in train + held_out:
        assert [quality(r, row["answer"]) for r in row["responses"]] == row["quality"]
        best_first = sorted(range(4), key=lambda i: row["ranking"][i])
        assert sorted(row["quality"], reverse=True) == [row["quality"][i] for i in best_first]
    assert len({tuple(row["ranking"]) for row in train}) == 24  # a response's place says nothing
    assert normalise(train, "preferences")[0]["prompt"] == train[0]["prompt"]


def test_only_the_kinds_asked_for_occur():
    train, _ = preferences(200, held_out=10, kinds=("correct", "wrong"), noise=0.0)
    assert {tuple(row["quality"]) for row in train} == {(4.0, 2.0)}
    # a wrong answer is as long as the right one
    assert all(len(row["chosen"]) == len(row["rejected"]) for row in train)
    with pytest.raises(UserError, match="at least as many kinds"):
        preferences(10, k=3, kinds=("correct", "wrong"))
    with pytest.raises(UserError, match="at least as many kinds"):
        preferences(10, kinds=("correct", "nonsense"))


def test_word_problems_are_solved_rightly_step_by_step():
    train, _ = word_problems(1000, held_out=200)
    for row in train:
        *lines, last = row["completion"].split("\n")
        assert len(lines) == row["steps"] and last == f"#### {row['answer']}" and row["prompt"].endswith("?\n")
        value = None
        for line in lines:
            a, op, b, result = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", line).groups()
            assert value is None or int(a) == value
            value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[op]
            assert value == int(result)
        assert str(value) == row["answer"] == final_answer(row["completion"])
        # every number of the calculation stands in the words
        numbers = re.findall(r"\d+", row["prompt"])
        assert numbers == [re.match(r"\d+", lines[0])[0], *(re.search(r"[-+*](\d+)=", line)[1] for line in lines)]


def test_no_calculation_of_a_held_out_word_problem_was_trained():
    def calculation(row):
        return row["completion"]

    train, held_out = word_problems(2000, held_out=300, steps=(1, 2))
    assert not {calculation(r) for r in train} & {calculation(r) for r in held_out}
    assert len({calculation(r) for r in held_out}) == 300 and len({r["prompt"] for r in train}) == 2000
    assert {r["steps"] for r in train} == {1, 2}


def test_word_problems_stay_in_their_bounds():
    train, _ = word_problems(500, held_out=50, steps=(3,), high=9, max_value=30, operations="+-")
    numbers = [int(n) for row in train for n in re.findall(r"\d+", row["completion"])]
    assert max(numbers) <= 30 and not any("*" in row["completion"] for row in train)
    with pytest.raises(UserError, match="different word problems can be made this way, not 500"):
        word_problems(10, held_out=500, steps=(1,), high=2)
    with pytest.raises(UserError, match="operations out of"):
        word_problems(10, operations="/")
