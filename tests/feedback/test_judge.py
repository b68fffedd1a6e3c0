"""Labelling data with a judge: what it reads, what it writes, and what it says of itself."""

from __future__ import annotations

import asyncio
import re

import pytest

from bench.scripted import ScriptedServer
from rlhf_fast.data import load_records, normalise
from rlhf_fast.errors import UserError
from rlhf_fast.feedback.candidates import read_candidates
from rlhf_fast.feedback.judge import label
from rlhf_fast.rewards.chat import connect
from rlhf_fast.rewards.judge import Panel
from rlhf_fast.rewards.judging import Rubric

SHOWN = re.compile(r"<response (.)>\n(.*?)\n</response", re.DOTALL)


def by_number(messages):
    """Prefers the response with the larger number; "?" leaves it without a verdict; equal numbers go to the first shown."""
    shown = [(name, text.strip("n")) for name, text in SHOWN.findall(messages[0]["content"])]
    if any(text == "?" for _, text in shown):
        return "I would rather not say."
    return "[[" + " > ".join(name for name, _ in sorted(shown, key=lambda item: -int(item[1]))) + "]]"


def labelled(rows, reply=by_number, form=None, **options):
    with ScriptedServer(reply) as server:
        panel = Panel(connect(None, server.url, backoff=0.01), Rubric("compare"), **options)
        return asyncio.run(label(panel, read_candidates(load_records(rows))[0], form)), server


def test_pairs_without_labels_become_preferences_that_training_reads():
    rows = [{"prompt": f"p{i}", "responses": [f"n{i}", f"n{9 - i}"], "topic": i} for i in range(4)]
    rows.append({"prompt": [{"role": "user", "content": "q"}], "responses": ["n1", "n2"], "topic": None})
    labels, server = labelled(rows)
    assert len(server.calls) == 10
    canonical = normalise(labels.rows, "preferences")
    assert [row["responses"] for row in canonical][:4] == [[f"n{9 - i}", f"n{i}"] for i in range(4)]
    assert canonical[4]["responses"][0] == [{"role": "assistant", "content": "n2"}]
    assert [row["topic"] for row in canonical] == [0, 1, 2, 3, None]
    origin = labels.rows[0]["label_origin"]
    assert origin["by"] == "judge" and origin["model"] == "scripted" and origin["orders"] == 2
    assert origin["rubric"].startswith("compare-")


def test_both_orders_are_asked_and_a_liking_for_a_place_decides_nothing():
    always_first = [{"prompt": "p", "responses": ["n1", "n2"]}, {"prompt": "q", "responses": ["n3", "n4"]}]
    labels, server = labelled(always_first, reply=lambda messages: "[[A > B]]")
    assert labels.rows == []
    figures = labels.figures
    assert (figures["pairs/decided"], figures["pairs/tied"]) == (0, 2)
    assert figures["pairs/tied because the orders disagree"] == 2 and figures["first shown preferred"] == 1.0
    orders = [SHOWN.findall(call["messages"][0]["content"]) for call in server.calls]
    assert sorted(tuple(text for _, text in order) for order in orders) == [
        ("n1", "n2"), ("n2", "n1"), ("n3", "n4"), ("n4", "n3"),
    ]  # fmt: skip
    one, server = labelled(always_first, reply=lambda messages: "[[A > B]]", swap=False)
    assert len(server.calls) == 2 and len(one.rows) == 2 and one.rows[0]["label_origin"]["orders"] == 1


@pytest.mark.parametrize(("together", "calls"), [(2, 12), (4, 2)])
def test_rankings_are_strict_and_complete(together, calls):
    """n3 twice under two names: as good as each other, so that only one of them is kept."""
    rows = [{"prompt": "p", "responses": ["n1", "n3", "nn3", "n7"]}]
    labels, server = labelled(rows, together=together)
    assert len(server.calls) == calls
    (row,) = labels.rows
    assert [r.strip("n") for r in row["responses"]] == ["7", "3", "1"] and row["ranking"] == [1, 2, 3]
    assert normalise(labels.rows, "preferences")[0]["responses"] == row["responses"]


