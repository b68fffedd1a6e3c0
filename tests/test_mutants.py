"""The tests of the trainers notice every seeded mistake: each mutant is applied to a copy, and each test it names must fail."""

from __future__ import annotations

import re

import pytest

from tests.mutants import DETAILS, MUTANTS
from tests.mutation import ROOT, Workspace
from tests.test_proofs import TOPICS, named_in, table

IDS = [mutant.name for mutant in MUTANTS]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("mutants") / "rlhf_fast")


def test_every_mutant_still_fits_its_file():
    """The list cannot rot: each text is there exactly once, and the mutant is a change."""
    for mutant in MUTANTS:
        assert (ROOT / "rlhf_fast" / mutant.file).read_text().count(mutant.old) == 1, mutant.name
        assert mutant.old != mutant.new and mutant.killers, mutant.name
    assert len({(m.file, m.old, m.new) for m in MUTANTS}) == len(MUTANTS) == len(set(IDS))


def test_every_test_of_a_detail_has_a_mutant_that_it_must_notice():
    """By topic: what the page of proofs claims is what is broken here."""
    claimed = {(topic, "::".join(name)) for topic, _, cell in table("| topic | what holds") for name in named_in(cell)}
    broken = {(m.topic, killer) for m in DETAILS for killer in m.killers}
    anywhere = {killer for m in MUTANTS for killer in m.killers}
    assert {topic for topic, _ in broken} == set(TOPICS)
    assert {(topic, name) for topic, name in claimed if name not in anywhere} == set()


@pytest.mark.slow
def test_the_unspoilt_copy_passes(workspace):
    """Else a mutant would be killed by whatever is broken already."""
    done = workspace.tests([f"tests/{killer}" for killer in sorted({k for m in MUTANTS for k in m.killers})])
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=IDS)
def test_every_mutant_is_noticed(workspace, mutant):
    """By each of the tests named beside it: a test that fails for one set of parameters has noticed."""
    missed = []
    for killer in mutant.killers:
        with workspace.spoilt(f"rlhf_fast/{mutant.file}", mutant.old, mutant.new):
            done = workspace.tests([f"tests/{killer}"])
        # 1: tests ran and failed; anything else is a mutant that does not even start, which proves nothing
        if done.returncode != 1 or re.search(r"\d+ errors? ", done.stdout.splitlines()[-1]):
            missed.append(f"{killer}\n{done.stdout[-2000:]}{done.stderr[-1000:]}")
    print(f"{'SURVIVED' if missed else 'noticed':9} {mutant.name}")
    assert not missed, "\n".join(missed)
