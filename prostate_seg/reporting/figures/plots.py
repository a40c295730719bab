"""Plots of metrics as PNG files or SVG: box plots, Bland-Altman plot, Dice from apex to base, learning curves.

Figures are built from matplotlib's objects and never through pyplot, whose state is shared between threads. In SVG, text stays
text and the colours of `PAGE_COLOURS` become CSS variables, so that the page's light and dark theme both apply.
"""

import io
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prostate_seg.common.files import atomic_path
from prostate_seg.reporting.evaluation.tables import METRIC_LABELS

SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Okabe and Ito's palette, one colour per fold, repeated from the seventh fold on."""

MARKERS = ("o", "s", "^", "D")
"""Markers of curves, beside their colours."""

PAGE_COLOURS = {"#000000": "currentColor", **{colour: f"var(--series-{n})" for n, colour in enumerate(SERIES)}}
"""CSS value that replaces each drawn colour."""

PANEL_INCH = (4.4, 3.1)
"""Width and height of one SVG panel: 9 pt text is 10 pixels high at the width of a phone."""

PLOTTED_METRICS = ("dice", "hd95_mm", "volume_difference_percent")
"""Metrics with a box plot."""

HD95_TICKS_MM = (0, 2, 5, 10, 20, 50, 100, 200, 500)

HD95_LINEAR_MM = 10.0
"""The HD95 axis is linear to here and logarithmic above: a missed gland has 20 times the HD95 of a good case."""

JITTER_WIDTH = 0.12
"""Half width of the horizontal jitter of a fold's points, in units of the distance between folds."""

MAX_MARKED_EPOCHS = 40
"""Longest learning curve that gets a marker per epoch."""

READERS_DICE = {"dice": 0.92, "dice_apex": 0.90, "dice_base": 0.87}
"""Mean inter-reader Dice of whole gland, apex and base (Insights into Imaging 2021, doi 10.1186/s13244-021-01010-9)."""

READERS_OF_REGIONS = {
    "whole_gland": (0.92, "between readers"),
    "transition_zone": (0.88, "between readers"),
    "peripheral_zone": (0.71, "of a junior reader"),
}
"""Mean Dice and its kind, by region: the same source, and Insights into Imaging 2023, doi 10.1186/s13244-023-01394-w."""

OUTSIDE_WIDTH = 0.17
"""Width of the area for slices predicted outside the reference's extent, in units of the gland's length."""


def save_png(path: Path, figure: Figure) -> None:
    """Write a figure as PNG; without the version of matplotlib, so that equal figures are equal files."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi="figure", metadata={"Software": None})


def case_metrics_figure(cases: pd.DataFrame) -> Figure:
    """Draw box plots of `PLOTTED_METRICS` per fold, one panel each; NaN values are left out."""
    width_inch = max(9.0, 0.75 * cases["fold"].nunique() * len(PLOTTED_METRICS))
    figure = Figure(figsize=(width_inch, 3.6), dpi=110, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(PLOTTED_METRICS)), PLOTTED_METRICS, strict=True):
        draw_metric(axes, cases, name)
        axes.set_title(METRIC_LABELS[name][0], fontsize=11)
    return figure


def draw_metric(axes: Axes, cases: pd.DataFrame, name: str) -> None:
    """Draw one of `PLOTTED_METRICS`: a box per fold and a point per case."""
    groups = [(fold, rows[name].dropna().to_numpy(dtype=float)) for fold, rows in cases.groupby("fold")]
    axes.boxplot(
        [values for _, values in groups],
        positions=range(len(groups)),
        widths=0.5,
        showfliers=False,
        medianprops={"color": "black", "linewidth": 1.8},
    )
    for position, (_, values) in enumerate(groups):
        # without random numbers: equal tables, equal plots
        jitter = JITTER_WIDTH * np.sin(2.4 * np.arange(len(values)))
        _draw_points(axes, position + jitter, values)
    axes.set_xticks(range(len(groups)), [f"{fold}\nn={len(values)}" for fold, values in groups])
    axes.set_xlabel("fold")
    axes.grid(axis="y", alpha=0.3)
    if name == "dice":
        axes.set_ylim(-0.02, 1.02)
    elif name == "hd95_mm":
        axes.set_yscale("symlog", linthresh=HD95_LINEAR_MM)
        top_mm = max(axes.get_ylim()[1], 2 * HD95_LINEAR_MM)
        axes.set_yticks(HD95_TICKS_MM, [str(tick) for tick in HD95_TICKS_MM])
        axes.set_ylim(-0.3, top_mm)
    else:
        axes.axhline(0.0, color="black", linewidth=0.8)


def _draw_points(axes: Axes, x: Any, y: Any, *, colour: str = SERIES[0], label: str | None = None) -> None:
    """Draw a point per case."""
    axes.plot(x, y, "o", color=colour, label=label, markersize=4, alpha=0.7, markeredgewidth=0)


def history_figure(history: pd.DataFrame, *, kept: int, title: str) -> Figure:
    """Draw the learning curves of one fold from its history.csv; a dashed line marks the epoch whose weights were kept."""
    figure = Figure(figsize=(7, 3.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2)
    by_epoch = history.set_index("epoch")
    for axes, name, label in zip(panels, ("train/loss", "val/dice"), ("training loss", "val Dice"), strict=True):
        draw_curve(axes, by_epoch[name].dropna(), colour=SERIES[0])
        axes.axvline(kept, color=SERIES[1], linewidth=1, linestyle="--")
        axes.set(xlabel="epoch", ylabel=label)
    panels[1].set_title(f"{by_epoch['val/dice'][kept]:.3f} in epoch {kept}, whose weights are kept", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_curve(axes: Axes, values: pd.Series, *, colour: str, label: str | None = None) -> None:
    """Draw one value per epoch, the index, as a line."""
    marker = "." if len(values) < MAX_MARKED_EPOCHS else None
    axes.plot(values.index, values, marker=marker, color=colour, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


# --- SVG for the report page ---------------------------------------------------------------------------------------


def regions_figure(cases_of: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw the Dice of the cases by region as boxes and points, beside the Dice of human readers."""
    figure, axes = _panel(ylabel="Dice", width_inch=5.4)
    names = {region: region.replace("_", " ") for region in cases_of}
    table = pd.concat([cases.assign(fold=names[region]) for region, cases in cases_of.items()])
    draw_metric(axes, table, "dice")
    axes.set_xlabel("")
    for position, (_, region) in enumerate(sorted((name, region) for region, name in names.items())):
        if region in READERS_OF_REGIONS:
            dice, kind = READERS_OF_REGIONS[region]
            axes.plot([position - 0.4, position + 0.4], [dice, dice], color=SERIES[1], linewidth=1.6, linestyle="--")
            axes.text(position, 0.02, f"{dice:.2f}\n{kind}", ha="center", va="bottom", fontsize=7.5)
    return figure


