"""One picture of many cases, a slice of each, to see at a glance what a data set is and what is wrong with it.

Slices are [Y, X] in LPS, drawn as in `overlays`: the patient's right on the left.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prostate_seg.common.files import atomic_path
from prostate_seg.imaging.geometry import Volume
from prostate_seg.reporting.overlays import REFERENCE_COLOUR, WINDOW_PERCENTILES, printable

NUM_COLUMNS = 6
"""Panels per row."""

MAX_PANELS = 60
"""Panels on a sheet: more would be too small, or too long, to look at."""

PANEL_INCH = 1.75
"""Width of a panel."""

DOTS_PER_INCH = 110
"""Resolution of the PNG: about 1,150 pixels wide."""

FIELD_MM = 120.0
"""Edge length of the square that is shown; prostate, rectum and pelvic wall lie in it."""

MAX_PIXELS = 200
"""Pixels along an edge that are kept: a panel has no more."""

WARNING_COLOUR, ERROR_COLOUR = "#E69F00", "#D55E00"
"""Orange and vermilion of Okabe and Ito's palette, for frames."""

LEGEND = "blue: the mask; orange frame: look at it; red frame: cannot be used"
"""Second line of the title."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """The slice of a case that has most gland, or its middle one."""

    grey: np.ndarray
    """uint8 [Y, X], 0 black to 255 white: a data set of thousands fits into memory."""
    gland: np.ndarray | None
    """bool [Y, X]; None where there is no usable mask."""
    spacing_mm: tuple[float, float]
    """Height and width of a pixel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One case on the sheet."""

    case_id: str
    caption: Sequence[str]
    """A few short lines below the picture."""
    picture: Picture | None
    """None for an image that cannot be read."""
    is_error: bool
    """Whether the case cannot be used."""
    is_warning: bool


def picture_of(image: Volume, gland: np.ndarray | None) -> Picture:
    """Return the slice that shows most of a case.

    Args:
        image: Finite values.
        gland: bool [Z, Y, X] on the image's grid; None without one, or where it is empty.
    """
    index = len(image.array) // 2 if gland is None else int(gland.sum(axis=(1, 2)).argmax())
    _, spacing_y_mm, spacing_x_mm = image.geometry.spacing_mm
    centre = [size / 2 for size in image.array.shape[1:]] if gland is None else np.argwhere(gland[index]).mean(axis=0)
    rows = _range(centre[0], image.array.shape[1], spacing_mm=spacing_y_mm)
    columns = _range(centre[1], image.array.shape[2], spacing_mm=spacing_x_mm)
    shown = image.array[index, rows, columns].astype(np.float32)
    black, white = np.percentile(shown, WINDOW_PERCENTILES)
    return Picture(
        grey=np.clip((shown - black) / max(white - black, 1e-6) * 255, 0, 255).astype(np.uint8),
        gland=None if gland is None else gland[index, rows, columns],
        spacing_mm=(spacing_y_mm * rows.step, spacing_x_mm * columns.step),
    )


def _range(centre: float, size: int, *, spacing_mm: float) -> slice:
    half = min(FIELD_MM / 2 / spacing_mm, size / 2)
    first = round(min(max(centre - half, 0), size - 2 * half))
    return slice(first, first + max(round(2 * half), 1), max(1, math.ceil(2 * half / MAX_PIXELS)))


def choose_panels(panels: Sequence[Panel]) -> list[Panel]:
    """Return at most a sheet of panels, in their order: those with errors first, then warnings, then an even choice."""
    chosen: list[Panel] = []
    groups = (
        [panel for panel in panels if panel.is_error],
        [panel for panel in panels if panel.is_warning and not panel.is_error],
        [panel for panel in panels if not panel.is_warning and not panel.is_error],
    )
    for group in groups:
        room = MAX_PANELS - len(chosen)
        places = np.linspace(0, len(group) - 1, min(room, len(group))).round().astype(int)
        chosen += [group[place] for place in places]
    ids = {panel.case_id for panel in chosen}
    return [panel for panel in panels if panel.case_id in ids]


def draw_contact_sheet(path: Path, panels: Sequence[Panel], *, title: str) -> None:
    """Write a PNG with a panel per case, in rows.

    Args:
        path: File to write.
        panels: At least one, see `choose_panels`.
        title: Line above.
    """
    num_rows = math.ceil(len(panels) / NUM_COLUMNS)
    size_inch = (PANEL_INCH * NUM_COLUMNS, (PANEL_INCH + 0.45) * num_rows + 0.5)
    figure = Figure(figsize=size_inch, layout="constrained")
    for number, panel in enumerate(panels):
        _draw_panel(figure.add_subplot(num_rows, NUM_COLUMNS, number + 1), panel)
    figure.suptitle(f"{printable(title)}\n{LEGEND}", fontsize=10, parse_math=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DOTS_PER_INCH)


def _draw_panel(ax: Axes, panel: Panel) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    colour = ERROR_COLOUR if panel.is_error else WARNING_COLOUR if panel.is_warning else "black"
    ax.set_title(printable(_short(panel.case_id)), fontsize=7.5, parse_math=False)
    ax.set_xlabel("\n".join(printable(line) for line in panel.caption), fontsize=6.5, parse_math=False)
    for side in ax.spines.values():
        side.set_color(colour)
        side.set_linewidth(2 if panel.is_error or panel.is_warning else 0.5)
    if panel.picture is None:
        ax.set_facecolor("#eeeeee")
        ax.text(0.5, 0.5, "no picture", transform=ax.transAxes, ha="center", va="center", fontsize=8, color="grey")
        ax.set_box_aspect(1)
        return
    height_mm, width_mm = panel.picture.spacing_mm
    ax.imshow(panel.picture.grey, cmap="gray", vmin=0, vmax=255, aspect=height_mm / width_mm)
    if panel.picture.gland is not None and panel.picture.gland.any():
        padded = np.pad(panel.picture.gland.astype(float), 1)
        y, x = (np.arange(-1, size + 1) for size in panel.picture.gland.shape)
        ax.contour(x, y, padded, levels=[0.5], colors=[REFERENCE_COLOUR], linewidths=1.0)
        ax.set_xlim(-0.5, panel.picture.grey.shape[1] - 0.5)
        ax.set_ylim(panel.picture.grey.shape[0] - 0.5, -0.5)


def _short(case_id: str) -> str:
    return case_id if len(case_id) <= 26 else f"{case_id[:12]}…{case_id[-12:]}"
