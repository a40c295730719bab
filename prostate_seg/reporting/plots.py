"""The report's plots as SVG for a page: text stays text, colours are the page's own, so that both of its themes fit.

Figures are drawn in the colours of `PAGE_COLOURS`, which the page's style sheet then decides. One figure holds one panel: a
narrow page sets them below one another instead of shrinking their words.
"""

import io
import math
import re
from collections.abc import Mapping

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prostate_seg.reporting.analysis import READERS_DICE, limits_of_agreement
from prostate_seg.reporting.curves import draw_curve
from prostate_seg.reporting.overlays import PLOTTED_METRICS, draw_metric

SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Okabe and Ito's palette, one a fold; a seventh fold begins again."""

PAGE_COLOURS = {"#000000": "currentColor", **{colour: f"var(--series-{n})" for n, colour in enumerate(SERIES)}}
"""What each drawn colour becomes; the style sheet gives the variables their values."""

SIZE_INCH = (4.4, 3.1)
"""A panel: at the width of a phone its 9 pt text is 10 pixels high."""

BEYOND = 0.17
"""Width on the axis of the place for what was predicted beyond an end of the gland."""


def all_plots(
    cases: pd.DataFrame, tables: Mapping[str, pd.DataFrame], kept_epochs: Mapping[str, int]
) -> dict[str, str]:
    """Return every plot as SVG, by name.

    Args:
        cases: One row per case, as evaluation/cases.csv.
        tables: Those of `analysis.all_tables`.
        kept_epochs: The epoch whose weights were kept, by fold.
    """
    figures = {f"box_{name}": box_figure(cases, name) for name in PLOTTED_METRICS}
    figures["bland_altman"] = bland_altman_figure(tables["bland_altman"])
    figures["dice_along_gland"] = along_gland_figure(tables["dice_along_gland"])
    if not tables["learning_curves"].empty:
        figures["train_loss"] = curves_figure(tables["learning_curves"], "train_loss", kept_epochs)
        figures["val_dice"] = curves_figure(tables["learning_curves"], "val_dice", kept_epochs)
    return {name: svg_of(figure, name=name) for name, figure in figures.items()}


def box_figure(cases: pd.DataFrame, name: str) -> Figure:
    """Draw one metric, a box per fold and a dot per case."""
    figure, axes = _panel(ylabel=PLOTTED_METRICS[name])
    shown = cases.assign(fold=cases["fold"].str.removeprefix("fold"))
    draw_metric(axes, shown, name)
    if name == "dice":  # from the tenth below the worst case, so that boxes near 1 can be told apart
        axes.set_ylim(max(math.floor(10 * cases[name].min() - 0.2) / 10, -0.02), 1.01)
    return figure


def bland_altman_figure(table: pd.DataFrame) -> Figure:
    """Draw the difference of the volumes over their mean, with bias and limits of agreement."""
    figure, axes = _panel(xlabel="mean of both volumes (mL)", ylabel="predicted - reference (mL)")
    axes.plot(
        table["mean_ml"], table["difference_ml"], "o", color=SERIES[0], markersize=4, alpha=0.7, markeredgewidth=0
    )
    axes.axhline(0, color="black", linewidth=0.6)
    bias, low, high = limits_of_agreement(table["difference_ml"])
    lines = ((bias, "-", f"bias {bias:+.1f}"), (low, "--", f"{low:+.1f}"), (high, "--", f"{high:+.1f}"))
    for value, style, text in lines:
        if pd.notna(value):
            axes.axhline(value, color=SERIES[1], linewidth=1.2, linestyle=style)
            axes.annotate(
                text,
                (1, value),
                (-2, 3),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                fontsize=8,
            )
    axes.margins(y=0.15)
    return figure


