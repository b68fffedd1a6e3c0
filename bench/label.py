"""How fast the label page is with many items: reading the data, first paint, a click, and going on after a stop.

    python -m bench.label --items 10000 -o bench/results/label.md

A person's Chromium opens the real page on loopback: *first paint* is from the request of the link to the first prompt and
its responses on the screen (their text in the document, two frames later), *a click* from the key to the next item on the
screen, fsync included.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_fast.data.sources import Records, load_records, write_jsonl
from rlhf_fast.feedback.candidates import read_candidates
from rlhf_fast.feedback.people.items import Items
from rlhf_fast.feedback.people.store import Label, Store

TOKEN = "the-token-of-the-benchmark"
WORDS = [f"word{i}" for i in range(500)]  # what they say does not matter, how much does


def rows(count: int, words: int = 150, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Prompts with two responses of about so many words each."""
    draw = random.Random(seed)
    for i in range(count):
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(words // 2, 3 * words // 2))) for _ in range(2)]
        yield {"prompt": f"Question {i}: " + " ".join(draw.choices(WORDS, k=30)), "responses": texts}


@contextmanager
def page_of(items: Items, store: Store) -> Iterator[str]:
    """The link to a page that is being served."""
    import uvicorn

    from rlhf_fast.feedback.people.app import SERVER, Desk, build_app

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(build_app(Desk(items, store), TOKEN), **SERVER))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/{TOKEN}/"
    server.should_exit = True
    thread.join(10)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def in_a_browser(url: str, visits: int, clicks: int) -> dict[str, list[float]]:
    """Milliseconds of each first paint and each click, as the page's own clock has them."""
    from playwright.sync_api import sync_playwright

    drawn = """() => new Promise((done) => { const wait = () => document.querySelector("#responses .text")
        ? requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now()))) : setTimeout(wait, 1); wait() })"""
    click = """async () => { const begun = performance.now(); const before = place;
        document.dispatchEvent(new KeyboardEvent("keydown", {key: "2", bubbles: true})); await running;
        await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
        if (place === before) throw new Error("no next item"); return performance.now() - begun }"""
    found: dict[str, list[float]] = {"first paint": [], "a click": []}
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for _ in range(visits):
            context = browser.new_context()
            page = context.new_page()
            page.goto(f"{url}?annotator=kim", wait_until="commit")
            found["first paint"].append(page.evaluate(drawn))
            found["a click"] += [page.evaluate(click) for _ in range(clicks)]
            context.close()
        browser.close()
    return found


def measure(count: int, visits: int, clicks: int, folder: Path) -> list[tuple[str, str]]:
    """(what, how long) at ``count`` items, first untouched, then all but the last ones labelled."""
    data = write_jsonl(rows(count), folder / "data.jsonl")
    seconds, records = timed(lambda: load_records(data))
    more, items = timed(lambda: Items(read_candidates(Records(records))[0]))
    lines = [(f"read {count:,} items ({data.stat().st_size / 1e6:.0f} MB)", f"{seconds + more:.2f} s")]
    store = Store(folder / "labels.jsonl", write=True)
    for state, left in (("none labelled", count), ("almost all labelled", visits * clicks + 1)):
        if left < count:
            for place in range(count - left):
                store.put(Label(items[place][0], "kim", ranks=(1, 2), margin=2, done=True))
        with page_of(items, store) as url:
            for what, ms in in_a_browser(url, visits, clicks).items():
                lines.append((f"{what}, {state}", f"{statistics.median(ms):.0f} ms, worst {max(ms):.0f}"))
    store.close()
    seconds, again = timed(lambda: Store(store.path))
    lines.append((f"read {sum(1 for _ in again):,} labels after a stop", f"{seconds:.2f} s"))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--visits", type=int, default=7, help="openings of the page")
    parser.add_argument("--clicks", type=int, default=20, help="labels in each")
    parser.add_argument("-o", "--output", help="write the table to this file too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = measure(args.items, args.visits, args.clicks, Path(folder))
    table = ["| | median |", "| --- | --- |", *(f"| {what} | {value} |" for what, value in lines)]
    where = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}, {time.strftime('%Y-%m-%d')}"
    text = "\n".join([*table, "", f"`python -m bench.label --items {args.items}` on {where}."])
    print(text)
    if args.output:
        Path(args.output).write_text(f"# The label page with {args.items:,} items\n\n{text}\n")


if __name__ == "__main__":
    main()
