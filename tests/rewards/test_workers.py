"""Processes with a deadline: what hangs or dies costs one answer and nothing else."""

from __future__ import annotations

import time

import pytest

from rlhf_fast.rewards import Fault
from rlhf_fast.rewards.workers import WorkerPool

# says its process id, and does to itself what it is asked for
SCRIPT = """
import json, os, sys, time
print("ready", flush=True)
for line in sys.stdin:
    timeout, item = json.loads(line)
    if item == "hang": time.sleep(1000)
    while item == "think": pass
    if isinstance(item, list):  # a file: whoever comes here first is stopped
        with open(item[0], "a+") as file:
            file.write("x"); file.seek(0)
            if file.read() == "x": file.close(); os.kill(os.getpid(), 19)
    if item == "die": os.kill(os.getpid(), 9)
    if item == "leave": sys.exit(0)
    print(json.dumps([item, os.getpid()]), flush=True)
"""


@pytest.fixture
def pool(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(SCRIPT)
    return lambda size, timeout=20.0: WorkerPool(script, size, timeout)


def test_answers_come_in_the_order_of_the_questions_from_processes_that_stay(pool):
    workers = pool(2)
    first, second = workers.map(range(20)), workers.map(range(20))
    assert [item for item, _ in first] == [item for item, _ in second] == list(range(20))
    assert len({pid for _, pid in first + second}) <= 2


@pytest.mark.parametrize(("item", "reason"), [("hang", "gave no answer in 0.5 s"), ("die", "died"), ("leave", "died")])
def test_a_worker_that_hangs_or_dies_is_replaced(pool, item, reason):
    workers = pool(1, timeout=0.5 if item == "hang" else 20.0)
    before, lost, after = workers.map(["a", item, "b"])
    assert lost == Fault(reason)
    assert (before[0], after[0]) == ("a", "b") and before[1] != after[1]


def test_a_worker_that_was_kept_from_working_hides_no_answer(pool, tmp_path):
    """Stopped from outside before it could answer: another one is asked. One that thinks for too long is not."""
    visits = tmp_path / "visits"
    ((item, _),) = pool(1, timeout=1.0).map([[str(visits)]])
    assert item == [str(visits)] and visits.read_text() == "xx"
    assert pool(1, timeout=1.0).map(["think"]) == [Fault("gave no answer in 1 s")]


def test_a_hung_worker_is_killed(pool):
    workers = pool(1, timeout=0.5)
    ((_, pid),) = workers.map(["a"])
    workers.map(["hang"])
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            open(f"/proc/{pid}/stat").close()
            time.sleep(0.01)
        except FileNotFoundError:
            return
    pytest.fail(f"process {pid} still runs")


def test_a_worker_that_cannot_start_says_why(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text("import no_such_module")
    (fault,) = WorkerPool(script, 1, 5.0).map(["a"])
    assert "could not start" in fault.reason and "no_such_module" in fault.reason
