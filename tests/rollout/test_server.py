"""Rollouts from servers: the real application behind a middleware that breaks what it says, and servers that die."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import re
import sys
import threading
from collections import deque
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("starlette")

from rlhf_fast.errors import RolloutError, UserError
from rlhf_fast.models.adapters import lora_config
from rlhf_fast.rollout import (
    CAPABILITIES,
    Engine,
    GenerateEngine,
    Request,
    ServerEngine,
    SlotEngine,
    awake,
    check_logprobs,
)
from rlhf_fast.rollout.colocate import ColocatedEngine, engine_arguments, read_output
from rlhf_fast.rollout.completions import Unusable, completion_body, read_completion, sampling_fields

PROMPTS = [[5], [7, 9, 11], [30, 31, 32, 33, 34, 35, 36, 37, 38], [12, 13], [20, 0, 21, 0, 22]]
QUICK = {"backoff": 0.01, "patience": 0.0, "timeout": 30.0}


def requests(count=5, **options):
    options = {"n": 2, "max_new_tokens": 8, "temperature": 1.3, **options}
    return [Request(PROMPTS[i % 5], seed=i, **options) for i in range(count)]


def ids(groups):
    return [[s.ids for s in group] for group in groups]


NEVER = object()  # no answer


class Faults:
    """Stands before the application and breaks answers of ``/v1/completions`` as planned: one entry per call; ``always`` is
    for those that no plan is left for. A status, NEVER, what changes the answer, what delays it, or None."""

    def __init__(self, app):
        self.app, self.plan, self.always = app, deque(), None
        self.calls = []  # bodies that arrived
        self.on_call = lambda count: None

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["path"] != "/v1/completions":
            await self.app(scope, receive, send)
            return
        fault = self.plan.popleft() if self.plan else self.always
        body = await receive()
        assert not body.get("more_body")
        self.calls.append(json.loads(body["body"]))
        self.on_call(len(self.calls))
        first, answer = iter([body]), []

        async def replay():
            return next(first, None) or await receive()

        async def collect(message):
            answer.append(message)

        if fault is NEVER:
            while (await receive())["type"] != "http.disconnect":
                pass
        elif isinstance(fault, int):
            await _send(send, fault, {"error": {"message": "broken on purpose"}})
        elif fault is None or inspect.iscoroutinefunction(fault):
            await (fault() if fault else asyncio.sleep(0))
            await self.app(scope, replay, send)
        else:
            await self.app(scope, replay, collect)
            await _send(send, 200, fault(json.loads(answer[1]["body"])))


async def _send(send, status, what):
    body = what if isinstance(what, bytes) else json.dumps(what).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def change(**fields):
    """A fault: other values in every choice."""
    return lambda answer: {**answer, "choices": [{**c, **fields} for c in answer["choices"]]}


def shorter(answer):
    for choice in answer["choices"]:
        choice["logprobs"]["token_logprobs"].pop()
    return answer


BROKEN = {
    "answered 500 to /v1/completions (broken on purpose)": 500,
    "answered 503": 503,
    "answered with malformed JSON": lambda answer: b'{"choices": [',
    "answered without 'model'": lambda answer: {},
    "tokens with": shorter,
    "gave 1 samples where 2 were asked": lambda answer: {**answer, "choices": answer["choices"][:1]},
    "gave 4 samples where 2 were asked": lambda answer: {**answer, "choices": answer["choices"] * 2},
    "answered as 'policy-v0' where 'base' was asked": lambda answer: {**answer, "model": "policy-v0"},
    "continued another prompt": change(prompt_token_ids=[1, 2]),
    "answered without 'token_ids'": lambda a: {**a, "choices": [{"index": i, "text": ""} for i in range(2)]},
    "ended a sample with 'abort'": change(finish_reason="abort"),
    "gave no answer within": NEVER,
}


@pytest.fixture
def faulty(make_policy, serve):
    """faulty() -> (Served, its Faults)"""

    def start(**options):
        kept = []
        served = serve(make_policy(), wrap=lambda app: kept.append(Faults(app)) or kept[0], **options)
        return served, kept[0]

    return start


# ---- the contract


def test_the_engine_fits_the_protocol_and_gives_the_samples_of_the_engine_in_process(make_policy, serve):
    engine = ServerEngine(serve(make_policy()).url + "/v1/", **QUICK)
    assert isinstance(engine, Engine)
    assert engine.capabilities == CAPABILITIES - {"sleep"}
    for options in ({}, {"temperature": 0.0, "n": 1}, {"stop": ("a",), "stop_ids": (9,)}, {"top_k": 5, "top_p": 0.9}):
        mine, theirs = engine.generate(requests(**options)), SlotEngine(make_policy()).generate(requests(**options))
        assert ids(mine) == ids(theirs)
        for a, b in zip(itertools.chain(*mine), itertools.chain(*theirs)):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
            assert a.finish_reason == b.finish_reason
    assert engine.generate([]) == []


def test_unseeded_requests_follow_torchs_global_seed(make_policy, serve):
    engine = ServerEngine(serve(make_policy()).url, **QUICK)
    torch.manual_seed(7)
    first, second = (ids(engine.generate([Request([5], max_new_tokens=20)])) for _ in range(2))
    torch.manual_seed(7)
    assert ids(engine.generate([Request([5], max_new_tokens=20)])) == first != second


def test_a_seed_and_a_sample_are_the_same_tokens_on_every_engine(make_policy, serve):
    """Also numbers that the 63 bits of a server's seed cannot hold: each is some number that they can."""
    remote = ServerEngine(serve(make_policy()).url, **QUICK)
    asked = [Request([5], n=3, max_new_tokens=20, seed=seed) for seed in (7, -1, 2**63 + 7, 2**64 + 9)]
    mine, *others = (ids(e.generate(asked)) for e in (SlotEngine(make_policy()), GenerateEngine(make_policy()), remote))
    assert others == [mine, mine]
    assert mine[2] == mine[0] and mine[1] != mine[0]


