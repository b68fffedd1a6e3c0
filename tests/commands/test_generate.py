"""Responses from a file to a file, resumed after a stop, and typed in."""

from __future__ import annotations

import io
import json

import pytest

from rlhf_fast.cli import main
from rlhf_fast.models.scratch import new_model

TEXTS = [f"{a}+{a * 7 % 10}=" for a in range(24)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(new_model("nano", TEXTS * 9, tmp_path_factory.mktemp("model") / "nano", vocab_size=300, quiet=True))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": t, "level": i}) + "\n" for i, t in enumerate(TEXTS)))
    return str(path)


def generate(*arguments) -> int:
    return main(["generate", *map(str, arguments), "--max_new_tokens", "5", "--batch_size", "6"])


def test_every_prompt_gets_its_responses_in_order_with_its_columns(model, prompts, tmp_path):
    assert generate(model, "--prompts", prompts, "-o", tmp_path / "out.jsonl", "--n", "2") == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [t for t in TEXTS for _ in range(2)]
    assert [row["level"] for row in rows] == [i for i in range(24) for _ in range(2)]
    assert all(row["tokens"] <= 5 and row["finish_reason"] in ("stop", "length") for row in rows)
    assert len({row["completion"] for row in rows}) > 40  # every prompt and sample has random numbers of its own


@pytest.mark.parametrize("kept", [0, 1, 700, 1500])
def test_an_interrupted_run_ends_with_the_same_file(model, prompts, tmp_path, kept):
    """Cut after any byte: in the middle of a line, and between the two responses to one prompt."""
    out = tmp_path / "out.jsonl"
    arguments = (model, "--prompts", prompts, "-o", out, "--n", "2")
    assert generate(*arguments) == 0
    whole = out.read_bytes()
    out.write_bytes(whole[:kept])
    assert generate(*arguments) == 0
    assert out.read_bytes() == whole
    assert generate(*arguments) == 0  # nothing left to do
    assert out.read_bytes() == whole


def test_a_file_of_something_else_is_never_written_to(model, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    out.write_text('{"prompt": "other"}\n' * 3)
    assert generate(model, "--prompts", prompts, "-o", out) == 2
    assert "exists and holds no responses to these prompts" in capsys.readouterr().err
    assert out.read_text() == '{"prompt": "other"}\n' * 3


def test_a_prompt_may_be_given_or_typed_and_put_as_a_chat(model, capsys, monkeypatch):
    assert generate(model, "--prompt", "1+1=", "--prompt", "2+2=", "--temperature", "0") == 0
    given = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("1+1=\n\n2+2=\n"))
    assert generate(model, "--temperature", "0") == 0
    assert capsys.readouterr().out == given
    assert generate(model, "--prompt", "1+1=", "--prompt", "2+2=", "--temperature", "0", "--chat") == 0
    assert capsys.readouterr().out != given


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--prompts", "nowhere.jsonl", "-o", "out.jsonl"), "nowhere.jsonl"),
        (("--prompt", "x", "-o", "out.jsonl"), "-o needs --prompts"),
        (("--prompt", "x", "--n", "2", "--temperature", "0"), "all the same"),
        (("--prompt", "x", "--top_p", "2"), "top_p must be"),
        (("--prompt", "x", "--device", "cuda:99"), "--device cuda:99"),
    ],
)
def test_a_users_mistake_is_one_line(model, arguments, told, capsys):
    assert generate(model, *arguments) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error
