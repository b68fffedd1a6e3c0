"""`rlhf-fast label` as a process: clicks that survive kill -9, exports, responses written on the spot, and mistakes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time

import pytest

httpx2 = pytest.importorskip("httpx2")
pytest.importorskip("uvicorn")

from rlhf_fast.cli import main
from rlhf_fast.commands import label as command
from rlhf_fast.models.scratch import new_model


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "data.jsonl", [{"prompt": f"질문 {i}", "responses": ["예", "아니오"]} for i in range(6)])


class Clicks:
    """Somebody at the page that ``url`` leads to, who prefers one response."""

    def __init__(self, url, annotator="kim"):
        self.url, self.annotator = url, annotator
        self.headers = {"Origin": url.rsplit("/", 2)[0]}

    def items(self):
        query = f"{self.url}api/items?annotator={self.annotator}&from=0&count=20"
        return httpx2.get(query, timeout=60).json()["items"]

    def prefer(self, item, best, **fields):
        ranks = [1 if text == best else 2 for text in item["responses"]]
        body = {"annotator": self.annotator, "item": item["id"], "ranks": ranks, "margin": 2, "done": True, **fields}
        answer = httpx2.post(f"{self.url}api/label", json=body, headers=self.headers, timeout=60)
        assert answer.status_code == 200, answer.text


class Process:
    """The command in a process of its own, on a free port: a fork of this one, which has imported torch already."""

    def __init__(self, *arguments):
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:  # never returns
            os.dup2(writing, 1)
            sys.stdout = os.fdopen(1, "w")
            os._exit(main(["label", *map(str, arguments), "--port", "0"]))
        os.close(writing)
        self.said = os.fdopen(reading)
        self.url = re.search(r"http://\S+/", self.said.readline())[0]

    def end(self, number):
        """The exit code, or minus the signal that ended it."""
        os.kill(self.pid, number)
        self.said.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_kill_9_between_clicks_loses_nothing_and_the_same_command_goes_on(data, tmp_path, capsys):
    labels = tmp_path / "labels.jsonl"
    for number in range(4):  # killed after every click
        served = Process(data, "-o", labels)
        kim = Clicks(served.url)
        assert [item["label"] is not None for item in kim.items()] == [True] * number + [False] * (6 - number)
        kim.prefer(kim.items()[number], "예")
        assert served.end(signal.SIGKILL) == -signal.SIGKILL
        assert len(read(labels)) == number + 1
    with labels.open("ab") as file:
        file.write(b'{"item": "cut sho')  # as if the kill had come in the middle of a fifth
    served = Process(data, "-o", labels)
    kim = Clicks(served.url)
    kim.prefer(kim.items()[4], "예", reason="다섯째")
    assert served.end(signal.SIGINT) == 0
    out = tmp_path / "pairs.jsonl"
    assert main(["label", str(data), "-o", str(labels), "--export", str(out), "--margins", "0.5", "1.5", "4"]) == 0
    captured = capsys.readouterr()
    assert "1 lines of" in captured.err and "cut short by a kill" in captured.err
    rows = read(out)
    assert [(r["prompt"], r["chosen"], r["rejected"], r["margin"]) for r in rows] == [
        (f"질문 {i}", "예", "아니오", 1.5) for i in range(5)
    ]


@pytest.fixture
def page(monkeypatch):
    """`main` in a thread of this process; the link that it prints, and its end when it is told."""
    servers, threads = [], []

    def start(argv, printed):
        uvicorn = command.import_uvicorn("label")
        monkeypatch.setattr(uvicorn.Server, "install_signal_handlers", lambda self: None, raising=False)
        monkeypatch.setattr(command, "signals_end_quietly", contextlib.nullcontext)
        run = uvicorn.Server.run

        def noticed(self, **options):
            servers.append(self)
            return run(self, **options)

        monkeypatch.setattr(uvicorn.Server, "run", noticed)
        codes = []
        threads.append(threading.Thread(target=lambda: codes.append(main([*argv, "--port", "0"])), daemon=True))
        threads[-1].start()
        said = ""
        while "http://" not in said:
            assert threads[-1].is_alive(), said + printed().err
            time.sleep(0.05)
            said += printed().out
        return re.search(r"http://\S+/", said)[0], codes

    def stop():
        for server in servers:
            server.should_exit = True
        for thread in threads:
            thread.join(60)

    start.stop = stop
    yield start
    stop()


def test_responses_are_written_on_the_spot_and_labelled_while_they_are(tmp_path, page, capsys):
    sums = [{"prompt": f"{a}+{b}="} for a in range(1, 5) for b in range(1, 4)]
    prompts = write(tmp_path / "prompts.jsonl", sums)
    corpus = write(tmp_path / "corpus.jsonl", [{"text": f"{a}+{b}={a + b}"} for a in range(9) for b in range(9)])
    model = new_model("nano", corpus, tmp_path / "model", vocab_size=300, quiet=True)
    labels = tmp_path / "mine.jsonl"
    argv = ["label", "--model", str(model), "--prompts", str(prompts), "--num_responses", "3", "-o", str(labels)]
    url, codes = page([*argv, "--max_new_tokens", "4", "--batch_size", "3", "--device", "cpu"], capsys.readouterr)
    kim = Clicks(url)
    deadline = time.monotonic() + 60
    while httpx2.get(f"{url}api/start?annotator=kim").json()["expected"] > len(kim.items()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    items = kim.items()
    assert len(items) == 12 and {item["prompt"][0]["text"] for item in items} == {row["prompt"] for row in sums}
    for item in items:
        kim.prefer(item, item["responses"][1], margin=None, ranks=[2, 1, 3][: len(item["responses"])])
    page.stop()
    assert codes == [0]
    responses = tmp_path / "mine.responses.jsonl"
    assert len(read(responses)) == 36
    out = tmp_path / "ranked.jsonl"
    assert main(["label", str(responses), "-o", str(labels), "--export", str(out), "--format", "ranked"]) == 0
    best = {item["prompt"][0]["text"]: item["responses"][1] for item in items}
    assert {row["prompt"]: row["responses"][0] for row in read(out)} == best


@pytest.mark.parametrize("form", ["argilla", "label-studio"])
def test_what_others_labelled_is_taken_over_and_given_back(form, data, tmp_path, capsys):
    """An export of ours in their form, read by a second command that never saw the labels."""
    from rlhf_fast.commands.label import _items, _parser
    from rlhf_fast.feedback.people.store import Label, Store

    labels = tmp_path / "labels.jsonl"
    items, _, _ = _items(_parser().parse_args([str(data)]))
    store = Store(labels, write=True)
    for place in range(6):
        identity, item = items[place]
        ranks = tuple(1 if text == "예" else 2 for text in item.responses)
        store.put(Label(identity, "kim", ranks=ranks, margin=3, done=True))
    store.close()
    theirs, out = tmp_path / "theirs.json", tmp_path / "pairs.jsonl"
    assert main(["label", str(data), "-o", str(labels), "--export", str(theirs), "--format", form]) == 0
    assert theirs.with_suffix(".xml").exists() == (form == "label-studio")
    assert main(["label", str(theirs), "-o", str(tmp_path / "none.jsonl"), "--export", str(out)]) == 0
    assert "6 labels of 1 annotators taken over" in capsys.readouterr().err
    assert {(row["chosen"], row["rejected"], row["margin"]) for row in read(out)} == {("예", "아니오", 3.0)}
    assert not (tmp_path / "none.jsonl").exists()  # an export writes nothing else


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "give DATA to compare, or --model and --prompts"),
        (["{data}", "--model", "m"], "not both"),
        (["--model", "m"], "--model needs --prompts FILE"),
        (["--model", "m", "--prompts", "p", "--num_responses", "1"], "--num_responses of at least 2"),
        (["--model", "m", "--prompts", "p", "--temperature", "0"], "greedy responses to a prompt are all the same"),
        (["{data}", "--format", "pairs"], "--format is of an export; add --export FILE"),
        (["{data}", "--export", "{data}"], "would overwrite what it is made from"),
        (["{data}", "--export", "{folder}/x.jsonl", "-o", "{folder}/none.jsonl"], "label some first"),
        (["{data}", "--host", "0.0.0.0"], "say with --allow_host by which name others call this one"),
        (["{data}", "--token", "short"], "--token must be 16 to 128"),
        (["{folder}/alone.jsonl"], "no prompt has two different responses"),
        (["{data}", "-o", "{data}"], "holds no labels of rlhf-fast label"),
        (["{data}", "-o", "{folder}/l.jsonl", "--port", "{taken}"], "label: cannot listen on 127.0.0.1 port"),
    ],
)
def test_a_mistake_is_one_line_and_loses_nothing(arguments, told, data, tmp_path, capsys):
    write(tmp_path / "alone.jsonl", [{"prompt": "p", "responses": ["same", "same"]}])
    before = data.read_bytes()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        places = {"data": data, "folder": tmp_path, "taken": taken.getsockname()[1]}
        assert main(["label", *(a.format(**places) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error and error.count("\n") == 1
    assert data.read_bytes() == before


def test_the_answers_of_a_file_lie_beside_it_unless_told_otherwise(data):
    def labels(*arguments):
        return str(command._labels(command._parser().parse_args([*map(str, arguments)])))

    assert labels(data) == str(data.with_name("data.labels.jsonl"))
    assert labels(data, "-o", "mine.jsonl") == "mine.jsonl"
    names = {"my.responses.jsonl": "my.labels.jsonl", "a.json.gz": "a.labels.jsonl", "owner/name": "name.labels.jsonl"}
    assert {name: labels(name) for name in names} == names


@pytest.mark.parametrize("output", [[], ["-o", "people.jsonl"]])
def test_what_a_model_wrote_leads_to_the_same_answers_again(output, tmp_path, monkeypatch):
    """As in the README: label --model ... -o people.jsonl, then label people.responses.jsonl -o people.jsonl --export ..."""
    monkeypatch.chdir(tmp_path)
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "p"}])
    writing = command._parser().parse_args(["--model", "m", "--prompts", str(prompts), *output])
    responses = command._responses(writing)
    responses.touch()
    assert responses.name == ("people.responses.jsonl" if output else "prompts.responses.jsonl")
    assert command._labels(command._parser().parse_args([str(responses), *output])) == command._labels(writing)
