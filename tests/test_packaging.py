"""The package from every side: run from the checkout, built into an sdist and from that into a wheel, installed editable.

`kernels/` lies beside `rlhf_fast/` and is installed inside it, and it shares its name with a package that transformers
probes for: both are easy to break without any other test noticing.
"""

from __future__ import annotations

import email
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py"))
# what an sdist is made from; the compiled module, caches and build folders stay behind
FOLDERS = ("csrc", "kernels", "rlhf_fast")
FILES = ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
# the compiler's optimiser takes most of the time of a build, and nothing here is about speed
UNOPTIMISED = "-DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O0"

# Prints where things came from, after a computation in which a kernel of every kind of file takes part.
PROBE = """
import rlhf_fast.kernels, rlhf_fast.kernels.advantages as family, torch
from rlhf_fast.kernels import available, gae, token_logprobs
one = torch.ones(1, 2)
advantages, returns = gae(one, one, one > 0, gamma=1.0, lam=1.0)
assert advantages.tolist() == [[1.0, 0.0]] and returns.tolist() == [[2.0, 1.0]]
assert abs(token_logprobs(torch.zeros(1, 4), torch.zeros(1, dtype=torch.long)).item() + 1.3862944) < 1e-6
print(rlhf_fast.__file__, family.__file__, available("advantages", "cpu", "gae", one), sep="\\n")
"""


