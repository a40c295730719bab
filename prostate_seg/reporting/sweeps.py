"""Figures of a sweep: every trial as a line across its settings, and how much each setting matters."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Row = tuple[Mapping[str, str], float]
"""The settings of a trial, as JSON or plain text, and its objective."""

NUM_BINS = 4
"""Groups of equal size that the values of a number are cut into."""
WIDEST_RATIO = 20.0
"""Positive numbers that span more than this are drawn by their logarithm."""


def draw_sweep(folder: Path, rows: Sequence[Row]) -> None:
    """Draw parallel_coordinates.png and importance.png of two trials or more; of fewer there is nothing to see."""
    if len(rows) < 2 or not rows[0][0]:
        return
    draw_parallel_coordinates(folder / "parallel_coordinates.png", rows)
    draw_importance(folder / "importance.png", importance(rows))


def draw_parallel_coordinates(path: Path, rows: Sequence[Row]) -> None:
    """Draw a line per trial across an axis per setting and the objective; the best is dark and on top."""
    names = list(rows[0][0])
    figure = Figure(figsize=(2 + 1.9 * len(names), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    scores = np.array([score for _, score in rows])
    columns = [_Axis([settings[name] for settings, _ in rows]) for name in names]
    low, spread = scores.min(), max(float(np.ptp(scores)), 1e-12)
    heights = np.column_stack([*(column.heights for column in columns), (scores - low) / spread])
    for row in np.argsort(scores):
        colour = colormaps["viridis_r"]((scores[row] - low) / spread)
        axes.plot(heights[row], color=colour, linewidth=2.5 if row == scores.argmax() else 1.2)
    for place, column in enumerate(columns):
        axes.axvline(place, color="black", linewidth=0.6)
        for height, label in column.labels:
            axes.annotate(label, (place, height), xytext=(3, 0), textcoords="offset points", fontsize=7, va="center")
    axes.axvline(len(names), color="black", linewidth=0.6)
    for height in np.linspace(0, 1, 5):
        label = f"{low + height * spread:.3f}"
        axes.annotate(label, (len(names), height), xytext=(3, 0), textcoords="offset points", fontsize=7, va="center")
    axes.set_xticks(range(len(names) + 1), [*names, "objective"], fontsize=8)
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(names) + 0.4)
    axes.set_frame_on(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def draw_importance(path: Path, shares: Mapping[str, float]) -> None:
    """Draw a bar per setting."""
    figure = Figure(figsize=(6, 1.2 + 0.35 * len(shares)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    ordered = sorted(shares.items(), key=lambda item: item[1])
    bars = axes.barh([name for name, _ in ordered], [share for _, share in ordered], color="#0072B2")
    axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    axes.set_xlim(0, 1.1)
    axes.set_xlabel("share of the objective's variance that the setting alone explains")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def importance(rows: Sequence[Row]) -> dict[str, float]:
    """Return for each setting the share of the objective's variance between its values, from 0 to 1.

    That is epsilon squared of a one-way analysis of variance: eta squared less what chance groups would have. Numbers with
    more values than NUM_BINS are cut into so many groups of equal size. Settings that only matter together show little.
    """
    scores = np.array([score for _, score in rows])
    return {name: _epsilon_squared(_groups([settings[name] for settings, _ in rows]), scores) for name in rows[0][0]}


def _epsilon_squared(groups: np.ndarray, scores: np.ndarray) -> float:
    total = float(((scores - scores.mean()) ** 2).sum())
    kinds = np.unique(groups)
    if total == 0 or len(scores) <= len(kinds):  # one trial a group: nothing can be told from chance
        return 0.0
    within = sum(float(((scores[groups == kind] - scores[groups == kind].mean()) ** 2).sum()) for kind in kinds)
    share = 1 - (within / (len(scores) - len(kinds))) / (total / (len(scores) - 1))
    return max(0.0, share)


def _groups(values: Sequence[str]) -> np.ndarray:
    numbers = _numbers(values)
    if numbers is None or len(set(values)) <= NUM_BINS:
        return np.unique(values, return_inverse=True)[1]
    inner = np.quantile(numbers, np.linspace(0, 1, NUM_BINS + 1)[1:-1])
    return np.digitize(numbers, inner)


def _numbers(values: Sequence[str]) -> np.ndarray | None:
    """Return the values as numbers, None if one of them is none."""
    try:
        return np.array([float(value) for value in values])
    except ValueError:
        return None


class _Axis:
    """Heights from 0 to 1 of the values of a setting, and labels at some heights."""

    def __init__(self, values: Sequence[str]) -> None:
        numbers = _numbers(values)
        if numbers is None:
            kinds = sorted(set(values))
            step = 1 / max(1, len(kinds) - 1)
            self.heights = np.array([kinds.index(value) * step for value in values])
            self.labels = [(place * step, _short(kind)) for place, kind in enumerate(kinds)]
            return
        is_wide = numbers.min() > 0 and numbers.max() / numbers.min() > WIDEST_RATIO
        scaled = np.log10(numbers) if is_wide else numbers
        low, spread = scaled.min(), max(float(np.ptp(scaled)), 1e-12)
        self.heights = (scaled - low) / spread
        ends = np.linspace(0, 1, 3)
        self.labels = [(float(h), f"{10 ** (low + h * spread) if is_wide else low + h * spread:.3g}") for h in ends]


def _short(value: str) -> str:
    return value if len(value) <= 18 else f"{value[:17]}…"
