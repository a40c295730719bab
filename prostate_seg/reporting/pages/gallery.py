"""Slices of single cases for the report page: a grey picture as data URI with both contours as SVG paths above it.

Arrays are [Z, Y, X] in LPS, as in `overlays`. Contours run along half voxels, so that whole numbers describe them exactly.
"""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from contourpy import contour_generator
from PIL import Image

from prostate_seg.imaging.geometry import Spacing
from prostate_seg.reporting.figures import overlays
from prostate_seg.reporting.figures.overlays import RegionMasks

WEBP_QUALITY = 80
"""No visible difference at the sizes shown; a quarter smaller than JPEG."""

STRIP_LENGTH = 6
"""Slices shown side by side; the slider has all."""


def worst_median_best(cases: pd.DataFrame) -> dict[str, int]:
    """Return the index labels of the cases with lowest, median and highest Dice; each case once."""
    ordered = cases["dice"].sort_values(kind="stable").index
    chosen: dict[int, str] = {}
    for rank, row in (("worst", ordered[0]), ("median", ordered[len(ordered) // 2]), ("best", ordered[-1])):
        chosen.setdefault(int(row), rank)
    return {rank: row for row, rank in chosen.items()}


def gallery_case(image: np.ndarray, regions: Sequence[RegionMasks], *, spacing_mm: Spacing) -> dict[str, Any]:
    """Return what the page shows of a case, cropped around the gland, the first region; all masks are bool with a reference.

    Returns:
        slices, from one below the apex to one above the base, each with label, image_uri and the contours of gland and zones;
        strip, the positions of those shown side by side; shape_vox and spacing_mm, height and width of a slice and of a pixel.
    """
    gland = regions[0]
    assert gland.reference is not None
    union = gland.reference | gland.predicted
    rows, columns = overlays.crop_around(union, spacing_mm=spacing_mm)
    indices = overlays.slice_indices(union, num_slices=image.shape[0])
    image = image[:, rows, columns]
    grey = overlays.to_uint8(image, shown=image[indices])
    slices = []
    for index in indices:
        stream, part = io.BytesIO(), np.s_[index, rows, columns]
        Image.fromarray(grey[index]).save(stream, format="WEBP", quality=WEBP_QUALITY, method=6)
        contours = [_contours(region, part, spacing_mm=spacing_mm) for region in regions]
        slices.append(
            {
                "label": overlays.slice_label(index, gland.reference[part], gland.predicted[part]),
                "image_uri": f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}",
                "gland": contours[0],
                "zones": contours[1:],
            }
        )
    strip = sorted({round(place) for place in np.linspace(0, len(slices) - 1, STRIP_LENGTH)})
    return {"slices": slices, "strip": strip, "shape_vox": image.shape[1:], "spacing_mm": spacing_mm[1:]}


def _contours(region: RegionMasks, part: tuple[int, slice, slice], *, spacing_mm: Spacing) -> dict[str, Any]:
    """Return the contours of a region in a slice, and the place of its initials along x and y, if the slice has it."""
    assert region.reference is not None
    reference, predicted = region.reference[part], region.predicted[part]
    place = overlays.label_place(predicted, reference)
    return {
        "initials": region.initials,
        "reference": svg_contour(reference),
        "predicted": svg_contour(predicted),
        "place_mm": None if place is None else ((place[1] + 0.5) * spacing_mm[2], (place[0] + 0.5) * spacing_mm[1]),
    }


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