def box_figure(cases: pd.DataFrame, name: str) -> Figure:
    """Draw one metric with a box per fold and a point per case."""
    figure, axes = _panel(ylabel=METRIC_LABELS[name][0])
    draw_metric(axes, cases.assign(fold=cases["fold"].str.removeprefix("fold")), name)
    if name == "dice":  # from the tenth below the worst case, so that boxes near 1 can be distinguished
        axes.set_ylim(max(math.floor(10 * cases[name].min() - 0.2) / 10, -0.02), 1.01)
    return figure


def bland_altman_figure(table: pd.DataFrame, *, limits_ml: tuple[float, float, float]) -> Figure:
    """Draw volume difference over mean volume, with bias and limits of agreement."""
    figure, axes = _panel(xlabel="mean of both volumes (mL)", ylabel="predicted - reference (mL)")
    _draw_points(axes, table["mean_ml"], table["difference_ml"])
    axes.axhline(0, color="black", linewidth=0.6)
    for value, style, name in zip(limits_ml, ("-", "--", "--"), ("bias ", "", ""), strict=True):
        if not np.isnan(value):
            axes.axhline(value, color=SERIES[1], linewidth=1.2, linestyle=style)
            place = axes.get_yaxis_transform()  # x as a fraction of the axes, y in mL
            axes.text(0.99, value, f"{name}{value:+.1f}", transform=place, ha="right", va="bottom", fontsize=8)
    axes.margins(y=0.15)
    return figure


def curves_figure(table: pd.DataFrame, column: str, *, label: str, kept_epochs: Mapping[str, int]) -> Figure:
    """Draw one learning curve per fold; a ring marks the epoch in `kept_epochs`."""
    figure, axes = _panel(xlabel="epoch", ylabel=label)
    for number, (fold, rows) in enumerate(table.dropna(subset=[column]).groupby("fold")):
        values = rows.set_index("epoch")[column]
        colour = SERIES[number % len(SERIES)]
        draw_curve(axes, values, colour=colour, label=str(fold))
        kept = kept_epochs.get(str(fold))
        if kept is not None and kept in values.index:
            axes.plot([kept], [values[kept]], "o", markersize=9, markerfacecolor="none", color=colour)
    axes.legend(frameon=False, fontsize=8)
    return figure


