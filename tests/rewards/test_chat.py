"""Models that are asked in words: a real HTTP server that follows a script, and a tiny local model."""

from __future__ import annotations

import asyncio
import email.utils
import json
import threading
import time

import pytest

from bench.scripted import DROP, GARBAGE, HANG, ScriptedServer
from rlhf_fast.errors import UserError
from rlhf_fast.rewards import Fault
from rlhf_fast.rewards.chat import API_KEY, connect
from rlhf_fast.rewards.ledger import IN_MEMORY, Ledger, key_of

QUICK = {"backoff": 0.01, "timeout": 60.0, "deadline": 120.0}


def echo(messages):
    return f"you said {messages[-1]['content']}"


def say(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def ask(chat, *texts):
    return asyncio.run(chat.answer(say(*texts)))


def test_the_body_of_a_call_is_what_the_api_wants(monkeypatch):
    monkeypatch.setenv(API_KEY, "sesame")
    with ScriptedServer(echo, key="sesame") as server:
        chat = connect(None, server.url, temperature=0.5, max_new_tokens=7, seed=3, extra={"top_k": 1}, **QUICK)
        (reply,) = ask(chat, "hello")
        without = connect("m", server.url + "/v1/", extra={"max_tokens": None, "max_completion_tokens": 9}, **QUICK)
        ask(without, "hello")
    assert (reply.text, reply.complete, reply.prompt_tokens, reply.completion_tokens) == ("you said hello", True, 10, 5)
    messages = [{"role": "user", "content": "hello"}]
    sent = {"model": "scripted", "messages": messages, "temperature": 0.5, "max_tokens": 7, "seed": 3, "top_k": 1}
    assert server.calls[0] == sent
    assert server.calls[1] == {"model": "m", "messages": messages, "temperature": 0.0, "max_completion_tokens": 9}


@pytest.mark.parametrize(
    "fault", [408, 429, 500, 503, DROP, GARBAGE, {"choices": []}, {"choices": [{"message": 1}]}], ids=str
)
def test_a_failure_that_may_pass_is_tried_again(fault):
    with ScriptedServer(echo, plan=[fault, fault]) as server:
        chat = connect(None, server.url, **QUICK)
        (reply,) = ask(chat, "hello")
        assert reply.text == "you said hello" and len(server.calls) == 3
        assert (chat.asked, chat.failed, chat.tokens) == (1, 0, [10, 5])


def test_what_stays_broken_is_a_fault_and_no_answer_and_is_asked_again_later():
    with ScriptedServer(echo, plan=[500] * 3) as server:
        chat = connect(None, server.url, retries=2, **QUICK)
        (fault,) = ask(chat, "hello")
        assert isinstance(fault, Fault) and "500 (broken on purpose)" in fault.reason and "3 tries" in fault.reason
        assert ask(chat, "hello")[0].text == "you said hello"


def test_one_refused_conversation_is_a_fault_of_its_own():
    """400 to the first: too long, say. It is not tried again, and the others are answered."""
    with ScriptedServer(echo, plan=[400]) as server:
        replies = ask(connect(None, server.url, concurrency=1, **QUICK), "a", "b")
        assert isinstance(replies[0], Fault) and replies[1].text == "you said b" and len(server.calls) == 2


def test_a_server_that_never_answers_costs_no_more_than_the_timeout_and_the_deadline():
    with ScriptedServer(echo, plan=[HANG] * 50) as server:
        (fault,) = ask(connect(None, server.url, timeout=0.1, deadline=0.35, backoff=0.01, retries=40), "hello")
        assert "no answer within" in fault.reason and 1 <= len(server.calls) <= 5


@pytest.mark.parametrize("as_date", [False, True])
def test_the_next_try_waits_as_long_as_the_server_asks(as_date):
    """A date has whole seconds: 2 of them are 1 to 2 from now."""
    wait = (lambda: email.utils.formatdate(time.time() + 2, usegmt=True)) if as_date else "0.4"
    times = []
    with ScriptedServer(echo, plan=[(429, {"Retry-After": wait})]) as server:
        server.before = lambda count: times.append(time.monotonic())
        replies = ask(connect(None, server.url, concurrency=1, **QUICK), "a", "b")
    assert [r.text for r in replies] == ["you said a", "you said b"]
    assert min(times[1:]) - times[0] >= 0.4


def test_while_one_is_told_to_wait_nobody_else_is_sent():
    """Two at a time: the first is told to wait 2 s; the second is answered before, and the third must not be sent until then."""
    times = {}

    def before(count):
        times[server.calls[count - 1]["messages"][0]["content"]] = time.monotonic()
        if count == 2:
            time.sleep(0.5)  # until the client has read the refusal

    with ScriptedServer(echo, plan=[(429, {"Retry-After": "2"})]) as server:
        server.before = before
        assert [r.text for r in ask(connect(None, server.url, concurrency=2, **QUICK), *"abc")] == [
            f"you said {c}" for c in "abc"
        ]
    assert times["c"] - times["b"] >= 1.2


def test_a_pause_beyond_the_deadline_is_not_waited_for():
    with ScriptedServer(echo, plan=[(429, {"Retry-After": "3600"})]) as server:
        (fault,) = ask(connect(None, server.url, **QUICK), "a")
        assert "429" in fault.reason and len(server.calls) == 1


def test_calls_run_side_by_side_up_to_the_limit_and_equal_ones_once():
    """Four have to be there before one is answered; a fifth would be seen."""
    with ScriptedServer(echo) as server:
        together = threading.Barrier(4, timeout=60)
        server.before = lambda count: together.wait()
        texts = [str(i % 12) for i in range(24)]
        replies = ask(connect(None, server.url, concurrency=4, **QUICK), *texts)
        assert [r.text for r in replies] == [f"you said {t}" for t in texts]
        assert len(server.calls) == 12 and server.most_in_flight == 4


def test_an_error_that_nothing_survives_lets_calls_in_flight_end_and_keeps_their_answers(tmp_path):
    """The second of two at once is refused for good: the first, slower one still arrives in the ledger."""
    with ScriptedServer(echo, plan=[None, 404]) as server:
        refused = threading.Event()

        def before(count):
            if count == 1:
                refused.wait(60)
                time.sleep(1)  # until the client has read the refusal
            refused.set()

        server.before = before
        chat = connect("no-such-model", server.url, concurrency=2, cache=tmp_path / "calls.jsonl", **QUICK)
        with pytest.raises(UserError, match="404.*'no-such-model' there"):
            ask(chat, *"abcdef")
        assert len(server.calls) == 2 and len(Ledger(tmp_path / "calls.jsonl")) == 1


def test_failure_after_failure_ends_the_work_instead_of_paying_for_more():
    with ScriptedServer(echo, plan=[None] * 2 + [400] * 100) as server:
        chat = connect(None, server.url, concurrency=1, give_up_after=3, **QUICK)
        with pytest.raises(UserError, match="3 calls in a row failed.*answered 400"):
            ask(chat, *map(str, range(50)))
        assert len(server.calls) == 5


def test_answers_on_the_disk_are_never_asked_for_again(tmp_path):
    """Line separators, quotes and half a character (which JSON allows and UTF-8 does not) included."""
    texts = ["plain", "두 번", "a\u2028b\x85c\r\nd", '"[[A]]"', "half \ud83d"]
    with ScriptedServer(lambda messages: messages[-1]["content"] + "\ud83d") as server:
        options = {"cache": tmp_path / "deep" / "calls.jsonl", **QUICK}
        first = ask(connect(None, server.url, **options), *texts)
        second = ask(connect(None, server.url, **options), *texts)
        assert first[:4] == second[:4] and [r.text for r in first[:4]] == [t + "?" for t in texts[:4]]
        assert "half a character" in first[4].reason
        assert len(server.calls) == 4
        # another model, wording or conversation is another call
        for change in ({"temperature": 1.0}, {"max_new_tokens": 5}, {"extra": {"top_p": 0.5}}):
            ask(connect(None, server.url, **options, **change), "plain")
        ask(connect("other", server.url, **options), "plain")
        assert len(server.calls) == 8


def test_a_line_that_a_kill_cut_is_passed_over_and_costs_nothing_else(tmp_path):
    path = tmp_path / "calls.jsonl"
    ledger = Ledger(path)
    ledger.put("a", {"text": "1"})
    ledger.put("b", {"text": "2"})
    path.write_bytes(path.read_bytes()[:-9])
    again = Ledger(path)
    assert (again.get("a"), again.get("b"), again.torn) == ({"text": "1"}, None, 1)
    again.put("b", {"text": "2"})
    last = Ledger(path)
    assert (last.get("a"), last.get("b"), last.torn) == ({"text": "1"}, {"text": "2"}, 1)
    (tmp_path / "other.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(UserError, match="holds no answers"):
        Ledger(tmp_path / "other.jsonl")


def test_a_ledger_without_a_file_forgets_the_oldest():
    ledger = Ledger()
    for i in range(IN_MEMORY + 2):
        ledger.put(str(i), i)
    assert len(ledger) == IN_MEMORY and ledger.get("1") is None and ledger.get("2") == 2


def test_the_key_of_a_call_does_not_depend_on_the_order_of_its_fields():
    assert key_of({"a": 1, "b": ["x", "ü"]}) == key_of({"b": ["x", "ü"], "a": 1}) != key_of({"a": 1, "b": ["ü", "x"]})


def test_the_key_comes_from_the_environment_and_appears_nowhere(monkeypatch, tmp_path):
    """The server repeats it in its errors, as some do."""
    monkeypatch.setenv(API_KEY, "s3cret")
    with ScriptedServer(echo, plan=[400], key="s3cret") as server:
        chat = connect(None, server.url, cache=tmp_path / "calls.jsonl", **QUICK)
        (fault,) = ask(chat, "a")
        assert "***" in fault.reason and "s3cret" not in fault.reason
        ask(chat, "b")
        assert "s3cret" not in (tmp_path / "calls.jsonl").read_text() + json.dumps(server.calls)
    with ScriptedServer(echo, key="another") as server, pytest.raises(UserError) as error:
        connect(None, server.url, **QUICK)
    assert "not accepted" in str(error.value) and "s3cret" not in str(error.value)
    monkeypatch.delenv(API_KEY)
    with ScriptedServer(echo, key="another") as server, pytest.raises(UserError, match=f"{API_KEY} is not set"):
        connect(None, server.url, **QUICK)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"url": "localhost:8000"}, "no URL of a server"),
        ({"url": "http://me:pass@host/v1"}, r"//\*\*\*@host.*put a key into"),
        ({"url": "http://127.0.0.1:1"}, "cannot be reached"),
        ({"url": "http://127.0.0.1:1", "timeout": 0}, "timeout and deadline above 0"),
        ({"url": "http://127.0.0.1:1", "temperature": -1}, "temperature >= 0"),
        ({}, "name a model to ask"),
        ({"url": "http://127.0.0.1:1", "time_out": 3}, "no option 'time_out'; of a server it has api_key_env, concurrency"),
        ({"model": "m", "timeout": 3}, "'timeout' is an option of servers, and there is no url"),
    ],
)  # fmt: skip
def test_a_users_mistake_is_told_before_anything_is_asked(arguments, told):
    with pytest.raises(UserError, match=told) as error:
        connect(**arguments)
    assert "pass" not in str(error.value)