def curves_figure(table: pd.DataFrame, column: str, kept_epochs: Mapping[str, int]) -> Figure:
    """Draw one curve per fold; on val Dice a ring marks the epoch whose weights were kept."""
    figure, axes = _panel(xlabel="epoch", ylabel={"train_loss": "training loss", "val_dice": "val Dice"}[column])
    for number, (fold, rows) in enumerate(table.dropna(subset=[column]).groupby("fold")):
        values = {int(epoch): float(value) for epoch, value in zip(rows["epoch"], rows[column], strict=True)}
        colour = SERIES[number % len(SERIES)]
        draw_curve(axes, values, colour=colour, label=str(fold))
        kept = kept_epochs.get(str(fold))
        if column == "val_dice" and kept in values:
            axes.plot([kept], [values[kept]], "o", markersize=9, markerfacecolor="none", color=colour)
    axes.legend(frameon=False, fontsize=8)
    return figure


def along_gland_figure(table: pd.DataFrame) -> Figure:
    """Draw mean Dice and its interval from apex to base, between the values of human readers and beside what lies beyond."""
    figure, axes = _panel(xlabel="place along the gland", ylabel="Dice of slices", width=5.4)
    inside = table.iloc[1:-1].dropna(subset=["mean"])
    middle = inside["position"]
    low, high = inside["ci95_low"].fillna(inside["mean"]), inside["ci95_high"].fillna(inside["mean"])
    axes.fill_between(middle, low.astype(float), high.astype(float), color=SERIES[0], alpha=0.2, linewidth=0)
    axes.plot(middle, inside["mean"], color=SERIES[0], marker="o", markersize=4, label="mean, 95% interval")
    _draw_readers(axes)
    for place, row in ((-BEYOND, table.iloc[0]), (1 + BEYOND, table.iloc[-1])):
        axes.axvspan(min(place, 1), max(place, 0), color="black", alpha=0.06, linewidth=0)
        note = f"beyond\nslices: {int(row['num_slices'])}\ncases: {int(row['num_cases'])}"
        axes.text(place / 2 if place < 0 else 1 + BEYOND / 2, 0.03, note, ha="center", va="bottom", fontsize=7.5)
    axes.set_xlim(-BEYOND, 1 + BEYOND)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xticks([0, 1 / 3, 2 / 3, 1], ["apex", "⅓", "⅔", "base"])
    axes.legend(frameon=False, fontsize=8, loc="lower center")
    return figure


def _draw_readers(axes: Axes) -> None:
    """Draw the band between the whole gland's and each end's Dice of human readers."""
    whole = READERS_DICE["dice"]
    for number, (name, place) in enumerate({"dice_apex": (0, 1 / 3), "dice_base": (2 / 3, 1)}.items()):
        label = "human readers" if number == 0 else None
        axes.fill_between(place, READERS_DICE[name], whole, color=SERIES[1], alpha=0.3, linewidth=0, label=label)
        axes.text(
            sum(place) / 2, READERS_DICE[name] - 0.012, f"{READERS_DICE[name]:.2f}", ha="center", va="top", fontsize=7.5
        )
    axes.plot([0, 1], [whole, whole], color=SERIES[1], linewidth=1.2)
    axes.text(0.5, whole - 0.012, f"readers, whole gland {whole:.2f}", ha="center", va="top", fontsize=7.5)


def _panel(*, xlabel: str = "", ylabel: str = "", width: float = SIZE_INCH[0]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, SIZE_INCH[1]), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return figure, axes


def svg_of(figure: Figure, *, name: str) -> str:
    """Return a figure as an `<svg>` element: no fixed size, ids that no other figure has, the page's font and colours."""
    stream = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'^<svg [^>]*viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text)
    text = re.sub(r"<style.*?</style>|font-family: [^;\"]+;? ?", "", text, flags=re.DOTALL)
    for colour, page_colour in PAGE_COLOURS.items():
        text = text.replace(colour, page_colour)
    return _unique_ids(text, prefix=name)


def _unique_ids(svg: str, *, prefix: str) -> str:
    """Drop the ids that nothing refers to, and prefix the others."""
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: f' id="{prefix}-{found[1]}"' if found[1] in used else "", svg)
    return re.sub(r'((?:href="|url\()#)', rf"\1{prefix}-", svg)