def test_inside_an_event_loop_it_works_too(make_policy, serve):
    """As in a notebook, whose cells run inside a loop."""
    url = serve(make_policy()).url

    async def cell():
        return ids(ServerEngine(url, **QUICK).generate(requests()))

    assert asyncio.run(cell()) == ids(SlotEngine(make_policy()).generate(requests()))


def test_every_sampling_setting_is_sent_so_that_no_default_of_the_server_counts():
    request = Request([5, 6], n=2, max_new_tokens=7, temperature=0.5, stop=("x",), stop_ids=(3,), seed=2**64 + 9)
    assert completion_body(request, "m", request.seed, stop_ids=(0, 3)) == {
        "model": "m",
        "prompt": [5, 6],
        "return_token_ids": True,
        "stream": False,
        "n": 2,
        "seed": 9,
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop": ["x"],
        "stop_token_ids": [3, 0],
        "include_stop_str_in_output": True,
        "logprobs": 0,
    }


# ---- faults


@pytest.mark.parametrize("said", BROKEN)
def test_a_broken_answer_is_asked_again_and_no_prompt_is_lost_or_repeated(faulty, make_policy, said):
    """Two of the five prompts are answered with the fault; each is sent once more, and nothing else is."""
    served, faults = faulty()
    engine = ServerEngine(served.url, **{**QUICK, "timeout": 1.0 if BROKEN[said] is NEVER else 30.0})
    faults.plan.extend([None, BROKEN[said], None, BROKEN[said]])
    assert ids(engine.generate(requests())) == ids(SlotEngine(make_policy()).generate(requests()))
    sent = sorted(call["seed"] for call in faults.calls)
    assert len(sent) == 7 and sorted(set(sent)) == list(range(5))


