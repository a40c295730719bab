"""Figure of comparisons: mean differences with intervals by metric and subgroup, and the Dice difference of each case.

Between repeated trainings the Dice of each seed and the sources of its variance take the place of the cases. One row of panels
per comparison. Colour is never the only cue: markers of clear differences are filled, others are open.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prostate_seg.imaging.settings import WHOLE_GLAND
from prostate_seg.reporting.comparison.lines import SOURCES
from prostate_seg.reporting.comparison.results import ALL, DICE, Comparison, Repeats, Row
from prostate_seg.reporting.evaluation.tables import METRIC_LABELS
from prostate_seg.reporting.figures.overlays import printable
from prostate_seg.segmentation.variance import NoiseFloor

BETTER_COLOUR, WORSE_COLOUR, UNCLEAR_COLOUR = "#0072B2", "#D55E00", "#666666"
"""Blue and vermilion of Okabe and Ito's palette, and grey."""

PANELS = {
    "Dice, IoU; subgroups: Dice": ("dice", "dice_base", "dice_mid", "dice_apex", "iou", "nsd_2mm"),
    "distance (mm); subgroups: HD95": ("hd95_mm", "assd_mm"),
    "volume error (% of reference)": ("abs_volume_difference_percent",),
}
"""Metrics that share an axis, by its label; volume errors in mL are in the table only."""

NUM_MAIN_LINES = max(len(metrics) for metrics in PANELS.values())
"""Lines of a panel above its subgroups."""

STYLES = {"a": (UNCLEAR_COLOUR, "o"), "b": (BETTER_COLOUR, "^"), "b - a": (WORSE_COLOUR, "D")}
"""Colour and marker of each side of repeated trainings and of their difference."""

LABEL_CHARACTERS = 34
LINE_INCH = 0.27


def comparisons_figure(comparisons: Sequence[Comparison]) -> Figure:
    """Draw a row of panels per comparison."""
    num_parts = max(len(_rows_of(one, DICE)[1]) for one in comparisons)
    is_repeated = bool(comparisons[0].floors)
    width_inch, margin_inch, num_own = (18, 2.1, 2) if is_repeated else (16, 1.8, 1)
    row_inch = LINE_INCH * (NUM_MAIN_LINES + num_parts) + margin_inch
    figure = Figure(figsize=(width_inch, row_inch * len(comparisons)), dpi=110, layout="constrained")
    subfigures = figure.subfigures(len(comparisons), 1, squeeze=False)[:, 0]
    for subfigure, comparison in zip(subfigures, comparisons, strict=True):
        axes = subfigure.subplots(1, len(PANELS) + num_own)
        for number, (label, metrics) in enumerate(PANELS.items()):
            text = label.partition(";")[0] if is_repeated else label
            _draw_differences(axes[number], comparison, metrics, label=text, name_parts=number == 0)
        sides = {"a": comparison.baseline, "b": comparison.other}
        if is_repeated:
            _draw_seeds(axes[-2], sides)
            _draw_sources(axes[-1], comparison.floors[WHOLE_GLAND])
        else:
            _draw_cases(axes[-1], comparison)
        names = [f"{key}: {one.name}" + (f" ({one.seeds_text})" if is_repeated else "") for key, one in sides.items()]
        subfigure.suptitle(
            f"{printable('      '.join(names))}\n{_explanation(comparison)}", parse_math=False, fontsize=11
        )
    return figure


def _explanation(comparison: Comparison) -> str:
    """Return what the points and lines of the differences are."""
    start = "mean of b - a and its 95% interval over"
    if not comparison.floors:
        return f"{start} patients (number of patients)"
    (dice,), _ = _rows_of(comparison, DICE)
    if (p := dice["p_not_better"]) is None:
        return f"{start} patients, for these networks: one seed tells nothing of the setting"
    probability = f"probability that the better one is not better in Dice: {p:.3f}"
    return f"{start} seeds, folds and patients (number of patients); {probability}"


def _rows_of(comparison: Comparison, metric: str) -> tuple[list[Row], list[Row]]:
    """Return the row of a metric over all cases, and its rows in the zones, then in the subgroups of the whole gland."""
    main: list[Row] = []
    parts: list[Row] = []
    for row in comparison.full_rows:
        is_gland, is_all = row["region"] == WHOLE_GLAND, row["subgroup"] == ALL
        if row["metric"] == metric and (is_gland or is_all):
            (main if is_gland and is_all else parts).append(row)
    return main, sorted(parts, key=lambda row: row["subgroup"] != ALL)


def _draw_differences(
    ax: Axes, comparison: Comparison, metrics: Sequence[str], *, label: str, name_parts: bool
) -> None:
    """Draw a point and an interval per row: all cases above the dotted line, zones and subgroups below, aligned."""
    main = [row for metric in metrics for row in _rows_of(comparison, metric)[0]]
    parts = _rows_of(comparison, metrics[0])[1]
    labels = {}
    ax.axvline(0, color="black", linewidth=0.8)
    for y, row in enumerate([*main, *parts], start=NUM_MAIN_LINES - len(main)):
        is_main = y < NUM_MAIN_LINES
        low, difference, high = row["ci95_low"], row["difference"], row["ci95_high"]
        # Grey unless the interval excludes 0 and there is a p: enough patients for a test, or repeats on both sides.
        colour = UNCLEAR_COLOUR
        if low is not None:
            if row.get("p_wilcoxon", row.get("p_not_better")) is not None and not low <= 0 <= high:
                colour = BETTER_COLOUR if (high < 0) == (row["better"] == "lower") else WORSE_COLOUR
            ax.plot([low, high], [y, y], color=colour, linewidth=1.8)
        if difference is not None:
            face = "white" if colour == UNCLEAR_COLOUR else colour
            ax.plot(difference, y, "o", color=colour, markerfacecolor=face, markersize=6)
        if is_main or name_parts:
            part = row["region"] if row["subgroup"] == ALL else f"{row['subgroup']}: {row['group']}"
            name = _metric_label(row["metric"]) if is_main else printable(part)
            name = name if len(name) <= LABEL_CHARACTERS else name[: LABEL_CHARACTERS - 3] + "..."
            labels[y] = f"{name} ({row['num_patients']})"
    ax.set_yticks(list(labels), list(labels.values()), parse_math=False)
    ax.set_ylim(NUM_MAIN_LINES + len(parts) - 0.4, -0.6)
    ax.axhline(NUM_MAIN_LINES - 0.5, color="black", linewidth=0.8, linestyle=":")
    ax.margins(x=0.1)
    ax.set_xlabel(f"{label}\n{'← b better' if main[0]['better'] == 'lower' else 'b better →'}")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="x", alpha=0.3)


def _metric_label(metric: str) -> str:
    """Return the label of a metric without its unit, which the axis has."""
    return "volume error" if metric.startswith("abs_") else METRIC_LABELS[metric][0].partition(" (")[0]


def _draw_cases(ax: Axes, comparison: Comparison) -> None:
    """Draw the Dice difference of each case over its Dice in the baseline."""
    a, b = comparison.baseline.table["dice"], comparison.other.table["dice"]
    change = b - a
    for selected, colour, marker, label in (
        (change > 0, BETTER_COLOUR, "^", "better in b"),
        (change < 0, WORSE_COLOUR, "v", "better in a"),
        (change == 0, UNCLEAR_COLOUR, "o", "equal"),
    ):
        if selected.any():
            ax.plot(a[selected], change[selected], marker, color=colour, alpha=0.7, label=f"{selected.sum()} {label}")
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set(xlabel="Dice of a case in a", title="Dice of a case, b - a")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, loc="best")


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
