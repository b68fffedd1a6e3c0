"""What a run reports while it runs: ``metrics.jsonl`` always, a progress bar for people, trackers when asked.

``metrics.jsonl`` has one JSON object a line: ``step``, ``time`` (seconds since this process began to log) and the metrics.
JSON has no NaN or infinity: such a value is ``null``, and ``"nonfinite": {"loss": "nan"}`` on the same line says which.
``completions.jsonl`` has what a policy wrote at each evaluation, one JSON object a completion: ``step``, ``prompt``,
``completion``, ``rewards``, how it ended and the row's other columns.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from rlhf_fast.errors import UserError
from rlhf_fast.run.disk import disk_faults

FILE = "metrics.jsonl"
COMPLETIONS = "completions.jsonl"
SHOWN = 200  # characters of a prompt or completion in a table


class MetricsLog:
    """Writes the metrics of a run. Use as a context manager; `close` ends the progress bar.

    Args:
        run_dir: the run folder; made when missing.
        headline: metrics that each log prints in a line (above the bar, on a terminal), most important first.
        total_steps: optimizer steps of the whole run; may be set anew when more is known.
        trackers: names that accelerate knows: ``tensorboard``, ``wandb``, ...
        quiet: write files and trackers only.
        resume_step: None for a fresh run: earlier files are kept under other names. A step when resuming: lines past it, and
            one that a kill cut in half, are dropped.
        config: shown by trackers.
        enabled: False on all ranks but the first: every method does nothing.
    Raises:
        UserError: a tracker is unknown or not installed.
    """

    def __init__(
        self,
        run_dir: Path | str,
        headline: Sequence[str],
        total_steps: int,
        trackers: Sequence[str] | str = (),
        quiet: bool = False,
        resume_step: int | None = None,
        config: Mapping[str, Any] | None = None,
        enabled: bool = True,
    ):
        self.run_dir = Path(run_dir)
        self.headline = list(headline)
        self.total_steps = total_steps
        self.enabled = enabled
        self._started = time.perf_counter()
        self._first_step = resume_step or 0
        self._file = self._progress = self._trackers = None
        if not enabled:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        for name in (FILE, COMPLETIONS):
            _prepare_file(self.run_dir / name, resume_step)
        self._trackers = _start_trackers(trackers, self.run_dir, config)
        self._file = (self.run_dir / FILE).open("a", encoding="utf-8")
        self._console = Console(quiet=quiet, highlight=False)
        if self._console.is_terminal and not quiet:
            self._progress = _progress_bar(self._console)
            self._task = self._progress.add_task("", total=total_steps, completed=self._first_step, note="")
            self._progress.start()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line, and show the headline. Values: numbers and tensors of one element (read from the device)."""
        if not self.enabled:
            return
        values = {key: _number(key, value) for key, value in metrics.items()}
        line = {"step": step, "time": round(time.perf_counter() - self._started, 3), **_finite(values)}
        # a line is flushed whole: a kill loses at most the one being written, and resuming drops a torn one
        with disk_faults(FILE, self.run_dir):
            self._file.write(json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n")
            self._file.flush()
        for tracker in self._trackers:
            tracker.log(values, step=step)
        self._show(step, values)

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]], shown: int) -> None:
        """Append what an evaluation gave to ``completions.jsonl``, and print the first ``shown`` above the bar.

        Args:
            rows: one per completion, with at least ``prompt``, ``completion`` and ``rewards`` (name -> score or None).
        """
        if not self.enabled:
            return
        with disk_faults(COMPLETIONS, self.run_dir), (self.run_dir / COMPLETIONS).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **row}, ensure_ascii=False, default=str) + "\n" for row in rows)
        table = [(brief(row["prompt"]), brief(row["completion"]), scores_text(row["rewards"])) for row in rows[:shown]]
        if table and not self._console.quiet:
            print_table(f"step {step}: completions", table, ("prompt", "completion", "rewards"), console=self._console)

    def tick(self, step: int, note: str = "") -> None:
        """Move the bar to ``step`` between log lines; ``note`` says what is going on, for example "generating"."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, total=self.total_steps, note=escape(note))

    def print(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self.enabled:
            self._console.print(text, markup=False, soft_wrap=True)

    def table(self, title: str, rows: Iterable[Sequence] | Mapping[str, Any], header: Sequence[str] = ("", "")) -> None:
        """Print a table (`print_table`)."""
        if self.enabled:
            self._stop_bar()
            print_table(title, rows, header, console=self._console)

    def close(self) -> None:
        """End the bar, the file and the trackers."""
        self._stop_bar()
        if self._file is not None:
            self._file.close()
            self._file = None
            for tracker in self._trackers:
                tracker.finish()

    def __enter__(self) -> MetricsLog:  # noqa: PYI034 (typing.Self needs Python 3.11)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        # what could not be written cannot be flushed either, and was said
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self.close()

    def _stop_bar(self) -> None:
        if self._progress is not None:
            self._progress.update(self._task, note="")
            self._progress.stop()
            self._progress = None

    def _show(self, step: int, values: dict[str, float | int]) -> None:
        names = self.headline + [f"eval_{key}" for key in self.headline]
        shown = {key: values[key] for key in names if key in values} or dict(list(values.items())[:4])
        figures = "  ".join(f"{key} {format_number(value)}" for key, value in shown.items())
        width = len(str(self.total_steps))
        if self._progress is None:
            self.print(f"step {step:>{width}}/{self.total_steps}  {figures}{self._eta(step)}")
        else:
            self._progress.update(self._task, completed=step, note="")
            self._console.print(f"[dim]step {step:>{width}}[/]  {escape(figures)}", soft_wrap=True)

    def _eta(self, step: int) -> str:
        done, left = step - self._first_step, self.total_steps - step
        if done <= 0 or left <= 0:
            return ""
        return f"  eta {format_duration((time.perf_counter() - self._started) / done * left)}"


def read_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``, NaN and infinities restored. Empty when there is none.

    Raises:
        UserError: a line is not JSON; says which. (The last may be torn by a kill: it is left out.)
    """
    path = Path(run_dir) / FILE
    if not path.is_file():
        return []
    rows, lines = [], path.read_text(encoding="utf-8").splitlines()
    for number, text in enumerate(lines, start=1):
        try:
            row = json.loads(text)
        except ValueError:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number} is not JSON: {text[:60]!r}; delete the line") from None
        row.update({key: float(word) for key, word in row.pop("nonfinite", {}).items()})
        rows.append(row)
    return rows


