"""What several annotators come to: majorities by hand, and rows that the trainers take."""

from __future__ import annotations

import pytest

from rlhf_fast.data import Records, normalise
from rlhf_fast.errors import UserError
from rlhf_fast.feedback.candidates import read_candidates
from rlhf_fast.feedback.people.consensus import agreement, export, majority
from rlhf_fast.feedback.people.items import Items, item_id, shown_order
from rlhf_fast.feedback.people.store import Label, Store


def make(rows):
    return Items(read_candidates(Records(rows))[0])


def say(store, items, place, who, **opinions):
    """A label from {response: rank} and the like, whatever the item's own order."""
    identity, item = items[place]
    fields = {"done": True, **opinions}
    for name in ("ranks", "safer", "unsafe"):
        if name in fields:
            fields[name] = tuple(fields[name][response] for response in item.responses)
    store.put(Label(identity, who, order=tuple(shown_order(identity, who, len(item.responses))), **fields))


@pytest.fixture
def store():
    return Store(None)


@pytest.fixture
def pair():
    return make([{"prompt": "질문", "responses": ["good", "poor"], "topic": "x"}])


@pytest.mark.parametrize(
    ("votes", "said"), [([1, 1, -1], 1), ([1, -1], None), ([1, 0], None), ([0, 0, 1], 0), ([-1], -1), ([], None)]
)
def test_a_majority_is_the_one_answer_that_most_give(votes, said):
    assert majority(votes) == said


def test_pairs_with_the_mean_margin_of_the_majority(pair, store):
    """Two say good by 1 and 3, one says poor by 3: chosen good, margin (1 + 3) / 2; with own margins (0.3 + 1) / 2."""
    say(store, pair, 0, "kim", ranks={"good": 1, "poor": 2}, margin=1)
    say(store, pair, 0, "lee", ranks={"good": 1, "poor": 2}, margin=3)
    say(store, pair, 0, "mina", ranks={"good": 2, "poor": 1}, margin=3)
    (row,) = export(pair, store, "pairs").rows
    assert row == {
        "prompt": "질문",
        "chosen": "good",
        "rejected": "poor",
        "margin": 2.0,
        "topic": "x",
        "label_origin": {"by": "people", "annotators": ["kim", "lee", "mina"]},
    }
    assert export(pair, store, "pairs", (0.3, 0.7, 1.0)).rows[0]["margin"] == pytest.approx(0.65)
    (canonical,) = normalise(Records([row]), "preferences")
    assert canonical["responses"] == ["good", "poor"] and canonical["margin"] == 2.0


def test_a_conflict_gives_no_row_and_is_reported(pair, store):
    say(store, pair, 0, "kim", ranks={"good": 1, "poor": 2}, margin=1)
    say(store, pair, 0, "mina", ranks={"good": 2, "poor": 1}, margin=3)
    outcome = export(pair, store, "pairs")
    assert outcome.rows == []
    assert outcome.figures["pairs/without a majority"] == 1 and outcome.figures["items/labelled by several"] == 1
    assert "contradict each other on 1 pairs" in outcome.notes[0]


def test_skips_ties_and_unfinished_answers_give_no_pairs(pair, store):
    say(store, pair, 0, "kim", skipped=True)
    say(store, pair, 0, "lee", ranks={"good": 1, "poor": 2}, done=False)
    with pytest.raises(UserError, match="no item of the data has an answer to export as pairs"):
        export(pair, store, "pairs")
    say(store, pair, 0, "lee", ranks={"good": 1, "poor": 1}, bad=True)
    outcome = export(pair, store, "pairs")
    assert outcome.rows == [] and outcome.figures["pairs/tied"] == 1
    assert outcome.figures["items/all responses bad"] == 1


def test_a_ranking_follows_the_majority_of_every_pair(store):
    """kim b>a>c, lee b>c>a, mina a>b>c: b beats a 2:1, b beats c 3:0, a beats c 2:1, so b a c."""
    items = make([{"prompt": "p", "responses": ["a", "b", "c"]}])
    for who, order in (("kim", "bac"), ("lee", "bca"), ("mina", "abc")):
        say(store, items, 0, who, ranks={letter: i for i, letter in enumerate(order, 1)})
    (row,) = export(items, store, "ranked").rows
    assert (row["responses"], row["ranking"]) == (["b", "a", "c"], [1, 2, 3])
    assert normalise(Records([row]), "preferences")[0]["responses"] == ["b", "a", "c"]
    pairs = {(r["chosen"], r["rejected"]) for r in export(items, store, "pairs").rows}
    assert pairs == {("b", "a"), ("b", "c"), ("a", "c")}
    assert all("margin" not in r for r in export(items, store, "pairs").rows)


def test_of_equally_good_responses_a_ranking_keeps_one(store):
    items = make([{"prompt": "p", "responses": ["a", "b", "c"]}])
    say(store, items, 0, "kim", ranks={"a": 1, "b": 2, "c": 2})
    (row,) = export(items, store, "ranked").rows
    assert row["responses"][0] == "a" and len(row["responses"]) == 2 and row["ranking"] == [1, 2]


