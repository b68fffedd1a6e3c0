"""Variety of texts against counts by hand."""

from __future__ import annotations

import math

import pytest

from rlhf_fast.data.diversity import distinct, ngrams, self_overlap


def test_ngrams_are_runs_of_neighbours():
    assert ngrams([1, 2, 3], 2) == [(1, 2), (2, 3)] and ngrams("가나", 1) == [("가",), ("나",)] and ngrams([1], 2) == []


def test_distinct_n_by_hand():
    """the the the / the cat: of 5 words 2 differ; of the bigrams (the, the) twice and (the, cat) once, 2 of 3."""
    texts = [["the", "the", "the"], ["the", "cat"]]
    assert distinct(texts, 1) == 2 / 5
    assert distinct(texts, 2) == 2 / 3
    assert distinct(texts, 3) == 1.0 and math.isnan(distinct(texts, 4)) and math.isnan(distinct([], 1))


def test_text_without_spaces_is_measured_by_characters():
    """하하하하 repeats itself although it is a single word."""
    assert distinct([["하하하하"]], 1) == 1.0
    assert distinct(["하하하하"], 1) == 1 / 4


def test_self_overlap_by_hand():
    """a b a b against b a b: (a, b) stands there once and is clipped to 1 of its 2, (b, a) 1 of 1: 2/3. The other way 2/2."""
    assert self_overlap(["abab", "bab"], 2) == pytest.approx((2 / 3 + 1) / 2)
    assert self_overlap(["abc", "abc", "abc"], 2) == 1.0
    assert self_overlap(["abc", "def"], 1) == 0.0
    # each against the best of the others, not their sum: aa in the first, twice a in none
    assert self_overlap(["aa", "a", "a"], 1) == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert math.isnan(self_overlap(["abc"], 1)) and math.isnan(self_overlap(["abc", ""], 1))
