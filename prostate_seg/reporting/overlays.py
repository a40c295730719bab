"""Pictures of masks on their images, and plots of per-case metrics, as PNG files.

Arrays are [Z, Y, X] in LPS: drawn with y downwards and x to the right, an axial slice shows the patient's right on the left,
as radiologists read it. Figures are built from matplotlib's objects and never through pyplot, whose state is shared between
threads. No metric is defined here.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from prostate_seg.common.files import atomic_path
from prostate_seg.imaging.geometry import Spacing, bounding_box
from prostate_seg.segmentation.metrics import CaseMetrics, as_mask_pair, dice

REFERENCE_COLOUR = "#56B4E9"
"""Sky blue of Okabe and Ito's palette, told apart from orange with every common colour vision deficiency."""

PREDICTED_COLOUR = "#E69F00"
"""Orange of Okabe and Ito's palette."""

MARGIN_MM = 20.0
"""Width of the surroundings drawn around both masks: bladder neck, rectum and pelvic wall help to judge a contour."""

WINDOW_PERCENTILES = (1.0, 99.0)
"""Grey values that are drawn black and white; the extremes would leave the gland flat."""

MAX_NUM_COLUMNS = 3
"""Most panels per row, so that six slices stay legible at the width of a page."""

PANEL_WIDTH_INCH = 2.9
"""Width of one panel."""

DOTS_PER_INCH = 130
"""Resolution of the PNG: a page-wide figure of about 1,100 pixels."""

TITLE_SIZE_PT = 12.0
"""Size of the title, unless it is too long for that."""

TITLE_CHARACTER_EM = 0.65
"""Width of an average character of matplotlib's font, digits and capitals included, in units of the font's size."""

PLOTTED_METRICS = {
    "dice": "Dice",
    "hd95_mm": "HD95 (mm)",
    "volume_difference_percent": "volume difference (%)",
}
"""Columns of the case table that are plotted, with their axis labels."""

HD95_TICKS_MM = (0, 2, 5, 10, 20, 50, 100, 200, 500)
"""Ticks of the HD95 axis, which is linear to 10 mm and logarithmic above: a missed gland is 20 times a good case."""

HD95_LINEAR_MM = 10.0
"""End of the linear part of the HD95 axis."""

JITTER_WIDTH = 0.12
"""Half width over which the points of a fold are spread, in units of the distance between folds."""


def overlay_title(case_id: str, metrics: CaseMetrics) -> str:
    """Return the title of a case's overlay: its id, Dice and HD95, and whether the gland was missed."""
    title = f"{case_id}    Dice {metrics.dice:.3f}    HD95 {metrics.hd95_mm:.1f} mm"
    return f"{title}    gland missed" if metrics.missed_gland else title


def draw_overlay(
    path: Path,
    *,
    image: np.ndarray,
    reference: np.ndarray,
    predicted: np.ndarray,
    spacing_mm: Spacing,
    title: str,
    num_slices: int = 6,
) -> None:
    """Write a PNG of axial slices with the contours of both masks.

    Args:
        path: File to write.
        image: Grey values, shape [Z, Y, X], LPS.
        reference: Binary mask on the same grid.
        predicted: Binary mask on the same grid; may be empty.
        spacing_mm: Voxel edge lengths along Z, Y, X.
        title: Line above the panels, see `overlay_title`; characters without a glyph are written as escapes.
        num_slices: Number of slices, evenly spaced from apex to base; fewer when the gland spans fewer.

    Raises:
        ValueError: If the shapes differ, a mask is not binary, or `num_slices` is below 1.
    """
    reference, predicted = as_mask_pair(reference, predicted)
    if image.shape != reference.shape:
        raise ValueError(f"image and masks must have one shape, got {image.shape} and {reference.shape}.")
    figure = overlay_figure(image, reference, predicted, spacing_mm=spacing_mm, title=title, num_slices=num_slices)
    _save(figure, path)


def draw_prediction(
    path: Path, *, image: np.ndarray, predicted: np.ndarray, spacing_mm: Spacing, title: str, num_slices: int = 6
) -> None:
    """Write a PNG of axial slices with the contour of a mask that has no reference.

    Args:
        path: File to write.
        image: Grey values, shape [Z, Y, X], LPS.
        predicted: Binary mask on the same grid; may be empty.
        spacing_mm: Voxel edge lengths along Z, Y, X.
        title: Line above the panels.
        num_slices: As in `draw_overlay`.

    Raises:
        ValueError: If the shapes differ, the mask is not binary, or `num_slices` is below 1.
    """
    if image.shape != predicted.shape:
        raise ValueError(f"image and mask must have one shape, got {image.shape} and {predicted.shape}.")
    predicted, _ = as_mask_pair(predicted, predicted)
    figure = overlay_figure(image, None, predicted, spacing_mm=spacing_mm, title=title, num_slices=num_slices)
    _save(figure, path)