def print_table(
    title: str,
    rows: Iterable[Sequence] | Mapping[str, Any],
    header: Sequence[str] = ("", ""),
    console: Console | None = None,
) -> None:
    """Print ``rows`` (sequences of cells, or a mapping from name to value) under ``title``. Numbers are aligned right."""
    cells = [list(row) for row in (rows.items() if isinstance(rows, Mapping) else rows)]
    table = Table(title=escape(title), title_justify="left", title_style="bold", show_header=any(header))
    for i, name in enumerate(header):
        numeric = any(isinstance(row[i], (int, float)) for row in cells if i < len(row))
        table.add_column(escape(name), justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*(format_number(cell) if isinstance(cell, (int, float)) else escape(str(cell)) for cell in row))
    console = console or Console(highlight=False)
    console.print()
    console.print(table)


def brief(text: object, limit: int = SHOWN) -> str:
    """A prompt or completion for a table: of messages the last; of a long text the end; on one line."""
    text = " ".join((text if isinstance(text, str) else str(text[-1]["content"])).split())
    return text if len(text) <= limit else "..." + text[3 - limit :]


def scores_text(rewards: Mapping[str, float | None]) -> str:
    """Scores by the functions' names, on one line."""
    return ", ".join(f"{name} {'-' if value is None else f'{value:.4g}'}" for name, value in rewards.items())


def format_number(value: float) -> str:
    """A number as people read it: about four significant digits, no exponent unless it is tiny or huge."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < 1e6):
        return f"{int(value):,}"
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3g}"
    return f"{value:.4f}" if abs(value) < 10 and abs(value) >= 0.001 else f"{value:.4g}"


def format_duration(seconds: float) -> str:
    """``h:mm:ss``, or ``m:ss`` under an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _progress_bar(console: Console) -> Progress:
    return Progress(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=console,
        # a step may take minutes: estimate from the last quarter of an hour
        speed_estimate_period=900,
    )


def _number(key: str, value: Any) -> float | int:
    if hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, (bool, int, float)):
        raise TypeError(f"metric {key} is a {type(value).__name__}; metrics are numbers")
    return value


def _finite(values: Mapping[str, float | int]) -> dict[str, Any]:
    odd = {key: str(value) for key, value in values.items() if not math.isfinite(value)}
    finite = {key: None if key in odd else value for key, value in values.items()}
    return {**finite, "nonfinite": odd} if odd else finite


def _prepare_file(path: Path, resume_step: int | None) -> None:
    """Make room for a fresh run, or take the lines back to ``resume_step``."""
    if not path.exists() or path.stat().st_size == 0:
        return
    if resume_step is None:
        n = 1
        while (aside := path.with_name(f"{path.stem}-{n}{path.suffix}")).exists():
            n += 1
        path.rename(aside)
        return
    kept = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(text)["step"] <= resume_step:
                kept.append(text + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def _start_trackers(names: Sequence[str] | str, run_dir: Path, config: Mapping[str, Any] | None) -> list[Any]:
    names = [names] if isinstance(names, str) else list(names)
    names = [name for name in dict.fromkeys(names) if name != "none"]
    if not names:
        return []
    # accelerate takes a second to import, and its trackers want its process state
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    PartialState()
    available = [str(t) for t in get_available_trackers()]
    trackers = []
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"report_to: unknown tracker {name!r}; known are {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name not in available:
            raise UserError(f"report_to: {name} is not installed; `pip install {name}`, or leave it out")
        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        if tracker_class.requires_logging_directory:
            tracker = tracker_class(name, logging_dir=str(run_dir))  # files go to run_dir/<name>
        elif name == "wandb":
            tracker = tracker_class("rlhf_fast", name=run_dir.resolve().name, dir=str(run_dir))
        else:
            tracker = tracker_class(run_dir.resolve().name)
        if hasattr(tracker, "start"):
            tracker.start()
        if config:
            tracker.store_init_configuration(_flat(config))
        trackers.append(tracker)
    return trackers


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values that every tracker takes: numbers, strings, bools."""
    return {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in config.items()}
