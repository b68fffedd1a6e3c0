"""``rlhf-fast check`` answers as training would: what it lists is what a run stops at, what it passes a run takes."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from rlhf_fast.cli import main
from rlhf_fast.commands.check import _histogram, _painted
from rlhf_fast.data import Example
from rlhf_fast.models.load import load, load_tokenizer
from rlhf_fast.models.scratch import new_model

SUMS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(1, 9) for b in range(1, 4)]
BAD = {"completion": "", "prompt": "9+9="}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    texts = [row["prompt"] + row["completion"] for row in SUMS] * 9
    return str(new_model("nano", texts, tmp_path_factory.mktemp("model") / "nano", vocab_size=300, quiet=True))


@pytest.fixture
def data(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def check(capsys, *argv):
    code = main(["check", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_sound_data_set_is_described_and_accepted(model, data, capsys):
    code, out, err = check(capsys, data(SUMS), "--for", "sft", "--model", model, "--rows", 1)
    assert (code, err) == (0, "")
    for part in (
        "train: 24 of 24 rows of",
        "24 of 24 sequences end with a trained stop token",
        "0 rows (0.0%) cut or dropped at the limit of 1,024",
        "1+1=⟦2<|im_end|>⟧",
        "stop '<|im_end|>'",
        "sft would train on it",
    ):
        assert part in out
    assert "2+1=" not in out, "one row was asked for"


def test_what_it_says_of_a_bad_row_is_what_training_stops_at(model, data, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # so that a long path breaks no line
    path = data([*SUMS, BAD, {**BAD, "completion": 18}])
    code, out, _ = check(capsys, path, "--for", "sft", "--model", model)
    assert code == 1
    assert "line 25" in out
    assert "line 26" in out
    refusal = out[out.index("training would refuse it: train: 2 bad rows, first ") :].strip().partition("first ")[2]
    assert (
        main(["sft", "--model_name_or_path", model, "--dataset_name", path, "--output_dir", str(tmp_path / "r")]) == 2
    )
    assert capsys.readouterr().err.strip() == f"error: {refusal}"
    code, out, _ = check(capsys, path, "--for", "sft", "--model", model, "--bad_rows", "drop")
    assert code == 0
    assert "1 rows dropped: empty completion" in out


def test_settings_of_the_trainer_count(model, data, capsys):
    code, out, _ = check(capsys, data(SUMS), "--for", "sft", "--max_length", 5, "--model", model)
    assert code == 1
    assert "rows (100.0%) are longer than max_length 5" in out
    assert "24 rows (100.0%) cut or dropped at the limit of 5" in out
    assert check(capsys, data(SUMS), "--for", "sft", "--model", model, "--max_length=5", "--allow_truncation")[0] == 0


def test_held_out_rows_are_checked_and_compared(model, data, capsys):
    held_out = data([SUMS[0], {"prompt": "8+9=", "completion": "17"}, BAD], "held.jsonl")
    code, out, _ = check(capsys, data(SUMS), "--for", "sft", "--model", model, "--eval", held_out)
    assert code == 1
    assert "held.jsonl, line 3" in out
    assert "1 of the 2 prompts of eval are in train too" in out


def test_a_reward_that_needs_another_column_is_named(model, data, capsys):
    rows = [{"prompt": row["prompt"], "result": row["completion"]} for row in SUMS]
    code, out, _ = check(capsys, data(rows), "--for", "grpo", "--model", model, "--reward_funcs", "answer")
    assert code == 1
    assert "needs a column 'answer' or 'solution'; the prompts' columns are: result" in out


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (("--for", "sft", "--model", "{model}"), 2, "DATA is missing"),
        (("{data}", "--for", "sft"), 2, "--model MODEL is missing"),
        (("{data}", "--model", "{model}"), 2, "required: --for"),
        (("{data}", "--for", "sfft", "--model", "{model}"), 2, "invalid choice: 'sfft'"),
        (("{data}", "--for", "sft", "--model", "{model}", "--max_lenght", "3"), 2, "did you mean --max_length"),
        (("{data}", "--for", "dpo", "--model", "{model}"), 1, "Missing beside what is there: `chosen`"),
        (("nowhere.jsonl", "--for", "sft", "--model", "{model}"), 1, "no file or folder 'nowhere.jsonl'"),
        (("{data}", "--for", "sft", "--model", "./nowhere"), 2, "no such model folder"),
    ],
    ids=str,
)
def test_mistakes_have_one_sentence(argv, code, said, model, data, capsys):
    argv = [word.format(model=model, data=data(SUMS)) for word in argv]
    done, out, err = check(capsys, *argv)
    assert done == code
    assert said in out + err
    assert "Traceback" not in out + err


def test_the_tokenizer_alone_says_what_the_model_would(model):
    """Without reading weights: the same stop tokens and embedding as the loaded model's."""
    tokenizer, about = load_tokenizer(model)
    policy = load(model)
    assert about["stop_ids"] == policy.stop_ids
    assert about["vocab_size"] == policy.model.get_input_embeddings().num_embeddings
    assert tokenizer.get_vocab() == policy.tokenizer.get_vocab()


def test_colours_replace_the_marks_on_a_terminal(model):
    tokenizer, about = load_tokenizer(model)
    ids = tokenizer("1+1=2")["input_ids"]
    example = Example([*ids, *about["stop_ids"]], [False] * (len(ids) - 1) + [True, True])
    shown = _painted(example, tokenizer, about["stop_ids"], colours=True)
    assert shown.plain == "1+1=2<|im_end|>"
    styles = {shown.plain[span.start : span.end]: span.style for span in shown.spans}
    assert styles == {"1+1=": "dim", "2": "green", "<|im_end|>": "bold magenta"}
    console = Console(record=True, force_terminal=True, width=80, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(shown)
    assert "\x1b[32m2" in console.export_text(styles=True)


def test_a_long_stretch_is_shown_without_its_middle(model):
    tokenizer, about = load_tokenizer(model)
    (one,) = tokenizer("1")["input_ids"][:1]
    shown = _painted(Example([one] * 500, [False] * 500), tokenizer, about["stop_ids"], colours=False).plain
    assert shown == "1" * 60 + " [... 380 tokens ...] " + "1" * 60


def test_the_histogram_counts_every_length_once():
    """By hand: 1..24 in bars of two; the tallest is 40 wide, and one row of many still shows."""
    rows = _histogram([1, 2, 2, 24])
    assert rows[0] == ("1 - 2", 3, "█" * 40)
    assert rows[-1] == ("23 - 24", 1, "█" * 13)
    assert len(rows) == 12
    assert sum(count for _, count, _ in rows) == 4
    assert _histogram([1] * 1000 + [2])[-1] == ("2 - 2", 1, "▏")
