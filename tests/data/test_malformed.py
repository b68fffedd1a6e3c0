"""Malformed rows, for every trainer: each is named with file, line, column, value and what to do; none passes unseen."""

from __future__ import annotations

import csv
import json

import pytest

from rlhf_fast.cli import COMMANDS, trainer_of
from rlhf_fast.errors import UserError

ASK = [{"role": "user", "content": "2+1="}]
PAIR = {"chosen": "3", "rejected": "4"}
ROWS = {
    "sft": {"prompt": "1+2=", "completion": "3"},
    "reward": {"prompt": "1+2=", **PAIR},
    "dpo": {"prompt": "1+2=", **PAIR},
    "kto": {"prompt": "1+2=", "completion": "3", "label": True},
    "ppo": {"prompt": "1+2=", "answer": "3"},
    "safe-ppo": {"prompt": "1+2=", "answer": "3"},
    "grpo": {"prompt": "1+2=", "answer": "3"},
    # kinds of a command's data: a cost model's, rankings, the two labels of PKU-SafeRLHF
    "cost": {"prompt": "1+2=", **PAIR, "safe": [True, False]},
    "ranked": {"prompt": "1+2=", "responses": ["3", "4"], "ranking": [1, 2]},
    "labels": {
        "prompt": "1+2=",
        "response_0": "3",
        "response_1": "4",
        "better_response_id": 0,
        "safer_response_id": 1,
        "is_response_0_safe": False,
        "is_response_1_safe": True,
    },
}
# what trains on them, and how
METHODS = {"cost": ("reward", {"kind": "cost"}), "ranked": ("reward", {}), "labels": ("reward", {"kind": "cost"})}
SAMPLING = ("ppo", "safe-ppo", "grpo")
RESPONSE = {"sft": "completion", "reward": "rejected", "dpo": "chosen", "kto": "completion", "cost": "chosen"}
GONE = object()

