"""Grading on another machine, the server here being a real one on loopback."""

from __future__ import annotations

import http.client
import json
import threading

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.rewards import Code, Fault
from rlhf_fast.rewards.grading import LocalGrader
from rlhf_fast.rewards.remote import CEILING, TOKEN, RemoteGrader, Runner

PROGRAM = "def double(x): return 2 * x"


@pytest.fixture
def runner(sandbox, monkeypatch):
    monkeypatch.setenv(TOKEN, "secret")
    server = Runner(("127.0.0.1", 0), LocalGrader(sandbox), "secret", workers=2)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def request(runner, method, path, body=None, token="secret"):
    connection = http.client.HTTPConnection("127.0.0.1", runner.server_port, timeout=30)
    connection.request(method, path, body, {"Authorization": f"Bearer {token}"} if token else {})
    response = connection.getresponse()
    return response.status, response.read().decode()


def task(**limits):
    limits = {"timeout": 5.0, "memory_mb": 512, "scratch_mb": 16, "output_kb": 256} | limits
    tests = {
        "kind": "asserts",
        "program": PROGRAM,
        "tests": ["assert double(1) == 2"],
        "entry_point": None,
        "setup": "",
    }
    return json.dumps({"task": tests, "limits": limits, "partial": False})


def test_the_reward_is_the_same_as_here(runner):
    code = Code(f"http://127.0.0.1:{runner.server_port}")
    tests = ["assert double(4) == 8", [{"args": [4], "expected": 9}], [{"args": [4], "expected": 8}], 5]
    scores = code(["p"] * 4, [PROGRAM] * 4, tests=tests, entry_point=["double"] * 4)
    assert scores[:3] == [1.0, 0.0, 1.0] and isinstance(scores[3], Fault)


@pytest.mark.parametrize("path", ["/health", "/grade", "/", "/../etc/passwd"])
@pytest.mark.parametrize("token", [None, "", "wrong", "secret2"])
def test_nothing_answers_without_the_token(runner, path, token):
    for method in ("GET", "POST"):
        assert request(runner, method, path, task() if method == "POST" else None, token)[0] == 401


@pytest.mark.parametrize(
    "body",
    ["", "{", "[]", "{}", "null", '{"task": 1}', task().replace("asserts", "shell"), task(timeout=CEILING.timeout + 1),
     task(memory_mb=10**6), task(output_kb=0), task(timeout="5"), "[" * 100_000],
)  # fmt: skip
def test_what_is_no_task_or_asks_for_too_much_is_refused(runner, body):
    assert request(runner, "POST", "/grade", body)[0] == 400


def test_an_impossible_task_is_refused_and_the_server_lives_on(runner):
    assert request(runner, "POST", "/grade", task().replace("assert double(1) == 2", "assert ("))[0] == 503
    assert json.loads(request(runner, "POST", "/grade", task())[1]) == {"passed": 1, "total": 1, "reason": ""}


def test_a_wrong_token_or_nobody_there_is_told_at_the_start(runner, monkeypatch):
    monkeypatch.setenv(TOKEN, "wrong")
    with pytest.raises(UserError, match="401"):
        RemoteGrader(f"http://127.0.0.1:{runner.server_port}")
    with pytest.raises(UserError, match="does not answer.*rlhf-fast code-runner"):
        RemoteGrader("http://127.0.0.1:1")


def test_a_runner_that_goes_away_is_a_fault_and_no_score(runner):
    code = Code(f"http://127.0.0.1:{runner.server_port}")
    runner.shutdown()
    runner.server_close()
    (score,) = code(["p"], [PROGRAM], tests=["assert double(1) == 2"])
    assert isinstance(score, Fault) and "does not answer" in score.reason
