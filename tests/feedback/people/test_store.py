"""The file of people's answers: what holds, what is taken back, and what a kill leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.feedback.people.store import Label, Store

ROOT = Path(__file__).resolve().parents[3]


def label(item="i", annotator="kim", **fields):
    return Label(item, annotator, order=(1, 0), **{"ranks": (1, 2), "done": True, **fields})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "labels.jsonl"


def test_a_label_comes_back_as_it_was_and_the_last_one_holds(path):
    store = Store(path, write=True)
    store.put(label(reason="더 정확하다\u2028</script>", margin=3, unsafe=(False, True), safer=(2, 1), time=5.0))
    store.put(label(annotator="mina", ranks=(1, 1)))
    again = Store(path)
    assert again.get("kim", "i") == store.get("kim", "i")
    assert again.get("kim", "i").unsafe == (False, True)
    assert again.annotators() == ["kim", "mina"] and again.torn == 0
    store.put(label(ranks=(2, 1)))
    assert Store(path).get("kim", "i").ranks == (2, 1)
    assert len(path.read_text(encoding="utf-8").split("\n")) == 4  # nothing is ever written over


def test_undo_takes_an_item_back_to_what_it_was_whatever_was_clicked_on_it(path):
    store = Store(path, write=True)
    store.put(label("first", margin=1))
    store.put(label("second", done=False))
    store.put(label("second", done=True))
    store.put(label("first", margin=3))
    for one in (store, Store(path)):
        assert one.counts("kim") == {"labelled": 2, "skipped": 0}
    assert store.undo("kim") == "first" and store.get("kim", "first").margin == 1
    assert store.undo("kim") == "second" and store.get("kim", "second") is None
    assert store.undo("mina") is None
    assert store.undo("kim") == "first" and store.get("kim", "first") is None
    assert store.undo("kim") is None
    again = Store(path)
    assert list(again) == [] and again.counts("kim") == {"labelled": 0, "skipped": 0}


def test_skipped_items_are_counted_apart(path):
    store = Store(path, write=True)
    store.put(label("a", ranks=None, skipped=True))
    store.put(label("b"))
    store.put(label("c", done=False))
    assert store.counts("kim") == {"labelled": 1, "skipped": 1}
    store.put(label("a"))
    assert store.counts("kim") == {"labelled": 2, "skipped": 0}


def test_a_torn_last_line_is_noticed_dropped_and_not_glued_to_the_next(path):
    store = Store(path, write=True)
    store.put(label("a"))
    store.put(label("b"))
    store.close()
    for cut in range(1, len(path.read_bytes().split(b"\n")[1]) + 1):
        whole = path.read_bytes()
        path.write_bytes(whole[:-cut])
        torn = Store(path, write=True)
        kept = {one.item for one in torn}
        # without its newline alone the line is whole
        assert (kept, torn.torn) == (({"a", "b"}, 0) if cut == 1 else ({"a"}, 1))
        torn.put(label("c"))
        torn.close()
        assert {one.item for one in Store(path)} == kept | {"c"}
        path.write_bytes(whole)


def test_only_one_process_writes(path):
    store = Store(path, write=True)
    with pytest.raises(UserError, match="is being written by another rlhf-fast label; stop that one first"):
        Store(path, write=True)
    store.close()
    Store(path, write=True).close()


def test_a_file_of_something_else_is_refused_and_left_alone(path):
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n' * 3)
    with pytest.raises(UserError, match="holds no labels of rlhf-fast label"):
        Store(path)
    assert path.read_text().count("chosen") == 3


WRITER = """
import importlib.util, sys
from rlhf_fast.feedback.people.store import Label, Store
store = Store(sys.argv[1], write=True)
for i in range(100_000):
    store.put(Label(str(i), "kim", order=(0, 1), ranks=(1, 2), done=True, reason="x" * (i % 500)))
    print(i, flush=True)  # told only now
"""


def test_kill_9_loses_nothing_that_was_acknowledged(path):
    """A process that writes as fast as the disk lets it is killed amid its writing: at most one more label than it told of."""
    acknowledged = set()
    command = [sys.executable, "-c", WRITER, str(path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    for line in child.stdout:
        acknowledged.add(line.strip())
        if len(acknowledged) == 200:
            time.sleep(0.005)
            os.kill(child.pid, signal.SIGKILL)
            break
    acknowledged |= {line.strip() for line in child.stdout if line.endswith("\n")}
    child.wait()
    store = Store(path, write=True)
    kept = {one.item for one in store}
    assert len(acknowledged) >= 200 and acknowledged <= kept and len(kept) <= len(acknowledged) + 1
    assert all(len(one.reason) == int(one.item) % 500 for one in store)
    store.put(label("after"))
    assert json.loads(path.read_text().splitlines()[-1])["item"] == "after"
