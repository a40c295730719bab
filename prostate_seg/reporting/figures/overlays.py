"""Axial slices with mask contours: the overlay of one case, and the contact sheet of a data set.

Arrays are [Z, Y, X] in LPS. Drawn with y downwards and x to the right, an axial slice has the patient's right on the left, as
radiologists read it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, cycle

import numpy as np
from matplotlib import font_manager, patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import ndimage

from prostate_seg.imaging.geometry import Spacing, Volume, bounding_box
from prostate_seg.segmentation.metrics import CaseMetrics
from prostate_seg.segmentation.overlap import as_mask_pair, dice

REFERENCE_COLOUR = "#56B4E9"
"""Sky blue of Okabe and Ito's palette, distinct from orange with every common colour vision deficiency."""

PREDICTED_COLOUR = "#E69F00"
"""Orange of Okabe and Ito's palette."""

ZONE_COLOURS = ("#CC79A7", "#009E73", "#F0E442")
"""Purple, green and yellow of the same palette, one per zone and repeated; initials name the zones too."""

SHEET_ZONES = (("purple dashes", "--"), ("green dots", ":"), ("yellow dashes and dots", "-."))
"""Words and line styles of the same zones on a contact sheet, where initials would hide the picture."""

FRAMES = (("black", 0.5), ("#E69F00", 2.0), ("#D55E00", 2.0))
"""Colour and line width of the frames of a contact sheet: black, orange and vermilion of the same palette."""

MARGIN_MM = 20.0
"""Width of the surroundings drawn around both masks: bladder neck, rectum and pelvic wall help to judge a contour."""

WINDOW_PERCENTILES = (1.0, 99.0)
"""Percentiles of the grey values drawn black and white; with the extremes the gland would have no contrast."""

PANEL_INCH, SHEET_PANEL_INCH = 2.9, 1.75
"""Width of a panel of an overlay and of a contact sheet."""

NUM_SLICES = 6
"""Panels of an overlay: six slices are legible at the width of a page."""

NUM_COLUMNS, NUM_SHEET_COLUMNS = 3, 6
"""Panels per row."""

MAX_PANELS = 60
"""Panels of a contact sheet; more would be too small to recognise anything."""

SHEET_FIELD_MM = 120.0
"""Edge length of the square in a panel of a contact sheet; it contains prostate, rectum and pelvic wall."""

SHEET_MAX_PIXELS = 200
"""Pixels kept along an edge: a panel of a contact sheet has no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionMasks:
    """Binary masks of the gland or a zone, on the grid of the image."""

    name: str
    predicted: np.ndarray
    """May be empty."""
    reference: np.ndarray | None = None

    @property
    def initials(self) -> str:
        """PZ for peripheral_zone."""
        return "".join(word[0] for word in self.name.split("_") if word).upper()


# --- overlay of one case -------------------------------------------------------------------------------------------


def overlay_title(case_id: str, metrics: CaseMetrics) -> str:
    """Return the title of a case's overlay: id, Dice, HD95, and whether the gland was missed."""
    title = f"{case_id}    Dice {metrics.dice:.3f}    HD95 {metrics.hd95_mm:.1f} mm"
    return f"{title}    gland missed" if metrics.missed_gland else title