# ---- a model in this process


def test_a_local_model_answers_the_same_alone_and_in_company_and_from_the_ledger(make_policy, tmp_path):
    policy = make_policy()
    options = {"max_new_tokens": 6, "temperature": 1.0, "cache": tmp_path / "calls.jsonl"}
    together = ask(connect(policy, batch_size=2, **options), *"abcdefghijk")
    assert [r.text for r in together] == [
        ask(connect(policy, max_new_tokens=6, temperature=1.0), t)[0].text for t in "abcdefghijk"
    ]
    assert len({r.text for r in together}) > 1
    again = connect(policy, **options)
    assert ask(again, *"kjihgfedcba") == together[::-1] and again.asked == 0
    policy.model.get_input_embeddings().weight.data.mul_(1.5)
    assert ask(other := connect(policy, **options), "a") and other.asked == 1  # other weights


def test_what_a_local_model_cannot_read_is_a_fault(make_policy):
    """Its context is 64 tokens, and each character is one."""
    replies = ask(connect(make_policy(), max_new_tokens=4), "short", "long" * 30)
    assert replies[0].completion_tokens <= 4
    assert "fills the model's context of 64" in replies[1].reason


def test_a_reward_model_cannot_answer(make_policy):
    with pytest.raises(UserError, match="writes none"):
        connect(make_policy(role="reward"))
