"""`rlhf-fast code-runner` in a process of its own, used as the lines that it prints say."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.rewards import Code
from rlhf_fast.rewards.remote import TOKEN
from rlhf_fast.rewards.sandbox import Bwrap, Limits, check_sandbox


def test_another_process_grades_with_the_token_that_the_runner_prints(monkeypatch):
    try:
        check_sandbox(Bwrap(), Limits())
    except UserError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "rlhf_fast", "code-runner", "--port", "0", "--workers", "1"]
    environment = {name: value for name, value in os.environ.items() if name != TOKEN}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as runner:
        try:
            printed = "".join(runner.stdout.readline() for _ in range(3))
            url = re.search(r"on (http://127\.0\.0\.1:\d+)", printed)[1]
            monkeypatch.setenv(TOKEN, re.search(rf"export {TOKEN}=(\S+)", printed)[1])
            scores = Code(url)(["p"] * 2, ["def f(): return 1", "def f(): return 2"], tests=["assert f() == 1"] * 2)
        finally:
            runner.terminate()
    assert scores == [1.0, 0.0]
