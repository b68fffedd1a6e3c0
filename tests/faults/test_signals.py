"""SIGTERM and SIGINT: the step under way is finished and saved, an evaluation is let go, and ``--resume`` goes on.

A few by default; ``-m slow -s`` sends one at every kind of moment of every kind of run, and prints how long each took to end.
"""

from __future__ import annotations

import pytest

from rlhf_fast.run.checkpoint import latest_checkpoint, list_checkpoints
from tests.faults.conftest import KINDS

WATCHED = {"eval": True, "eval_steps": 2, "save_steps": 9}
CASES = [
    ("grpo", ("micro", 3), "SIGTERM", {}),
    ("grpo", ("rollout", 7), "SIGTERM", {}),
    ("grpo", ("save.op", 20), "SIGINT", {}),
    ("grpo", ("log", 1), "SIGINT", {}),
    ("grpo", ("held_out", 4), "SIGTERM", WATCHED),
    ("dpo", ("held_out", 2), "SIGINT", {"save_steps": 9}),
]
MOMENTS = ("rollout", "micro", "optimizer", "log", "save.begin", "save.op", "held_out")


def stop_and_resume(server, whole, out, kind, moment, name, settings):
    """One signal, one ``--resume``. The figures of the cut logging window are not compared, nor an evaluation let go."""
    settings = {"use_peft": False, **settings}
    reference, _ = whole(kind, **settings)
    ended = server.run(kind, out, fault=(*moment, name), **settings)
    assert ended["code"] == 130, server.log(out)
    assert ended["after"].get("stepped", 0) <= 1
    assert ended["after"].get("save.begin", 0) <= 1
    step = ended["ticks"]["stepped"]
    assert f"{name}: finishing this step, then saving" in server.log(out)
    assert latest_checkpoint(out / "checkpoints").name == f"step-{step:08d}"
    assert server.run(kind, out, "--resume", **settings)["code"] == 0
    same = ("step", "weights", "optimizer", "order")
    assert [server.digest(out)[key] for key in same] == [server.digest(reference)[key] for key in same]
    return ended


@pytest.mark.parametrize(("kind", "moment", "name", "settings"), CASES, ids=str)
def test_a_signal_ends_the_run_within_a_step_and_resume_goes_on(kind, moment, name, settings, server, whole, tmp_path):
    ended = stop_and_resume(server, whole, tmp_path / "run", kind, moment, name, settings)
    if moment[0] in ("held_out", "save.op"):  # neither is a step
        assert ended["after"].get("stepped", 0) == 0
    assert ended["after"].get("held_out", 0) == (moment[0] == "held_out")


@pytest.mark.parametrize("moment", [("micro", 5), ("save.op", 25)], ids=str)
def test_a_second_ctrl_c_ends_it_at_once_and_the_last_checkpoint_is_whole(moment, server, whole, tmp_path):
    """Within the third step, and within its save."""
    reference, _ = whole("sft", use_peft=False)
    out = tmp_path / "run"
    ended = server.run("sft", out, fault=(*moment, "SIGINT SIGINT"), use_peft=False)
    assert ended["code"] == 130
    assert set(ended["after"]) == {moment[0]}  # but for cleaning up, nothing happens any more
    assert "interrupted" in server.log(out)
    assert "Traceback" not in server.log(out)
    assert server.run("sft", out, "--resume", use_peft=False)["code"] == 0
    assert server.digest(out) == server.digest(reference)


@pytest.mark.parametrize(
    ("kind", "moment", "settings"),
    [("sft", "rehearse", {"memory_check": True}), ("dpo", "reference", {"precompute_ref_log_probs": True})],
)
def test_before_the_first_step_there_is_nothing_to_wait_for(kind, moment, settings, server, tmp_path):
    for name, how in (("SIGTERM", {"signal": 15, "code": 0}), ("SIGINT", {"signal": 0, "code": 130})):
        out = tmp_path / name
        ended = server.run(kind, out, fault=(moment, 1, name), use_peft=False, **settings)
        assert {key: ended[key] for key in how} == how
        assert not list_checkpoints(out / "checkpoints")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_ends_within_a_step_of_a_signal(kind, server, whole, tmp_path):
    settings = {"save_steps": 2, "eval": True, "eval_steps": 2}
    ticks = whole(kind, use_peft=False, **settings)[1]
    for number, moment in enumerate(m for m in MOMENTS if m in ticks):
        name, at = ("SIGTERM", "SIGINT")[number % 2], max(1, ticks[moment] // 3)
        ended = stop_and_resume(server, whole, tmp_path / moment, kind, (moment, at), name, settings)
        print(f"{kind}: {name} at {moment} {at}, out after {ended['seconds']:.2f} s", flush=True)
