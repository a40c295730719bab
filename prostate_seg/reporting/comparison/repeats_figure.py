"""Figure of comparisons between repeated trainings: differences with intervals, Dice of each seed, sources of its variance."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prostate_seg.imaging.settings import WHOLE_GLAND
from prostate_seg.reporting.comparison.figures import (
    BETTER_COLOUR,
    LINE_INCH,
    NUM_MAIN_LINES,
    PANELS,
    UNCLEAR_COLOUR,
    WORSE_COLOUR,
    draw_differences,
)
from prostate_seg.reporting.comparison.repeats import DICE, SOURCES, Repeats, RepeatsComparison
from prostate_seg.reporting.figures.overlays import printable
from prostate_seg.segmentation.variance import NoiseFloor

STYLES = {"a": (UNCLEAR_COLOUR, "o"), "b": (BETTER_COLOUR, "^"), "b - a": (WORSE_COLOUR, "D")}
"""Colour and marker of each side and of the difference."""


def repeats_figure(comparisons: Sequence[RepeatsComparison]) -> Figure:
    """Draw a row of panels per comparison."""
    num_zones = max(len(one.floors) for one in comparisons) - 1
    row_inch = LINE_INCH * (NUM_MAIN_LINES + num_zones) + 2.1
    figure = Figure(figsize=(18, row_inch * len(comparisons)), dpi=110, layout="constrained")
    subfigures = figure.subfigures(len(comparisons), 1, squeeze=False)[:, 0]
    for subfigure, comparison in zip(subfigures, comparisons, strict=True):
        axes = subfigure.subplots(1, len(PANELS) + 2)
        for number, (label, metrics) in enumerate(PANELS.items()):
            text = label.partition(";")[0]
            draw_differences(axes[number], comparison.rows, metrics, label=text, name_subgroups=number == 0)
        _draw_seeds(axes[-2], {"a": comparison.baseline, "b": comparison.other})
        _draw_sources(axes[-1], comparison.floors[WHOLE_GLAND])
        subfigure.suptitle(_title(comparison), parse_math=False, fontsize=11)
    return figure


def _title(comparison: RepeatsComparison) -> str:
    sides = {"a": comparison.baseline, "b": comparison.other}
    names = "      ".join(printable(f"{letter}: {side.name} ({side.seeds_text})") for letter, side in sides.items())
    dice = next(row for row in comparison.rows if row["metric"] == DICE)
    p = dice["p_not_better"]
    if p is None:
        over = "mean of b - a and its 95% interval over patients, for these networks: one seed tells nothing of the setting"
    else:
        over = (
            "mean of b - a and its 95% interval over seeds, folds and patients (number of patients); "
            f"probability that the better one is not better in Dice: {p:.3f}"
        )
    return f"{names}\n{over}"


def _draw_seeds(ax: Axes, sides: dict[str, Repeats]) -> None:
    """Draw the mean Dice of each seed as a point, and their mean as a line."""
    for x, (letter, side) in enumerate(sides.items()):
        means = [float(results.table[DICE].mean()) for results in side.results]
        colour, marker = STYLES[letter]
        offsets = np.linspace(-0.15, 0.15, len(means)) if len(means) > 1 else [0.0]
        ax.plot(x + np.array(offsets), means, marker, color=colour, alpha=0.8)
        ax.hlines(np.mean(means), x - 0.3, x + 0.3, color=colour, linewidth=1.8)
    ax.set_xticks(range(len(sides)), list(sides))
    ax.set_xlim(-0.6, len(sides) - 0.4)
    ax.margins(y=0.2)
    ax.set_title("mean Dice of each seed", fontsize=10)
    ax.grid(axis="y", alpha=0.3)


def _draw_sources(ax: Axes, floor: NoiseFloor) -> None:
    """Draw the standard deviation of each source, of both sides and of the difference."""
    columns = {"a": floor.sd_baseline, "b": floor.sd_other, "b - a": floor.sd_difference}
    for shift, (letter, components) in zip((-0.2, 0.0, 0.2), columns.items(), strict=True):
        colour, marker = STYLES[letter]
        found = {y: getattr(components, name) for y, name in enumerate(SOURCES)}
        known = {y + shift: value for y, value in found.items() if value is not None}
        ax.hlines(list(known), 0, list(known.values()), color=colour, linewidth=1.4)
        ax.plot(list(known.values()), list(known), marker, color=colour, label=letter, clip_on=False)
    ax.set_yticks(range(len(SOURCES)), list(SOURCES))
    ax.set_ylim(len(SOURCES) - 0.5, -0.5)
    ax.set_xlim(left=0)
    ax.set_title("noise floor: SD of Dice", fontsize=10)
    ax.grid(axis="x", alpha=0.3)
    ax.legend(frameon=False, loc="best")
