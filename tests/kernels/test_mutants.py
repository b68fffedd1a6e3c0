"""The tests of the kernels notice every seeded mistake: each mutant is applied to a copy, and the tests must fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
NOT_COPIED = ("__pycache__", ".git", ".hypothesis", ".pytest_cache", "build", "runs", "*.egg-info", "bench")
IDS = [f"{mutant.file}: {mutant.name}" for mutant in MUTANTS]


class Workspace:
    """A copy of the project in which one file at a time is spoilt."""

    def __init__(self, root: Path):
        self.root = root
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(*NOT_COPIED))
        # bytecode is told apart by the second and the size, which a mutant may share with the original
        self.environment = os.environ | {
            "PYTHONPATH": str(root),
            "PYTHONDONTWRITEBYTECODE": "1",
            "RLHF_FAST_SHRINK": "0",
            "RLHF_FAST_CUDA": "OFF",
            "MAX_JOBS": "2",
        }
        self.built: dict[Path, str] = {}  # what the module was made of; nothing yet: a copied one is never trusted

    def tests(self, killers: tuple[str, ...]) -> subprocess.CompletedProcess:
        """Run the tests on the copy, after bringing the module up to date."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=line"]
        command += [f"tests/kernels/{killer}" for killer in killers]
        return subprocess.run(command, check=False, cwd=self.root, env=self.environment, capture_output=True, text=True)

    def build(self) -> None:
        """Compile what changed; ninja tells by the files' times."""
        sources = {path: path.read_text() for path in (self.root / "csrc").rglob("*") if path.is_file()}
        if sources != self.built:
            command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            subprocess.run(command, check=True, cwd=self.root, env=self.environment, capture_output=True)
            self.built = sources

    def verdict(self, mutant: Mutant) -> subprocess.CompletedProcess:
        file = self.root / mutant.file
        original = file.read_text()
        file.write_text(original.replace(mutant.old, mutant.new))
        try:
            self.build()
            return self.tests(mutant.killers)
        finally:
            file.write_text(original)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("mutants") / "rlhf_fast")


@pytest.mark.parametrize("mutant", MUTANTS, ids=IDS)
def test_every_mutant_still_fits_its_file(mutant):
    """The list cannot rot: each text is there exactly once, and the mutant is a change."""
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.old != mutant.new and mutant.killers


def test_no_two_mutants_are_the_same():
    assert len(MUTANTS) >= 24 and len({(m.file, m.old, m.new) for m in MUTANTS}) == len(MUTANTS)
    assert len(set(IDS)) == len(IDS)


@pytest.mark.slow
def test_the_unspoilt_copy_passes(workspace):
    """Else a mutant would be killed by whatever is broken already."""
    workspace.build()
    done = workspace.tests(tuple(sorted({killer for mutant in MUTANTS for killer in mutant.killers})))
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=IDS)
def test_every_mutant_is_killed(workspace, mutant):
    done = workspace.verdict(mutant)
    # 1: tests ran and failed; anything else is a mutant that does not even start, which proves nothing
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    print(f"{'killed' if done.returncode == 1 else 'SURVIVED':9} {mutant.file}: {mutant.name} ({len(failed)} failed)")
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-2000:]
