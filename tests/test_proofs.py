"""The page of proofs names tests that exist, for the trainers that it claims."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PAGE = (HERE / "README.md").read_text()
# the topics of the details that each need a test
TOPICS = (
    *(
        "prompt boundary",
        "chat templates",
        "packing",
        "truncation",
        "EOS",
        "reward pooling",
        "score head",
        "value head",
    ),
    *(
        "advantages",
        "KL",
        "accumulation",
        "old logprobs",
        "reference",
        "dropout",
        "unscorable, zero variance",
        "overlong",
    ),
    *("DPO", "RM losses", "hand numbers", "schedule"),
)


def table(header: str) -> list[list[str]]:
    lines = PAGE[PAGE.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def named_in(cell: str) -> list[list[str]]:
    return [name.split("::") for name in re.findall(r"`([^`]+)`", cell)]


@pytest.fixture(scope="module")
def functions():
    """functions(file) -> the tests in it."""
    found: dict[str, set[str]] = {}

    def read(file: str) -> set[str]:
        if file not in found:
            tree = ast.parse((HERE / file).read_text())
            found[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        return found[file]

    return read


def test_every_detail_has_tests_and_they_exist(functions):
    rows = table("| topic | what holds")
    assert tuple(row[0] for row in rows) == TOPICS
    for topic, _, cell in rows:
        assert named_in(cell), topic
        for file, name in named_in(cell):
            assert name in functions(file), f"{topic}: {file} has no {name}"


def test_every_invariance_is_tested_for_the_trainers_that_it_names(functions):
    """By the names in the test's own tables."""
    rows = table("| invariance | trainers")
    assert len(rows) == 9
    for invariance, trainers, cell in rows:
        ((file, name),) = named_in(cell)
        assert name in functions(file), f"{invariance}: {file} has no {name}"
        words = re.findall(r"[a-z]+", (HERE / file).read_text().lower())
        text = " ".join(words)
        for trainer in trainers.split(", "):
            assert re.search(rf"\b{trainer}(trainer)?\b", text), f"{invariance}: {file} knows no {trainer}"
