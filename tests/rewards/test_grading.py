"""Programs and their tests: how each kind is run and compared, what travels, and what is nobody's fault but ours."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.rewards.grading import Grade, LocalGrader, stand_ins, task_from
from rlhf_fast.rewards.sandbox import Limits, SandboxFault, process, wire

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
)
KEYS = st.integers() | st.text() | st.tuples(st.integers(), st.booleans())
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.sets(KEYS, max_size=3)
        | st.frozensets(KEYS, max_size=3)
        | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def encode():
    """The guest's own encoder, from the text that enters sandboxes, without running what it ends with."""
    namespace: dict = {}
    exec(process.GUEST.rpartition("main()")[0], namespace)  # noqa: S102
    return namespace["encoded"]


@settings(max_examples=100, deadline=None)
@given(value=VALUES)
def test_values_come_out_of_a_sandbox_as_they_were(encode, value):
    (back,) = wire.message(f'["value",{encode(value)}]'.encode())[1:]
    assert wire.same(back, value) and wire.same(value, back)


@settings(max_examples=100, deadline=None)
@given(
    line=st.binary()
    | st.recursive(SCALARS.filter(lambda v: not isinstance(v, (bytes, complex))), st.lists).map(
        lambda v: json.dumps(v).encode()
    )
)
def test_any_line_is_a_message_or_refused(line):
    """Never another exception: a candidate writes what it likes."""
    try:
        assert isinstance(wire.message(line)[0], str)
    except wire.Malformed:
        pass


def test_numbers_chosen_to_collide_are_refused(encode):
    """All multiples of 2**61 - 1 have hash 0; a set of n would compare n^2 / 2 pairs, in the trainer's process."""
    with pytest.raises(wire.Malformed, match="collide"):
        wire.message(f'["value",{encode([i * (2**61 - 1) for i in range(50)])}]'.replace('"list"', '"set"').encode())


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, 1.0), (1, True), (0, None), ((1,), [1]), ({1}, {1.0}), ({1: 2}, {True: 2}), ([[1]], [[1.0]]), ("1", 1), (b"a", "a"),
     (1.0, 1.00001), ({1}, frozenset({1})), ([1, 2], [2, 1]), ({1: [0]}, {1: [False]})],
)  # fmt: skip
def test_values_of_different_type_or_size_differ(one, other):
    assert not wire.same(one, other) and not wire.same(other, one)


def test_floats_are_the_same_to_a_billionth():
    assert wire.same(0.1 + 0.2, 0.3) and wire.same([math.nan], [math.nan]) and wire.same({"x": 1.0}, {"x": 1 + 1e-10})


# ---------------------------------------------------------------------------------------------------- tasks from rows


@pytest.mark.parametrize(
    ("tests", "kind", "count"),
    [
        ("assert f(1) == 2\nassert f(2) == 3", "asserts", 1),
        (["assert f(1) == 2", "assert f(2) == 3"], "asserts", 2),
        ("def check(candidate):\n    assert candidate(1) == 2\n", "asserts", 1),
        ([{"input": "1", "output": "2"}], "program", 1),
        ('[{"args": [1], "expected": 2}]', "calls", 1),
    ],
)
def test_the_form_of_the_tests_says_how_they_run(tests, kind, count):
    task = task_from("", tests, "f")
    assert (task.kind, len(task.tests)) == (kind, count)


def test_check_is_called_where_it_is_only_defined():
    definition = "def check(candidate):\n    assert candidate(1) == 2"
    assert task_from("", definition, "f").tests == [f"{definition}\ncheck(candidate)"]
    assert task_from("", f"{definition}\ncheck(f)", "f").tests == [f"{definition}\ncheck(f)"]


@pytest.mark.parametrize(
    "tests", [5, [], None, [1], [{"input": "1"}], ["assert x", {"input": "", "output": ""}], '["', "assert ("]
)
def test_unreadable_tests_say_so(tests):
    with pytest.raises((ValueError, SyntaxError)):
        task_from("", tests, "f")


def test_calls_need_a_function_to_call():
    with pytest.raises(ValueError, match="entry_point"):
        task_from("", [{"args": [], "expected": 1}])


def test_names_that_the_tests_do_not_define_stand_for_the_candidates():
    """`helper` is the set-up's, `math`, `i`, `e` and `local` the tests' own."""
    tests = (
        "import math\ndef local(a): return a\n"
        "for i in range(3):\n    try: assert f(local(i)) == helper(math.pi)\n    except ValueError as e: print(e)\nassert g(1)"
    )
    task = task_from("", [tests], setup="def helper(x): return x")
    assert stand_ins(task) == {"f": "f", "g": "g"}
    task = task_from("", "assert candidate(1)", "f", setup="def f(): ...")
    assert stand_ins(task) == {"f": "f", "candidate": "f"}


# ---------------------------------------------------------------------------------------------------- grades


@pytest.fixture(scope="module")
def grade(sandbox):
    def grade(program, tests, entry_point="f", setup="", partial=False, **limits):
        task = task_from(program, tests, entry_point, setup)
        return LocalGrader(sandbox).grade(task, Limits(**limits), partial)

    return grade


