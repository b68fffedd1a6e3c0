"""A copy of the project in which one place at a time is spoilt, and tests are run on it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_COPIED = ("__pycache__", ".git", ".hypothesis", ".pytest_cache", "build", "runs", "*.egg-info")


class Workspace:
    """A copy of the checkout, its compiled module included."""

    def __init__(self, root: Path):
        self.root = root
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(*NOT_COPIED))
        # bytecode is told apart by the second and the size, which a mutant may share with the original
        self.environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}

    def tests(self, names: Sequence[str]) -> subprocess.CompletedProcess:
        """Run tests on the copy up to the first that fails."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=line", *names]
        return subprocess.run(command, check=False, cwd=self.root, env=self.environment, capture_output=True, text=True)

    @contextlib.contextmanager
    def spoilt(self, file: str, old: str, new: str) -> Iterator[None]:
        """Inside, ``old`` is ``new`` in ``file``."""
        path = self.root / file
        original = path.read_text()
        path.write_text(original.replace(old, new))
        try:
            yield
        finally:
            path.write_text(original)
