"""Slices of single cases for the report page: a grey picture as data URI with both contours as SVG paths above it.

Arrays are [Z, Y, X] in LPS, as in `overlays`. Contours run along half voxels, so that whole numbers describe them exactly.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from contourpy import contour_generator
from PIL import Image

from prostate_seg.imaging.geometry import Spacing
from prostate_seg.reporting.figures.overlays import (
    RegionMasks,
    crop_around,
    label_place,
    slice_indices,
    slice_label,
    to_uint8,
)

WEBP_QUALITY = 80
"""No visible difference at the sizes shown; a quarter smaller than JPEG."""

STRIP_LENGTH = 6
"""Slices shown side by side; the slider has all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contours:
    """Contours of the gland or a zone in a slice."""

    initials: str
    reference: str
    """SVG path data, in half voxels; empty without the region."""
    predicted: str
    place_mm: tuple[float, float] | None
    """Position of the initials along x and y; None where the slice has neither."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GallerySlice:
    """One axial slice."""

    label: str
    """Index and Dice of the slice."""
    image_uri: str
    gland: Contours
    zones: Sequence[Contours]


@dataclass(frozen=True, slots=True, kw_only=True)
class GalleryCase:
    """All slices with gland of one case and one beyond each end, or the reason why there are none."""

    rank: str
    """worst, median or best."""
    case_id: str
    metrics: dict[str, float]
    """Numeric columns of the case's row in cases.csv."""
    slices: Sequence[GallerySlice] = ()
    """From apex to base; empty when the case cannot be shown."""
    shape_vox: tuple[int, int] = (0, 0)
    """Height and width of the slices."""
    spacing_mm: tuple[float, float] = (1.0, 1.0)
    """Height and width of their pixels."""
    missing: str = ""
    """Reason why the case cannot be shown."""

    @property
    def strip(self) -> list[int]:
        """Positions of the slices shown side by side, evenly spaced."""
        return sorted({round(place) for place in np.linspace(0, len(self.slices) - 1, STRIP_LENGTH)})


def worst_median_best(cases: pd.DataFrame) -> dict[str, int]:
    """Return the index labels of the cases with lowest, median and highest Dice; each case once."""
    ordered = cases["dice"].sort_values(kind="stable").index
    chosen: dict[int, str] = {}
    for rank, row in (("worst", ordered[0]), ("median", ordered[len(ordered) // 2]), ("best", ordered[-1])):
        chosen.setdefault(int(row), rank)
    return {rank: row for row, rank in chosen.items()}


def gallery_case(
    rank: str,
    case_id: str,
    metrics: dict[str, float],
    *,
    image: np.ndarray,
    regions: Sequence[RegionMasks],
    spacing_mm: Spacing,
) -> GalleryCase:
    """Return the slices of a case, cropped around the gland, the first region; all masks are bool and have a reference."""
    gland = regions[0]
    assert gland.reference is not None
    union = gland.reference | gland.predicted
    rows, columns = crop_around(union, spacing_mm=spacing_mm)
    indices = slice_indices(union, num_slices=image.shape[0])
    image = image[:, rows, columns]
    grey = to_uint8(image, shown=image[indices])
    slices = []
    for index in indices:
        stream, part = io.BytesIO(), np.s_[index, rows, columns]
        Image.fromarray(grey[index]).save(stream, format="WEBP", quality=WEBP_QUALITY, method=6)
        contours = [_contours(region, part, spacing_mm=spacing_mm) for region in regions]
        slices.append(
            GallerySlice(
                label=slice_label(index, gland.reference[part], gland.predicted[part]),
                image_uri=f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}",
                gland=contours[0],
                zones=contours[1:],
            )
        )
    return GalleryCase(
        rank=rank,
        case_id=case_id,
        metrics=metrics,
        slices=slices,
        shape_vox=(image.shape[1], image.shape[2]),
        spacing_mm=spacing_mm[1:],
    )


def _contours(region: RegionMasks, part: tuple[int, slice, slice], *, spacing_mm: Spacing) -> Contours:
    assert region.reference is not None
    reference, predicted = region.reference[part], region.predicted[part]
    place = label_place(predicted, reference)
    return Contours(
        initials=region.initials,
        reference=svg_contour(reference),
        predicted=svg_contour(predicted),
        place_mm=None if place is None else ((place[1] + 0.5) * spacing_mm[2], (place[0] + 0.5) * spacing_mm[1]),
    )


def svg_contour(mask: np.ndarray) -> str:
    """Return the contour of a boolean mask [Y, X] as SVG path data.

    One unit is half a voxel; the origin is the outer corner of the first voxel.
    """
    paths = []
    for line in contour_generator(z=np.pad(mask.astype(float), 1)).lines(0.5):
        points = np.rint(2 * np.asarray(line) - 1).astype(int)  # [N, 2] in (x, y)
        steps = np.diff(points, axis=0)
        # Consecutive steps in one direction are merged; z draws the last one.
        starts = np.flatnonzero(np.r_[True, (steps[1:] != steps[:-1]).any(axis=1)])
        merged = np.add.reduceat(steps, starts, axis=0)[:-1]
        path = f"M{points[0][0]} {points[0][1]}l{' '.join(f'{x} {y}' for x, y in merged)}z"
        paths.append(path.replace(" -", "-"))
    return "".join(paths)