def test_a_missing_verdict_is_counted_and_never_a_label():
    rows = [{"prompt": "p", "responses": ["n1", "?", "n3"]}, {"prompt": "q", "responses": ["n1", "n2", "n3"]}]
    ranked = labelled(rows)[0]
    assert [row["prompt"] for row in ranked.rows] == ["q"]
    assert ranked.figures["pairs/without a verdict"] == 2 and ranked.figures["replies without a verdict"] == 4
    assert "4 replies ended without a readable verdict" in ranked.notes[0] and "rather not say" in ranked.notes[0]
    pairs = labelled(rows, form="pairs")[0].rows
    assert sorted((row["prompt"], row["chosen"], row["rejected"]) for row in pairs) == [
        ("p", "n3", "n1"), ("q", "n2", "n1"), ("q", "n3", "n1"), ("q", "n3", "n2"),
    ]  # fmt: skip


def test_agreement_with_people_by_hand():
    """Ten pairs: the judge agrees on 6, differs on 2, has ties on 2 (equal numbers: the orders disagree)."""
    pairs = [(9, 1)] * 6 + [(1, 9)] * 2 + [(5, 5)] * 2
    rows = [
        {"prompt": f"p{i}", "chosen": f"n{a}", "rejected": f"nn{b}", "margin": 1.0} for i, (a, b) in enumerate(pairs)
    ]
    labels = labelled(rows)[0]
    assert labels.figures["people/pairs"] == 10
    assert labels.figures["people/accuracy on decided pairs"] == 6 / 8
    assert 0 < labels.figures["people/Cohen's kappa, ties a third answer"] < 0.75
    assert len(labels.rows) == 8 and "margin" not in labels.rows[0]  # people's margin is no judge's


def test_the_place_of_a_response_does_not_tell_what_people_said():
    """All labels are chosen-first in the file; half of them are shown first as A, in the first of the two orders."""
    rows = [{"prompt": f"p{i}", "chosen": f"n{i}", "rejected": f"nn{i + 1}"} for i in range(200)]
    candidates, _ = read_candidates(load_records(rows))
    assert 70 < sum(c.ranks == [0, 1] for c in candidates) < 130
    assert [c.responses for c in candidates] == [c.responses for c in read_candidates(load_records(rows))[0]]


def test_rows_of_generate_are_gathered_by_prompt_and_doubles_left_out():
    written = [("p", "n1"), ("p", "n1"), ("p", "n2"), ("q", "n5"), ("q", "n5"), ("r", "n1"), ("r", "n4")]
    rows = [{"prompt": p, "completion": c, "finish_reason": "stop", "tokens": 3, "kind": p} for p, c in written]
    candidates, alone = read_candidates(load_records(rows))
    assert [(c.prompt, sorted(c.responses)) for c in candidates] == [("p", ["n1", "n2"]), ("r", ["n1", "n4"])]
    assert alone == 1 and candidates[0].columns == {"kind": "p"}


def test_what_a_model_left_empty_is_no_response():
    rows = [{"prompt": "p", "completion": text, "finish_reason": "stop"} for text in ("n1", "", "n2")]
    candidates, alone = read_candidates(load_records([*rows, {**rows[1], "prompt": "q"}, {**rows[0], "prompt": "q"}]))
    assert [(c.prompt, sorted(c.responses)) for c in candidates] == [("p", ["n1", "n2"])] and alone == 1
    with pytest.raises(UserError, match="no prompt has two different responses"):
        read_candidates(load_records(rows[1:2]))


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"prompt": "p", "responses": "ab"}], "row 1: `responses` must be a list"),
        ([{"prompt": "p", "responses": ["a", ""]}], "`completion` is empty"),
        ([{"prompt": "p", "completion": "a"}], "no prompt has two different responses"),
        ([{"question": "p", "answer": "a"}], "needs `prompt` \\+ `chosen` \\+ `rejected`"),
    ],
)
def test_data_that_cannot_be_compared_is_told(rows, told):
    with pytest.raises(UserError, match=told):
        read_candidates(load_records(rows))
