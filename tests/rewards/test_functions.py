"""Reward functions by name, and faults that never become scores."""

from __future__ import annotations

import asyncio
import functools
import math
import time

import numpy as np
import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.rewards import Answer, Length, check_columns, resolve, resolve_all, score

TEXTS = ["a", "bb", "ccc"]


def run(*functions, **columns):
    names = [getattr(f, "__name__", "f") for f in functions]
    return score(functions, names, ["p"] * 3, TEXTS, [[1], [1, 2], [1, 2, 3]], columns)


def test_a_spec_is_a_name_a_mapping_json_a_dotted_path_or_the_function_itself():
    assert resolve("answer") == Answer()
    assert resolve({"name": "length", "max": 64}) == Length(max=64)
    assert resolve('{"name": "length", "max": 64, "min": 2}') == Length(max=64, min=2)
    assert resolve("math:sqrt") is math.sqrt
    assert resolve(len) is len


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("anwser", "Did you mean 'answer'"),
        ("nothing_like_it", "Built in: answer"),
        ({"name": "length", "maximum": 3}, "no parameter 'maximum'; it has max"),
        ("length", "needs a value for `max`"),
        ({"max": 3}, "needs a `name`"),
        ('{"name": "length", "max": }', "not valid JSON"),
        ("no_such_module:f", "cannot import 'no_such_module'"),
        ("math:sqrr", "Did you mean 'sqrt'"),
        (7, "got int 7"),
    ],
)
def test_a_wrong_spec_is_told_what_is_wrong(spec, told):
    with pytest.raises(UserError) as error:
        resolve(spec)
    assert told in str(error.value)


def test_a_function_is_found_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_of_this_test.py").write_text("def short(completions, **columns):\n    return [1.0]\n")
    (tmp_path / "broken_rewards_of_this_test.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    assert resolve("my_rewards_of_this_test:short")(completions=["x"]) == [1.0]
    with pytest.raises(UserError, match="ZeroDivisionError"):
        resolve("broken_rewards_of_this_test:short")


def test_names_for_metrics_are_those_of_the_functions_and_distinct():
    def mine(completions):
        return completions

    specs = ["answer", {"name": "length", "max": 3}, {"name": "length", "max": 9}, mine, functools.partial(mine)]
    assert resolve_all(specs)[1] == ["answer", "length", "length_2", "mine", "mine_2"]
    assert resolve_all("answer")[1] == ["answer"]


def test_functions_get_the_columns_they_accept_as_lists_of_their_own():
    def picky(completions, level):
        completions.clear()  # spoils nobody else's
        return [float(x) for x in level]

    def everything(**columns):
        assert columns["completions"] == ["a", "bb", "ccc"]
        return [float(len(columns))] * 3

    table = run(picky, everything, level=(1, 2, 3), other="xyz")
    assert table.values.tolist() == [[1, 5], [2, 5], [3, 5]]
    assert not table.faults and not table.messages


def test_none_is_no_fault_and_numpy_and_torch_results_are_fine():
    def declines(completions):
        return [None, True, np.float32(0.5)]

    def array(completions):
        return np.array([1.0, 2.0, 3.0])

    def tensor(completions):
        return torch.tensor([1, 2, 3])

    table = run(declines, array, tensor)
    assert table.values.isnan().sum() == 1 and not table.faults
    assert table.values.nan_to_num(-1).tolist() == [[-1, 1, 1], [1, 2, 2], [0.5, 3, 3]]


FAULTS = {
    "raises": (lambda completions: 1 / 0, "ZeroDivisionError", [0, 1, 2]),
    "short": (lambda completions: [1.0], "1 scores for 3 samples", [0, 1, 2]),
    "no_list": (lambda completions: 1.0, "returned float where a list", [0, 1, 2]),
    "nothing": (lambda completions: None, "returned NoneType", [0, 1, 2]),
    "text": (lambda completions: "abc", "returned str", [0, 1, 2]),
    "nan": (lambda completions: [1.0, math.nan, 1.0], "returned nan", [1]),
    "inf": (lambda completions: [1.0, 1.0, -math.inf], "returned -inf", [2]),
    "too_big": (lambda completions: [1e300, 1.0, 10**400], "returned 1e+300", [0, 2]),
    "words": (lambda completions: ["0.5", 1.0, [1.0]], "returned str '0.5'", [0, 2]),
    "vector": (lambda completions: torch.ones(3, 2), "returned list", [0, 1, 2]),
    "missing": (lambda completions, level: [1.0] * 3, "needs a column 'level'", [0, 1, 2]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_masks_the_samples_concerned_and_is_told(fault):
    function, told, masked = FAULTS[fault]
    function.__name__ = fault
    table = run(function, lambda completions: [1.0] * 3)
    assert table.values[:, 0].isnan().nonzero().flatten().tolist() == masked
    assert table.faults == {fault: len(masked)}
    assert (
        fault in table.messages[0] and told in table.messages[0] and f"first: sample {masked[0]}" in table.messages[0]
    )
    # the other function scored, but a sum without the missing part would be a wrong score
    assert table.total().isnan().nonzero().flatten().tolist() == masked


def test_the_total_weighs_what_scored_and_is_nan_where_nothing_did():
    def first(completions):
        return [1.0, None, None]

    def second(completions):
        return [2.0, 4.0, None]

    table = run(first, second)
    assert table.total([1.0, 0.5]).nan_to_num(-9).tolist() == [2.0, 2.0, -9.0]
    with pytest.raises(UserError, match="3 weights for 2"):
        table.total([1, 1, 1])


def test_async_functions_run_together_also_inside_a_running_loop():
    started = []

    async def slow(completions):
        started.append(time.perf_counter())
        await asyncio.sleep(0.1)
        return [1.0] * 3

    async def fails(completions):
        raise ConnectionError("no route")

    async def in_a_notebook():
        return run(slow, slow)

    before = time.perf_counter()
    table = run(slow, lambda completions: [2.0] * 3, fails, slow)
    assert time.perf_counter() - before < 0.19
    assert table.values[:, [0, 1, 3]].tolist() == [[1, 2, 1]] * 3
    assert table.faults == {"fails": 3} and "ConnectionError: no route" in table.messages[0]
    assert asyncio.run(in_a_notebook()).values.tolist() == [[1, 1]] * 3


def test_a_missing_column_is_refused_at_the_start():
    def needs_level(completions, level):
        return level

    functions, names = resolve_all(["answer", needs_level])
    check_columns(functions, names, ["solution", "level"])
    with pytest.raises(UserError, match="reward 'answer' needs a column 'answer' or 'solution'.*are: level"):
        check_columns(functions, names, ["level", "prompt_ids"])
    with pytest.raises(UserError, match="reward 'needs_level' needs a column 'level'"):
        check_columns(functions, names, ["answer"])
