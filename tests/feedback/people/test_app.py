"""What the page is told and what is kept of what it sends."""

from __future__ import annotations

import pytest

from rlhf_fast.data.prepare import prepare_labelled
from rlhf_fast.feedback.people.consensus import export
from tests.feedback.people.wire import ask
from tests.rewards.conftest import VOCAB, character_tokenizer

PAIRS = [{"prompt": f"p{i}", "responses": ["a", "b"]} for i in range(5)]
THREE = [{"prompt": "p", "responses": ["a", "b", "c"]}]


def first_item(served, who="kim"):
    return ask(served, "GET", f"api/items?annotator={who}&from=0&count=1").json()["items"][0]


def keep(served, item, who="kim", **fields):
    answer = ask(served, "POST", "api/label", {"annotator": who, "item": item["id"], **fields})
    assert answer.status == 200, answer.body
    return answer.json()


def test_what_is_said_of_places_is_kept_for_responses(serve):
    """Whatever order each of twelve annotators sees, `b` comes best in the file, and back in its place on the page."""
    served = serve(THREE)
    orders = set()
    for who in (f"annotator {i}" for i in range(12)):
        item = first_item(served, who.replace(" ", "+"))
        orders.add(tuple(item["responses"]))
        ranks = [{"b": 1, "c": 2, "a": 3}[text] for text in item["responses"]]
        unsafe = [text == "a" for text in item["responses"]]
        keep(served, item, who, ranks=ranks, unsafe=unsafe, done=True)
        (label,) = served.said(who).values()
        canonical = served.items[0][1].responses
        assert dict(zip(canonical, label.ranks)) == {"b": 1, "c": 2, "a": 3}
        assert dict(zip(canonical, label.unsafe)) == {"a": True, "b": False, "c": False}
        assert [canonical[i] for i in label.order] == item["responses"]
        again = first_item(served, who.replace(" ", "+"))["label"]
        assert (again["ranks"], again["unsafe"], again["done"]) == (ranks, unsafe, True)
    assert len(orders) > 2


def test_items_come_a_few_at_a_time_and_the_next_one_is_the_next_without_an_answer(serve):
    served = serve([{"prompt": f"p{i}", "responses": ["a", "b"]} for i in range(50)])
    assert [row["place"] for row in ask(served, "GET", "api/items?annotator=k&from=3&count=2").json()["items"]] == [
        3,
        4,
    ]
    assert len(ask(served, "GET", "api/items?annotator=k&from=0&count=1000").json()["items"]) == 20
    assert ask(served, "GET", "api/items?annotator=k&from=49").json()["items"][0]["place"] == 49
    assert ask(served, "GET", "api/items?annotator=k&from=50").json()["items"] == []
    item = ask(served, "GET", "api/items?annotator=k&from=49").json()["items"][0]
    state = keep(served, item, "k", ranks=[1, 2], done=True)
    assert (state["next"], state["labelled"], state["total"]) == (0, 1, 50)
    start = ask(served, "GET", "api/start?annotator=other").json()
    assert start["next"] == 0 and [row["place"] for row in start["items"]] == [0, 1, 2, 3]


def test_all_answered_there_is_no_next_and_undo_leads_back(serve):
    served = serve(PAIRS)
    rows = ask(served, "GET", "api/items?annotator=kim").json()["items"]
    for item in rows[:-1]:
        keep(served, item, ranks=[1, 2], margin=2, done=True)
    state = keep(served, rows[-1], skipped=True, done=True)
    assert (state["next"], state["labelled"], state["skipped"]) == (None, 4, 1)
    state = ask(served, "POST", "api/undo", {"annotator": "kim"}).json()
    assert (state["place"], state["next"], state["skipped"]) == (4, 4, 0)
    assert ask(served, "POST", "api/undo", {"annotator": "nobody yet"}).json()["place"] is None


def test_both_bad_is_clicked_exported_and_read_by_kto(serve):
    """Both responses to p0 are bad, of p1 one is better: three rows that say bad and one that says good."""
    served = serve(PAIRS[:2])
    bad, fine = ask(served, "GET", "api/items?annotator=kim").json()["items"]
    keep(served, bad, ranks=[1, 1], bad=True, done=True)
    keep(served, fine, ranks=[1, 2], margin=2, done=True)
    rows = export(served.items, served.store, "kto").rows
    tokenizer = character_tokenizer(VOCAB)
    labelled, _ = prepare_labelled(rows, tokenizer, max_length=16)
    told = {tokenizer.decode(row.example.input_ids, skip_special_tokens=True): row.label for row in labelled}
    assert told == {"p0a": False, "p0b": False, **{f"p1{text}": i == 0 for i, text in enumerate(fine["responses"])}}


def test_ranks_are_kept_dense_and_names_composed(serve):
    served = serve(THREE)
    item = first_item(served)
    keep(served, item, "  김 ", ranks=[7, 3, 3], done=True)
    (label,) = served.said("김").values()
    assert sorted(label.ranks) == [1, 1, 2]


def test_people_are_told_how_far_they_are_and_agree(serve):
    served = serve(PAIRS)
    for who in ("kim", "lee"):
        for item in ask(served, "GET", f"api/items?annotator={who}").json()["items"]:
            best = "a" if item["place"] < 3 else "b"
            keep(served, item, who, ranks=[1 if text == best else 2 for text in item["responses"]], done=True)
    told = ask(served, "GET", "api/people").json()
    assert told["people"] == [{"name": who, "labelled": 5, "skipped": 0} for who in ("kim", "lee")]
    assert told["agreement"] in ({"Cohen's kappa/kim, lee": 1.0}, {})  # {} if all five signs are the same one


def test_a_conversation_is_shown_turn_by_turn(serve):
    prompt = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "안녕"}]
    served = serve([{"prompt": prompt, "responses": ["a", "b"]}])
    assert first_item(served)["prompt"] == [{"role": "system", "text": "be kind"}, {"role": "user", "text": "안녕"}]


def test_other_names_of_this_machine_are_let_in_when_they_are_given(serve):
    served = serve(PAIRS, hosts={"gpu-box"})
    origin = {"Host": "gpu-box:8700", "Origin": "http://gpu-box:8700"}
    assert ask(served, "GET", "api/people", **origin).status == 200
    assert ask(served, "POST", "api/undo", {"annotator": "kim"}, **origin).status == 200
    assert ask(served, "GET", "api/people", Host="another-box:8700").status == 403
    behind_tls = {"Host": "gpu-box", "Origin": "https://gpu-box"}
    assert ask(served, "POST", "api/undo", {"annotator": "kim"}, **behind_tls).status == 200
    assert ask(served, "POST", "api/undo", {"annotator": "kim"}, Origin="https://127.0.0.1").status == 403


@pytest.mark.parametrize("name", ["", "label.css", "label.js", "icon.svg", "api/people"])
def test_every_answer_keeps_out_of_frames_caches_and_other_pages(serve, name):
    headers = ask(serve(PAIRS), "GET", name).headers
    assert "default-src 'none'; script-src 'self'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["cache-control"] == "no-store" and headers["x-frame-options"] == "deny"
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    assert not {"set-cookie", "access-control-allow-origin", "server", "location"} & set(headers)