@pytest.mark.parametrize("said", BROKEN)
def test_what_stays_broken_is_told_with_the_url_and_the_prompts_left(faulty, said):
    """Prompts 0 and 1 are answered, then the server breaks for good."""
    served, faults = faulty()
    timeout = 0.5 if BROKEN[said] is NEVER else 30.0
    engine = ServerEngine(served.url, max_concurrency=1, retries=1, **{**QUICK, "timeout": timeout})
    faults.plan.extend([None, None])
    faults.always = BROKEN[said]
    with pytest.raises(RolloutError) as error:
        engine.generate(requests())
    message = str(error.value)
    assert message.startswith(f"rollout: no samples for prompts 2, 3, 4 of 5: {served.url} ")
    assert said in message and "after 2 tries" in message and "start it again" in message and "\n" not in message


def test_a_request_that_the_server_refuses_is_not_asked_again(faulty):
    served, faults = faulty()
    engine = ServerEngine(served.url, **QUICK)
    with pytest.raises(UserError, match=re.escape(f"{served.url} answered 400 to /v1/completions (max_tokens is 65")):
        engine.generate(requests(1, max_new_tokens=65))
    assert len(faults.calls) == 1


def test_a_server_that_dies_in_a_rollout_is_replaced_by_the_other(faulty, make_policy):
    """The first of two is killed at its third call, while others are on their way: every prompt is answered, once."""
    (first, faults), (second, others) = faulty(), faulty()
    engine = ServerEngine([first.url, second.url], max_concurrency=8, **QUICK)
    killed = threading.Event()
    faults.on_call = lambda count: count == 3 and (threading.Thread(target=first.kill).start(), killed.set())
    assert ids(engine.generate(requests(40))) == ids(SlotEngine(make_policy()).generate(requests(40)))
    assert killed.is_set()
    answered = [call["seed"] for call in others.calls]
    assert len(answered) == len(set(answered)) > 30  # the one that lives answered each of its prompts once


def test_when_the_only_server_dies_the_prompts_left_are_named(faulty):
    served, faults = faulty()
    engine = ServerEngine(served.url, max_concurrency=1, retries=2, **QUICK)
    faults.on_call = lambda count: count == 3 and threading.Thread(target=served.kill).start()
    faults.plan.extend([None, None, NEVER])
    faults.always = 503  # a server that dies slowly answers nobody any more
    # and may still say that it is about to
    came = "(cannot be reached|gave no answer|shutting down|answered 503)"
    with pytest.raises(RolloutError, match=rf"no samples for prompts 2, 3, 4, 5, 6 and 13 more of 20: .*{came}"):
        engine.generate(requests(20))


def test_servers_share_the_work_by_what_they_owe(faulty):
    """The first answers nothing until the second was asked 18 times: of 24 prompts it gets two until then."""
    (slow, faults), (fast, others) = faulty(), faulty()
    engine = ServerEngine([slow.url, fast.url], max_concurrency=4, **QUICK)

    async def wait():
        assert len(faults.calls) <= 2 or len(others.calls) >= 18
        while len(others.calls) < 18:
            await asyncio.sleep(0.001)

    faults.always = wait
    assert len(engine.generate(requests(24))) == 24
    assert len(faults.calls) + len(others.calls) == 24
    assert 2 <= len(faults.calls) <= 6


def test_no_more_requests_are_in_flight_than_allowed(faulty):
    served, _ = faulty()
    engine = ServerEngine(served.url, max_concurrency=3, **QUICK)
    most, waiting = [], served.worker.submit
    served.worker.submit = lambda job: (most.append(len(served.worker.running)), waiting(job))
    engine.generate(requests(20, n=1, max_new_tokens=4))
    assert len(most) == 20 and max(most) <= 3


# ---- weights


