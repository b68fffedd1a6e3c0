"""Pictures of the cells: mean over seeds, band of one standard error, each curve named where it ends. One file for light pages
and one for dark ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_fast.run.plots import smooth

BLUE, ORANGE, GREEN, GREY = "#2f7de1", "#e8730c", "#12986a", "#8a929c"  # legible on white and on near black
THEMES = {
    "light": {"paper": "#ffffff", "ink": "#22262b", "soft": "#6b7280", "grid": "#e4e7eb"},
    "dark": {"paper": "#0d1117", "ink": "#e6edf3", "soft": "#9aa4af", "grid": "#262c34"},
}


@dataclass(frozen=True)
class Line:
    """A curve of a panel: which cells, what it is called, how it is drawn."""

    trainer: str
    label: str
    color: str
    variant: str = ""
    library: str = "rlhf_fast"
    style: str = "-"


@dataclass(frozen=True)
class Panel:
    task: str
    metric: str
    title: str
    lines: tuple[Line, ...]
    xlabel: str = "responses sampled"


PPO, GRPO = Line("ppo", "PPO", BLUE), Line("grpo", "GRPO", ORANGE)
TRL_GRPO = Line("grpo", "GRPO, TRL", ORANGE, library="trl", style="--")
NOISE = (
    Line("ppo", "PPO, random reward", GREY, "random reward"),
    Line("grpo", "GRPO, random reward", GREY, "random reward", style="--"),
)
FROZEN = Line("ppo", "PPO, kl_coef 20", GREEN, "kl_coef 20")
RL, CONTROLLED = (PPO, GRPO, TRL_GRPO), (PPO, GRPO, TRL_GRPO, FROZEN, *NOISE)
ROWS = "rows of data seen"
DPO = (Line("dpo", "rlhf_fast", BLUE), Line("dpo", "TRL", ORANGE, library="trl", style="--"))
FIGURES = {
    "addition": (
        Panel("addition", "reward", "Addition: held-out reward", CONTROLLED),
        Panel("addition", "greedy accuracy", "Held-out greedy accuracy", CONTROLLED),
    ),
    "stories": (
        Panel("stories", "greedy accuracy", "Word problems: held-out greedy accuracy", RL),
        Panel("stories", "groups scored alike", "GRPO's groups that teach nothing", (GRPO, TRL_GRPO)),
    ),
    "preference": (
        Panel("preference", "reward", "Preference: reward model's score", RL),
        Panel("preference", "quality", "True quality, which no trainer sees", RL),
    ),
    "more": (
        Panel("addition", "explained variance", "PPO's critic, addition: explained variance", (PPO, FROZEN, NOISE[0])),
        Panel("preference", "quality", "DPO, preference: true quality", DPO, ROWS),
        Panel("addition", "preferred to SFT", "DPO, addition: preferred to SFT", DPO, ROWS),
        Panel("addition", "greedy accuracy", "DPO, addition: greedy accuracy", DPO, ROWS),
    ),
}


def draw(
    found: Sequence[dict[str, Any]],
    folder: Path,
    figures: Mapping[str, Sequence[Panel]] = FIGURES,
    prefix: str = "learning",
) -> list[Path]:
    """The figures that have any cells. Returns the files."""
    files: list[Path] = []
    seeds = len({cell["seed"] for cell in found})
    note = f"mean of up to {seeds} seeds, band of one standard error" if seeds > 1 else "one seed"
    for name, panels in figures.items():
        series = [
            [(line, points) for line in panel.lines if (points := average(found, panel, line))] for panel in panels
        ]
        for theme in THEMES if any(series) else ():
            files.append(folder / f"{prefix}-{name}-{theme}.png")
            _figure(files[-1], panels, series, THEMES[theme], note)
    return files


def average(found: Sequence[dict[str, Any]], panel: Panel, line: Line) -> list[tuple[float, float, float]]:
    """(samples, mean, standard error) over seeds. A run that stopped early stays where it was."""
    wanted = (panel.task, line.trainer, line.variant, line.library)
    cells = [c for c in found if (c["task"], c["trainer"], c["variant"], c["library"]) == wanted]
    curves = [{x: v for x, name, v in c["points"] if name == panel.metric} for c in cells]
    averaged = []
    for x in sorted({x for curve in curves for x in curve}):
        values = [curve[x] if x in curve else curve[max(curve)] for curve in curves if x in curve or x > max(curve)]
        if len(values) == len(curves):
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
            averaged.append((x, statistics.fmean(values), error))
    return averaged


def _figure(path: Path, panels: Sequence[Panel], series: Sequence[list], theme: dict[str, str], note: str) -> None:
    # half a second to import; Figure without pyplot needs no display and leaves no global state
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(11, 0.4 + 3.9 * rows), dpi=150, layout="constrained", facecolor=theme["paper"])
    FigureCanvasAgg(figure)
    for axes, panel, drawn in zip(figure.subplots(rows, 2, squeeze=False).flat, panels, series):
        _panel(axes, panel, drawn, theme)
    figure.text(0.993, 0.012, note, ha="right", va="bottom", color=theme["soft"], fontsize=9)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.06, hspace=0.06)
    figure.savefig(path)


def _panel(axes: Any, panel: Panel, drawn: list, theme: dict[str, str]) -> None:
    axes.set_facecolor(theme["paper"])
    for line, points in drawn:
        x, mean, error = zip(*points)
        mean, error = smooth(mean), smooth(error)  # curves of a dozen points and more
        axes.fill_between(
            x,
            [m - e for m, e in zip(mean, error)],
            [m + e for m, e in zip(mean, error)],
            color=line.color,
            alpha=0.18,
            linewidth=0,
        )
        axes.plot(x, mean, line.style, color=line.color, linewidth=2.0, solid_capstyle="round")
    axes.set_title(panel.title, loc="left", color=theme["ink"], fontsize=12, fontweight="bold", pad=10)
    axes.set_xlabel(panel.xlabel, color=theme["soft"], fontsize=9, loc="left")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(True, axis="y", color=theme["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme["grid"])
    axes.tick_params(colors=theme["soft"], labelsize=9, length=0)
    axes.margins(x=0.0, y=0.08)
    axes.locator_params(nbins=5)
    _name_at_the_end(axes, drawn)


def _name_at_the_end(axes: Any, drawn: list) -> None:
    """Each curve's name to the right of its last point, moved apart where names would touch."""
    if not drawn:
        return
    low, high = axes.get_ylim()
    step = 0.062 * (high - low)
    ends = [(smooth([y for _, y, _ in points])[-1], points[-1][0], line) for line, points in drawn]
    ends.sort(key=lambda end: end[0])
    places = spread([value for value, *_ in ends], step)
    for place, (_, right, line) in zip(places, ends):
        axes.annotate(
            line.label,
            (right, place),
            xytext=(7, 0),
            textcoords="offset points",
            color=line.color,
            fontsize=9.5,
            fontweight="bold",
            va="center",
            annotation_clip=False,
        )


def spread(values: Sequence[float], step: float) -> list[float]:
    """Ascending values, moved as little as it takes to be ``step`` apart: neighbours that touch share one mean."""
    groups: list[list[float]] = []
    for value in values:
        groups.append([value])
        while len(groups) > 1 and _bottom(groups[-1], step) < _top(groups[-2], step) + step:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_bottom(group, step) + i * step for group in groups for i in range(len(group))]


def _bottom(group: list[float], step: float) -> float:
    return statistics.fmean(group) - step * (len(group) - 1) / 2


def _top(group: list[float], step: float) -> float:
    return statistics.fmean(group) + step * (len(group) - 1) / 2