def test_safety_is_exported_apart_from_helpfulness(pair, store):
    """The more helpful one is the unsafe one."""
    ranks, safer = {"good": 1, "poor": 2}, {"good": 2, "poor": 1}
    say(store, pair, 0, "kim", ranks=ranks, margin=2, safer=safer, unsafe={"good": True, "poor": False})
    assert export(pair, store, "pairs").rows[0]["chosen"] == "good"
    (row,) = export(pair, store, "safety").rows
    assert (row["chosen"], row["rejected"]) == ("poor", "good")
    assert row["safe"] == [True, False] and "margin" not in row
    (canonical,) = normalise(Records([row]), "harm")
    assert canonical["responses"] == ["poor", "good"] and canonical["safe"] == [True, False]


def test_all_bad_makes_bad_examples_and_preferences_a_good_and_a_bad_one(store):
    """Most say all bad of p; of q nobody does, b is best and c worst; of r they tie. As kto reads it."""
    rows = [{"prompt": "p", "responses": ["a", "b"], "topic": 1}, {"prompt": "q", "responses": ["a", "b", "c"]}]
    items = make([*rows, {"prompt": "r", "responses": ["a", "b"]}])
    for who, bad in (("kim", True), ("lee", True), ("mina", False)):
        say(store, items, 0, who, ranks={"a": 1, "b": 2}, bad=bad)
    say(store, items, 1, "kim", ranks={"a": 2, "b": 1, "c": 3})
    say(store, items, 2, "kim", ranks={"a": 1, "b": 1})
    outcome = export(items, store, "kto")
    labelled = normalise(Records(outcome.rows), "labelled")
    assert {(r["prompt"], r["completion"]): r["label"] for r in labelled} == {
        ("p", "a"): False, ("p", "b"): False, ("q", "b"): True, ("q", "c"): False,
    }  # fmt: skip
    assert all(row["label_origin"]["by"] == "people" for row in outcome.rows) and outcome.rows[0]["topic"] == 1
    pairs = export(items, store, "pairs")
    assert "--format kto makes rows of them" in pairs.notes[0] and ("a", "b") in {
        (row["chosen"], row["rejected"]) for row in pairs.rows
    }


def test_of_several_responses_the_safe_ones_stand_above_the_unsafe(store):
    items = make([{"prompt": "p", "responses": ["a", "b", "c"]}])
    ranks = {"a": 1, "b": 2, "c": 3}
    say(store, items, 0, "kim", ranks=ranks, unsafe={"a": True, "b": False, "c": False})
    pairs = {(r["chosen"], r["rejected"]) for r in export(items, store, "safety").rows}
    assert pairs == {("b", "a"), ("c", "a")}
    say(store, items, 0, "kim", ranks=ranks)
    with pytest.raises(UserError, match=r"export as safety; label some first \(start it with --safety\)"):
        export(items, store, "safety")


def test_agreement_of_two_by_hand(store):
    """4 pairs, first or second better: 1/1, 1/1, 1/2, 2/2. Observed 3/4; by chance 3/4 * 1/2 + 1/4 * 1/2 = 1/2; kappa 1/2."""
    items = make([{"prompt": f"p{i}", "responses": ["a", "b"]} for i in range(5)])
    for place, better in enumerate(["11", "11", "12", "22"]):
        for who, best in zip(("kim", "lee"), better):
            store.put(Label(items[place][0], who, ranks=(1, 2) if best == "1" else (2, 1), done=True))
    store.put(Label(items[4][0], "kim", ranks=(1, 2), done=True))  # judged by one alone
    assert agreement(items, store) == {"Cohen's kappa/kim, lee": pytest.approx(0.5)}


def test_three_annotators_have_a_fleiss_kappa_too(store):
    items = make([{"prompt": f"p{i}", "responses": ["a", "b"]} for i in range(6)])
    for place in range(6):
        for who in ("kim", "lee", "mina"):
            say(store, items, place, who, ranks={"a": 1, "b": 2} if place % 2 else {"a": 1, "b": 1})
    figures = agreement(items, store)
    assert figures["Fleiss' kappa"] == 1 and len(figures) == 4


def test_labels_of_other_data_are_left_out_and_said(pair, store):
    say(store, pair, 0, "kim", ranks={"good": 1, "poor": 2})
    other = make([{"prompt": "another", "responses": ["x", "y"]}])
    say(store, other, 0, "kim", ranks={"x": 1, "y": 2})
    outcome = export(pair, store, "pairs")
    assert len(outcome.rows) == 1 and "1 labelled items are not in the data" in outcome.notes[0]


def test_an_item_is_the_same_wherever_it_stands_and_however_its_responses_are_ordered():
    one = make([{"prompt": "p", "responses": ["a", "b", "c"]}, {"prompt": "q", "responses": ["a", "b"]}])
    two = make([{"prompt": "q", "responses": ["b", "a"]}, {"prompt": "p", "responses": ["c", "a", "b"]}])
    assert one[0][0] == two[1][0] and one[1][0] == two[0][0]
    assert one[0][1].responses == two[1][1].responses
    assert item_id(one[0][1]) != item_id(one[1][1])


def test_every_annotator_has_an_order_of_their_own_that_stays():
    orders = {who: shown_order("an item", who, 3) for who in map(str, range(40))}
    assert orders == {who: shown_order("an item", who, 3) for who in orders}
    assert {tuple(order) for order in orders.values()} == {
        (0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0),
    }  # fmt: skip
