"""Every accepted format becomes the canonical rows worked out by hand here; every bad row is named."""

import json

import pytest

from rlhf_fast.data.formats import final_answer, normalise, parse_transcript
from rlhf_fast.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


HH = {
    "chosen": "\n\nHuman: hi\n\nAssistant: Hello. A list:\n\n1. one\n\nHuman: and?\n\nAssistant: No.",
    "rejected": "\n\nHuman: hi\n\nAssistant: Hello. A list:\n\n1. one\n\nHuman: and?\n\nAssistant: Yes!",
}
HH_PROMPT = [user("hi"), assistant("Hello. A list:\n\n1. one"), user("and?")]
GSM8K = {"question": "How many?", "answer": "Ten hundreds are 10*100=<<10*100=1000>>1,000.\n#### 1,000"}
ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
SHAREGPT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}


def one(row, need):
    return normalise([row], need)[0]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "abc", "id": 7}, {"text": "abc", "id": 7}),
        ({"messages": [user("hi"), assistant("yes")]}, {"messages": [user("hi"), assistant("yes")]}),
        (SHAREGPT, {"messages": [user("hi"), assistant("yes")]}),
        ({"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "c"}),
        ({"prompt": "p", "response": "c"}, {"prompt": "p", "completion": "c"}),
        ({"prompt": [user("hi")], "completion": "c"}, {"prompt": [user("hi")], "completion": [assistant("c")]}),
        ({"prompt": "p", "completion": "c", "weight": "0.5"}, {"prompt": "p", "completion": "c", "weight": 0.5}),
        (ALPACA, {"prompt": [user("Add.\n\n1 and 2")], "completion": [assistant("3")]}),
        ({**ALPACA, "input": ""}, {"prompt": [user("Add.")], "completion": [assistant("3")]}),
        (GSM8K, {"prompt": [user("How many?")], "completion": [assistant(GSM8K["answer"])]}),
        ({"prompt": "p", "chosen": "good", "rejected": "bad"}, {"prompt": "p", "completion": "good"}),
        (HH, {"prompt": HH_PROMPT, "completion": [assistant("No.")]}),
        ({"prompt": "p", "responses": ["a", "b"], "ranking": [2, 1]}, {"prompt": "p", "completion": "b"}),
    ],
)
def test_rows_for_supervised_fine_tuning(row, expected):
    assert one(row, "sft") == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"prompt": "p", "chosen": "good", "rejected": "bad", "margin": 2, "source": "x"},
            {"prompt": "p", "responses": ["good", "bad"], "margin": 2.0, "source": "x"},
        ),
        (HH, {"prompt": HH_PROMPT, "responses": [[assistant("No.")], [assistant("Yes!")]]}),
        (
            {"chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]},
            {"prompt": [user("hi")], "responses": [[assistant("a")], [assistant("b")]]},
        ),
        # a prompt beside whole conversations is their first message once more
        (
            {"prompt": "hi", "chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]},
            {"prompt": [user("hi")], "responses": [[assistant("a")], [assistant("b")]]},
        ),
        # the shared prefix of strings ends with a whole word, and "bl" belongs to both responses
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is black."},
            {"prompt": "The sky is", "responses": [" blue.", " black."]},
        ),
        ({"chosen": "Sum?\n46", "rejected": "Sum?\n47"}, {"prompt": "Sum?\n", "responses": ["46", "47"]}),
        ({"chosen": "It is so", "rejected": "It is so sad"}, {"prompt": "It is", "responses": [" so", " so sad"]}),
    ],
)
def test_pairs(row, expected):
    assert one(row, "preferences") == expected


def test_a_pair_that_parts_early_keeps_all_of_both_conversations():
    row = {
        "chosen": [user("hi"), assistant("a"), user("more"), assistant("b")],
        "rejected": [user("hi"), assistant("c")],
    }
    responses = one(row, "preferences")["responses"]
    assert responses == [[assistant("a"), user("more"), assistant("b")], [assistant("c")]]


