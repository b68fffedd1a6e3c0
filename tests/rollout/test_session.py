"""The scheduler by hand: requests that come and go between steps."""

from __future__ import annotations

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.rollout import Request, SlotEngine

LONG = [30, 31, 32, 33, 34, 35, 36, 37, 38]


def finish(session):
    """Run to the end: key -> {index: token ids}."""
    found = {}
    while not session.idle:
        for writing in session.step():
            if writing.sample.finish_reason:
                found.setdefault(writing.key, {})[writing.index] = writing.sample.ids
    return found


def alone(policy, request):
    return {j: s.ids for j, s in enumerate(SlotEngine(policy).generate([request])[0])}


def test_every_step_streams_one_token_of_each_live_sample(policy):
    request = Request([7, 9, 11], n=2, max_new_tokens=9, seed=1)
    streamed = {0: [], 1: []}
    with SlotEngine(policy).session() as session:
        key = session.add(request)
        while not session.idle:
            for writing in session.step():
                assert writing.key == key
                streamed[writing.index].append(writing.sample.ids[-1])
    assert streamed == alone(policy, request)


def test_a_request_that_comes_later_joins_those_that_are_being_written(policy):
    first, second = (Request(p, n=2, max_new_tokens=14, seed=s) for p, s in (([7, 9, 11], 1), (LONG, 2)))
    with SlotEngine(policy, slots=3).session() as session:
        a = session.add(first)
        for _ in range(4):
            assert len(session.step()) == 2
        b = session.add(second)
        assert {w.key for w in session.step()} == {a, b}  # the third slot, in the very next step
        assert finish(session) == {a: alone(policy, first), b: alone(policy, second)}


def test_a_long_prompt_comes_in_chunks_while_others_go_on_writing(policy):
    """9 tokens, 4 at a time: two steps in which only the other sample gains a token, then both do."""
    short, long = Request([7, 9], max_new_tokens=20, seed=1), Request(LONG, max_new_tokens=20, seed=2)
    shapes = []
    policy.model.model.embed_tokens.register_forward_hook(lambda m, inputs, out: shapes.append(tuple(inputs[0].shape)))
    with SlotEngine(policy, prefill_tokens=4).session() as session:
        a = session.add(short)
        session.step()
        b = session.add(long)
        keys = [[w.key for w in session.step()] for _ in range(3)]
        assert keys == [[a], [a], [a, b]]
        assert shapes[1:] == [(1, 1), (1, 4), (1, 1), (1, 4), (1, 1), (1, 1)]
        assert finish(session) == {a: alone(policy, short), b: alone(policy, long)}


def test_a_cancelled_request_frees_its_slots_and_disturbs_nobody(policy):
    """Four of two samples over three slots; one that is being written and one that waits are cancelled."""
    requests = [Request([3 + i, 9, 11], n=2, max_new_tokens=20, seed=i) for i in range(4)]
    with SlotEngine(policy, slots=3).session() as session:
        keys = [session.add(r) for r in requests]
        for _ in range(3):
            session.step()
        session.cancel(keys[0])
        session.cancel(keys[3])
        session.cancel("never heard of")
        assert len(session.live) == 1
        assert len(session.step()) == 3
        found = finish(session)
    assert found == {keys[i]: alone(policy, requests[i]) for i in (1, 2)}


def test_cancelling_everything_leaves_nothing_to_do(policy):
    with SlotEngine(policy, prefill_tokens=4).session() as session:
        key = session.add(Request(LONG, n=3, seed=0))
        assert session.step() == []  # the first chunk
        session.cancel(key)
        assert session.idle and session.step() == []


def test_keys_may_be_anything_and_are_named_in_messages(policy):
    with SlotEngine(policy).session() as session:
        assert session.add(Request([5], max_new_tokens=1), key="mine") == "mine"
        with pytest.raises(UserError, match="prompt yours has 64 tokens"):
            session.add(Request([9] * 64), key="yours")
        assert list(finish(session)) == ["mine"]