def overlay_figure(image: np.ndarray, regions: Sequence[RegionMasks], *, spacing_mm: Spacing, title: str) -> Figure:
    """Draw axial slices from apex to base with the contours of the predicted mask and, if there is one, of the reference.

    The first region is the gland; the others, its zones, are drawn on the same slices again, below. A gland of fewer than
    `NUM_SLICES` slices has fewer panels; see `slice_indices`.

    Raises:
        ValueError: If the shapes of image [Z, Y, X] and gland differ or a mask of the gland is not binary.
    """
    gland, *zones = regions
    reference, predicted = as_mask_pair(
        gland.predicted if gland.reference is None else gland.reference, gland.predicted
    )
    if image.shape != predicted.shape:
        raise ValueError(f"image and mask must have one shape, got {image.shape} and {predicted.shape}.")
    union = reference | predicted
    indices = slice_indices(union, num_slices=NUM_SLICES)
    rows, columns = crop_around(union, spacing_mm=spacing_mm)
    shown = image[indices][:, rows, columns]
    black, white = np.percentile(shown, WINDOW_PERCENTILES)

    num_rows = math.ceil(len(indices) / NUM_COLUMNS)
    num_columns = math.ceil(len(indices) / num_rows)
    bands = [[gland], zones] if zones else [[gland]]
    height_over_width = (shown.shape[1] * spacing_mm[1]) / (shown.shape[2] * spacing_mm[2])
    row_inch = PANEL_INCH * height_over_width + 0.3  # one line of text below each panel
    size_inch = (PANEL_INCH * max(num_columns, 2), row_inch * num_rows * len(bands) + 0.8)
    figure = Figure(figsize=size_inch, dpi=130, layout="constrained")
    for place, (grey, index) in enumerate(zip(shown, indices, strict=True), start=1):
        for number, band in enumerate(bands):
            below = number * num_rows * num_columns
            ax = figure.add_subplot(num_rows * len(bands), num_columns, below + place, xticks=[], yticks=[])
            ax.imshow(grey, cmap="gray", vmin=black, vmax=white, aspect=spacing_mm[1] / spacing_mm[2])
            _draw_regions(ax, band, np.s_[index, rows, columns], is_gland=number == 0)
    _draw_title_and_sides(figure, title)
    figure.legend(handles=_legend_lines(gland, zones), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draw_title_and_sides(figure: Figure, title: str) -> None:
    """Draw the title, small enough for the width of the figure, and the sides of the patient in the first panel."""
    first = figure.axes[0]  # in LPS the patient's right is on the left, anterior on top
    first.text(0.02, 0.5, "R", transform=first.transAxes, color="white", ha="left", va="center")
    first.text(0.5, 0.98, "A", transform=first.transAxes, color="white", ha="center", va="top")
    title = printable(title)
    fitting_pt = 72 * figure.get_figwidth() / (0.65 * len(title) + 1)  # ids: 64 characters of 0.65 em on average
    figure.suptitle(title, fontsize=min(12, fitting_pt), parse_math=False)


def _draw_regions(ax: Axes, regions: Sequence[RegionMasks], part: tuple[int, slice, slice], *, is_gland: bool) -> None:
    """Draw the contours of regions in a slice, with the Dice of the gland, or the initials of zones at their deepest voxel."""
    ax.set_xlabel(f"z = {part[0]}")
    for region, zone_colour in zip(regions, cycle(ZONE_COLOURS), strict=False):
        predicted, reference = region.predicted[part], None if region.reference is None else region.reference[part]
        colours = (REFERENCE_COLOUR, PREDICTED_COLOUR) if is_gland else (zone_colour, zone_colour)
        if reference is not None:
            _draw_contour(ax, reference, colour=colours[0])
        _draw_contour(ax, predicted, colour=colours[1], style="-" if reference is None else "--")
        if is_gland:
            ax.set_xlabel(slice_label(part[0], reference, predicted))
        elif (place := label_place(predicted, reference)) is not None:
            text = ax.text(*place[::-1], region.initials, color=zone_colour, ha="center", va="center", fontsize=8)
            text.set(fontweight="bold", path_effects=[patheffects.withStroke(linewidth=2, foreground="black")])


def _legend_lines(gland: RegionMasks, zones: Sequence[RegionMasks]) -> list[Line2D]:
    """Return a line with the label of each kind of contour."""
    label, has_reference = "predicted" if gland.predicted.any() else "predicted (empty)", gland.reference is not None
    lines = [Line2D([], [], color=REFERENCE_COLOUR, label="reference")] if has_reference else []
    lines.append(Line2D([], [], color=PREDICTED_COLOUR, linestyle="--" if has_reference else "-", label=label))
    for zone, colour in zip(zones, cycle(ZONE_COLOURS), strict=False):
        lines.append(Line2D([], [], color=colour, label=f"{zone.initials} {zone.name.replace('_', ' ')}"))
    return lines


def label_place(predicted: np.ndarray, reference: np.ndarray | None) -> tuple[int, int] | None:
    """Return the index (y, x) of the voxel that is farthest from the contour of the predicted mask [Y, X], or of the reference.

    It is None if both are empty.
    """
    mask = predicted if reference is None or predicted.any() else reference
    if not mask.any():
        return None
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    y, x = divmod(int(depth.argmax()), mask.shape[1])
    return y, x


def slice_label(index: int, reference: np.ndarray | None, predicted: np.ndarray) -> str:
    """Return the index of a slice and the Dice of its masks [Y, X], if there is a reference."""
    if not predicted.any() and (reference is None or not reference.any()):
        return f"z = {index}   no gland"
    return f"z = {index}" + ("" if reference is None else f"   Dice {dice(reference[None], predicted[None]):.2f}")


def slice_indices(mask: np.ndarray, *, num_slices: int) -> list[int]:
    """Return slice indices evenly spaced from one below to one above the extent of a mask [Z, Y, X], within the volume.

    An empty mask stands for the whole volume. Fewer indices are returned when the extent has fewer slices.
    """
    extent = bounding_box(mask)[0] if mask.any() else slice(0, mask.shape[0])
    first, last = max(extent.start - 1, 0), min(extent.stop, mask.shape[0] - 1)
    return sorted({round(position) for position in np.linspace(first, last, num_slices)})


def crop_around(mask: np.ndarray, *, spacing_mm: Spacing) -> tuple[slice, slice]:
    """Return the ranges along Y and X of a mask [Z, Y, X] with a margin of `MARGIN_MM`; all when the mask is empty."""
    if not mask.any():
        return slice(None), slice(None)
    _, rows, columns = bounding_box(mask)
    margin_y, margin_x = (math.ceil(MARGIN_MM / length_mm) for length_mm in spacing_mm[1:])
    return (
        slice(max(rows.start - margin_y, 0), rows.stop + margin_y),
        slice(max(columns.start - margin_x, 0), columns.stop + margin_x),
    )


def to_uint8(image: np.ndarray, *, shown: np.ndarray) -> np.ndarray:
    """Map grey values to 0 to 255, with black and white at `WINDOW_PERCENTILES` of the values in `shown`."""
    black, white = np.percentile(shown, WINDOW_PERCENTILES)
    return np.clip((image - black) / max(white - black, 1e-6) * 255, 0, 255).astype(np.uint8)


def printable(text: str) -> str:
    """Replace each character that matplotlib's own font has no glyph for by its escape.

    An id in Chinese would otherwise become a row of equal boxes; Latin, Greek, Cyrillic and Arabic letters have glyphs.
    """
    glyphs = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    return "".join(char if ord(char) in glyphs else char.encode("unicode_escape").decode() for char in text)


def _draw_contour(ax: Axes, mask: np.ndarray, *, colour: str, style: str = "-", width: float = 1.6) -> None:
    if not mask.any():
        return
    padded = np.pad(mask.astype(float), 1)  # closes the contour of a mask at the edge of the picture
    y, x = (np.arange(-1, size + 1) for size in mask.shape)
    ax.contour(x, y, padded, levels=[0.5], colors=[colour], linewidths=width, linestyles=[style])
    ax.set_xlim(-0.5, mask.shape[1] - 0.5)
    ax.set_ylim(mask.shape[0] - 0.5, -0.5)


# --- contact sheet -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """The slice of a case with the largest gland area, or its middle slice."""

    grey: np.ndarray
    """uint8 [Y, X], 0 black to 255 white; the pictures of thousands of cases fit into memory."""
    masks: Sequence[np.ndarray]
    """bool [Y, X] of the gland and its zones; empty without a usable mask."""
    spacing_mm: tuple[float, float]
    """Height and width of a pixel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One case of a contact sheet."""

    case_id: str
    caption: Sequence[str]
    """A few short lines below the picture."""
    picture: Picture | None
    """None for an image that cannot be read."""
    severity: int
    """Index of `FRAMES`: 0 without a finding, 1 with a warning, 2 if the case cannot be used."""


def picture_of(image: Volume, masks: Sequence[np.ndarray]) -> Picture:
    """Return the slice that represents a case, cropped to `SHEET_FIELD_MM` around the gland.

    The image has finite values. The masks of gland and zones are bool [Z, Y, X] on its grid; none without a gland.
    """
    index = int(masks[0].sum(axis=(1, 2)).argmax()) if masks else len(image.array) // 2
    shape = image.array.shape[1:]
    centre = np.argwhere(masks[0][index]).mean(axis=0) if masks else [size / 2 for size in shape]
    spacing_mm = image.geometry.spacing_mm[1:]
    ranges = []
    for middle, size, length_mm in zip(centre, shape, spacing_mm, strict=True):
        half = min(SHEET_FIELD_MM / 2 / length_mm, size / 2)
        first = round(min(max(middle - half, 0), size - 2 * half))
        ranges.append(slice(first, first + max(round(2 * half), 1), max(1, math.ceil(2 * half / SHEET_MAX_PIXELS))))
    rows, columns = ranges
    shown = image.array[index, rows, columns].astype(np.float32)
    return Picture(
        grey=to_uint8(shown, shown=shown),
        masks=[mask[index, rows, columns].copy() for mask in masks],  # no view, which would keep the volume
        spacing_mm=(spacing_mm[0] * rows.step, spacing_mm[1] * columns.step),
    )


def choose_panels(panels: Sequence[Panel]) -> list[Panel]:
    """Return at most `MAX_PANELS` panels in their order: errors first, then warnings, then others evenly spaced."""
    chosen: list[int] = []
    for severity in (2, 1, 0):
        members = np.flatnonzero([panel.severity == severity for panel in panels])
        num_panels = min(MAX_PANELS - len(chosen), len(members))
        places = np.linspace(0, len(members) - 1, num_panels).round().astype(int)
        chosen += members[places].tolist()
    return [panels[number] for number in sorted(chosen)]


def contact_sheet_figure(panels: Sequence[Panel], *, title: str, zones: Sequence[str] = ()) -> Figure:
    """Draw one panel per case, row by row; `zones` has the names of those in the pictures."""
    num_rows = math.ceil(len(panels) / NUM_SHEET_COLUMNS)
    size_inch = (SHEET_PANEL_INCH * NUM_SHEET_COLUMNS, (SHEET_PANEL_INCH + 0.45) * num_rows + 0.5)
    figure = Figure(figsize=size_inch, dpi=110, layout="constrained")
    for number, panel in enumerate(panels):
        _draw_panel(figure.add_subplot(num_rows, NUM_SHEET_COLUMNS, number + 1, xticks=[], yticks=[]), panel)
    styles = zip(cycle(SHEET_ZONES), zones, strict=False)
    drawn = "".join(f"; {words}: {zone.replace('_', ' ')}" for (words, _), zone in styles)
    legend = f"blue: mask{drawn}; orange frame: warning; red frame: cannot be used"
    figure.suptitle(f"{printable(title)}\n{legend}", fontsize=10, parse_math=False)
    return figure


def _draw_panel(ax: Axes, panel: Panel) -> None:
    case_id = panel.case_id if len(panel.case_id) <= 26 else f"{panel.case_id[:12]}…{panel.case_id[-12:]}"
    ax.set_title(printable(case_id), fontsize=7.5, parse_math=False)
    ax.set_xlabel("\n".join(printable(line) for line in panel.caption), fontsize=6.5, parse_math=False)
    colour, width = FRAMES[panel.severity]
    ax.spines[:].set(color=colour, linewidth=width)
    picture = panel.picture
    if picture is None:
        ax.set_facecolor("#eeeeee")
        ax.text(0.5, 0.5, "no picture", transform=ax.transAxes, ha="center", va="center", fontsize=8, color="grey")
        ax.set_box_aspect(1)
        return
    ax.imshow(picture.grey, cmap="gray", vmin=0, vmax=255, aspect=picture.spacing_mm[0] / picture.spacing_mm[1])
    zones = ((colour, style) for colour, (_, style) in zip(cycle(ZONE_COLOURS), cycle(SHEET_ZONES), strict=False))
    for mask, (colour, style) in zip(picture.masks, chain([(REFERENCE_COLOUR, "-")], zones), strict=False):
        _draw_contour(ax, mask, colour=colour, style=style, width=1.0)