def overlay_figure(
    image: np.ndarray,
    reference: np.ndarray | None,
    predicted: np.ndarray,
    *,
    spacing_mm: Spacing,
    title: str,
    num_slices: int,
) -> Figure:
    """Return the figure that `draw_overlay` and `draw_prediction` write; masks are boolean."""
    either = predicted if reference is None else reference | predicted
    indices = slice_indices(either, num_slices=num_slices)
    rows, columns = crop_around(either, spacing_mm=spacing_mm)
    shown = image[indices][:, rows, columns]
    figure, axes = _panels(len(indices), height_over_width=_height_over_width(shown, spacing_mm=spacing_mm))
    black, white = np.percentile(shown, WINDOW_PERCENTILES)
    for ax, picture, index in zip(axes, shown, indices, strict=True):
        ax.imshow(picture, cmap="gray", vmin=black, vmax=white, aspect=spacing_mm[1] / spacing_mm[2])
        found = predicted[index, rows, columns]
        if reference is None:
            ax.set_xlabel(f"z = {index}" if found.any() else f"z = {index}   no gland")
        else:
            true = reference[index, rows, columns]
            _draw_contour(ax, true, colour=REFERENCE_COLOUR, style="-")
            ax.set_xlabel(slice_label(index, true, found))
        _draw_contour(ax, found, colour=PREDICTED_COLOUR, style="-" if reference is None else "--")
    _mark_sides(axes[0])
    _add_title(figure, printable(title))
    _add_legend(figure, has_reference=reference is not None, is_predicted_empty=not predicted.any())
    return figure


def slice_label(index: int, reference: np.ndarray, predicted: np.ndarray) -> str:
    """Return the index of a slice and the Dice of its masks [Y, X]."""
    if not reference.any() and not predicted.any():
        return f"z = {index}   no gland"
    return f"z = {index}   Dice {dice(reference[None], predicted[None]):.2f}"


