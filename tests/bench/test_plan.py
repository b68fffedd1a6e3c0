"""The page of the memory plan says what the plan says."""

from __future__ import annotations

from bench.plan import PAGE, page


def test_the_page_is_what_the_plan_says_today():
    assert PAGE.read_text() == page(), "made again by python -m bench.plan"