def test_a_grade_stops_at_the_first_failure_unless_all_shall_count(grade):
    program = "def f(x): return x if x != 2 else 0"
    asserts = [f"assert f({i}) == {i}" for i in (1, 2, 3)]
    calls = [{"args": [i], "expected": i} for i in (1, 2, 3)]
    for tests in (asserts, calls):
        assert (grade(program, tests).passed, grade(program, tests, partial=True).passed) == (1, 2)
    assert grade(program, asserts).reason == "AssertionError: "
    assert grade(program, calls).reason == "wrong result 0"


def test_keyword_arguments_and_every_plain_value_reach_the_candidate(grade):
    calls = [{"args": [[1, {"a": None}], "é"], "kwargs": {"k": 1.5}, "expected": [[[1, {"a": None}], "é"], 1.5]}]
    assert grade("def f(*args, k): return [list(args), k]", calls).passed == 1
    assert grade("def f(x): return type(x).__name__", ["assert f((1, {2}, b'', 1j)) == 'tuple'"]).passed == 1


def test_exceptions_of_the_candidate_reach_assert_style_tests_as_built_in_ones(grade):
    program = (
        "class Odd(ValueError): pass\ndef f(x): raise Odd('odd') if x else UnicodeDecodeError('utf-8', b'', 0, 1, 'r')"
    )
    tests = "try:\n    f(1)\nexcept ValueError as e:\n    assert str(e) == 'odd'\nelse:\n    assert False\n"
    assert grade(program, tests).passed == 1
    assert grade(program, "try:\n    f(0)\nexcept RuntimeError:\n    pass").passed == 1


def test_the_candidate_keeps_its_state_between_the_calls_of_one_row(grade):
    assert grade("n = 0\ndef f():\n    global n\n    n += 1\n    return n", "assert [f(), f()] == [1, 2]").passed == 1


def test_a_program_reads_more_input_than_a_pipe_holds_and_may_leave_it(grade):
    lines = "1\n" * 200_000
    assert grade("import sys\nprint(len(sys.stdin.readlines()))", [{"input": lines, "output": "200000"}]).passed == 1
    assert grade("print(input())", [{"input": lines, "output": "1"}]).passed == 1


def test_spaces_at_the_ends_of_lines_do_not_count(grade):
    assert grade("print('1 2 ')\nprint()", [{"input": "", "output": "1 2"}]).passed == 1
    assert grade("print('1  2')", [{"input": "", "output": "1 2"}]).passed == 0


def test_a_program_runs_as_main_with_threads_and_imports(grade):
    program = (
        "import collections, heapq, itertools, re, sys, threading\n"
        "def main(): print(sys.stdin.read())\n"
        "if __name__ == '__main__':\n    threading.stack_size(1 << 26)\n    t = threading.Thread(target=main); t.start(); t.join()"
    )
    assert grade(program, [{"input": "5", "output": "5"}]).passed == 1


def test_tests_that_cannot_run_are_a_fault_and_not_a_failure(grade):
    with pytest.raises(SandboxFault, match="ModuleNotFoundError"):
        grade("def f(): return 1", "assert f() == 1", setup="import no_such_module")
    with pytest.raises(SandboxFault, match="they pass a function"):
        grade("def f(g): return g(1)", "assert f(lambda x: x) == 1")


def test_a_sandbox_that_does_not_start_is_a_fault(sandbox, tmp_path):
    script = tmp_path / "broken"
    script.write_text("#!/bin/sh\necho no such luck >&2\n")
    script.chmod(0o755)
    with pytest.raises(SandboxFault, match="no such luck"):
        process.Guest([str(script)], {"role": "call", "source": ""}, Limits())


def test_results_that_python_cannot_print_are_wrong_all_the_same(grade):
    assert grade("def f(): return 10**5000", [{"args": [], "expected": 1}]) == Grade(0, 1, "wrong result of type int")


def test_the_limits_are_those_asked_for(grade):
    """Each program needs more than one setting gives and less than the other."""
    assert [
        grade("import time\ndef f(): time.sleep(1); return 1", "assert f() == 1", timeout=t).passed for t in (0.3, 9)
    ] == [0, 1]
    big = "def f(): return len(bytes(200 << 20)) >> 20"
    assert [grade(big, "assert f() == 200", memory_mb=m).passed for m in (128, 512)] == [0, 1]
    flood = "def f(): return 'x' * 50_000"  # twice as long in hexadecimal
    assert [grade(flood, "assert len(f()) == 50_000", output_kb=k).passed for k in (64, 128)] == [0, 1]


def test_the_guest_runs_under_every_python_that_it_may_meet():
    """It must not need what only this interpreter has: its text compiles for the oldest supported grammar."""
    code = "import ast, sys; ast.parse(sys.stdin.read(), feature_version=(3, 8))"
    subprocess.run([sys.executable, "-c", code], input=process.GUEST, text=True, check=True)
