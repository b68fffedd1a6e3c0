"""Pictures of a run: small multiples of its key curves, and one large picture of the headline."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_fast.run.fonts import fonts_for
from rlhf_fast.run.metrics import format_number, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# what people look at first, in this order; patterns match whole names
KEY_METRICS = (
    r"reward|objective/scores|accuracy|mean_token_accuracy|rewards/accuracies",
    r"rewards/[^/]+/mean|objective/rlhf_reward|margin|rewards/margins",
    r"loss",
    r"eval_(loss|reward|accuracy|rewards/accuracies|mean_token_accuracy)",
    r"kl|objective/kl|entropy|objective/entropy",
    r"loss/(policy|value)_avg|val/explained_variance|explained_variance",
    r"clip_ratio/region_mean|policy/clipfrac_avg|policy/approxkl_avg|frac_reward_zero_std|reward_std",
    r"completions/mean_length|completions/clipped_ratio",
    r"rewards/(chosen|rejected)|logps/(chosen|rejected)",
    r"grad_norm|lr|tokens_per_second",
)
MAX_PANELS = 12
_INK, _GRID, _CURVE, _RAW = "#22262b", "#e4e7eb", "#1f6feb", "#9cc2f7"


def plot_run(run_dir: Path | str, keys: Sequence[str] | None = None, headline: str | None = None) -> list[Path]:
    """Draw the curves of a run's ``metrics.jsonl`` as PNG files in ``run_dir/plots``.

    Args:
        keys: metrics for ``curves.png``; the key ones among those logged when None.
        headline: the metric that gets a picture of its own; the first of ``keys`` when None or never logged.
    Returns:
        the files: ``curves.png`` and the headline's. Empty when nothing was logged.
    """
    series = _series(read_metrics(run_dir))
    keys = [k for k in keys if k in series] if keys else _key_metrics(series)
    if not keys:
        return []
    folder = Path(run_dir) / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    headline = headline if headline in series else keys[0]
    name = Path(run_dir).resolve().name
    file_name = re.sub(r"[^\w.-]+", "-", headline)
    curves, single = folder / "curves.png", folder / f"{file_name}.png"
    if single == curves:
        single = folder / "curves-headline.png"
    with fonts_for([name, headline, *keys]):
        _draw(curves, name, {key: series[key] for key in keys})
        _draw(single, name, {headline: series[headline]})
    return [curves, single]


def plot_bars(
    path: Path | str, title: str, names: Sequence[str], values: Sequence[float], errors: Sequence[float]
) -> Path:
    """Draw one bar per name with its standard error as a PNG, to compare runs or stages. Returns ``path``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with fonts_for([title, *names]):
        figure = Figure(figsize=(1.6 + 1.1 * len(names), 3.6), dpi=150, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        panel = figure.subplots()
        bars = panel.bar(names, values, width=0.6, color=_CURVE, yerr=errors, ecolor=_INK, capsize=4)
        panel.bar_label(bars, [format_number(float(f"{v:.3g}")) for v in values], padding=3, color=_INK, fontsize=9)
        panel.set_title(title, loc="left", color=_INK, fontsize=11, fontweight="bold", parse_math=False)
        panel.grid(True, axis="y", color=_GRID, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.spines["bottom"].set_color("#c3c8ce")
        panel.tick_params(colors="#4b5563", labelsize=9, length=0)
        panel.margins(y=0.15)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return Path(path)


def smooth(values: Sequence[float]) -> list[float]:
    """A local straight line through about a seventh of the values, so that the ends neither lag nor flutter.

    NaN and infinities are left out; fewer than 12 values come back as they are.
    """
    import numpy as np

    n = len(values)
    if n < 12:
        return list(values)
    x, y = np.arange(n, dtype=float), np.asarray(values, dtype=float)
    seen = np.isfinite(y)
    width = 2 * max(2, n // 14) + 1
    first = np.clip(np.arange(n) - width // 2, 0, n - width)

    def window_sum(terms: np.ndarray) -> np.ndarray:
        total = np.concatenate([[0.0], np.cumsum(np.where(seen, terms, 0.0))])
        return total[first + width] - total[first]

    with np.errstate(all="ignore"):
        count = window_sum(np.ones(n))
        mean_x, mean_y = window_sum(x) / count, window_sum(y) / count
        variance = window_sum(x * x) / count - mean_x**2
        slope = (window_sum(x * y) / count - mean_x * mean_y) / variance
        line = mean_y + np.where(count > 1, slope, 0.0) * (x - mean_x)
    return line.tolist()


def _series(rows: list[dict[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Metric -> (steps, values); metrics that never had a finite value are left out."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key not in ("step", "time", "epoch") and isinstance(value, (int, float)):
                steps, values = series.setdefault(key, ([], []))
                steps.append(row["step"])
                values.append(float(value))
    return {key: (x, y) for key, (x, y) in series.items() if any(map(math.isfinite, y))}


def _key_metrics(series: dict[str, Any]) -> list[str]:
    found = [key for pattern in KEY_METRICS for key in series if re.fullmatch(pattern, key)]
    return list(dict.fromkeys(found or series))[:MAX_PANELS]


def _draw(path: Path, run: str, series: dict[str, tuple[list[int], list[float]]]) -> None:
    # half a second to import; Figure without pyplot needs no display and leaves no global state
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 1 if len(series) == 1 else 2 if len(series) <= 4 else 3
    rows = -(-len(series) // columns)
    size = (7.5, 4.4) if len(series) == 1 else (4.2 * columns, 2.7 * rows + 0.4)
    figure = Figure(figsize=size, dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(run, x=0.01, ha="left", color=_INK, fontsize=13, fontweight="bold", parse_math=False)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, (key, (steps, values)) in zip(panels, series.items()):
        _draw_curve(panel, key, steps, values)
    for panel in panels[len(series) :]:
        panel.set_visible(False)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.04, hspace=0.05)
    figure.savefig(path)


def _draw_curve(panel: Axes, key: str, steps: list[int], values: list[float]) -> None:
    mean = smooth(values)
    few = len(values) < 12
    if not few:
        panel.plot(
            steps, values, color=_RAW, linewidth=0.8, alpha=0.6 if len(values) > 200 else 1.0, solid_joinstyle="round"
        )
    panel.plot(steps, mean, color=_CURVE, linewidth=1.8, marker="o" if few else None, markersize=3.5)
    last = next(v for v in reversed(values) if math.isfinite(v))
    panel.set_title(key, loc="left", color=_INK, fontsize=10, fontweight="bold", parse_math=False)
    panel.set_title(f"last {format_number(float(f'{last:.4g}'))}", loc="right", color="#6b7280", fontsize=9)
    panel.set_xlabel("optimizer step", color="#6b7280", fontsize=8)
    panel.grid(True, color=_GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.spines["bottom"].set_color("#c3c8ce")
    panel.tick_params(colors="#4b5563", labelsize=8, length=0)
    panel.margins(x=0.02, y=0.12)
    panel.locator_params(axis="x", nbins=6, integer=True)
    panel.locator_params(axis="y", nbins=5)
    _limit(panel, values, mean)


def _limit(panel: Axes, values: list[float], mean: list[float]) -> None:
    """Keep one wild point of hundreds from flattening the curve: show what lies between the 1st and 99th percentile."""
    finite = sorted(v for v in values if math.isfinite(v))
    if len(finite) < 100:
        return
    low, high = finite[len(finite) // 100], finite[-1 - len(finite) // 100]
    low, high = min(low, *filter(math.isfinite, mean)), max(high, *filter(math.isfinite, mean))
    if finite[-1] - finite[0] > 3 * (high - low) > 0:
        pad = 0.12 * (high - low)
        panel.set_ylim(low - pad, high + pad)
