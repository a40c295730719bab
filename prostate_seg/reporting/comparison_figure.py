"""A picture of comparisons: mean differences with their intervals, by metric and subgroup, and Dice case by case.

One row of panels per comparison. Colour never tells alone: what differs clearly is filled, the rest is open. Figures are
built from matplotlib's objects, as in `overlays`.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prostate_seg.common.files import atomic_path
from prostate_seg.reporting.comparison import ALL, Comparison, Row
from prostate_seg.reporting.overlays import printable

BETTER_COLOUR, WORSE_COLOUR, UNCLEAR_COLOUR = "#0072B2", "#D55E00", "#666666"
"""Blue and vermillion of Okabe and Ito's palette, and grey."""

PANELS = {
    "Dice, IoU; subgroups: Dice": ("dice", "dice_base", "dice_mid", "dice_apex", "iou", "nsd_2mm"),
    "distance (mm); subgroups: HD95": ("hd95_mm", "assd_mm"),
    "volume error (% of reference)": ("abs_volume_difference_percent",),
}
"""Metrics that share an axis, by its label; volumes in mL say the same as in percent and are left to the table."""

SHOWN = {
    "dice": "Dice",
    "dice_base": "Dice, base",
    "dice_mid": "Dice, mid-gland",
    "dice_apex": "Dice, apex",
    "iou": "IoU",
    "nsd_2mm": "NSD at 2 mm",
    "hd95_mm": "HD95",
    "assd_mm": "ASSD",
    "abs_volume_difference_percent": "volume error",
}
"""Metrics as they are called on paper."""

NUM_MAIN_LINES = max(len(metrics) for metrics in PANELS.values())
"""Lines of a panel above its subgroups."""

LONGEST_LABEL = 34
"""Characters of a line's label."""

ROW_INCH = 0.27
"""Height of a line of a panel."""

DOTS_PER_INCH = 110
"""Resolution of the PNG."""


def draw_comparisons(path: Path, comparisons: Sequence[Comparison]) -> None:
    """Write a PNG with a row of panels per comparison."""
    with atomic_path(path) as temporary:
        comparisons_figure(comparisons).savefig(temporary, dpi=DOTS_PER_INCH)


def comparisons_figure(comparisons: Sequence[Comparison]) -> Figure:
    """Return the figure that `draw_comparisons` writes."""
    num_lines = max(len(_rows_of(one, "dice", subgroups=True)) for one in comparisons) + NUM_MAIN_LINES
    figure = Figure(figsize=(16, (ROW_INCH * num_lines + 1.8) * len(comparisons)), layout="constrained")
    parts = figure.subfigures(len(comparisons), 1, squeeze=False)[:, 0]
    for part, comparison in zip(parts, comparisons, strict=True):
        axes = part.subplots(1, len(PANELS) + 1)
        for number, (label, metrics) in enumerate(PANELS.items()):
            _draw_panel(axes[number], comparison, metrics, label=label, name_subgroups=number == 0)
        _draw_cases(axes[-1], comparison)
        part.suptitle(_title(comparison), parse_math=False, fontsize=11)
    return figure


def _title(comparison: Comparison) -> str:
    names = f"a: {comparison.baseline.name}      b: {comparison.other.name}"
    return f"{printable(names)}\nmean of b - a and its 95% interval over patients (number of patients)"


def _rows_of(comparison: Comparison, metric: str, *, subgroups: bool) -> list[Row]:
    """Return the row of a metric over all cases, or those over the subgroups."""
    return [row for row in comparison.rows if row.metric == metric and (row.subgroup != ALL) == subgroups]


def _draw_panel(ax: Axes, comparison: Comparison, metrics: Sequence[str], *, label: str, name_subgroups: bool) -> None:
    """Draw all cases above the dotted line and the subgroups below, on the same lines in every panel."""
    main = [row for metric in metrics for row in _rows_of(comparison, metric, subgroups=False)]
    parts = _rows_of(comparison, metrics[0], subgroups=True)
    rows = dict(enumerate([*main, *parts], start=NUM_MAIN_LINES - len(main)))
    ax.axvline(0, color="black", linewidth=0.8)
    for y, row in rows.items():
        _draw_difference(ax, y, row)
    named = {y: _label(row) for y, row in rows.items() if row.subgroup == ALL or name_subgroups}
    ax.set_yticks(list(named), list(named.values()), parse_math=False)
    ax.set_ylim(NUM_MAIN_LINES + len(parts) - 0.4, -0.6)
    ax.axhline(NUM_MAIN_LINES - 0.5, color="black", linewidth=0.8, linestyle=":")
    ax.margins(x=0.1)
    ax.set_xlabel(f"{label}\n{'← b better' if main[0].lower_is_better else 'b better →'}")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="x", alpha=0.3)


def _draw_difference(ax: Axes, y: int, row: Row) -> None:
    """Draw a point and its interval; a row without a value keeps its line."""
    low, difference, high = row.paired.ci95_low, row.paired.difference, row.paired.ci95_high
    colour = _colour(row)
    if low is not None and high is not None:
        ax.plot([low, high], [y, y], color=colour, linewidth=1.8)
    if difference is not None:
        face = "white" if colour == UNCLEAR_COLOUR else colour
        ax.plot(difference, y, "o", color=colour, markerfacecolor=face, markersize=6)


def _label(row: Row) -> str:
    name = SHOWN[row.metric] if row.subgroup == ALL else printable(f"{row.subgroup}: {row.group}")
    return f"{name if len(name) <= LONGEST_LABEL else name[: LONGEST_LABEL - 3] + '...'} ({row.paired.num_patients})"


def _colour(row: Row) -> str:
    """Return grey unless the interval lies on one side of 0, of patients that are enough for a test."""
    low, high = row.paired.ci95_low, row.paired.ci95_high
    if row.paired.p_wilcoxon is None or low is None or high is None or low <= 0 <= high:
        return UNCLEAR_COLOUR
    return BETTER_COLOUR if (high < 0) == row.lower_is_better else WORSE_COLOUR


def _draw_cases(ax: Axes, comparison: Comparison) -> None:
    """Draw the difference in Dice of each case over its Dice in the baseline."""
    a, b = comparison.baseline.table["dice"], comparison.other.table["dice"]
    change = b - a
    for is_kind, colour, marker, label in (
        (change > 0, BETTER_COLOUR, "^", "better in b"),
        (change < 0, WORSE_COLOUR, "v", "better in a"),
        (change == 0, UNCLEAR_COLOUR, "o", "equal"),
    ):
        if is_kind.any():
            ax.plot(a[is_kind], change[is_kind], marker, color=colour, alpha=0.7, label=f"{is_kind.sum()} {label}")
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set(xlabel="Dice of a case in a", title="Dice of a case, b - a")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, loc="best")
