"""The benchmark of the label page measures a page that works, with few items."""

from __future__ import annotations

import shutil

import pytest

from bench.label import measure


def test_every_figure_is_measured(tmp_path):
    pytest.importorskip("playwright.sync_api")
    if shutil.which("chromium") is None:
        pytest.skip("no chromium; apt-get install chromium")
    lines = dict(measure(12, visits=1, clicks=3, folder=tmp_path))
    states = ("none labelled", "almost all labelled")
    assert [f"{what}, {state}" for state in states for what in ("first paint", "a click")] == list(lines)[1:-1]
    # three clicks on a fresh page, then all but the last four written, then three clicks more
    assert list(lines)[-1] == "read 11 labels after a stop"
