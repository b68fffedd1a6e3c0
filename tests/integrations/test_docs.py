"""The pages of the kernels: every example runs, every function has a section, and the table of backends is true."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rlhf_fast.kernels
from rlhf_fast.kernels.dispatch import BACKENDS, OPS, _has_kernel

ROOT = Path(__file__).resolve().parents[2]
INDEX = ROOT / "kernels" / "README.md"
PAGES = [INDEX, *sorted((ROOT / "kernels").glob("*/README.md"))]
BLOCK = re.compile(r"(<!-- needs (\w+) -->\n)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_OPERATIONS = {"BACKENDS", "LoraWeights", "available", "backend_report", "implementation", "use_backend"}


def blocks():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            line = text[: match.start(3)].count("\n") + 1
            name = f"{page.parent.name}-line {line}"
            yield pytest.param(page, line, match[3], match[2], id=name)


@pytest.mark.parametrize("page, line, code, package", list(blocks()))
def test_an_example_runs_by_itself(page, line, code, package):
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    torch.manual_seed(0)
    # padded to its place in the page, so that a traceback names the page's own line
    exec(compile("\n" * (line - 1) + code, str(page), "exec"), {"__name__": "example"})  # noqa: S102
    if package == "trl":
        from rlhf_fast.integrations import trl

        trl.unpatch()


def test_every_function_has_one_section_and_every_section_a_function():
    sections = [name for page in PAGES[1:] for name in re.findall(r"^## `(\w+)`$", page.read_text(), re.MULTILINE)]
    assert sorted(sections) == sorted(set(rlhf_fast.kernels.__all__) - NOT_OPERATIONS)
    indexed = re.findall(r"`(\w+)`", INDEX.read_text().split("| page |")[1].split("\n\n")[0])
    assert sorted(indexed) == sorted(sections)


def test_a_family_without_a_page_is_noticed():
    families = {path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py")}
    assert families == {page.parent.name for page in PAGES[1:]}


def test_the_table_of_backends_is_what_dispatch_finds():
    """A failure prints the table as it should stand in kernels/README.md."""
    pytest.importorskip("triton")
    rows = ["| operation | cpu | triton | cuda |", "|---|---|---|---|"]
    for family, ops in OPS.items():
        for op in ops:
            marks = ("yes" if _has_kernel(family, backend, op) else "" for backend in BACKENDS[:3])
            rows.append(f"| {' | '.join((f'`{op}`', *marks))} |")
    assert BACKENDS[3:] == ("reference",)
    text = INDEX.read_text(encoding="utf-8")
    found = text.split("<!-- backends -->\n")[1].strip().split("\n\n")[0]
    assert found.split("\n") == rows, "\n".join(rows)


def test_links_between_the_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_importing_the_kernels_loads_pytorch_and_nothing_else():
    heavy = ("transformers", "datasets", "accelerate", "peft", "trl", "triton", "safetensors", "tokenizers")
    code = f"import rlhf_fast.kernels, sys; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_importing_an_integration_loads_no_trainer():
    code = (
        "import rlhf_fast.integrations.trl, rlhf_fast.integrations.verl, sys;"
        "print([m for m in ('trl', 'verl', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
