"""Who may import whom. Every import statement of the project is read, lazy ones inside functions too."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Floor -> what it may import of ours, and of others. Every floor may import itself, the standard library and torch.
FLOORS = {
    "kernels": ((), ("triton",)),
    "losses": (("kernels", "errors"), ()),
    "data": (("errors",), ("tokenizers", "datasets")),
    "run": (("errors",), ("accelerate", "rich", "jsonargparse", "yaml", "matplotlib", "safetensors", "numpy")),
    "models": (
        ("data", "kernels", "losses", "errors"),
        ("transformers", "tokenizers", "safetensors", "accelerate", "numpy", "peft", "bitsandbytes", "flash_attn"),
    ),
    "rollout": (
        ("models", "run", "data", "kernels", "errors"),
        ("transformers", "numpy", "httpx2", "starlette", "vllm"),
    ),
    "rewards": (
        ("rollout", "models", "run", "data", "kernels", "errors"),
        ("transformers", "numpy", "math_verify", "httpx2"),
    ),
    "feedback": (
        ("rewards", "rollout", "models", "run", "data", "errors"),
        ("transformers", "starlette", "uvicorn", "rich", "numpy"),
    ),
    "trainers": (
        ("feedback", "rewards", "rollout", "models", "run", "data", "losses", "kernels", "errors"),
        ("accelerate", "transformers", "numpy"),
    ),
    # the kernels inside other people's trainers; ours know nothing of it
    "integrations": (("kernels", "errors"), ("trl", "transformers", "verl")),
}
# packages that one file (or one kind of file) has to itself
RESERVED = {
    "triton": ("triton_impl.py",),
    "rlhf_fast._C": ("cpu_impl.py", "cuda_impl.py"),
    "peft": ("models/adapters.py",),
    "bitsandbytes": ("models/adapters.py",),
    "flash_attn": ("models/attention.py",),
    "httpx2": ("rollout/server.py", "rewards/chat.py"),
    "vllm": ("rollout/colocate.py",),
    "starlette": ("serving/app.py", "people/app.py", "commands/serve.py"),
    "uvicorn": ("commands/serve.py",),
    "trl": ("integrations/trl.py",),
    "verl": ("integrations/verl.py",),
}
# what every trainer is built on, and the one that continues another
SHARED_TRAINER_FILES = tuple(
    f"rlhf_fast.trainers.{name}"
    for name in (
        "trainer",
        "loop",
        "progress",
        "journal",
        "evaluation",
        "figures",
        "shards",
        "algorithm",
        "config",
        "build",
        "engines",
        "optimizers",
        "memory",
        "nonfinite",
        "trial",
        "resume",
        "upgrade",
        "best",
        "callbacks",
    )
    + ("rl", "importance", "scores", "groups", "reference", "lagrangian", "guard", "measures", "alarms")
)
CONTINUES = {"safe_ppo": "ppo"}


def modules() -> dict[str, Path]:
    """Every module of the project under the name that it is imported by; tests and benches aside."""
    found = {}
    for base, prefix in ((ROOT / "rlhf_fast", "rlhf_fast"), (ROOT / "kernels", "rlhf_fast.kernels")):
        for path in base.rglob("*.py"):
            parts = [prefix, *path.relative_to(base).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name: str, path: Path, lazy: bool = True) -> set[str]:
    """The absolute names that a module imports; ``lazy=False`` leaves out those that run later, or never."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree) if lazy else _at_import(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            # `from package import module` imports the module
            found |= {f"{base}.{a.name}" if _is_module(f"{base}.{a.name}") else base for a in node.names}
    return found


def _is_module(name: str) -> bool:
    return name in MODULES or name == "rlhf_fast._C"


def _at_import(tree: ast.AST):
    """The statements that run when the module is imported: outside functions and ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _at_import(node)


def root_of(name: str) -> str:
    return name.partition(".")[0]


def others(name: str, path: Path) -> set[str]:
    """Third-party packages that a module imports, torch aside."""
    return {root_of(i) for i in imports(name, path)} - set(sys.stdlib_module_names) - {"rlhf_fast", "torch"}


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_imports_only_what_lies_below(floor):
    ours, theirs = FLOORS[floor]
    wrong = []
    for name, path in MODULES.items():
        if not f"{name}.".startswith(f"rlhf_fast.{floor}."):
            continue
        allowed = tuple(f"rlhf_fast.{part}." for part in (floor, *ours))
        for imported in imports(name, path):
            ours_and_above = root_of(imported) == "rlhf_fast" and not f"{imported}.".startswith(allowed)
            if ours_and_above and imported != "rlhf_fast._C":
                wrong.append(f"{name} imports {imported}")
        wrong += [f"{name} imports {package}" for package in others(name, path) - set(theirs)]
    assert not wrong


@pytest.mark.parametrize("package", RESERVED)
def test_some_packages_belong_to_one_file(package):
    wrong = [
        name
        for name, path in MODULES.items()
        if any(f"{i}.".startswith(f"{package}.") for i in imports(name, path))
        and not path.as_posix().endswith(RESERVED[package])
    ]
    assert not wrong


def test_nobody_imports_the_kernels_folder_by_its_bare_name():
    """``import kernels.x`` would register every operation twice, and is another project's package."""
    everywhere = {**MODULES, **{str(p): p for folder in ("tests", "bench") for p in (ROOT / folder).rglob("*.py")}}
    assert not [name for name, path in everywhere.items() if "kernels" in {root_of(i) for i in imports(name, path)}]
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_trainers_do_not_import_each_other():
    trainers = {name: path for name, path in MODULES.items() if name.startswith("rlhf_fast.trainers.")}
    wrong = []
    for name, path in trainers.items():
        allowed = {name, *SHARED_TRAINER_FILES, f"rlhf_fast.trainers.{CONTINUES.get(name.rpartition('.')[2])}"}
        wrong += [f"{name} imports {i}" for i in imports(name, path) if i in trainers and i not in allowed]
    assert not wrong


def test_the_command_line_imports_lazily():
    """``rlhf-fast --help`` may load nothing but the standard library and our own error class."""
    names = [n for n in MODULES if n in ("rlhf_fast", "rlhf_fast.__main__", "rlhf_fast.cli") or ".commands" in n]
    light = ("rlhf_fast", "rlhf_fast.cli", "rlhf_fast.errors", "rlhf_fast.commands")
    wrong = []
    for name in names:
        for imported in imports(name, MODULES[name], lazy=False):
            ours = imported in light or imported.startswith("rlhf_fast.commands.")
            if not ours and root_of(imported) not in sys.stdlib_module_names:
                wrong.append(f"{name} imports {imported} at once")
    assert not wrong


def test_the_reader_of_imports_sees_every_kind(tmp_path):
    """Lazy, relative, aliased, and a module named in ``from package import module``."""
    path = tmp_path / "x.py"
    path.write_text(
        "import os.path as p\nfrom . import policy\nfrom ..data.batch import Example\nfrom rlhf_fast import _C\n"
        "def f():\n    from peft.utils import g\n"
        "if TYPE_CHECKING:\n    import datasets\n"
    )
    name = "rlhf_fast.models.x"
    assert imports(name, path, lazy=False) == {
        "os.path",
        "rlhf_fast.models.policy",
        "rlhf_fast.data.batch",
        "rlhf_fast._C",
    }
    assert imports(name, path) - imports(name, path, lazy=False) == {"peft.utils", "datasets"}
