"""``rlhf-fast serve`` as its clients see it: the real application on a real port, compared with the engine in process."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

httpx2 = pytest.importorskip("httpx2")
pytest.importorskip("starlette")

from rlhf_fast.errors import UserError
from rlhf_fast.models import load
from rlhf_fast.models.adapters import check_adapter, lora_config
from rlhf_fast.rollout import Request
from rlhf_fast.rollout.serving.answer import TextStream
from rlhf_fast.rollout.slots import SlotEngine
from tests.rollout.conftest import Served, qwen

PROMPTS = [[5], [7, 9, 11], [30, 31, 32, 33, 34, 35, 36, 37, 38], [12, 13], [20, 0, 21, 0, 22]]


def complete(served, **body):
    """POST /v1/completions; the answer's JSON."""
    body = {"logprobs": 0, "return_token_ids": True, "max_tokens": 12, **body}
    response = httpx2.post(f"{served.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def streamed(served, path="/v1/completions", **body):
    """The chunks of a stream; the last event must be [DONE]."""
    with httpx2.stream("POST", served.url + path, json={**body, "stream": True}, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def refused(served, status, path="/v1/completions", headers=None, content=None, **body):
    """The message of the error that a call is answered with."""
    data = {"content": content} if content is not None else {"json": body}
    response = httpx2.post(served.url + path, headers=headers, timeout=60, **data)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == status
    return error["message"]


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


def in_process(policy, *requests, role="policy"):
    return [[s.ids for s in group] for group in SlotEngine(policy, role=role).generate(requests)]


# ---- the contract of /v1/completions


def test_greedy_tokens_and_logprobs_are_those_of_the_engine_in_process(make_policy, serve):
    served = serve(make_policy())
    answer = complete(served, prompt=PROMPTS, temperature=0)
    groups = SlotEngine(make_policy()).generate([Request(p, max_new_tokens=12, temperature=0.0) for p in PROMPTS])
    assert [c["index"] for c in answer["choices"]] == list(range(len(PROMPTS)))
    for prompt, choice, (sample,) in zip(PROMPTS, answer["choices"], groups):
        assert choice["token_ids"] == sample.ids
        assert choice["prompt_token_ids"] == prompt
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(sample.logprobs, abs=1e-5)
        assert choice["finish_reason"] == sample.finish_reason
    assert answer["model"] == "base"
    assert answer["usage"]["prompt_tokens"] == sum(map(len, PROMPTS))
    assert answer["usage"]["completion_tokens"] == sum(len(s.ids) for (s,) in groups)


def test_a_seed_gives_the_same_samples_alone_and_among_many(make_policy, serve):
    """Four slots: 16 samples at once wait for each other; the engine in process has 128."""
    served = serve(make_policy())
    alone = complete(served, prompt=PROMPTS[1], n=3, seed=5)
    answers: dict[int, dict] = {}

    def ask(i):
        answers[i] = complete(served, prompt=PROMPTS[i % 5], n=2, seed=i)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    among = complete(served, prompt=PROMPTS[1], n=3, seed=5)
    for thread in threads:
        thread.join()
    assert [c["token_ids"] for c in alone["choices"]] == [c["token_ids"] for c in among["choices"]]
    expected = in_process(make_policy(), *(Request(PROMPTS[i % 5], n=2, seed=i, max_new_tokens=12) for i in range(8)))
    assert [[c["token_ids"] for c in answers[i]["choices"]] for i in range(8)] == expected


def test_sampling_options_reach_the_engine(make_policy, serve):
    served = serve(make_policy())
    options = {"temperature": 1.4, "top_p": 0.8, "top_k": 9, "min_p": 0.02, "repetition_penalty": 1.2}
    answer = complete(served, prompt=PROMPTS[2], n=4, seed=3, **options)
    (expected,) = in_process(make_policy(), Request(PROMPTS[2], n=4, seed=3, max_new_tokens=12, **options))
    assert [c["token_ids"] for c in answer["choices"]] == expected
    plain = complete(served, prompt=PROMPTS[2], n=4, seed=3)
    assert [c["token_ids"] for c in plain["choices"]] != expected


def test_stop_strings_and_ids_end_a_sample_and_the_text_ends_before_them(make_policy, serve, tokenizer):
    policy = make_policy()
    served = serve(policy)
    free = complete(served, prompt=PROMPTS[1], seed=11, max_tokens=20, temperature=1.5)["choices"][0]
    text = tokenizer.decode(free["token_ids"])
    stop = text[4:6]
    at = text.index(stop)
    cut = complete(served, prompt=PROMPTS[1], seed=11, max_tokens=20, temperature=1.5, stop=stop)["choices"][0]
    assert cut["token_ids"] == free["token_ids"][: at + 2]
    assert (cut["text"], cut["finish_reason"], cut["stop_reason"]) == (text[:at], "stop", stop)
    body = {"stop": [stop], "include_stop_str_in_output": True}
    kept = complete(served, prompt=PROMPTS[1], seed=11, max_tokens=20, temperature=1.5, **body)["choices"][0]
    assert kept["text"] == text[: at + 2]
    by_id = complete(
        served, prompt=PROMPTS[1], seed=11, max_tokens=20, temperature=1.5, stop_token_ids=[free["token_ids"][3]]
    )["choices"][0]
    assert by_id["token_ids"] == free["token_ids"][: free["token_ids"].index(free["token_ids"][3]) + 1]


def test_a_stream_adds_up_to_the_answer_in_one_piece(make_policy, serve):
    """Two prompts, three samples each, with a stop string; every chunk brings one token."""
    served = serve(make_policy())
    body = {"prompt": PROMPTS[:2], "n": 3, "seed": 2, "max_tokens": 15, "stop": ["a"], "temperature": 2.0}
    body |= {"logprobs": 0, "return_token_ids": True}
    whole = complete(served, **body)
    chunks = streamed(served, **body, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(p["text"] for p in parts) == choice["text"]
        assert [t for p in parts for t in p["token_ids"]] == choice["token_ids"]
        logprobs = [x for p in parts for x in p["logprobs"]["token_logprobs"]]
        assert logprobs == choice["logprobs"]["token_logprobs"]
        assert [p["finish_reason"] for p in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
        assert parts[-1]["stop_reason"] == choice["stop_reason"]
        assert parts[0]["prompt_token_ids"] == choice["prompt_token_ids"] and parts[-1]["prompt_token_ids"] is None


def test_a_prompt_of_text_is_tokenized_here(make_policy, serve, tokenizer):
    served = serve(make_policy())
    answer = complete(served, prompt=["hello ", "12+3="], temperature=0)
    ids = [tokenizer(text)["input_ids"] for text in ("hello ", "12+3=")]
    assert [c["prompt_token_ids"] for c in answer["choices"]] == ids
    expected = in_process(make_policy(), *(Request(p, temperature=0.0, max_new_tokens=12) for p in ids))
    assert [[c["token_ids"]] for c in answer["choices"]] == expected


def test_text_is_streamed_in_whole_characters_and_without_what_a_stop_string_cuts():
    """A tokenizer of bytes: "é" is two tokens. "ab" is held back while it may become "abc"."""

    class Bytes:
        def decode(self, ids, **options):
            return bytes(ids).decode(errors="replace")

    text = TextStream(Bytes(), stop=("abc",))
    assert [text.push([b]) for b in "é".encode()] == ["", "é"]
    assert [text.push([b]) for b in b"xab"] == ["x", "", ""]
    assert text.push(list(b"d")) == "abd"
    assert [text.push([b]) for b in b"ab"] == ["", ""]
    assert (text.push(list(b"c"), "stop"), text.stop_reason) == ("", "abc")
    cut = TextStream(Bytes())
    assert cut.push(list("é".encode()[:1]), "length") == "\ufffd"  # the end, so nothing more will complete it


# ---- chat


CHAT = "{% for m in messages %}{{ m.role[0] }}.{{ m.content }}#{% endfor %}{% if add_generation_prompt %}a.{% endif %}"


def test_chat_goes_through_the_template_and_streams_the_same_text(make_policy, serve, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    served = serve(make_policy())
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1="}]
    body = {"messages": messages, "max_tokens": 8, "temperature": 0, "logprobs": True, "return_token_ids": True}
    response = httpx2.post(f"{served.url}/v1/chat/completions", json=body, timeout=60).json()
    (choice,) = response["choices"]
    prompt = tokenizer("s.be brief#u.1+1=#a.")["input_ids"]
    assert choice["prompt_token_ids"] == prompt
    ((expected,),) = in_process(make_policy(), Request(prompt, temperature=0.0, max_new_tokens=8))
    assert choice["token_ids"] == expected
    text = tokenizer.decode(expected, skip_special_tokens=True)
    assert choice["message"] == {"role": "assistant", "content": text}
    assert len(choice["logprobs"]["content"]) == len(expected)
    deltas = [c["choices"][0]["delta"] for c in streamed(served, "/v1/chat/completions", **body)]
    assert deltas[0]["role"] == "assistant"
    assert "".join(d["content"] for d in deltas) == text


def test_chat_without_a_template_says_so(make_policy, serve):
    served = serve(make_policy())
    said = refused(served, 400, "/v1/chat/completions", messages=[{"role": "user", "content": "x"}])
    assert "no chat template; use /v1/completions" in said


# ---- adapters


def test_adapters_are_served_by_name_beside_the_base(make_policy, serve, adapter_folder):
    """Each answers as the engine in process under that adapter; the base is untouched by both."""
    folders = {name: adapter_folder(name, seed) for seed, name in enumerate(("red", "blue.v2"))}
    served = serve(make_policy())
    before = complete(served, prompt=PROMPTS[1], temperature=0)
    for name, folder in folders.items():
        body = {"lora_name": name, "lora_path": str(folder)}
        assert httpx2.post(f"{served.url}/v1/load_lora_adapter", json=body).text.startswith("Success")
    cards = httpx2.get(f"{served.url}/v1/models").json()["data"]
    assert [(c["id"], c["parent"]) for c in cards] == [("base", None), ("red", "base"), ("blue.v2", "base")]
    written = []
    for name, folder in folders.items():
        policy = make_policy()
        policy.adapters.load("own", folder, trainable=False)
        answer = complete(served, model=name, prompt=PROMPTS[1], temperature=0)
        ((expected,),) = in_process(policy, Request(PROMPTS[1], temperature=0.0, max_new_tokens=12), role="own")
        assert answer["model"] == name
        assert answer["choices"][0]["token_ids"] == expected
        written.append(expected)
    assert complete(served, prompt=PROMPTS[1], temperature=0)["choices"] == before["choices"]
    assert before["choices"][0]["token_ids"] not in written and written[0] != written[1]


def test_an_unloaded_adapter_is_gone_and_its_name_is_free_for_other_weights(make_policy, serve, adapter_folder):
    served = serve(make_policy())
    seen = []
    for seed in range(3):
        folder = adapter_folder(f"v{seed}", seed)
        httpx2.post(f"{served.url}/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": str(folder)})
        assert "loaded already" in refused(served, 400, "/v1/load_lora_adapter", lora_name="x", lora_path=str(folder))
        seen.append(complete(served, model="x", prompt=PROMPTS[1], temperature=0)["choices"][0]["token_ids"])
        httpx2.post(f"{served.url}/v1/unload_lora_adapter", json={"lora_name": "x"})
        assert "does not exist here; there are base" in refused(served, 404, model="x", prompt=[5])
    assert len({tuple(ids) for ids in seen}) == 3
    # one stays in memory until the next comes: a base that had adapters needs one
    assert len(served.service.models.policy.adapters.names) == 1


def test_a_folder_that_holds_no_adapter_of_this_base_is_refused(make_policy, serve, tmp_path, adapter_folder):
    served = serve(make_policy())
    path = "/v1/load_lora_adapter"
    said = refused(served, 400, path, lora_name="x", lora_path=str(tmp_path))
    assert f"{tmp_path}: no adapter_config.json on this machine" in said
    folder = adapter_folder("other", 0)
    (folder / "adapter_model.safetensors").write_bytes(b"broken")
    assert str(folder) in refused(served, 400, path, lora_name="x", lora_path=str(folder))
    assert "use 1 to 64 of" in refused(served, 400, path, lora_name="../x", lora_path=str(folder))
    assert "cannot be unloaded" in refused(served, 400, "/v1/unload_lora_adapter", lora_name="base")
    good = adapter_folder("good", 1)
    assert httpx2.post(served.url + path, json={"lora_name": "x", "lora_path": str(good)}).status_code == 200
    assert served.service.models.policy.adapters.names == [served.service.models.roles["x"]]


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_an_adapter_that_fits_is_told_from_one_of_another_model_before_anything_changes(
    make_policy, tmp_path, architecture
):
    """GPT-2 keeps its weights transposed; its own adapter fits all the same, and the other model's does not."""
    folders = {}
    for name in ("qwen2", "gpt2"):
        policy = make_policy(name, peft_config=lora_config(r=2))
        policy.adapters.save("policy", tmp_path / name)
        folders[name] = tmp_path / name
    policy = make_policy(architecture)
    before = set(dict(policy.model.named_modules()))
    check_adapter(folders.pop(architecture), policy.model)
    with pytest.raises(UserError, match=r"does not fit this model: .*lora_A.weight is \(2, .*no linear layer here"):
        check_adapter(*folders.values(), policy.model)
    assert set(dict(policy.model.named_modules())) == before


def test_an_adapter_of_a_wider_model_is_told_by_its_sizes(make_policy, tmp_path):
    make_policy(peft_config=lora_config(r=2)).adapters.save("policy", tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = next(k for k in tensors if "q_proj.lora_A" in k)
    save_file({**tensors, key: torch.zeros(2, 64)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"is \(2, 64\), and .*q_proj is a layer of 32 inputs and 32 outputs here"):
        check_adapter(tmp_path, make_policy().model)


def test_a_busy_adapter_does_not_starve_another(make_policy, serve, adapter_folder):
    """A client keeps the base busy without a pause; one request for an adapter is answered all the same."""
    served = serve(make_policy())
    body = {"lora_name": "x", "lora_path": str(adapter_folder("x", 0))}
    httpx2.post(f"{served.url}/v1/load_lora_adapter", json=body)
    done = threading.Event()

    def keep_busy(i):
        while not done.is_set():
            complete(served, prompt=PROMPTS[1], n=4, seed=i, max_tokens=20)

    threads = [threading.Thread(target=keep_busy, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.3)
        for _ in range(3):
            assert complete(served, model="x", prompt=PROMPTS[0], temperature=0)["model"] == "x"
    finally:
        done.set()
        for thread in threads:
            thread.join()


# ---- bad input


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "prompt must be a string, token ids, or an array of them, got None"),
        ({"prompt": []}, "prompt must be a string"),
        ({"prompt": [[]]}, "prompt 0 is empty"),
        ({"prompt": [5, "x"]}, "prompt must hold token ids, got 'x'"),
        ({"prompt": [5, 47]}, "prompt 0 holds token id 47; ids run from 0 to 46"),
        ({"prompt": [-1]}, "token id -1"),
        ({"prompt": [True]}, "prompt must hold token ids, got True"),
        ({"prompt": [5] * 64}, "prompt 0 has 64 tokens, which fills the model's context of 64"),
        ({"prompt": [5], "max_tokens": 65}, "max_tokens is 65; this server gives at most 64"),
        ({"prompt": [5], "max_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"prompt": [5], "max_tokens": "9"}, "max_tokens must be of type int, got '9'"),
        ({"prompt": [5], "n": 0}, "n must be at least 1, got 0"),
        ({"prompt": [5], "n": 10**9}, "1000000000 samples in one call; at most 1024"),
        ({"prompt": [5], "temperature": -1}, "temperature must be 0 (greedy) or more, and finite, got -1.0"),
        ({"prompt": [5], "temperature": 10**400}, "temperature is larger than any float"),
        ({"prompt": [5], "top_p": 2}, "top_p must be above 0 and at most 1"),
        ({"prompt": [5], "temperature": True}, "temperature must be of type int or float, got True"),
        ({"prompt": [5], "temprature": 1}, "unknown field 'temprature'; did you mean temperature?"),
        ({"prompt": [5], "echo": True}, "echo is True, which this server cannot do; leave it out"),
        ({"prompt": [5], "logprobs": 5}, "logprobs is 5; this server gives that of the sampled token only"),
        ({"prompt": [5], "stop": ""}, "stop must be a tuple of non-empty strings"),
        ({"prompt": [5], "stop": [3]}, "stop must be a string or an array of strings, got [3]"),
        ({"prompt": [5], "seed": 2**70, "n": 1}, "seed must be from -2^63 to 2^63 - 1"),
    ],
)
def test_bad_input_is_answered_by_one_sentence_in_openais_form(served_once, body, said):
    message = refused(served_once, 400, **body)
    assert said in message and "\n" not in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "the body is no JSON"),
        (b"[" * 100_000, "the body is no JSON"),
        (b"[]", "must be a JSON object, got list"),
    ],
)
def test_a_body_that_is_no_object_is_refused(served_once, content, said):
    assert said in refused(served_once, 400, content=content)


def test_unknown_paths_and_methods_are_answered_in_openais_form(served_once):
    assert "POST /v1/embeddings: Not Found" in refused(served_once, 404, "/v1/embeddings")
    assert httpx2.get(f"{served_once.url}/v1/completions").status_code == 405


@pytest.fixture(scope="module")
def served_once(tokenizer):
    """One server for all bad input; after it, a good request must still be answered as ever."""
    pytest.importorskip("uvicorn")
    policy = load(qwen(), tokenizer=tokenizer, device="cpu")
    served = Served(policy).start()
    before = complete(served, prompt=[5], temperature=0)["choices"]
    yield served
    assert complete(served, prompt=[5], temperature=0)["choices"] == before
    served.stop()


def test_a_request_that_the_cache_has_no_room_for_is_refused(make_policy, serve):
    served = serve(make_policy(), cache_tokens=20)
    assert "the cache has room for 20" in refused(served, 400, prompt=[5], max_tokens=20)
    assert complete(served, prompt=[[5], [6], [7]], max_tokens=15)["choices"]


# ---- who may call


def test_a_page_that_rebinds_a_name_or_comes_from_elsewhere_is_refused(make_policy, serve):
    served = serve(make_policy())
    port = served.url.rpartition(":")[2]
    assert "answers to localhost only" in refused(served, 403, headers={"Host": f"evil.example:{port}"}, prompt=[5])
    assert "page of http://evil.example" in refused(served, 403, headers={"Origin": "http://evil.example"}, prompt=[5])
    assert "is no place" in refused(served, 400, headers={"Host": "[::1"}, prompt=[5])
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
        same = {"Host": host, "Origin": f"http://{host}"}
        response = httpx2.post(f"{served.url}/v1/completions", json={"prompt": [5]}, headers=same, timeout=60)
        assert response.status_code == 200


def test_an_api_key_is_wanted_on_every_route(make_policy, serve):
    served = serve(make_policy(), api_key="secret")
    for path in ("/v1/completions", "/v1/models", "/health", "/sleep", "/v1/load_lora_adapter", "/nowhere"):
        assert "wants its API key" in refused(served, 401, path)
        assert "wants its API key" in refused(served, 401, path, headers={"Authorization": "Bearer secreT"})
    key = {"Authorization": "Bearer secret", "Host": "gpu-box:8000"}
    assert httpx2.get(f"{served.url}/v1/models", headers=key).status_code == 200


def test_a_body_beyond_the_limit_is_refused_with_and_without_a_length(make_policy, serve):
    served = serve(make_policy(), wrap=lambda guard: setattr(guard, "max_body", 1000) or guard)
    assert "larger than 1000 bytes" in refused(served, 413, prompt=[5] * 2000)
    chunks = (b" " * 300 for _ in range(4))
    assert "larger than 1000 bytes" in refused(served, 413, content=chunks)


def test_more_requests_than_may_wait_are_turned_away(make_policy, serve):
    served = serve(make_policy())
    served.worker.max_waiting = 2
    assert "2 requests wait already" in refused(served, 429, prompt=[[5]] * 20)
    assert complete(served, prompt=[5])["choices"]


# ---- sleep, disconnects, the end


def test_asleep_it_holds_no_keys_and_values_and_says_so(make_policy, serve):
    served = serve(make_policy())
    before = complete(served, prompt=[5], temperature=0)["choices"]
    assert served.worker.engine.cache.nbytes > 0
    assert httpx2.post(f"{served.url}/sleep?level=1").status_code == 200
    assert served.worker.engine.cache.nbytes == 0
    assert httpx2.get(f"{served.url}/is_sleeping").json() == {"is_sleeping": True}
    assert "POST /wake_up first" in refused(served, 503, prompt=[5])
    assert httpx2.post(f"{served.url}/wake_up").status_code == 200
    assert httpx2.post(f"{served.url}/reset_prefix_cache").json() == {"success": True}
    assert complete(served, prompt=[5], temperature=0)["choices"] == before


@pytest.mark.parametrize("stream", [False, True])
def test_work_for_a_client_that_left_is_dropped(make_policy, serve, stream):
    """1,000 samples in four slots would take minutes; most of them are never begun."""
    served = serve(make_policy())
    jobs, submit = [], served.worker.submit
    served.worker.submit = lambda job: (jobs.append(job), submit(job))
    body, url = {"prompt": [5], "n": 1000, "max_tokens": 60, "stream": stream}, f"{served.url}/v1/completions"
    if stream:
        with httpx2.stream("POST", url, json=body, timeout=60) as response:
            assert next(response.iter_lines()).startswith("data: {")
    else:
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(url, json=body, timeout=0.5)
    (job,) = jobs
    wait_until(lambda: not served.worker.running)
    assert job.cancelled and job.left > 500
    assert complete(served, prompt=[5])["choices"]


def test_an_engine_that_fails_answers_500_and_goes_on(make_policy, serve):
    policy = make_policy()
    served = serve(policy)
    weight = policy.model.get_output_embeddings().weight
    kept = weight.detach().clone()
    before = complete(served, prompt=[5], temperature=0)["choices"]
    weight.data.fill_(float("nan"))
    assert "logits are not finite" in refused(served, 500, prompt=[5])
    wait_until(lambda: not served.worker.running)
    assert served.worker.engine.cache.nbytes == 0, "the memory of what failed, which may be all there is"
    weight.data.copy_(kept)
    assert complete(served, prompt=[5], temperature=0)["choices"] == before


def test_told_to_stop_it_finishes_what_runs_and_ends_its_thread(make_policy, serve):
    served = serve(make_policy())
    answers = []
    thread = threading.Thread(target=lambda: answers.append(complete(served, prompt=PROMPTS, n=8, seed=1)))
    thread.start()
    wait_until(lambda: served.worker.running)
    served.worker.drain(30)
    assert "shutting down" in refused(served, 503, prompt=[5])
    served.server.should_exit = True
    thread.join(30)
    served.thread.join(30)
    assert len(answers[0]["choices"]) == 40
    assert not served.worker.is_alive() and served.worker.engine.cache.nbytes == 0


def test_what_cannot_be_finished_in_time_is_answered_all_the_same(make_policy, serve):
    served = serve(make_policy())
    said = []
    thread = threading.Thread(target=lambda: said.append(refused(served, 503, prompt=[5], n=1000, max_tokens=60)))
    thread.start()
    wait_until(lambda: served.worker.running)
    served.worker.drain(0.1)
    thread.join(30)
    assert "had no time to finish" in said[0]


# ---- many at once


async def ask_all(url, bodies):
    """All requests at once, each on a connection of its own."""
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(limits=limits, timeout=300) as client:
        answers = await asyncio.gather(*(client.post(f"{url}/v1/completions", json=body) for body in bodies))
    assert {a.status_code for a in answers} == {200}
    return [a.json() for a in answers]


@pytest.mark.parametrize("count", [64, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_concurrent_requests_each_get_their_own_answer(make_policy, serve, count):
    """Every request has a seed and a prompt of its own, so an answer that went to another would be seen."""
    served = serve(make_policy(), slots=32)
    prompts = [[3 + i % 40, 3 + i // 40, 5] for i in range(count)]
    bodies = [
        {"prompt": p, "seed": i, "max_tokens": 2 + i % 7, "return_token_ids": True, "temperature": 1.5}
        for i, p in enumerate(prompts)
    ]
    answers = asyncio.run(ask_all(served.url, bodies))
    expected = in_process(
        make_policy(),
        *(Request(p, seed=i, max_new_tokens=2 + i % 7, temperature=1.5) for i, p in enumerate(prompts)),
    )
    assert [a["choices"][0]["prompt_token_ids"] for a in answers] == prompts
    assert [[a["choices"][0]["token_ids"]] for a in answers] == expected
    served.stop()
    assert not served.worker.is_alive()


def test_a_chat_without_a_number_of_tokens_gets_what_fits_beside_its_prompt(make_policy, serve, tokenizer, monkeypatch):
    """60 tokens of room, of which a prompt takes twice its own while its sample begins."""
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    served = serve(make_policy(), cache_tokens=60)
    messages = [{"role": "user", "content": "a" * 15}]
    body = {"messages": messages, "seed": 1}
    answer = httpx2.post(f"{served.url}/v1/chat/completions", json=body, timeout=60).json()
    assert answer["usage"]["prompt_tokens"] > 60 / 4, answer
    assert answer["usage"]["completion_tokens"] <= 60 - 2 * answer["usage"]["prompt_tokens"]


def test_clients_hear_of_a_failure_whose_memory_cannot_be_given_back(make_policy, serve, monkeypatch):
    served = serve(make_policy())

    def fails(*_):
        raise RuntimeError("the GPU is gone")

    monkeypatch.setattr(served.worker.engine, "session", fails)
    monkeypatch.setattr(served.worker.engine, "sleep", fails)
    for _ in range(2):
        assert "the GPU is gone" in refused(served, 500, prompt=[5])
    monkeypatch.undo()
    assert complete(served, prompt=[5])["choices"]