def test_an_update_is_visible_in_the_next_request_under_a_name_of_its_own(make_policy, serve, adapter_folder):
    served = serve(make_policy())
    engine = ServerEngine(served.url, adapter_name="run", **QUICK)
    for version in range(3):
        folder = adapter_folder(f"v{version}", version)
        engine.update(folder, version)
        policy = make_policy()
        policy.adapters.load("own", folder, trainable=False)
        mine = engine.generate(requests())
        assert ids(mine) == ids(SlotEngine(policy, role="own").generate(requests()))
        assert {s.policy_version for group in mine for s in group} == {version}
        assert list(served.service.models.roles) == ["base", f"run-v{version}"]  # the version before is gone


def test_a_version_left_over_from_an_interrupted_run_is_replaced(make_policy, serve, adapter_folder):
    """A resumed run comes to the same step with other weights: the name must not stand for the old ones."""
    served = serve(make_policy())
    ServerEngine(served.url, **QUICK).update(adapter_folder("old", 0), 3)
    engine = ServerEngine(served.url, **QUICK)
    engine.update(adapter_folder("new", 1), 3)
    policy = make_policy()
    policy.adapters.load("own", adapter_folder("new", 1), trainable=False)
    assert ids(engine.generate(requests())) == ids(SlotEngine(policy, role="own").generate(requests()))


def test_a_server_that_cannot_load_an_adapter_is_left_out_until_it_can(make_policy, serve, adapter_folder, caplog):
    one, two = serve(make_policy()), serve(make_policy())
    engine = ServerEngine([one.url, two.url], retries=1, **QUICK)
    two.kill()
    engine.update(adapter_folder("a", 0), 1)
    assert f"{two.url} is left out until the next update" in caplog.text
    assert [server.ready for server in engine.servers] == [True, False]
    engine.reset_cache()
    probed = engine.probe(Request([5], max_new_tokens=5))
    assert list(probed) == [one.url] and not engine.servers[1].ready  # only an update brings it back
    assert len(engine.generate(requests())) == 5
    one.kill()
    with pytest.raises(RolloutError, match=f"{one.url} cannot be reached.*; {re.escape('rollout: ' + two.url)} cannot"):
        engine.update(adapter_folder("a", 0), 2)


def test_a_folder_that_the_server_cannot_read_is_told_with_what_to_do(make_policy, serve, tmp_path):
    served = serve(make_policy())
    engine = ServerEngine(served.url, **QUICK)
    with pytest.raises(UserError, match=f"no adapter_config.json on this machine.*let it read {tmp_path}"):
        engine.update(tmp_path, 1)
    with pytest.raises(UserError, match="pass the folder of an adapter"):
        engine.update(None, 1)


def test_it_sleeps_and_wakes_all_servers_only_where_that_is_allowed(make_policy, serve):
    served = [serve(make_policy()) for _ in range(2)]
    engine = ServerEngine([s.url for s in served], allow_sleep=True, **QUICK)
    assert engine.capabilities == CAPABILITIES
    engine.generate(requests())
    engine.sleep()
    assert all(s.worker.asleep and s.worker.engine.cache.nbytes == 0 for s in served)
    engine.wake()
    engine.reset_cache()
    assert len(engine.generate(requests())) == 5


class LostSleep:
    """Stands before the application and loses its first answers to /sleep, which it carries out all the same."""

    def __init__(self, app, losses):
        self.app, self.losses = app, losses

    async def __call__(self, scope, receive, send):
        async def nowhere(message):
            pass

        if scope["type"] != "http" or scope["path"] != "/sleep" or not self.losses:
            await self.app(scope, receive, send)
            return
        self.losses -= 1
        await self.app(scope, receive, nowhere)
        await _send(send, 502, {"error": {"message": "lost on the way"}})


def test_a_server_that_missed_the_answer_to_sleep_is_woken_and_used_again(make_policy, serve, caplog):
    one = serve(make_policy(), wrap=lambda app: LostSleep(app, losses=2))
    two = serve(make_policy())
    engine = ServerEngine([one.url, two.url], allow_sleep=True, retries=1, **QUICK)
    engine.sleep()
    assert [s.ready for s in engine.servers] == [False, True] and one.worker.asleep
    assert f"{one.url} is left out until the next update: answered 502 to /sleep (lost on the way)" in caplog.text
    engine.wake()
    assert [s.ready for s in engine.servers] == [True, True] and not one.worker.asleep
    two.kill()
    assert len(engine.generate(requests())) == 5