def slice_indices(mask: np.ndarray, *, num_slices: int) -> list[int]:
    """Return slice indices evenly spaced from one below to one above the mask's extent, within the volume.

    Args:
        mask: Boolean mask [Z, Y, X]; when it is empty, the whole volume is spanned.
        num_slices: Number of indices, at least 1; fewer are returned when the extent has fewer slices.

    Returns:
        Increasing indices without repeats; the middle slice alone when `num_slices` is 1.

    Raises:
        ValueError: If `num_slices` is below 1.
    """
    if num_slices < 1:
        raise ValueError(f"num_slices must be at least 1, got {num_slices}.")
    extent = bounding_box(mask)[0] if mask.any() else slice(0, mask.shape[0])
    first, last = max(extent.start - 1, 0), min(extent.stop, mask.shape[0] - 1)
    if num_slices == 1:
        return [(first + last) // 2]
    return sorted({round(position) for position in np.linspace(first, last, num_slices)})


def crop_around(mask: np.ndarray, *, spacing_mm: Spacing) -> tuple[slice, slice]:
    """Return the ranges along Y and X of a mask [Z, Y, X] and `MARGIN_MM` around it; all when the mask is empty."""
    if not mask.any():
        return slice(None), slice(None)
    _, rows, columns = bounding_box(mask)
    return _widened(rows, spacing_mm=spacing_mm[1]), _widened(columns, spacing_mm=spacing_mm[2])


def _widened(extent: slice, *, spacing_mm: float) -> slice:
    margin_vox = math.ceil(MARGIN_MM / spacing_mm)
    return slice(max(extent.start - margin_vox, 0), extent.stop + margin_vox)


def printable(text: str) -> str:
    """Return the text with every character that matplotlib's own font cannot draw written as its escape.

    An id in Chinese would otherwise become a row of equal boxes; Latin, Greek, Cyrillic and Arabic letters are drawn.
    """
    glyphs = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    return "".join(char if ord(char) in glyphs else char.encode("unicode_escape").decode() for char in text)


def _height_over_width(image: np.ndarray, *, spacing_mm: Spacing) -> float:
    return (image.shape[1] * spacing_mm[1]) / (image.shape[2] * spacing_mm[2])


def _panels(num_panels: int, *, height_over_width: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with `num_panels` axes without ticks, row by row."""
    num_rows = math.ceil(num_panels / MAX_NUM_COLUMNS)
    num_columns = math.ceil(num_panels / num_rows)
    panel_height_inch = PANEL_WIDTH_INCH * height_over_width + 0.3  # one line of text below each panel
    size_inch = (PANEL_WIDTH_INCH * max(num_columns, 2), panel_height_inch * num_rows + 0.8)
    figure = Figure(figsize=size_inch, layout="constrained")
    axes = [figure.add_subplot(num_rows, num_columns, number + 1) for number in range(num_panels)]
    for ax in axes:
        ax.set_xticks([])
        ax.set_yticks([])
    return figure, axes


def _draw_contour(ax: Axes, mask: np.ndarray, *, colour: str, style: str) -> None:
    if not mask.any():
        return
    padded = np.pad(mask.astype(float), 1)  # so that a mask at the edge of the picture has a closed contour
    y, x = (np.arange(-1, size + 1) for size in mask.shape)
    ax.contour(x, y, padded, levels=[0.5], colors=[colour], linewidths=1.6, linestyles=[style])
    ax.set_xlim(-0.5, mask.shape[1] - 0.5)
    ax.set_ylim(mask.shape[0] - 0.5, -0.5)


def _mark_sides(ax: Axes) -> None:
    """Mark the patient's right and anterior, which LPS arrays have at the left and at the top."""
    ax.text(0.02, 0.5, "R", transform=ax.transAxes, color="white", ha="left", va="center")
    ax.text(0.5, 0.98, "A", transform=ax.transAxes, color="white", ha="center", va="top")


def _add_title(figure: Figure, text: str) -> None:
    """Write the title in a size at which all of it fits the figure's width; ids can be 64 characters long."""
    fitting = 72 * figure.get_figwidth() / (TITLE_CHARACTER_EM * len(text) + 1)
    figure.suptitle(text, fontsize=min(TITLE_SIZE_PT, fitting), parse_math=False)


def _add_legend(figure: Figure, *, has_reference: bool, is_predicted_empty: bool) -> None:
    label = "predicted (empty)" if is_predicted_empty else "predicted"
    handles = [
        Line2D([], [], color=PREDICTED_COLOUR, linestyle="--" if has_reference else "-", linewidth=2, label=label)
    ]
    if has_reference:
        handles.insert(0, Line2D([], [], color=REFERENCE_COLOUR, linestyle="-", linewidth=2, label="reference"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)


def draw_case_metrics(path: Path, table: pd.DataFrame) -> None:
    """Write a PNG with a box and all cases per fold, one panel each for Dice, HD95 and volume difference.

    Args:
        path: File to write.
        table: One row per case with the columns `fold` and those of `PLOTTED_METRICS`; NaN values are left out.

    Raises:
        ValueError: If a column is missing or the table has no row.
    """
    _save(case_metrics_figure(table), path)


def case_metrics_figure(table: pd.DataFrame) -> Figure:
    """Return the figure that `draw_case_metrics` writes."""
    missing = [name for name in ("fold", *PLOTTED_METRICS) if name not in table.columns]
    if missing:
        raise ValueError(f"the case table needs the columns {', '.join(missing)}; it has {', '.join(table.columns)}.")
    if table.empty:
        raise ValueError("the case table has no row, so there is nothing to plot.")
    num_folds = table["fold"].nunique()
    figure = Figure(figsize=(max(9.0, 0.75 * num_folds * len(PLOTTED_METRICS)), 3.6), layout="constrained")
    for number, (name, label) in enumerate(PLOTTED_METRICS.items()):
        ax = figure.add_subplot(1, len(PLOTTED_METRICS), number + 1)
        draw_metric(ax, table, name)
        ax.set_title(label, fontsize=11)
    return figure


def draw_metric(ax: Axes, table: pd.DataFrame, name: str) -> None:
    """Draw a box and all cases per fold of one of `PLOTTED_METRICS`."""
    folds = sorted(table["fold"].unique().tolist())
    groups = [table.loc[table["fold"] == fold, name].dropna().to_numpy(dtype=float) for fold in folds]
    _draw_groups(ax, groups, labels=[f"{fold}\nn={len(group)}" for fold, group in zip(folds, groups, strict=True)])
    ax.set_xlabel("fold")
    _scale_axis(ax, name)


def _draw_groups(ax: Axes, groups: Sequence[np.ndarray], *, labels: Sequence[str]) -> None:
    """Draw a box without outlier marks and every value of each group, spread sideways in the order of the cases."""
    ax.boxplot(
        groups,
        positions=range(len(groups)),
        widths=0.5,
        showfliers=False,
        medianprops={"color": "black", "linewidth": 1.8},
    )
    for position, group in enumerate(groups):
        sideways = position + JITTER_WIDTH * np.sin(2.4 * np.arange(len(group)))  # the same picture for the same table
        ax.plot(sideways, group, "o", markersize=4, alpha=0.7, color="#0072B2", markeredgewidth=0)
    ax.set_xticks(range(len(groups)), labels)
    ax.grid(axis="y", alpha=0.3)


def _scale_axis(ax: Axes, name: str) -> None:
    if name == "dice":
        ax.set_ylim(-0.02, 1.02)
    elif name == "hd95_mm":
        ax.set_yscale("symlog", linthresh=HD95_LINEAR_MM)
        top_mm = max(ax.get_ylim()[1], 2 * HD95_LINEAR_MM)
        ax.set_yticks(HD95_TICKS_MM, [str(tick) for tick in HD95_TICKS_MM])
        ax.set_ylim(-0.3, top_mm)
    else:
        ax.axhline(0.0, color="black", linewidth=0.8)


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DOTS_PER_INCH)
