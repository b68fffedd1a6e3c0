"""Responses from a file to a file, resumed after a stop, and typed in."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from rlhf_fast.cli import main
from rlhf_fast.models import load
from rlhf_fast.models.adapters import lora_config
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
    assert "no out.jsonl.about.json beside it says what wrote it" in capsys.readouterr().err
    assert out.read_text() == '{"prompt": "other"}\n' * 3
    assert generate(model, "--prompts", prompts, "-o", out, "--restart") == 0
    whole = out.read_text()
    out.write_text('{"prompt": "other"}\n' * 3)
    assert generate(model, "--prompts", prompts, "-o", out) == 2
    assert "holds no responses to these prompts" in capsys.readouterr().err
    assert out.read_text() == '{"prompt": "other"}\n' * 3 and "other" not in whole


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (("--temperature", "0.9"), "another temperature (0.7, now 0.9)"),
        (("--stop", "+", "="), 'another stop ([], now ["+", "="])'),
        (("--seed", "3"), "another seed (0, now 3)"),
        (("--n", "2"), "another n (1, now 2)"),
        (("--dtype", "bfloat16"), "another model"),
        ("model", "another model"),
        ("prompts", "another prompts"),
        ("columns", "another prompts"),
    ],
    ids=str,
)
def test_nothing_is_added_to_the_responses_of_another_run(model, prompts, tmp_path, capsys, changed, told):
    """Half of a file; then one setting, one weight in every tensor, one prompt or one column is another."""
    out = tmp_path / "out.jsonl"
    assert generate(model, "--prompts", prompts, "-o", out) == 0
    half = b"".join(out.read_bytes().splitlines(keepends=True)[:12])
    out.write_bytes(half)
    arguments = () if isinstance(changed, str) else changed
    if changed == "model":
        policy = load(model, device="cpu")
        policy.model.get_input_embeddings().weight.data.mul_(1.5)
        policy.save(tmp_path / "other")
        model = tmp_path / "other"
    elif isinstance(changed, str):
        rows = [json.loads(line) for line in Path(prompts).read_text().splitlines()]
        rows[-1]["prompt" if changed == "prompts" else "level"] = "9+9="
        Path(prompts).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert generate(model, "--prompts", prompts, "-o", out, *arguments) == 2
    error = capsys.readouterr().err
    assert told in error and "--restart to begin anew" in error and out.read_bytes() == half
    assert generate(model, "--prompts", prompts, "-o", out, *arguments, "--restart") == 0
    assert len(out.read_text().splitlines()) == 24 * (2 if "--n" in arguments else 1)
    assert generate(model, "--prompts", prompts, "-o", out, *arguments) == 0  # the note is the new run's


def test_the_same_run_goes_on_with_another_batch_size_and_another_adapter_does_not(model, prompts, tmp_path, capsys):
    policy = load(model, device="cpu", peft_config=lora_config(r=2))
    policy.save(tmp_path / "lora")
    out = tmp_path / "out.jsonl"
    assert generate(tmp_path / "lora", "--prompts", prompts, "-o", out) == 0
    whole = out.read_bytes()
    out.write_bytes(whole[:700])
    assert generate(tmp_path / "lora", "--prompts", prompts, "-o", out, "--cache_tokens", "40") == 0
    assert out.read_bytes() == whole
    for parameter in policy.adapters.parameters("policy").values():
        parameter.data.add_(0.1)
    policy.save(tmp_path / "lora")
    assert generate(tmp_path / "lora", "--prompts", prompts, "-o", out) == 2
    assert "written with another model" in capsys.readouterr().err and out.read_bytes() == whole


def test_what_memory_allows_is_said_once_and_a_prompt_that_cannot_fit_is_one_line(model, prompts, tmp_path, capsys):
    assert generate(model, "--prompts", prompts, "-o", tmp_path / "out.jsonl") == 0
    said = capsys.readouterr().err
    assert said.count("memory: keys and values of at most") == 1 and "in host memory" in said
    assert generate(model, "--prompt", "1+1=", "--cache_tokens", "9") == 2
    error = capsys.readouterr().err
    assert "has room for 9" in error and "memory: " not in error


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


@pytest.mark.parametrize(("command", "name"), [("generate", "n"), ("generate", "batch_size"), ("evaluate", "n")])
def test_none_at_all_is_refused_before_a_model_is_loaded(command, name, capsys):
    assert main([command, "no-such-model", f"--{name}", "0"]) == 2
    assert f"{command}: --{name} must be at least 1, got 0" in capsys.readouterr().err