def test_when_no_server_is_in_use_the_prompts_and_the_servers_are_named(make_policy, serve):
    """All servers missed a sync: there is nobody to ask, and nothing to wait for."""
    urls = [serve(make_policy()).url for _ in range(2)]
    engine = ServerEngine(urls, allow_sleep=True, **QUICK)
    for server in engine.servers:
        server.ready = False
    said = f"no server is in use, as {urls[0]}, {urls[1]} failed at the last sync; .*start it again"
    with pytest.raises(RolloutError, match=f"^rollout: no samples for prompts 0, 1, 2, 3, 4 of 5: {said}$"):
        engine.generate(requests())
    with pytest.raises(RolloutError, match=said):
        engine.probe(Request([5]))
    engine.sleep()  # who is left out is left alone


def test_what_goes_wrong_in_a_rollout_is_told_and_not_that_the_server_cannot_sleep_either(faulty):
    served, faults = faulty()
    engine = ServerEngine(served.url, allow_sleep=True, retries=0, **QUICK)
    faults.always = 500

    def rollout():
        try:
            engine.generate(requests())
        finally:
            served.kill()

    with pytest.raises(RolloutError, match="no samples for prompts 0, 1, 2, 3, 4 of 5"), awake(engine):
        rollout()


# ---- the start


def test_a_url_where_nobody_answers_is_told_with_what_to_do():
    with pytest.raises(UserError, match=r"http://127.0.0.1:9 cannot be reached .*start the server"):
        ServerEngine("http://127.0.0.1:9", **QUICK)
    with pytest.raises(UserError, match="'127.0.0.1:9' is no server's URL; such as http://127.0.0.1:8000"):
        ServerEngine(["127.0.0.1:9"], **QUICK)


def test_servers_of_another_model_or_with_another_key_are_refused(make_policy, serve):
    one, two = serve(make_policy()), serve(make_policy(), name="other")
    with pytest.raises(UserError, match=f"{two.url} does not hold the model 'base', only other"):
        ServerEngine([one.url, two.url], **QUICK)
    locked = serve(make_policy(), api_key="secret")
    assert ServerEngine(locked.url, api_key="secret", **QUICK).model == "base"
    with pytest.raises(UserError, match="401"):
        ServerEngine(locked.url, **QUICK)


# ---- the canary


def test_the_canary_is_silent_where_both_sides_agree_and_sings_where_they_do_not(make_policy, serve, adapter_folder):
    """fp32 on both sides: they agree to 1e-5 at any temperature. The base without the adapter is off by far more."""
    engine = ServerEngine(serve(make_policy()).url, **QUICK)
    policy = make_policy(peft_config=lora_config(r=4))
    for temperature in (0.7, 1.0):
        assert check_logprobs(engine, policy, PROMPTS[1], temperature=temperature, tolerance=1e-4) < 1e-5
    assert check_logprobs(SlotEngine(policy), policy, PROMPTS[1], temperature=1.0, tolerance=1e-4) < 1e-5
    engine.update(adapter_folder("trained", 0), 1)
    with pytest.raises(UserError, match=f"{engine.servers[0].url} differ from the trainer's by .* nats per token"):
        check_logprobs(engine, policy, PROMPTS[1], temperature=1.0, tolerance=0.1)


def test_the_canary_drops_nothing_and_leaves_every_module_in_its_mode(make_policy, adapter_folder):
    """A policy in the middle of training with dropout, which the engine does not have: both still agree."""
    policy = make_policy(peft_config=lora_config(r=4, dropout=0.5))
    trained = make_policy()
    trained.adapters.load("own", adapter_folder("trained", 0), trainable=False)
    for key, parameter in policy.adapters.parameters("policy").items():
        parameter.data.copy_(trained.adapters.parameters("own")[key])
    policy.train()
    frozen = policy.model.get_decoder().norm.eval()
    assert check_logprobs(SlotEngine(policy), policy, PROMPTS[1], temperature=1.0, tolerance=1e-4) < 1e-5
    assert all(module.training is (module is not frozen) for module in policy.modules())