def along_gland_figure(table: pd.DataFrame) -> Figure:
    """Draw mean Dice and its interval from apex to base beside inter-reader Dice; grey areas lie outside the reference."""
    figure, axes = _panel(xlabel="position along the gland", ylabel="Dice of slices", width_inch=5.4)
    inside = table.iloc[1:-1].dropna(subset=["mean"])
    low, high = (inside[end].fillna(inside["mean"]).astype(float) for end in ("ci95_low", "ci95_high"))
    axes.fill_between(inside["position"], low, high, color=SERIES[0], alpha=0.2, linewidth=0)
    axes.plot(inside["position"], inside["mean"], color=SERIES[0], marker="o", markersize=4, label="mean, 95% interval")
    whole = READERS_DICE["dice"]
    for name, start, label in (("dice_apex", 0, "human readers"), ("dice_base", 2 / 3, None)):
        end, dice = start + 1 / 3, READERS_DICE[name]
        axes.fill_between((start, end), dice, whole, color=SERIES[1], alpha=0.3, linewidth=0, label=label)
        axes.text(start + 1 / 6, dice - 0.012, f"{dice:.2f}", ha="center", va="top", fontsize=7.5)
    axes.plot([0, 1], [whole, whole], color=SERIES[1], linewidth=1.2)
    is_curve_above = inside["mean"][inside["position"].between(1 / 3, 2 / 3)].mean() > whole
    y, va = (whole - 0.012, "top") if is_curve_above else (whole + 0.012, "bottom")
    axes.text(0.5, y, f"readers, whole gland {whole:.2f}", ha="center", va=va, fontsize=7.5)
    for start, row in ((-OUTSIDE_WIDTH, table.iloc[0]), (1, table.iloc[-1])):
        axes.axvspan(start, start + OUTSIDE_WIDTH, color="black", alpha=0.06, linewidth=0)
        note = f"outside\nslices: {int(row['num_slices'])}\ncases: {int(row['num_cases'])}"
        axes.text(start + OUTSIDE_WIDTH / 2, 0.03, note, ha="center", va="bottom", fontsize=7.5)
    axes.set_xlim(-OUTSIDE_WIDTH, 1 + OUTSIDE_WIDTH)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xticks([0, 1 / 3, 2 / 3, 1], ["apex", "⅓", "⅔", "base"])
    axes.legend(frameon=False, fontsize=8, loc="lower center")
    return figure


def expected_dice_figure(table: pd.DataFrame) -> Figure:
    """Draw Dice over expected Dice, a point per case, and the lower bound; cases below their bound have another colour."""
    figure, axes = _panel(xlabel="expected Dice", ylabel="Dice")
    rows = table.dropna(subset=["dice_lower_bound"]).sort_values("expected_dice")
    low = max(math.floor(10 * min(rows["dice"].min(), rows["dice_lower_bound"].min())) / 10, 0)
    axes.plot([low, 1], [low, 1], color="black", linewidth=0.6)
    axes.plot(rows["expected_dice"], rows["dice_lower_bound"], color=SERIES[1], linewidth=1.2, label="lower bound")
    is_covered = rows["dice"] >= rows["dice_lower_bound"]
    for members, colour, label in ((is_covered, SERIES[0], "case"), (~is_covered, SERIES[1], "case below its bound")):
        if members.any():
            _draw_points(axes, rows["expected_dice"][members], rows["dice"][members], colour=colour, label=label)
    axes.set(xlim=(max(rows["expected_dice"].min() - 0.02, 0), min(rows["expected_dice"].max() + 0.02, 1)))
    axes.set_ylim(low - 0.01, 1.01)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def risk_coverage_figure(curve: pd.DataFrame) -> Figure:
    """Draw the mean of 1 - Dice over the fraction of cases kept, beside the lowest possible curve."""
    figure, axes = _panel(xlabel="fraction of cases kept, highest expected Dice first", ylabel="mean of 1 - Dice")
    axes.plot(curve["coverage"], curve["risk"], color=SERIES[0], label="ordered by expected Dice")
    axes.plot(curve["coverage"], curve["best_risk"], color=SERIES[2], linestyle="--", label="ordered by Dice")
    axes.axhline(curve["risk"].iloc[-1], color="black", linewidth=0.6)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, None)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def reliability_figure(table: pd.DataFrame) -> Figure:
    """Draw the fraction of gland voxels over their mean probability, before and after temperature scaling."""
    figure, axes = _panel(xlabel="mean probability", ylabel="fraction of voxels in the reference")
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.6)
    for number, (is_scaled, label) in enumerate(((False, "as predicted"), (True, "with temperature"))):
        rows = table[table["is_scaled"] == is_scaled].dropna(subset=["probability"])
        if len(rows):
            style = ("o-", "o--")[number]
            axes.plot(rows["probability"], rows["fraction"], style, color=SERIES[number], markersize=4, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def _panel(*, xlabel: str = "", ylabel: str = "", width_inch: float = PANEL_INCH[0]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width_inch, PANEL_INCH[1]), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return figure, axes


def to_svg(figure: Figure, *, name: str) -> str:
    """Return a figure as an `<svg>` element without fixed size, with ids unique to `name` and the page's font and colours."""
    stream = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'^<svg [^>]*viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg)
    svg = re.sub(r"<style.*?</style>|font-family: [^;\"]+;? ?", "", svg, flags=re.DOTALL)
    for colour, page_colour in PAGE_COLOURS.items():
        svg = svg.replace(colour, page_colour)
    # Ids are unique per page: those without a reference are dropped, the others get a prefix.
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    return re.sub(r'((?:href="|url\()#)', rf"\1{name}-", svg)
