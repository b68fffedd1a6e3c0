"""The reward `code`: which program a completion holds, what its row's tests say, and refusals."""

from __future__ import annotations

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.rewards import Code, Fault, check_columns, resolve, score
from rlhf_fast.rewards.code import program_of
from rlhf_fast.rewards.sandbox import launch

RIGHT = "def double(x):\n    return 2 * x\n"
WRONG = "def double(x):\n    return x * x\n"


@pytest.fixture(scope="module")
def code(sandbox):
    return Code()


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("x = 1", "x = 1"),
        ("So:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```\nx = 1\n```\nBetter:\n```py\nx = 2\n```", "x = 2\n"),
        ("```python\nx = 1", "x = 1"),
        ("say ``x`` and ```y```", "say ``x`` and ```y```"),
    ],
)
def test_the_program_is_the_last_fenced_block_or_everything(completion, program):
    assert program_of(completion) == program


def test_each_kind_of_row_is_scored_in_one_batch(code):
    """Right, wrong, without tests, and with tests that cannot be read."""
    rows = [
        (RIGHT, "assert double(4) == 8", None, 1.0),
        (WRONG, "assert double(4) == 8", None, 0.0),
        (f"```python\n{RIGHT}```", ["assert double(2) == 4", "assert double(4) == 8"], None, 1.0),
        ("print(2 * int(input()))", [{"input": "4", "output": "8"}], None, 1.0),
        ("print(int(input()) ** 2)", [{"input": "2", "output": "4"}, {"input": "4", "output": "8"}], None, 0.0),
        (RIGHT, '[{"args": [4], "expected": 8}]', "double", 1.0),
        ([{"role": "assistant", "content": f"```\n{RIGHT}```"}], [{"args": [4], "expected": 8}], "double", 1.0),
        (RIGHT, [{"args": [4], "expected": 8.0}], "double", 0.0),
        (RIGHT, None, None, None),
    ]
    completions, tests, entry_points, wanted = map(list, zip(*rows))
    assert code(["p"] * len(rows), completions, tests=tests, entry_point=entry_points) == wanted


def test_a_prompt_that_is_python_goes_before_its_completion_and_lends_its_helpers_to_the_tests(code):
    """As in HumanEval. The helper that the tests use is the prompt's own: a candidate that redefines it gains nothing."""
    prompt = 'def half(x):\n    return x / 2\n\ndef double(x):\n    """Twice x."""\n'
    test = "def check(candidate):\n    assert half(candidate(4)) == 4"
    completions = ["    return 2 * x\n", RIGHT, "    return x\n\ndef half(x):\n    return 4\n"]
    assert code([prompt] * 3, completions, test=[test] * 3, entry_point=["double"] * 3) == [1.0, 1.0, 0.0]


def test_partial_scores_the_share_of_tests_that_pass(sandbox):
    tests = [[f"assert double({i}) == {2 * i}" for i in range(4)]]  # x * x is right for 0 and 2
    assert Code(partial=True)(["p"], [WRONG], tests=tests) == [0.5]


def test_a_fault_is_shown_and_is_no_score(code):
    assert isinstance(code(["p"], [RIGHT], tests=[5])[0], Fault)
    table = score([code], ["code"], ["p", "p"], [RIGHT, RIGHT], [[1], [1]], {"tests": [5, "assert double(1) == 2"]})
    assert table.faults == {"code": 1} and table.faulted[:, 0].tolist() == [True, False]
    assert table.total().isnan().tolist() == [True, False]
    assert "reward 'code' cannot read a row's tests: tests should be a list" in table.messages[0]


def test_it_is_found_by_name_with_options_and_wants_its_column(sandbox):
    reward = resolve({"name": "code", "sandbox": "bwrap", "timeout": 2, "memory_mb": 256})
    assert (reward.limits.timeout, reward.limits.memory_mb) == (2, 256)
    with pytest.raises(UserError, match="'code' needs a column 'tests' or 'test'"):
        check_columns([reward], ["code"], ["answer"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sandbox": "chroot"}, "'bwrap', 'docker', 'docker:IMAGE' or a URL"),
        ({"timeout": 0}, "timeout > 0"),
        ({"memory_mb": 1}, "memory_mb >= 64"),
        ({"sandbox": "docker", "python": "python3"}, "of sandbox 'bwrap' only"),
        ({"python": "/no/such/python"}, "no program here"),
        ({"sandbox": "http://127.0.0.1:1"}, "RLHF_FAST_RUNNER_TOKEN"),
    ],
)
def test_a_wrong_option_is_told(sandbox, options, told):
    with pytest.raises(UserError, match=told):
        Code(**options)


def test_a_missing_sandbox_is_refused_with_how_to_install_it(monkeypatch):
    """Nothing else is tried in its place."""
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="`bwrap` is not installed.*apt-get install bubblewrap.*docker.*code-runner"):
        Code()
    with pytest.raises(UserError, match="`docker` is not installed"):
        Code("docker")


def test_an_old_bwrap_is_refused(sandbox, monkeypatch):
    monkeypatch.setattr(launch, "OLDEST_BWRAP", (99, 0, 0))
    with pytest.raises(UserError, match="too old"):
        Code()


@pytest.mark.parametrize(
    ("left_out", "escape"),
    [
        (["--unshare-all", "--unshare-user", "--disable-userns"], None),  # bwrap itself refuses
        (["--seccomp"], "start a process"),
        (["--remount-ro"], "write to the root folder"),
        (["--size"], "write more than its share"),  # where unshare mounts nothing
        (["size"], "write more than its share"),
        (["nr_inodes"], "make more files than its share"),
        (["--clearenv"], "read the environment"),
    ],
)
def test_a_sandbox_with_a_hole_fails_its_self_test(sandbox, monkeypatch, left_out, escape):
    """Each protection is taken away once: the self-test names what gets through, and the reward refuses to start."""
    complete = launch.Bwrap._options

    def holed(self, limits, filter_fd):
        words, kept = complete(self, limits, filter_fd), []
        while words:
            word = words.pop(0)
            values = 0 if word.startswith("--unshare") or word in ("--disable-userns", "--clearenv") else 1
            if word in left_out:
                del words[:values]
            else:
                kept.append(word)
        return kept if "--clearenv" not in left_out else [*kept, "--setenv", "SECRET", "x"]

    mounted = launch.Bwrap._mounted

    def holed_mount(self, limits):
        *command, options = mounted(self, limits)
        return [*command, ",".join(o for o in options.split(",") if o.partition("=")[0] not in left_out)]

    monkeypatch.setattr(launch.Bwrap, "_options", holed)
    monkeypatch.setattr(launch.Bwrap, "_mounted", holed_mount)
    if "--size" in left_out:
        monkeypatch.setattr(launch.Bwrap, "_mounts", lambda self: False)
    with pytest.raises(UserError, match=escape or "cannot run here|is not safe here"):
        Code()
