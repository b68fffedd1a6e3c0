"""``rlhf-fast serve`` as a process: starts, answers, stops; and what it refuses to start with."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from argparse import Namespace
from pathlib import Path

import pytest

httpx2 = pytest.importorskip("httpx2")
pytest.importorskip("uvicorn")

from rlhf_fast.cli import main
from rlhf_fast.commands import serve
from rlhf_fast.models import load
from rlhf_fast.models.adapters import lora_config
from rlhf_fast.models.scratch import new_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    texts = [f"{a}+{a * 7 % 10}=" for a in range(24)] * 9
    return str(new_model("nano", texts, tmp_path_factory.mktemp("model") / "nano", vocab_size=300, quiet=True))


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    load(model, peft_config=lora_config(r=2), device="cpu").adapters.save("policy", folder)
    return str(folder)


class Process:
    """The command in a process of its own, on a free port."""

    def __init__(self, *arguments):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "rlhf_fast", "serve", *map(str, arguments), "--port", "0", "--device", "cpu"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.said = self.process.stdout.readline()
        self.url = re.search(r"http://[^/]+", self.said)[0]

    def end(self, number):
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_told_to_stop_and_then_finishes_what_runs(model, adapter, number):
    """Four samples are being streamed when the signal comes: they are finished, and the process ends with 0."""
    served = Process(model, "--served_model_name", "nano", "--adapter", f"math={adapter}", "--slots", "2")
    try:
        assert served.said.startswith("serving nano, math at http://127.0.0.1:")
        ids = [card["id"] for card in httpx2.get(f"{served.url}/v1/models").json()["data"]]
        assert ids == ["nano", "math"]
        answers = []
        body = {"model": "math", "prompt": "1+7=", "n": 4, "max_tokens": 60, "stream": True, "return_token_ids": True}
        first = threading.Event()

        def ask():
            with httpx2.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    answers.append(line)
                    first.set()

        thread = threading.Thread(target=ask)
        thread.start()
        assert first.wait(60)
        code, err = served.end(number)
        thread.join(30)
        assert code == 0 and err.startswith("memory: keys and values of at most") and err.count("\n") == 1
        assert answers[-2] == "data: [DONE]" or answers[-1] == "data: [DONE]"
        assert sum('"finish_reason": "' in line for line in answers) == 4
    finally:
        served.process.kill()
        served.process.wait()


def refused(capsys, *arguments) -> str:
    assert main(["serve", *map(str, arguments)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: serve") and err.count("\n") == 1
    return err


def test_other_machines_are_let_in_with_an_api_key_only(model, capsys, monkeypatch):
    monkeypatch.delenv("RLHF_FAST_API_KEY", raising=False)
    said = refused(capsys, model, "--host", "0.0.0.0")
    assert "lets other machines in; set an API key (RLHF_FAST_API_KEY in the environment, or --api_key)" in said


def test_a_port_that_is_taken_is_named(model, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1 port {port}" in refused(capsys, model, "--port", port, "--device", "cpu")


@pytest.mark.parametrize(
    ("adapter", "said"),
    [("math", "--adapter wants NAME=FOLDER, got 'math'"), ("math=nowhere", "nowhere: no adapter_config.json")],
)
def test_an_adapter_that_is_none_is_named(model, capsys, adapter, said):
    assert said in refused(capsys, model, "--adapter", adapter, "--device", "cpu")


def test_without_its_libraries_it_says_what_to_install(model, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'rlhf-fast[serve]'" in refused(capsys, model)


@pytest.mark.parametrize(("asked", "room", "most"), [(32_768, 40, 20), (15, 40, 15)])
def test_who_names_no_number_of_tokens_gets_no_more_than_half_of_the_cache(model, asked, room, most):
    options = {"adapter": [], "served_model_name": None, "dtype": "auto", "load_in_4bit": None, "device": "cpu"}
    service, said = serve._service(Namespace(model=model, slots=2, max_tokens=asked, cache_tokens=room, **options))
    assert said == "" and service.limits.max_tokens == most and service.worker.engine.max_tokens == room
