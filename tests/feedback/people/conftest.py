"""The page served in this process, for tests that send requests and tests that drive a browser."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest

pytest.importorskip("uvicorn")

import uvicorn

from rlhf_fast.data import Records
from rlhf_fast.feedback.candidates import read_candidates
from rlhf_fast.feedback.people.app import SERVER, Desk, build_app
from rlhf_fast.feedback.people.items import Items
from rlhf_fast.feedback.people.store import Store

TOKEN = "a-token-of-this-test"


def candidates(rows):
    return read_candidates(Records(rows))[0]


class Served:
    """A desk behind its server, on a free port."""

    def __init__(self, rows, path, safety=False, hosts=()):
        self.items, self.store = Items(candidates(rows)), Store(path, write=True)
        self.desk = Desk(self.items, self.store, "my_data.jsonl", safety)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.origin = f"http://127.0.0.1:{self.port}"
        self.url = f"{self.origin}/{TOKEN}/"
        config = uvicorn.Config(build_app(self.desk, TOKEN, hosts), **SERVER)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)

    def start(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def stop(self):
        self.server.should_exit = True
        self.thread.join(10)
        self.store.close()

    def said(self, annotator):
        """What the file on the disk holds of this annotator, item by item."""
        return {label.item: label for label in Store(self.store.path) if label.annotator == annotator}


@pytest.fixture(scope="session")
def make_served():
    return Served


@pytest.fixture
def serve(tmp_path):
    with contextlib.ExitStack() as stack:

        def start(rows, **options):
            served = Served(rows, options.pop("path", tmp_path / "labels.jsonl"), **options).start()
            stack.callback(served.stop)
            return served

        yield start