# kind -> what stands in the prompt, the column that is named, and what is said of the value
PROMPTS = {
    "null": (None, "prompt", "null"),
    "missing": (GONE, "prompt", "the row has"),
    "empty": ("", "prompt", "empty: ''"),
    "white space": (" \t ", "prompt", r"empty: ' \t '"),
    "a number": (12, "prompt", "got int 12"),
    "true": (True, "prompt", "got bool True"),
    "an object": ({"role": "user", "content": "x"}, "prompt", "got dict {'role'"),
    "half a character": ("1+2 \ud83d", "prompt", r"'\ud83d', at position 4"),
    "no messages": ([], "prompt", "no messages"),
    "a string among messages": ([*ASK, "more"], "prompt[1]", "got str 'more'"),
    "an unknown role": ([{"role": "robot", "content": "x"}], "prompt[0]", "'robot'; use one of system"),
    "a message without content": ([{"role": "user"}], "prompt[0]", "has no content"),
    "an empty message": ([*ASK, {"role": "user", "content": "\n"}], "prompt[1]", r"empty: '\n'"),
    "a message that is a number": ([{"role": "user", "content": 7}], "prompt[0]", "got int 7"),
    "characters without width": ("\u200b\ufeff", "prompt", r"empty: '\u200b"),
    "a number without end": (float("inf"), "prompt", "got float inf"),
    "a list of lists": ([[ASK]], "prompt[0]", "got list [[{'role'"),
    "tool calls in words": (
        [{"role": "user", "tool_calls": "f()"}],
        "prompt[0]",
        "must be a list of objects, got str 'f()'",
    ),
    "a role that is a list": ([{"role": ["user"], "content": "x"}], "prompt[0]", "has the role ['user']"),
    "a picture": ([{"role": "user", "content": [{"type": "image"}]}], "prompt[0]", "{'type': 'image'}"),
    "half a character in a message": ([{"role": "user", "content": "\udc00"}], "prompt[0]", r"'\udc00', at position 0"),
}
RESPONSES = {
    "null": (None, "null"),
    "missing": (GONE, "the row has"),
    "empty": ("", "''"),
    "a number": (0.5, "float 0.5"),
    "an object": ({"text": "3"}, "dict {'text'"),
    "half a character": ("\ud83d", r"'\ud83d', at position 0"),
    "messages after a string": ([{"role": "assistant", "content": "3"}], "list"),
}
WEIGHED = ("sft", "reward", "dpo", "kto", "cost", "ranked", "labels")
# of some trainers: changes to the row, the column that is named, and what is said of the value
SPECIAL = {
    "a negative weight": (WEIGHED, {"weight": -1}, "weight", "got -1"),
    "a weight that is NaN": (WEIGHED, {"weight": float("nan")}, "weight", "got float nan"),
    "a weight too large": (WEIGHED, {"weight": 10**400}, "weight", "got int 1000"),
    "a margin too large": (("reward", "dpo", "cost"), {"margin": -(10**400)}, "margin", "got int -1000"),
    "half a character elsewhere": (tuple(ROWS), {"note": "\udc00"}, "note", r"'\udc00', at position 0"),
    "a weight in words": (WEIGHED, {"weight": "high"}, "weight", "got str 'high'"),
    "nothing preferred": (("reward", "dpo"), {"rejected": "3"}, "chosen", "identical"),
    "an infinite margin": (("reward", "dpo"), {"margin": float("inf")}, "margin", "got float inf"),
    "a label that is neither": (("kto",), {"label": 2}, "label", "got int 2"),
    "a label in words": (("kto",), {"label": "perhaps"}, "label", "got str 'perhaps'"),
    "a null label": (("kto",), {"label": None}, "label", "null"),
    "no label": (("kto",), {"label": GONE}, "label", "the row has"),
}
RANKED = ROWS["ranked"]
SAFETY = {
    "in words": ({"safe": "yes"}, "safe", "got str 'yes'"),
    "of one response": ({"safe": [True]}, "safe", "got list [True]"),
    "of none": ({"safe": []}, "safe", "got list []"),
    "a label that is neither": ({"safe": [2, True]}, "safe", "got int 2"),
    "an unknown one beside a known": ({"safe": [None, True]}, "safe", "got NoneType None"),
    "objects": ({"safe": [{"safe": True}, {}]}, "safe", "got dict {'safe': True}"),
    "lists": ({"safe": [[True], [False]]}, "safe", "got list [True]"),
}
LABELS = {
    "a response too many": ({"safer_response_id": 2}, "safer_response_id", "got 2"),
    "half a response": ({"safer_response_id": 0.5}, "safer_response_id", "got 0.5"),
    "a truth": ({"safer_response_id": True}, "safer_response_id", "got bool True"),
    "a huge one": ({"safer_response_id": 10**400}, "safer_response_id", "got int 1000"),
    "nobody's": ({"safer_response_id": None}, "safer_response_id", "null"),
    "a response that is null": ({"response_0": None}, "response_0", "null"),
    "a response that is a number": ({"response_1": 4}, "responses[1]", "got int 4"),
    "one response twice": ({"response_1": "3"}, "responses", "identical"),
    "safe in words": ({"is_response_0_safe": "maybe"}, "safe", "got str 'maybe'"),
    "safe in a list": ({"is_response_1_safe": [True]}, "safe", "got list [True]"),
}
RANKINGS = {
    "a tie": ({"ranking": [1, 1]}, "ranking", "[1, 1] has a tie"),
    "no permutation": ({"ranking": [1, 5]}, "ranking", "got [1, 5]"),
    "too few ranks": ({"ranking": [1]}, "ranking", "got list [1]"),
    "no list": ({"responses": "3"}, "responses", "got str '3'"),
    "one response twice": ({"responses": ["3", "3"]}, "responses", "identical"),
    "an empty response": ({"responses": ["3", ""]}, "responses[1]", "''"),
}
CHAT = {"messages": [*ASK, {"role": "assistant", "content": "3"}]}
CHATS = {
    "nobody answers": ({"messages": ASK}, "messages", "no assistant message"),
    "an empty answer": ({"messages": [*ASK, {"role": "assistant", "content": ""}]}, "messages[1]", "''"),
}
# whole lines: kind -> bytes, what is said
LINES = {
    "cut off": (b'{"prompt": "1+2=", "comp', "malformed JSON at column 25"),
    "a list": (b'["1+2=", "3"]', 'got a list: \'["1+2="'),
    "a bare string": (b'"1+2="', "got a string: '\"1+2=\"'"),
    "a key twice": (b'{"prompt": "1", "prompt": "2"}', "`prompt` is there twice, as '1' and '2'"),
    "too deep": (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "a number too long": (b'{"prompt": ' + b"9" * 5000 + b"}", "too many digits"),
    "NULs": (b"\0\0\0\0", "malformed JSON at column 1"),
    "not UTF-8": (b'{"prompt": "caf\xe9"}', r"byte 16 (b'\xe9')"),
}
CELLS = {
    "too few cells": ("only one", "1 cells, but the header names", "['only one']"),
    "a quote that is not closed": ('"1+2=,3', "malformed CSV (unexpected end of data", "twice"),
}


def changed(row, **changes):
    return {key: value for key, value in {**row, **changes}.items() if value is not GONE}


def cases():
    for method, row in ROWS.items():
        for kind, (value, column, said) in PROMPTS.items():
            yield f"{method}: a prompt, {kind}", method, row, changed(row, prompt=value), column, said
        for kind, (value, said) in RESPONSES.items() if method in RESPONSE else ():
            column = RESPONSE[method]
            yield f"{method}: a response, {kind}", method, row, changed(row, **{column: value}), column, said
        for kind, (methods, changes, column, said) in SPECIAL.items():
            if method in methods:
                yield f"{method}: {kind}", method, row, changed(row, **changes), column, said
    for method, table in {"ranked": RANKINGS, "cost": SAFETY, "labels": LABELS}.items():
        for kind, (changes, column, said) in table.items():
            yield f"{method}: {kind}", method, ROWS[method], changed(ROWS[method], **changes), column, said
    three = {"responses": ["3", "4", "5"], "ranking": [1, 2, 3]}
    yield "dpo: three responses", "dpo", RANKED, changed(RANKED, **three), "responses", "has 3"
    for kind, (changes, column, said) in CHATS.items():
        yield f"sft: {kind}", "sft", CHAT, changed(CHAT, **changes), column, said


CASES = {name: case for name, *case in cases()}


def read(method, path, tokenizer, bad_rows):
    method, more = METHODS.get(method, (method, {}))
    config_class, trainer = trainer_of(method)
    if method in SAMPLING:
        more = {"reward_funcs": ["answer"], **({"cost_funcs": ["random"]} if method == "safe-ppo" else {})}
    return trainer.tokenize(str(path), tokenizer, config_class(**more), name="train", bad_rows=bad_rows)


@pytest.mark.parametrize("name", CASES)
def test_a_malformed_row_is_named(name, tokenizer, tmp_path):
    """The run stops with it, an audit lists it, and ``drop`` leaves it out and says so."""
    method, good, bad, column, said = CASES[name]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, bad, good)))
    with pytest.raises(UserError) as error:
        read(method, path, tokenizer, "error")
    message = str(error.value)
    for part in ("rows.jsonl, line 2: ", f"`{column}`", said, "Correct the row", "bad_rows: drop"):
        assert part in message
    items, report = read(method, path, tokenizer, "audit")
    (problem,) = report.problems
    assert problem.where == f"{path}, line 2"
    assert problem.column == column
    assert message.startswith(f"{problem.where}: {problem.message}")
    assert len(items) == 2
    kept, report = read(method, path, tokenizer, "drop")
    assert len(kept) == 2
    assert f"1 rows dropped: {problem.reason}" in str(report)