def test_the_canary_knows_raw_log_probabilities(make_policy, faulty):
    """vLLM's default reports those at temperature 1, whatever it samples at."""
    served, faults = faulty()
    policy, cold = make_policy(), Request(PROMPTS[1], max_new_tokens=16, temperature=0.5, seed=0)
    (sample,) = SlotEngine(policy).generate([cold])[0]
    from rlhf_fast.data.batch import Example, TokenBatch

    example = Example([*PROMPTS[1], *sample.ids], [False] * 3 + [True] * len(sample.ids))
    raw = policy.logprobs(TokenBatch.pack([example]))[3:].tolist()
    faults.always = change(logprobs={"token_logprobs": raw})
    engine = ServerEngine(served.url, **QUICK)
    with pytest.raises(
        UserError, match="temperature 0.5 and reports .* at 1; start vLLM with --logprobs-mode processed_"
    ):
        check_logprobs(engine, policy, PROMPTS[1], temperature=0.5, tolerance=1e-3)


# ---- in-process vLLM, as far as it goes without it


def test_vllms_arguments_are_those_of_the_policy(make_policy):
    policy = make_policy(peft_config=lora_config(r=12))
    policy.model.name_or_path = "some/base"
    assert engine_arguments(policy, True, 0.4, 7) == {
        "model": "some/base",
        "dtype": "float32",
        "seed": 7,
        "gpu_memory_utilization": 0.4,
        "enable_lora": True,
        "max_lora_rank": 16,
        "max_loras": 1,
        "enable_sleep_mode": True,
        "max_model_len": 64,
        "logprobs_mode": "processed_logprobs",
    }
    with pytest.raises(UserError, match="this run trains all weights: add use_peft"):
        engine_arguments(make_policy(), False, 0.3, 0)
    assert sampling_fields(Request([5], n=3, stop_ids=(4,)), 1, (0,))["stop_token_ids"] == [4, 0]


def test_without_vllm_it_says_what_to_do(make_policy, monkeypatch):
    policy = make_policy(peft_config=lora_config(r=4))
    policy.model.name_or_path = "some/base"
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="vllm_mode colocate needs vLLM .*or leave use_vllm out"):
        ColocatedEngine(policy)


def test_vllms_output_becomes_samples_in_order():
    """Each token's entry holds the sampled token, and maybe the likeliest."""
    entry = [{7: SimpleNamespace(logprob=-0.5), 9: SimpleNamespace(logprob=-0.1)}, {0: SimpleNamespace(logprob=-2.0)}]
    parts = [
        SimpleNamespace(index=1, token_ids=(7, 0), logprobs=entry, finish_reason="stop"),
        SimpleNamespace(index=0, token_ids=(9,), logprobs=entry[:1], finish_reason="length"),
    ]
    samples = read_output(SimpleNamespace(outputs=parts), version=4)
    assert [(s.ids, s.logprobs, s.finish_reason, s.policy_version) for s in samples] == [
        ([9], [-0.1], "length", 4),
        ([7, 0], [-0.5, -2.0], "stop", 4),
    ]


def test_an_answer_with_impossible_numbers_is_unusable():
    choice = {"index": 0, "token_ids": [5], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "stop"}
    request = Request([3])
    assert read_completion({"model": "m", "choices": [choice]}, request, "m", 2)[0].policy_version == 2
    for broken in ({"token_ids": [-5]}, {"logprobs": {"token_logprobs": [0.7]}}, {"token_ids": ["5"]}):
        with pytest.raises(Unusable, match="that are none"):
            read_completion({"model": "m", "choices": [{**choice, **broken}]}, request, "m", 2)
