"""Seconds are counted once, whatever lies within what."""

from __future__ import annotations

import pytest

from rlhf_fast.run import times


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds) lets time pass; nothing else does."""
    now = [0.0]
    monkeypatch.setattr(times.time, "perf_counter", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_a_block_within_another_is_counted_once(clock):
    """1 + 2 + 4 seconds of a round, of which 2 are a reward's and 3 of another's are told; then 8 of a step."""
    measured = times.Times()
    with measured.timed("round"):
        clock(1)
        with measured.timed("reward"):
            clock(2)
        clock(4)
        measured.add({"generate": 3.0})
    with measured.timed("step"):
        clock(8)
    assert measured.read() == {"round": 2.0, "reward": 2.0, "generate": 3.0, "step": 8.0}
    assert measured.read() == {}


def test_a_block_that_fails_is_counted_and_closed(clock):
    measured = times.Times()
    with pytest.raises(KeyError), measured.timed("a"):
        clock(1)
        raise KeyError
    with measured.timed("b"):
        clock(2)
    assert measured.read() == {"a": 1.0, "b": 2.0}