def test_there_are_25_kinds_for_every_trainer():
    for method in ROWS:
        assert len(LINES) + len(CELLS) + sum(case[0] == method for case in CASES.values()) >= 25
    assert set(ROWS) - set(METHODS) == {name for name, command in COMMANDS.items() if command.group == "train"}


@pytest.mark.parametrize("method", ROWS)
@pytest.mark.parametrize("kind", LINES)
def test_a_line_that_is_no_row_is_named(kind, method, tokenizer, tmp_path):
    line, said = LINES[kind]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(ROWS[method]).encode() + b"\n" + line + b"\n")
    for bad_rows in ("error", "audit", "drop"):
        with pytest.raises(UserError) as error:
            read(method, path, tokenizer, bad_rows)
        assert "rows.jsonl, line 2" in str(error.value)
        assert said in str(error.value)
        assert str(error.value).count(". ") >= 1, "a fix"


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("method", ROWS)
def test_cells_that_are_no_row_are_named(kind, method, tokenizer, tmp_path):
    cells, *said = CELLS[kind]
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        values = [json.dumps(v) if isinstance(v, list) else v for v in ROWS[method].values()]
        csv.writer(file).writerows([list(ROWS[method]), values])
        file.write(cells + "\n")
    with pytest.raises(UserError) as error:
        read(method, path, tokenizer, "error")
    for part in ("rows.csv, line 3: ", *said):
        assert part in str(error.value)


def test_what_is_no_error_is_told(tokenizer, tmp_path):
    """A row twice, a stop token in a response, a prompt of the training set among those held out."""
    rows = [{"prompt": "1+2=", "completion": "3"}] * 2 + [{"prompt": "2+2=", "completion": "4<|im_end|>5"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, report = read("sft", path, tokenizer, "error")
    assert "1 rows repeat an earlier row, token for token" in str(report)
    assert "in 1 rows the text itself holds a stop token" in str(report)
    _, held_out = read("sft", path, tokenizer, "error")
    held_out.name = "eval"
    assert report.shared_with(held_out) == ("2 of the 2 prompts of eval are in train too: figures of eval will flatter")


def test_an_odd_first_row_is_a_bad_row_like_others(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ({"note": "a header"}, ROWS["dpo"])))
    with pytest.raises(UserError, match="line 1: `prompt` is missing; the row has `note`"):
        read("dpo", path, tokenizer, "error")
    assert len(read("dpo", path, tokenizer, "drop")[0]) == 1


def test_what_nobody_reads_is_told(tokenizer, tmp_path):
    """Pictures and tools beside the messages; a NaN where an answer is due, which no response would ever give."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**CHAT, "images": ["a.png"], "tools": [{"name": "f"}]}) + "\n")
    _, report = read("sft", path, tokenizer, "error")
    for name in ("images", "tools"):
        assert f"in 1 rows `{name}` is not read: models see text alone" in str(report)
    path.write_text('{"prompt": "1+2=", "answer": NaN, "image": "python:3.11"}\n')
    (prompt,), report = read("grpo", path, tokenizer, "error")
    assert prompt.columns["answer"] is None
    assert "in 1 rows `answer` is NaN, taken as missing" in str(report)
    assert "not read" not in str(report)


def test_the_first_row_that_is_too_long_is_named(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (ROWS["sft"], {"prompt": "1" * 3000, "completion": "3"})))
    with pytest.raises(UserError, match="longer than max_length 1024 .first line 2; the longest has 3"):
        read("sft", path, tokenizer, "error")
