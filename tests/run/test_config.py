"""Settings: strict, and every mistake named with its place and its cure."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.errors import UserError
from rlhf_fast.run.config import help_text, parse_config, save_config


@dataclass(kw_only=True)
class BaseConfig:
    """Settings that all share.

    More about them.
    """

    output_dir: str = "runs/base"  # the run folder
    learning_rate: float | None = None  # peak; None is the algorithm's default
    steps: int = 10  # optimizer steps, 1e3 is fine # really
    packing: bool = True  # fill rows
    resume: str | bool | None = None  # true, or a path
    report_to: list[str] = field(default_factory=list)  # trackers


@dataclass(kw_only=True)
class AlgorithmConfig(BaseConfig):
    output_dir: str = "runs/algorithm"  # the algorithm's own run folder
    scale: Literal["group", "batch", "none"] = "group"  # of advantages
    weights: list[float] | None = None  # one per reward
    funcs: list[Any] = field(default_factory=list)  # rewards: names or mappings
    modules: str | list[str] = "all-linear"  # adapted layers
    betas: tuple[float, float] = (0.9, 0.999)  # of Adam
    options: dict[str, int] = field(default_factory=dict)  # extras
    folder: Path | None = None  # a path
    undocumented: int = 0

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"steps must be at least 0, got {self.steps}")


def parse(*argv: str) -> AlgorithmConfig:
    return parse_config(AlgorithmConfig, argv, prog="rlhf-fast algorithm")


def error(*argv: str) -> str:
    with pytest.raises(UserError) as raised:
        parse(*argv)
    return str(raised.value)


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_no_arguments_give_the_defaults():
    assert parse() == AlgorithmConfig()


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        ("--learning_rate 1e-5", "learning_rate", 1e-5),
        ("--learning_rate=-1e-5", "learning_rate", -1e-5),
        ("--learning_rate -0.5", "learning_rate", -0.5),
        ("--learning_rate inf", "learning_rate", math.inf),
        ("--learning_rate 1", "learning_rate", 1.0),
        ("--learning_rate none", "learning_rate", None),
        ("--learning-rate 3", "learning_rate", 3.0),
        ("--steps 1e3", "steps", 1000),
        ("--steps 1 --steps 2", "steps", 2),
        ("--packing", "packing", True),
        ("--packing false", "packing", False),
        ("--packing=no", "packing", False),
        ("--resume", "resume", True),
        ("--resume true", "resume", True),
        ("--resume runs/x", "resume", "runs/x"),
        ("--resume 12", "resume", "12"),
        ("--output_dir 2026-01-31", "output_dir", "2026-01-31"),
        ("--output_dir 007", "output_dir", "007"),
        ("--output_dir=a=b", "output_dir", "a=b"),
        ("--report_to tensorboard", "report_to", ["tensorboard"]),
        ("--report_to tensorboard wandb", "report_to", ["tensorboard", "wandb"]),
        ("--report_to [a,b]", "report_to", ["a", "b"]),
        ("--weights 1 0.5 1e-3", "weights", [1.0, 0.5, 1e-3]),
        ("--scale batch", "scale", "batch"),
        ("--scale none", "scale", "none"),
        ("--funcs answer {name:\tlength} 3", "funcs", ["answer", {"name": "length"}, 3]),
        ("--funcs answer", "funcs", ["answer"]),
        ("--modules q_proj", "modules", "q_proj"),
        ("--modules q_proj v_proj", "modules", ["q_proj", "v_proj"]),
        ("--betas 0.8 0.9", "betas", (0.8, 0.9)),
        ("--options {a:\t1}", "options", {"a": 1}),
        ("--folder x/y", "folder", Path("x/y")),
    ],
)
def test_flags(argv, key, value):
    config = parse(*(word.replace("\t", " ") for word in argv.split(" ")))
    given_value = getattr(config, key)
    assert given_value == value
    assert type(given_value) is type(value)
    assert dataclasses.replace(config, **{key: getattr(AlgorithmConfig(), key)}) == AlgorithmConfig()


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("learning_rate: 1e-5", "learning_rate", 1e-5),
        ("learning_rate: 1E-5", "learning_rate", 1e-5),
        ("learning_rate: 5.e+2", "learning_rate", 500.0),
        ("learning_rate: 2", "learning_rate", 2.0),
        ("learning_rate: null", "learning_rate", None),
        ("learning_rate: None", "learning_rate", None),
        ("steps: 1e3", "steps", 1000),
        ("packing: false", "packing", False),
        ("output_dir: 2026-01-31", "output_dir", "2026-01-31"),
        ("output_dir: '1e5'", "output_dir", "1e5"),
        ("report_to: tensorboard", "report_to", ["tensorboard"]),
        ("report_to: [tensorboard, wandb]", "report_to", ["tensorboard", "wandb"]),
        ("weights:\n- 1\n- 1e-2", "weights", [1.0, 0.01]),
        ("funcs:\n- answer\n- {name: length, max: 64}", "funcs", ["answer", {"name": "length", "max": 64}]),
        ("options: {a: 1, b: 2}", "options", {"a": 1, "b": 2}),
        ("", "steps", 10),
    ],
)
def test_yaml(yaml_file, text, key, value):
    config = parse("--config", yaml_file(text))
    assert getattr(config, key) == value
    assert type(getattr(config, key)) is type(value)


def test_flags_override_the_file_wherever_they_stand(yaml_file):
    path = yaml_file("steps: 3\npacking: false\n")
    config = parse("--steps", "4", "--config", path)
    assert (config.steps, config.packing) == (4, False)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--learning_rat 1", ["--learning_rat", "did you mean --learning_rate?"]),
        ("--lr 1", ["--lr", "unknown setting"]),
        ("--rate 1", ["did you mean --learning_rate?"]),
        ("--steps ten", ["--steps", "whole number", "'ten'"]),
        ("--steps 1.5", ["--steps", "whole number", "1.5"]),
        ("--steps true", ["--steps", "whole number", "'true'"]),
        ("--steps 1 2", ["--steps takes one value (whole number), got 2: 1 2"]),
        ("--steps", ["--steps needs a value: whole number"]),
        ("--steps -1", ["steps must be at least 0, got -1"]),
        ("--learning_rate fast", ["--learning_rate: expected number or none, got 'fast'"]),
        ("--packing maybe", ["--packing: expected true/false, got 'maybe'"]),
        ("--scale bach", ["--scale: expected group | batch | none, got 'bach'", "did you mean batch?"]),
        ("--weights 1 x", ["--weights[1]: expected number, got 'x'"]),
        ("--betas 1", ["--betas", "list of number"]),
        ("--options {a:x}", ["--options"]),
        ("--report_to [a", ["--report_to", "not valid YAML"]),
        ("stray --steps 1", ["unexpected argument 'stray'"]),
        ("-s 1", ["unknown option -s"]),
        ("--config", ["--config takes one YAML file"]),
        ("--config /nowhere/x.yaml", ["/nowhere/x.yaml", "does not exist"]),
    ],
)
def test_a_wrong_flag_is_named_with_what_was_expected(argv, said):
    message = error(*argv.split())
    assert all(part in message for part in said), message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rat: 1", ["c.yaml: learning_rat", "did you mean learning_rate?"]),
        ("steps: 1\nsteps: 2", ["c.yaml, line 2", "steps is given twice"]),
        ("options: {a: 1, a: 2}", ["line 1", "a is given twice"]),
        ("steps: ten", ["c.yaml: steps: expected whole number, got 'ten'"]),
        ("steps: [1, 2]", ["c.yaml: steps: expected whole number, got [1, 2]"]),
        ("output_dir: 5", ["c.yaml: output_dir: expected text, got 5"]),
        ("packing: 1", ["c.yaml: packing: expected true/false, got 1"]),
        ("learning_rate: true", ["c.yaml: learning_rate: expected number or none, got True"]),
        ("options: {a: x}", ["c.yaml: options.a: expected whole number, got 'x'"]),
        ("steps: [1", ["c.yaml, line 1"]),
        ("- steps", ["c.yaml should hold lines of `key: value`, found a list"]),
        ("1: 2", ["a key should be a word, got 1"]),
        ("steps: !!python/object/apply:os.system [echo]", ["c.yaml, line 1", "python/object"]),
    ],
)
def test_a_wrong_file_is_named_with_line_or_key(yaml_file, text, said):
    message = error("--config", yaml_file(text))
    assert all(part in message for part in said), message


def test_a_misspelled_file_suggests_its_neighbour(yaml_file):
    path = yaml_file("steps: 1")
    assert path in error("--config", path.replace("c.yaml", "cc.yaml")).partition("did you mean")[2]


def test_a_file_that_is_no_text_is_said(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"steps: \xff\xfe")
    assert "c.yaml is not UTF-8 text" in error("--config", str(tmp_path / "c.yaml"))
    assert "cannot be read" in error("--config", str(tmp_path))


def test_a_field_without_a_default_is_required():
    @dataclass
    class Needs:
        model: str

    # as from a module without postponed annotations
    Needs.__annotations__ = {"model": str}
    with pytest.raises(UserError, match=r"model is required: give --model"):
        parse_config(Needs, [])


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])) | st.sampled_from(
    [
        "1e5",
        "1e-5",
        "null",
        "true",
        "no",
        "2026-01-31",
        "~",
        "0x10",
        "12:30:45",
        "- a",
        "a: b",
        "#",
        " x ",
        "'",
        "{",
        "1_0",
    ]
)


@settings(max_examples=150, deadline=None)
@given(
    output_dir=words,
    learning_rate=st.floats(allow_nan=False) | st.none(),
    steps=st.integers(0, 10**20),
    resume=words.filter(lambda w: w.lower() != "none") | st.booleans() | st.none(),
    report_to=st.lists(words),
    weights=st.none() | st.lists(st.floats(allow_nan=False)),
    betas=st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)),
    modules=words | st.lists(words),
)
def test_a_saved_config_reads_back_equal(tmp_path_factory, **values):
    config = AlgorithmConfig(**values)
    path = tmp_path_factory.getbasetemp() / "saved.yaml"
    save_config(config, path)
    assert parse("--config", str(path)) == config


def test_help_shows_meaning_type_and_default_grouped_by_class(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stopped:
        parse("--steps", "1", "--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "usage: rlhf-fast algorithm [--config FILE.yaml] [--key value ...]"
    own, base = lines.index("AlgorithmConfig:"), lines.index("BaseConfig: Settings that all share:")
    assert own < base
    assert "--output_dir the algorithm's own run folder (text; default runs/algorithm)" in lines[own:base]
    assert "--scale of advantages (group | batch | none; default group)" in lines[own:base]
    assert "--funcs rewards: names or mappings (list; default empty)" in lines[own:base]
    assert "--undocumented (whole number; default 0)" in lines[own:base]
    assert "--steps optimizer steps, 1e3 is fine # really (whole number; default 10)" in lines[base:]
    assert "--packing fill rows (true/false; default true)" in lines[base:]
    assert sum(line.startswith("--output_dir ") for line in lines) == 1


def test_help_fits_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, help_text(AlgorithmConfig, prog="x").splitlines())) <= 80
