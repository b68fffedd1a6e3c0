"""A reward function in the run's own process that does not answer: the run ends soon after the deadline, and nothing is lost."""

from __future__ import annotations

import signal
import time

import pytest

from rlhf_fast.run.checkpoint import latest_checkpoint

COMMON = {"use_peft": True, "save_steps": 3, "max_completion_length": 3}
CASES = {
    "waits": (2, "gave no answer in 0.5 s; give it as module:function", 2),
    "swallows": (2, "gave no answer in 0.5 s and does not come out when interrupted: it is ended", 2),
    "holds_the_lock": (
        signal.SIGKILL,
        "gave no answer in 0.5 s, and nothing can interrupt it: the process is ended; go",
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_function_that_does_not_answer_ends_the_run_and_resume_goes_on(name, server, whole, tmp_path):
    """In the second round, before which the run has made 2 steps and saved nothing: interrupted or not, it is saved then,
    unless Python itself stands still. ``-s`` prints the times.
    """
    out, (ended, said, step) = tmp_path / "run", CASES[name]
    settings = {**COMMON, "reward_funcs": f"tests.faults.misbehaving:{name}"}
    reference, _ = whole("grpo", **settings)
    (server.folder / "misbehave").write_text("2")
    try:
        began = time.monotonic()
        result = server.run("grpo", out, **settings)
        print(f"{name}: the run has ended after {time.monotonic() - began:.1f} s, with a deadline of 0.5 s in it")
    finally:
        (server.folder / "misbehave").unlink()
    assert (result["signal"] or result["code"]) == ended
    assert said in server.log(out)
    assert "Traceback" not in server.log(out)
    found = latest_checkpoint(out / "checkpoints")
    if step is None:
        assert found is None
    else:
        assert found.name == f"step-{step:08d}"
        assert f"(saved at step {step}; continue with --resume)" in server.log(out)
    assert server.run("grpo", out, "--resume", **settings)["code"] == 0
    assert server.digest(out) == server.digest(reference)
