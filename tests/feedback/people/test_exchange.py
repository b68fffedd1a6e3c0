"""Argilla and Label Studio: their exports as they write them, and ours read back."""

from __future__ import annotations

import json

import pytest

from rlhf_fast.data import Records
from rlhf_fast.errors import UserError
from rlhf_fast.feedback.people.exchange import read, recognise, to_argilla, to_label_studio
from rlhf_fast.feedback.people.items import Items
from rlhf_fast.feedback.people.store import Label, Store

ARGILLA_2 = {
    "id": "1",
    "fields": {"prompt": "1+1?", "response_1": "2", "response_2": "3", "response_3": "two"},
    "metadata": {},
    "suggestions": {},
    "responses": {
        "ranking": [
            {"value": ["response_3", "response_1", "response_2"], "user_id": "u-1"},
            {"value": ["response_1", "response_3", "response_2"], "user_id": "u-2"},
        ],
        "reason": [{"value": "because", "user_id": "u-2"}],
    },
    "vectors": {},
    "_server_id": None,
}
ARGILLA_1 = {
    "fields": {"instruction": "1+1?", "response-1": "2", "response-2": "3"},
    "responses": [
        {
            "user_id": "u-1",
            "status": "submitted",
            "values": {
                "ranks": {"value": [{"value": "response_1", "rank": 1}, {"value": "response_2", "rank": 1}]},
            },
        },
        {"user_id": "u-2", "status": "discarded", "values": {}},
    ],
}
RANKER = {
    "data": {
        "prompt": "1+1?",
        "items": [{"id": "x", "title": "t", "body": "2"}, {"id": "y", "title": "t", "body": "3"}],
    },
    "annotations": [
        {
            "completed_by": {"id": 4, "email": "kim@example.org"},
            "was_cancelled": False,
            "result": [
                {"from_name": "rank", "to_name": "r", "type": "ranker", "value": {"ranker": {"rank": ["y", "x"]}}},
                {"from_name": "margin", "to_name": "prompt", "type": "choices", "value": {"choices": ["much"]}},
                {"from_name": "reason", "to_name": "prompt", "type": "textarea", "value": {"text": ["why", "not"]}},
            ],
        },
        {"completed_by": 5, "was_cancelled": True, "result": []},
    ],
}
PAIRWISE = {
    "data": {"prompt": "1+1?", "text1": "2", "text2": "3"},
    "annotations": [
        {
            "completed_by": 5,
            "result": [
                {"from_name": "pw", "to_name": "text1,text2", "type": "pairwise", "value": {"selected": "right"}}
            ],
        }
    ],
}


def by_text(item, label):
    return dict(zip(item.responses, label.ranks))


@pytest.mark.parametrize(
    ("record", "form", "expected"),
    [
        (ARGILLA_2, "argilla", {"u-1": {"two": 1, "2": 2, "3": 3}, "u-2": {"2": 1, "two": 2, "3": 3}}),
        (ARGILLA_1, "argilla", {"u-1": {"2": 1, "3": 1}}),
        (RANKER, "label-studio", {"kim@example.org": {"3": 1, "2": 2}}),
        (PAIRWISE, "label-studio", {"5": {"3": 1, "2": 2}}),
    ],
    ids=["argilla 2", "argilla 1", "ranker", "pairwise"],
)
def test_their_exports_are_read(record, form, expected):
    records = Records([record])
    assert recognise(records) == form
    (item,), labels, alone = read(records, form)
    assert item.prompt == "1+1?" and alone == 0
    assert {label.annotator: by_text(item, label) for label in labels} == expected
    assert all(label.done for label in labels)


def test_margin_and_reason_come_along():
    _, (label,), _ = read(Records([RANKER]), "label-studio")
    assert label.margin == 3 and label.reason == "why\nnot"
    assert [x.reason for x in read(Records([ARGILLA_2]), "argilla")[1]] == ["", "because"]


@pytest.mark.parametrize(("form", "write"), [("argilla", to_argilla), ("label-studio", to_label_studio)])
def test_ours_written_in_their_form_and_read_back_is_the_same(form, write):
    """Ties, margins, reasons, both bad and names too; through JSON, as a file would."""
    rows = [
        {"fields": {"prompt": f"질문 {i}", "response_1": "가", "response_2": "나", "response_3": "다"}}
        for i in range(3)
    ]
    found, _, _ = read(Records(rows), "argilla")
    items, store = Items(found), Store(None)
    for place, ranks in enumerate([(2, 1, 3), (1, 1, 2), (1, 1, 1)]):
        identity, _ = items[place]
        fields = {"reason": "이유", "bad": place == 2, "done": True, "time": 1.0}
        store.put(Label(identity, "김", ranks=ranks, margin=2 if place == 0 else None, **fields))
        store.put(Label(identity, "lee", ranks=ranks[::-1], done=True, time=1.0))
    records = Records(json.loads(json.dumps(write(items, store))))
    assert recognise(records) == form
    again, labels, _ = read(records, form)
    assert [item.responses for item in again] == [items[place][1].responses for place in range(3)]

    def key(x):
        return (x.annotator, x.item, x.ranks, x.margin, x.bad, x.reason)

    assert {key(x) for x in labels} == {key(x) for x in store}


def test_a_record_without_prompt_or_responses_is_named():
    with pytest.raises(UserError, match=r"row 2: no argilla record of prompt and responses \(its fields are text\)"):
        read(Records([ARGILLA_2, {"fields": {"text": "t"}}], "x.json"), "argilla")
    with pytest.raises(UserError, match="no record has two different responses"):
        read(Records([{"fields": {"prompt": "p", "response_1": "same", "response_2": "same"}}]), "argilla")