@pytest.mark.parametrize(
    ("ranking", "best_first"),
    [
        # ranks: response 0 is third, response 1 first, response 2 second
        ([3, 1, 2], ["b", "c", "a"]),
        (["2", "3", "1"], ["c", "a", "b"]),
        # with a zero it is the order: response 2 first, then 0, then 1
        ([2, 0, 1], ["c", "a", "b"]),
    ],
)
def test_rankings_give_the_best_response_first(ranking, best_first):
    row = {"prompt": "p", "responses": ["a", "b", "c"], "ranking": ranking}
    assert one(row, "preferences") == {"prompt": "p", "responses": best_first}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "12+34=", "completion": "46", "answer": "46"}, {"prompt": "12+34=", "completion": "46", "answer": "46"}),
        (GSM8K, {"prompt": [user("How many?")], "answer": "1000", "solution": GSM8K["answer"]}),
        (HH, {"prompt": HH_PROMPT}),
        ({"messages": [user("hi"), assistant("yes"), user("more"), assistant("no")]},
         {"prompt": [user("hi"), assistant("yes"), user("more")]}),
        ({"messages": [user("hi")]}, {"prompt": [user("hi")]}),
        (ALPACA, {"prompt": [user("Add.\n\n1 and 2")], "answer": "3"}),
    ],
)  # fmt: skip
def test_prompts_never_hold_their_answer(row, expected):
    assert one(row, "prompts") == expected


@pytest.mark.parametrize("label", [True, 1, "true", "1", 1.0])
def test_labels_are_booleans(label):
    assert one({"prompt": "p", "completion": "c", "label": label}, "labelled")["label"] is True


def test_transcripts():
    assert parse_transcript(HH["chosen"]) == [*HH_PROMPT, assistant("No.")]
    assert parse_transcript("Human: a\n\nAssistant: b: Human: c") == [user("a"), assistant("b: Human: c")]
    with pytest.raises(UserError, match="expected turns"):
        parse_transcript("once upon a time\n\nHuman: a")


def test_final_answers():
    assert final_answer("a #### 1\n#### -1,234 ") == "-1234"
    assert final_answer("1234") is None and final_answer("#### ") is None


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("row", "need", "expected"),
    [
        ({"promt": "p", "completion": "c"}, "sft", "Rename `promt` to `prompt`."),
        ({"prompt": "p", "good": "c"}, "preferences", "Missing beside what is there: `chosen`, `rejected`."),
        ({"prompt": "p"}, "sft", "Missing beside what is there: `completion`."),
        ({"a": 1, "b": 2}, "prompts", "its columns are `a`, `b`"),
        ({"a": 1}, "preferences", "`prompt` + `responses` + `ranking`"),
        ({"a": 1}, "sft", "supervised fine-tuning needs `messages`, or `prompt` + `completion`, or `text`"),
        ({"prompt": "p", "completion": "c"}, "labelled", "Missing beside what is there: `label`."),
    ],
)
def test_columns_that_fit_nothing_are_answered_in_one_sentence(row, need, expected):
    with pytest.raises(UserError) as error:
        normalise([row], need)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("row", "need", "expected"),
    [
        ({"text": None}, "sft", "`text` is null"),
        ({"text": " "}, "sft", "`text` is empty"),
        ({"text": 3}, "sft", "`text` must be a string, got int 3"),
        ({"other": "x"}, "sft", "`text` is missing; the row has `other`"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(tmp_path, row, need, expected):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"text": "fine"}, row])), encoding="utf-8")
    with pytest.raises(UserError) as error:
        normalise(str(path), need)
    assert "d.jsonl, line 2: " + expected in str(error.value) and "bad_rows: drop" in str(error.value)


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
RANKED = {"prompt": "p", "responses": ["a", "b", "c"], "ranking": [1, 2, 3]}


@pytest.mark.parametrize(
    ("row", "need", "expected"),
    [
        ({"messages": []}, "sft", "`messages` has no messages"),
        ({"messages": "hi"}, "sft", "`messages` must be a list of messages"),
        ({"messages": ["hi"]}, "sft", "`messages[0]` must be {role, content}"),
        ({"messages": [user("hi")]}, "sft", "no assistant message"),
        ({"messages": [user("hi"), assistant("")]}, "sft", "content of `messages[1]` (assistant) is empty"),
        ({"messages": [user("hi"), {"role": "robot", "content": "x"}]}, "sft", "the role 'robot'; use one of system"),
        ({"messages": [user("hi"), {"role": "assistant"}]}, "sft", "`messages[1]` has no content"),
        ({"prompt": "p", "completion": [assistant("x")]}, "sft", "`prompt` is a string"),
        ({"prompt": [user("p")], "completion": [user("x")]}, "sft", "must begin with the assistant"),
        ({"prompt": "p", "completion": "c", "weight": -1}, "sft", "`weight` must not be negative"),
        ({"prompt": "p", "completion": "c", "weight": "much"}, "sft", "`weight` must be a finite number"),
        ({**PAIR, "chosen": ""}, "preferences", "`chosen` is empty"),
        ({**PAIR, "rejected": None}, "preferences", "`rejected` is null"),
        ({**PAIR, "rejected": "a"}, "preferences", "identical, so nothing is preferred"),
        ({**PAIR, "rejected": [assistant("b")]}, "preferences", "must both be strings or both lists"),
        ({**PAIR, "margin": float("nan")}, "preferences", "`margin` must be a finite number"),
        ({"chosen": "one", "rejected": "two"}, "preferences", "share no beginning"),
        ({"chosen": [user("a"), assistant("x")], "rejected": [user("b"), assistant("x")]}, "preferences",
         "differ already in message 0 (user)"),
        ({**HH, "chosen": HH["chosen"].removesuffix(" No.")}, "preferences", "content of `chosen[3]` (assistant) is empty"),
        ({**RANKED, "ranking": [1, 2]}, "preferences", "one rank for each of the 3 responses"),
        ({**RANKED, "ranking": [1, 2, 2]}, "preferences", "has a tie"),
        ({**RANKED, "ranking": [1, 2, 4]}, "preferences", "a permutation of 1..3"),
        ({**RANKED, "ranking": [0.5, 1, 2]}, "preferences", "whole numbers"),
        ({**RANKED, "responses": ["a", "b", "a"]}, "preferences", "two of the `responses` are identical"),
        ({**RANKED, "responses": "abc"}, "preferences", "a list of two or more"),
        ({"question": "q", "answer": "a\n####"}, "prompts", "nothing after its `####`"),
        ({"prompt": "p", "completion": "c", "label": 2}, "labelled", "`label` must be true or false"),
    ],
)  # fmt: skip
def test_a_bad_row_says_what_is_wrong(row, need, expected):
    with pytest.raises(UserError) as error:
        normalise([row], need)
    assert "the data, row 1: " in str(error.value) and expected in str(error.value)


