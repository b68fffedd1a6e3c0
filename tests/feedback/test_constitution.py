"""Critique and revision: what is asked in which order, what becomes of failures, and what the data files hold."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from bench.scripted import ScriptedServer
from rlhf_fast.data import load_records, normalise
from rlhf_fast.errors import UserError
from rlhf_fast.feedback.constitution import (
    DEFAULT,
    Constitution,
    demonstrations,
    figures,
    preferences,
    read_chains,
    revise,
)
from rlhf_fast.rewards.chat import connect
from rlhf_fast.run.config import read_yaml

VALUES = {
    "critique_request": "CRITIQUE {critique}",
    "revision_request": "REVISE {revision}",
    "principles": [{"name": n, "critique": f"find {n}", "revision": f"drop {n}"} for n in ("x", "y", "z")],
}
CONSTITUTION = Constitution.read(VALUES, "toy.yaml")


def editor(messages):
    """Answers with "xyz", finds the letter that it is asked to find, and drops it from the response before."""
    last = messages[-1]["content"]
    if last.startswith("CRITIQUE"):
        letter = last[-1]
        return f"it says {letter}" if letter in messages[-2]["content"] else "nothing"
    if last.startswith("REVISE"):
        return messages[-4]["content"].replace(last[-1], "") or "-"
    return f"xyz {last}"


def worked(rows, reply=editor, rounds=1, plan=(), constitution=CONSTITUTION, **options):
    with ScriptedServer(reply, plan=plan) as server:
        chat = connect(None, server.url, **{"backoff": 0.01, "retries": 0, "concurrency": 1} | options)
        chains = read_chains(load_records(rows))
        asyncio.run(revise(chat, constitution, chains, rounds))
        return chains, chat, server


def test_a_response_is_criticised_and_then_revised_with_the_critique_in_view():
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    (chain,), _, server = worked([{"prompt": prompt}])
    letter = chain.steps[0]["principle"]
    asked = [[(m["role"], m["content"]) for m in call["messages"]] for call in server.calls]
    start = [("system", "s"), ("user", "q")]
    critique = [*start, ("assistant", "xyz q"), ("user", f"CRITIQUE find {letter}")]
    revision = [*critique, ("assistant", f"it says {letter}"), ("user", f"REVISE drop {letter}")]
    assert asked == [start, critique, revision]
    assert chain.row() == {
        "prompt": prompt,
        "response": "xyz q",
        "steps": [
            {
                "principle": letter,
                "critique_request": f"CRITIQUE find {letter}",
                "critique": f"it says {letter}",
                "revision_request": f"REVISE drop {letter}",
                "revision": "xyz q".replace(letter, ""),
            }
        ],
        "revised": "xyz q".replace(letter, ""),
    }


def test_every_round_starts_from_the_last_revision_with_another_principle():
    (chain,), _, server = worked([{"prompt": "q"}], rounds=3)
    assert sorted(step["principle"] for step in chain.steps) == ["x", "y", "z"]
    assert chain.current == "q" and len(server.calls) == 1 + 3 * 2
    assert [m["content"] for m in server.calls[3]["messages"]][:2] == ["q", chain.steps[0]["revision"]]


def test_a_response_of_the_data_is_revised_and_not_written_anew():
    rows = [{"prompt": "q", "completion": "abx", "topic": 1}, {"prompt": "q", "completion": "w", "topic": 2}]
    chains, _, server = worked(rows, rounds=3)
    assert [c.current for c in chains] == ["ab", "w"]
    assert len(server.calls) == 12
    sft, pairs = (make(chains, CONSTITUTION, "m") for make in (demonstrations, preferences))
    assert [(r["prompt"], r["completion"], r["topic"]) for r in sft] == [("q", "ab", 1), ("q", "w", 2)]
    assert [(r["chosen"], r["rejected"]) for r in pairs] == [("ab", "abx")]  # the second did not change
    assert pairs[0]["label_origin"] == {"by": "constitution", "model": "m", "constitution": CONSTITUTION.name}
    assert normalise(sft, "sft")[0]["completion"] == "ab"
    assert normalise(pairs, "preferences")[0]["responses"] == ["ab", "abx"]


def test_conversations_stay_conversations_in_what_training_reads():
    rows = [{"prompt": [{"role": "user", "content": "질문"}], "completion": "xyz 답"}]
    chains, _, _ = worked(rows, rounds=3)
    (row,) = normalise(demonstrations(chains, CONSTITUTION, "m"), "sft")
    assert row["completion"] == [{"role": "assistant", "content": "답"}]


@pytest.mark.parametrize(
    ("plan", "reply", "why"),
    [
        ([None, 500], editor, "the model answered 500"),
        ([None, None, 400], editor, "the model answered 400"),
        ([], lambda m: " \n" if m[-1]["content"].startswith("REVISE") else "fine", "a reply was empty"),
        ([{"choices": [{"message": {"content": "half"}, "finish_reason": "length"}]}], editor, "cut at max_new_tokens"),
    ],
    ids=["critique fails", "revision refused", "revision empty", "response cut"],
)
def test_a_step_that_fails_ends_the_chain_and_leaves_it_out_of_the_data(plan, reply, why):
    (chain,), chat, _ = worked([{"prompt": "q"}], reply=reply, plan=plan)
    assert why in chain.fault and why in chain.row()["fault"] and "revised" not in chain.row()
    assert demonstrations([chain], CONSTITUTION, "m") == preferences([chain], CONSTITUTION, "m") == []
    found = figures([chain], chat)
    assert (found["finished"], found["unfinished"]) == (0, 1)


def test_the_same_work_again_asks_only_for_what_failed(tmp_path):
    """The critique of the second of three prompts fails at first; its revision could not be asked."""
    rows, cache = [{"prompt": p} for p in "abc"], tmp_path / "calls.jsonl"
    chains, _, server = worked(rows, plan=[None] * 4 + [500], cache=cache)
    assert [bool(c.fault) for c in chains] == [False, True, False] and len(server.calls) == 8
    chains, chat, server = worked(rows, cache=cache)
    assert len(server.calls) == 2 == chat.asked and [c.fault for c in chains] == [None] * 3


def test_principles_are_drawn_by_seed_for_each_prompt_alone():
    drawn = [[p.name for p in CONSTITUTION.draw(f"p{i}", 4, seed=0)] for i in range(300)]
    assert drawn[7] == [p.name for p in CONSTITUTION.draw("p7", 4, seed=0)]
    assert drawn != [[p.name for p in CONSTITUTION.draw(f"p{i}", 4, seed=1)] for i in range(300)]
    assert all(sorted(names[:3]) == ["x", "y", "z"] for names in drawn)
    first = Counter(names[0] for names in drawn)
    assert all(70 < count < 130 for count in first.values()), first


def test_the_shipped_constitution_is_sound():
    """Every principle is told apart in the requests, which name no placeholder in the end."""
    constitution = Constitution.read(read_yaml(DEFAULT), DEFAULT)
    assert len(constitution.principles) >= 10
    asked = constitution.critique_request.replace("{critique}", constitution.principles[0].critique)
    assert constitution.principles[0].critique in asked and "{" not in asked


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"principles": None}, "`principles` must be a list"),
        ({"principles": []}, "`principles` must be a list of at least one"),
        ({"principle": []}, "toy.yaml: `principle` is unknown"),
        ({"critique_request": "no place"}, "must be a text with {critique} in it"),
        ({"principles": [{"name": "a", "critique": "b"}]}, "principle 1: `revision` is missing"),
        ({"principles": [{"name": "a", "critique": "b", "revision": " "}]}, "`revision` must be a text"),
        ({"principles": [VALUES["principles"][0]] * 2}, "two principles are called 'x'"),
        ({"principles": ["be good"]}, "principle 1: `be good` is unknown"),
    ],
)
def test_a_malformed_constitution_is_told(change, told):
    with pytest.raises(UserError) as error:
        Constitution.read({**VALUES, **change}, "toy.yaml")
    assert told in str(error.value)
