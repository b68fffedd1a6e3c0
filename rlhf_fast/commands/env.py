"""``rlhf-fast env``: what is installed, what the machine has, and which backend each kernel takes and why."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator, Sequence

from rlhf_fast.commands import Parser
from rlhf_fast.errors import UserError

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "bitsandbytes",
    "flash-attn",
)


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        "env",
        "Print versions, devices, the compiled extension, and each kernel's backend; of a RUN what its record says.",
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run folder, whose record.jsonl is shown instead")
    options = parser.parse_args(argv)

    from rlhf_fast.run.metrics import print_table

    if options.run:
        return _show_record(options.run)
    try:
        extension, kernels = _extension(), _kernels()
    except ValueError as error:  # RLHF_FAST_BACKEND or RLHF_FAST_CPU_ISA holds an unknown name
        raise UserError(f"environment: {error}") from error
    print_table("software", [("rlhf_fast", version("rlhf_fast")), ("python", platform.python_version()), *_versions()])
    print_table("machine", _machine())
    print_table("compiled extension", extension)
    print_table("kernels", kernels, ("op", "on", "backend", "why not the others"))
    return 0


def _show_record(folder: str) -> int:
    """When a run was started, gone on with and ended, on what, and what it began from."""
    from rlhf_fast.run.metrics import print_table
    from rlhf_fast.run.record import FILE, read_record

    lines = read_record(folder)
    begun = [line for line in lines if line["event"] != "end"]
    if not begun:
        raise UserError(f"{folder} has no {FILE}; give the folder of a run that rlhf-fast trained")
    rows = [(line["time"], line["event"], line["step"], line.get("outcome", "")) for line in lines]
    print_table(f"{folder}: run {begun[-1]['run']}, {begun[-1]['method']}", rows, ("time (UTC)", "", "step", "outcome"))
    last = begun[-1]
    git = last["commit"] and last["commit"]["hash"] + " and changes" * last["commit"]["changed"]
    about = {"commit": git or "installed package", **last["versions"], **last["machine"]}
    about["gpus"] = ", ".join(about["gpus"]) or "none"
    print_table("on", {key: str(value) for key, value in about.items()})
    data = [(n, d["source"], d["rows"], d["kept"], d["sha256"][:16]) for n, d in last["data"].items()]
    print_table("data", data, ("", "from", "rows", "kept", "SHA-256 of the tokens"))
    print_table(
        "began from", list(_ancestors(last["lineage"])), ("setting", "folder", "run", "method", "step", "outcome")
    )
    return 0


def _ancestors(parents: list[dict], depth: int = 0) -> Iterator[tuple[str, ...]]:
    for parent in parents:
        known = [str(parent.get(key, "")) for key in ("run", "method", "step", "outcome")]
        yield ("  " * depth + parent["setting"], parent["path"], *known)
        yield from _ancestors(parent.get("lineage") or [], depth + 1)


def version(package: str) -> str:
    """The installed version of a package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "running uninstalled" if package == "rlhf_fast" else "not installed"


def _versions() -> list[tuple[str, str]]:
    return [(package, version(package)) for package in PACKAGES]


def _machine() -> list[tuple[str, str]]:
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0.0
    rows = [
        ("system", f"{platform.system()} {platform.machine()}"),
        ("CPU", f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, {memory:.0f} GiB memory"),
    ]
    if not torch.cuda.is_available():
        built = (
            "torch is a CPU build" if torch.version.cuda is None else f"torch has CUDA {torch.version.cuda}, no device"
        )
        return [*rows, ("GPU", f"none ({built})")]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        rows.append((f"GPU {i}", f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute {p.major}.{p.minor}"))
    return [*rows, ("CUDA of torch", str(torch.version.cuda))]


def _extension() -> list[tuple[str, str]]:
    import torch  # noqa: F401  (first, so that one OpenMP library serves both)

    try:
        native = importlib.import_module("rlhf_fast._C")
    except ImportError as error:
        missing = importlib.util.find_spec("rlhf_fast._C") is None
        reason = (
            "not built; `pip install -e .` in the checkout builds it" if missing else f"cannot be imported: {error}"
        )
        return [("rlhf_fast._C", reason)]
    rows = [
        ("rlhf_fast._C", native.__file__),
        ("instruction set", f"{native.cpu.isa()} (of {', '.join(native.cpu.isas())})"),
    ]
    if not native.has_cuda:
        return [*rows, ("CUDA", "not built in: no nvcc was found, or RLHF_FAST_CUDA=OFF")]
    driver = native.cuda.driver_version()
    devices, error = native.cuda.device_count()
    architectures = native.cuda.architectures.replace("-real", "").replace(",", ", ")
    return [
        *rows,
        ("CUDA", f"built with {_cuda(native.cuda.runtime_version())} for compute {architectures}"),
        ("driver", f"up to CUDA {_cuda(driver)}" if driver else "none on this machine"),
        ("devices", str(devices) if devices else f"none: {error}"),
    ]


def _cuda(version: int) -> str:
    """13020 -> "13.2"."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _kernels() -> list[tuple[str, str, str, str]]:
    from rlhf_fast.kernels import backend_report

    # operations with the same answers share a row
    ops: dict[tuple[str, str, str], list[str]] = {}
    for row in backend_report():
        reasons = "\n".join(f"{name}: {reason}" for name, reason in row.refused.items())
        ops.setdefault((row.device, row.backend, reasons), []).append(row.op)
    return [("\n".join(names), *answer) for answer, names in ops.items()]