def test_bad_rows_can_be_dropped_and_are_counted():
    rows = [PAIR, {**PAIR, "chosen": ""}, {**PAIR, "rejected": "a"}, {**PAIR, "chosen": ""}]
    records = normalise(rows, "preferences", bad_rows="drop")
    assert len(records) == 1 and records.dropped == {"empty chosen": 2, "identical responses": 1}
    tied = normalise([RANKED, {**RANKED, "ranking": [1, 1, 2]}], "preferences", bad_rows="drop")
    assert tied.dropped == {"tied ranks": 1}
    with pytest.raises(UserError, match="every one of its 2 rows is unusable"):
        normalise(rows[1:3], "preferences", bad_rows="drop")
    with pytest.raises(UserError, match="'error' or 'drop'"):
        normalise(rows, "preferences", bad_rows="ignore")


def test_rows_of_a_reduced_data_set_keep_their_names():
    records = normalise([{"text": ""}, {"text": "a"}], "sft", bad_rows="drop")
    assert records.where(0) == "the data, row 2"


# ---- helpfulness and harmlessness apart

TWO = {"prompt": "p", "responses": ["a", "b"], "better": 1, "safer": 0, "safe": [True, False], "id": 7}
PKU = {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": 0}
PKU |= {"is_response_0_safe": True, "is_response_1_safe": False, "id": 7}


@pytest.mark.parametrize("row", [TWO, PKU], ids=["ours", "PKU-SafeRLHF"])
def test_one_row_with_two_labels_is_a_preference_and_a_comparison_of_harm(row):
    assert normalise([row], "preferences")[0] == {"prompt": "p", "responses": ["b", "a"], "id": 7}
    assert normalise([row], "harm")[0] == {"prompt": "p", "responses": ["a", "b"], "safe": [True, False], "id": 7}


def test_safety_follows_the_responses_of_pairs_and_rankings_in_files_of_their_own():
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "safe": ["true", 0]}
    assert normalise([pair], "harm")[0] == {"prompt": "p", "responses": ["a", "b"], "safe": [True, False]}
    ranked = {"prompt": "p", "responses": ["a", "b", "c"], "ranking": [3, 1, 2], "safe": [False, True, False]}
    want = {"prompt": "p", "responses": ["b", "c", "a"], "safe": [True, False, False]}
    assert normalise([ranked], "harm")[0] == want
    unlabelled = {"prompt": "p", "chosen": "a", "rejected": "b", "safe": None}
    assert normalise([unlabelled], "harm")[0] == {"prompt": "p", "responses": ["a", "b"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"safer": 2}, "`safer` must be 0 or 1, the index of a response, got 2"),
        ({"safe": [True]}, "`safe` must say true or false of each of 2 responses"),
        ({"safe": ["maybe", True]}, "`safe` must be true or false, got str 'maybe'"),
        ({"responses": ["a"]}, "`responses` must be a list of two"),
        ({"responses": ["a", "a"]}, "the two `responses` are identical"),
    ],
    ids=str,
)
def test_a_bad_label_of_harm_is_named(change, message):
    with pytest.raises(UserError, match=message):
        normalise([{**TWO, **change}], "harm")
