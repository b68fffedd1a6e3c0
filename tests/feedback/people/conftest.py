"""The page served in this process, for tests that send requests and tests that drive a browser."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
import time

import pytest

from rlhf_fast.data import Records
from rlhf_fast.feedback.candidates import read_candidates
from rlhf_fast.feedback.people.items import Items
from rlhf_fast.feedback.people.store import Store

TOKEN = "a-token-of-this-test"


def candidates(rows):
    return read_candidates(Records(rows))[0]


class Served:
    """A desk behind its server, on a free port."""

    def __init__(self, rows, path, safety=False, hosts=()):
        uvicorn = pytest.importorskip("uvicorn")
        from rlhf_fast.feedback.people.app import SERVER, Desk, build_app

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


@pytest.fixture
def serve(tmp_path):
    with contextlib.ExitStack() as stack:

        def start(rows, **options):
            served = Served(rows, options.pop("path", tmp_path / "labels.jsonl"), **options).start()
            stack.callback(served.stop)
            return served

        yield start


# ---- a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser():
    """One for all tests of a file; ended with it, because its event loop would be in the way of others."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'rlhf-fast[browser]'")
    if CHROMIUM is None:
        pytest.skip("no chromium; apt-get install chromium")
    sandbox = ["--no-sandbox"] if os.getuid() == 0 else []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


class Tab:
    """A page with a person in front of it; fails a test in which the browser complained."""

    def __init__(self, browser, served, annotator="kim", **options):
        self.served, self.complaints, self.asked = served, [], []
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(served.url + (f"?annotator={annotator}" if annotator else ""))
        self.annotator = annotator
        if annotator:
            self.page.wait_for_selector("main:not([hidden])")

    def press(self, *keys):
        """Keys, one after the other, each once the page has dealt with the one before."""
        for key in keys:
            self.page.keyboard.press(key)
            self.settle()

    def settle(self):
        self.page.evaluate("running")  # a top-level `let` of the page: the promise of all that was begun

    def shown(self):
        """Texts of the responses, in the places of the screen."""
        return self.page.locator("#responses .text").all_text_contents()

    def prompt(self):
        return self.page.locator("#prompt").text_content()

    def label(self, prompt):
        """What the file holds of this person's answer, by response text."""
        for place in range(len(self.served.items)):
            identity, item = self.served.items[place]
            found = self.served.said(self.annotator).get(identity)
            if item.prompt == prompt and found is not None:
                lists = {k: getattr(found, k) for k in ("ranks", "safer", "unsafe") if getattr(found, k) is not None}
                return found, {k: dict(zip(item.responses, v)) for k, v in lists.items()}
        return None, {}


@pytest.fixture
def tab(browser):
    with contextlib.ExitStack() as stack:

        def open_tab(served, annotator="kim", **options):
            made = Tab(browser, served, annotator, **options)
            stack.callback(made.context.close)
            opened.append(made)
            return made

        opened = []
        yield open_tab
    for made in opened:
        assert made.complaints == []
        assert all(url.startswith((made.served.origin, "data:")) for url in made.asked)