def python(code: str, cwd: Path, *path: Path, **environment: str) -> str:
    """Run code in a fresh interpreter with ``path`` in front; return what it printed."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RLHF_FAST_BACKEND")}
    environment = clean | environment | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout.strip()


def copy_of_sources(folder: Path) -> Path:
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    return folder


def build(kind: str, sources: Path, out: Path, **environment: str) -> Path:
    """Call the build backend as pip does, without pip's isolated environment: nothing is downloaded."""
    pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    out.mkdir()
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    python(code, sources, **({"RLHF_FAST_CUDA": "OFF", "CMAKE_ARGS": UNOPTIMISED} | environment))
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    (folder / "sources").mkdir()
    return build("sdist", copy_of_sources(folder / "sources"), folder / "out")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """A wheel made from the sdist alone, as an installer without wheels for its platform would."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.unpack_archive(sdist, folder)  # tarfile's own filter= is younger than Python 3.10
    (unpacked,) = folder.iterdir()
    return build("wheel", unpacked, folder / "out")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder to put on the path, as the installer would leave it."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def test_the_checkout_runs_uninstalled():
    package, family, _ = python(PROBE, ROOT).split("\n")
    assert Path(package) == ROOT / "rlhf_fast" / "__init__.py"
    assert Path(family) == ROOT / "kernels" / "advantages" / "__init__.py"


def test_the_wheel_runs_anywhere_with_its_compiled_module(installed, tmp_path):
    package, family, refusal = python(PROBE, tmp_path, installed).split("\n")
    assert Path(package) == installed / "rlhf_fast" / "__init__.py"
    assert Path(family) == installed / "rlhf_fast" / "kernels" / "advantages" / "__init__.py"
    assert refusal == "None"
    assert python("from rlhf_fast import _C; print(_C.has_cuda)", tmp_path, installed) == "False"


def test_the_wheel_holds_every_family_and_recipe_and_no_package_called_kernels(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"rlhf_fast"}
    sources = [path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")]
    assert FAMILIES and {f"rlhf_fast/{path.as_posix()}" for path in sources} <= set(names)
    kinds = (".py", ".yaml", ".txt", ".jsonl", ".html", ".css", ".js", ".svg")
    sources = [path.relative_to(ROOT) for path in (ROOT / "rlhf_fast").rglob("*") if path.suffix in kinds]
    assert {path.as_posix() for path in sources} <= set(names)
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".h"))]


def test_the_wheel_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (folder,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
        entry_points = archive.read(f"{folder}/entry_points.txt").decode()
        assert "MIT License" in archive.read(f"{folder}/licenses/LICENSE").decode()
    assert metadata["Name"] == "rlhf-fast"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    assert "rlhf-fast = rlhf_fast.cli:main" in entry_points
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    # optional packages must stay optional: a test machine cannot build flash-attn
    assert not [line for line in needed if line.startswith(("bitsandbytes", "flash-attn", "liger", "trl"))]
    extras = {"test", "dev", "browser", "math", "qlora", "serve", "flash-attn", "peers", "tensorboard", "wandb"}
    assert set(metadata.get_all("Provides-Extra")) == extras


def test_the_sdist_holds_all_that_the_build_reads(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "kernels"):
        sources = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert {path.relative_to(ROOT).as_posix() for path in sources} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def stand_in_for_kernels(folder: Path) -> Path:
    """A distribution called `kernels`, of a version that transformers takes for the real one."""
    from transformers.utils import import_utils

    version = getattr(import_utils, "KERNELS_MIN_VERSION", "0.12.0")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text(
        textwrap.dedent("""
        class Anything:
            def __init__(self, *arguments, **options): pass
            def __call__(self, decorated): return decorated

        def __getattr__(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return Anything
        """)
    )
    (folder / f"kernels-{version}.dist-info").mkdir()
    (folder / f"kernels-{version}.dist-info" / "METADATA").write_text(f"Name: kernels\nVersion: {version}\n")
    return folder


def test_transformers_finds_the_real_kernels_package_from_the_checkout(tmp_path):
    """With a regular package in `kernels/`, this import would run our folder in its place and fail."""
    site = stand_in_for_kernels(tmp_path)
    code = """
    import kernels
    from transformers.integrations import hub_kernels  # takes its names from the package when it is there
    from transformers.utils.import_utils import is_kernels_available
    from rlhf_fast.kernels import advantages
    print(is_kernels_available(), kernels.__file__, advantages.__file__, sep="\\n")
    """
    found, kernels, family = python(code, ROOT, site).split("\n")
    assert found == "True"
    assert Path(kernels) == site / "kernels" / "__init__.py"
    assert Path(family) == ROOT / "kernels" / "advantages" / "__init__.py"


def test_transformers_does_not_take_our_folder_for_the_kernels_package():
    if python("import importlib.util; print(importlib.util.find_spec('kernels'))", ROOT.parent) != "None":
        pytest.skip("the real kernels package is installed")
    assert python("from transformers.utils import is_kernels_available as f; print(f())", ROOT) == "False"


@pytest.mark.slow
def test_an_editable_install_runs_the_checkout_from_elsewhere(tmp_path):
    """Sources are edited in place, and the compiled module lies among them."""
    (tmp_path / "sources").mkdir()
    sources = copy_of_sources(tmp_path / "sources")
    wheel = build("editable", sources, tmp_path / "out")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    package, family, refusal = python(f"import site; site.addsitedir({str(site)!r})\n{PROBE}", tmp_path).split("\n")
    assert Path(package) == sources / "rlhf_fast" / "__init__.py"
    assert Path(family) == sources / "kernels" / "advantages" / "__init__.py"
    assert refusal == "None"
    assert list((sources / "rlhf_fast").glob("_C*"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_a_wheel_with_cuda_imports_without_a_driver(tmp_path):
    (tmp_path / "sources").mkdir()
    sources = copy_of_sources(tmp_path / "sources")
    wheel = build("wheel", sources, tmp_path / "out", RLHF_FAST_CUDA="ON", RLHF_FAST_CUDA_ARCHS="90")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "from rlhf_fast import _C; print(_C.has_cuda, _C.cuda.architectures, _C.cuda.runtime_version() // 1000 > 0)"
    assert python(code, tmp_path, tmp_path / "site") == "True 90 True"


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ("OFF", "rlhf_fast: CUDA kernels OFF (RLHF_FAST_CUDA=OFF)"),
        ("AUTO", "rlhf_fast: CUDA kernels OFF (no nvcc found)"),
        ("ON", "rlhf_fast: RLHF_FAST_CUDA=ON, but there is no nvcc"),
        ("MAYBE", "rlhf_fast: RLHF_FAST_CUDA=MAYBE is not one of AUTO, ON, OFF"),
    ],
)
def test_setup_says_in_one_line_whether_cuda_is_built(monkeypatch, capsys, wish, message):
    """On a machine where no nvcc can be found."""
    find_nvcc = from_setup("find_nvcc")
    monkeypatch.setenv("RLHF_FAST_CUDA", wish)
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    if wish in ("OFF", "AUTO"):
        assert find_nvcc() is None
        printed = capsys.readouterr().out
        assert printed.startswith(message) and printed.count("\n") == 1
    else:
        with pytest.raises(SystemExit, match=re.escape(message)):
            find_nvcc()


def test_a_build_folder_is_wiped_only_when_its_tools_are_gone(tmp_path):
    """pip builds in a temporary environment, whose ninja the CMake cache still names at the next build."""
    is_stale = from_setup("is_stale")
    cache = tmp_path / "CMakeCache.txt"
    assert not is_stale(cache)
    lines = "# a comment\nCMAKE_HOME_DIRECTORY:INTERNAL={root}\nCMAKE_MAKE_PROGRAM:FILEPATH={ninja}\n"
    cache.write_text(lines.format(root=ROOT, ninja=sys.executable))
    assert not is_stale(cache)
    cache.write_text(lines.format(root=ROOT, ninja=tmp_path / "pip-build-env" / "ninja"))
    assert is_stale(cache)
    cache.write_text(lines.format(root=tmp_path, ninja=sys.executable))
    assert is_stale(cache)


def from_setup(name: str):
    """A function of setup.py, without building anything."""
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup")[name]
