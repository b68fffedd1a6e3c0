"""The record of a run: ``record.jsonl`` in its folder, one line for each start, resume and end, only ever appended to.

A start or resume has ``run`` (a random name that resumes keep), ``method``, ``config``, ``versions``, ``commit`` (of the package,
when it is a checkout), ``machine``, ``data`` (rows, and a SHA-256 of the tokens that the trainer read) and ``lineage``: the models
that the run began from, each with the record of its own run, as far back as there are records. An end has ``outcome``, ``step``,
``seconds`` and the last figures. What looks like a password is not written.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import secrets
import subprocess
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rlhf_fast.run.disk import append_line, disk_faults

FILE = "record.jsonl"
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "triton",
    "bitsandbytes",
)
REDACTED = "(redacted)"
_SECRET_NAMES = re.compile(
    r"(?:^|_)(?:api_?key|access_?key|auth_?token|hf_token|token|password|passwd|secret)$", re.IGNORECASE
)
_SECRET_VALUES = re.compile(
    r"\b(?:hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[abp]-|AKIA)[A-Za-z0-9_\-]{8,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)


class Record:
    """Writes the lines of one process's part of a run. As a context manager it writes the end too, whatever happens.

    Args:
        folder: of the run.
        about: what a start says besides: method, config, data, lineage.
        resumed: the step gone on from; None for a fresh start.
        enabled: False on all ranks but the first.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], resumed: int | None, enabled: bool = True) -> None:
        self.path, self.enabled = folder / FILE, enabled
        self.outcome, self.step, self.figures = "", resumed or 0, {}
        earlier = [line for line in read_record(folder) if line.get("run")] if enabled else []
        self.run = earlier[-1]["run"] if earlier and resumed is not None else secrets.token_hex(8)
        self._about = {"event": "start" if resumed is None else "resume", "step": self.step, **about}

    def __enter__(self) -> Record:  # noqa: PYI034 (typing.Self needs Python 3.11)
        self._began = time.perf_counter()
        self._append({**self._about, "versions": versions(), "commit": commit(), "machine": machine()})
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        outcome = self.outcome if error is None else f"failed: {type(error).__name__}: {error}"
        seconds = round(time.perf_counter() - self._began, 3)
        end = {"event": "end", "outcome": outcome, "step": self.step, "seconds": seconds, "figures": dict(self.figures)}
        try:
            self._append(end)
        except Exception:
            if error is None:  # else what ended the run is what should be told
                raise

    def _append(self, line: dict[str, Any]) -> None:
        if not self.enabled:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        text = json.dumps(redacted({"time": now, "run": self.run, **line}), ensure_ascii=False, allow_nan=False)
        with disk_faults(FILE, self.path.parent), self.path.open("a+b") as file:
            append_line(file.fileno(), text.encode() + b"\n")


def read_record(folder: Path | str) -> list[dict[str, Any]]:
    """The lines of a run's record, without one that a kill has torn. Empty when there is none."""
    path, lines = Path(folder) / FILE, []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


# ---------------------------------------------------------------------------------------------------------- what it holds


def lineage(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The models that a config names: each setting whose value is a model or run folder, and what its own record says.

    Returns:
        for each ``setting`` and ``path``; where there is a record also ``run``, ``method``, ``step``, ``outcome`` and its own
        ``lineage``, as it was when that run began.
    """
    parents = []
    for setting, value in config.items():
        if setting in ("output_dir", "resume_from_checkpoint"):
            continue
        for path in _folders(value):
            parents.append({"setting": setting, "path": str(path), **_ancestor(path)})
    return parents


def _folders(value: Any) -> Iterator[Path]:
    if isinstance(value, str) and value and len(value) < 4096 and "\0" not in value:
        path = Path(value).expanduser()
        if any((path / name).is_file() for name in (FILE, "config.json", "adapter_config.json")):
            yield path.resolve()
    elif isinstance(value, Mapping):
        yield from (path for part in value.values() for path in _folders(part))
    elif isinstance(value, (list, tuple)):
        yield from (path for part in value for path in _folders(part))


def _ancestor(path: Path) -> dict[str, Any]:
    lines = read_record(path)
    begun = [line for line in lines if line.get("event") in ("start", "resume")]
    if not begun:
        return {}
    last, ends = begun[-1], [line for line in lines if line.get("event") == "end"]
    end = ends[-1] if ends and lines.index(ends[-1]) > lines.index(last) else {"outcome": "killed"}
    about = {key: last.get(key) for key in ("run", "method", "commit", "data", "lineage")}
    return {**about, "step": end.get("step"), "outcome": end["outcome"]}


def versions() -> dict[str, str]:
    """Of Python, of this package and of those that decide what a run computes; only what is installed."""
    found = {"python": platform.python_version()}
    for package in ("rlhf_fast", *PACKAGES):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, Any] | None:
    """The git commit of this package and whether files differ from it; None for an installed one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        hash_, changed = (
            subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, timeout=20, check=True
            ).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"hash": hash_, "changed": bool(changed)}


def machine() -> dict[str, Any]:
    """Host, system, cores and memory, and the GPUs that torch sees."""
    import torch

    about: dict[str, Any] = {"host": platform.node(), "system": f"{platform.system()} {platform.machine()}"}
    about |= {"cores": os.cpu_count(), "cpu": torch.backends.cpu.get_cpu_capability()}
    if hasattr(os, "sysconf"):
        about["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    about["gpus"] = [torch.cuda.get_device_name(i) for i in range(count)]
    return about


def redacted(value: Any, name: str = "") -> Any:
    """``value`` as strict JSON takes it, without what looks like a key, token or password by its name or its form."""
    if isinstance(value, Mapping):
        return {str(key): redacted(part, str(key)) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(part, name) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return REDACTED if value and _SECRET_NAMES.search(name) else _SECRET_VALUES.sub(REDACTED, str(value))
