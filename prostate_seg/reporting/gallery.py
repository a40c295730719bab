"""Slices of single cases for a page: the picture as a data URI, both contours as SVG paths on top of it.

Arrays are [Z, Y, X] in LPS, drawn as in `overlays`: the patient's right on the left. Contours run along half voxels, so that
they are exact in whole numbers of them, and small.
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
from prostate_seg.reporting.overlays import WINDOW_PERCENTILES, crop_around, slice_indices, slice_label

WEBP_QUALITY = 80
"""No difference to the original is seen at the sizes shown; a quarter smaller than JPEG."""

STRIP_LENGTH = 6
"""Slices shown side by side; the slider has all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """One picture."""

    label: str
    """Index and Dice of the slice."""
    image_uri: str
    """Grey picture as a data URI."""
    reference_path: str
    """Outline as SVG path data, in half voxels; empty without gland."""
    predicted_path: str
    """The same of the prediction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GalleryCase:
    """All slices with gland of one case, and one beyond each end."""

    rank: str
    """Such as worst."""
    case_id: str
    metrics: dict[str, float]
    """The case's row of numbers."""
    shape_vox: tuple[int, int]
    """Height and width of the pictures."""
    spacing_mm: tuple[float, float]
    """Height and width of their pixels."""
    slices: Sequence[Slice] = ()
    """From apex to base; empty when the case cannot be shown."""
    missing: str = ""
    """Why it cannot be shown."""

    @property
    def strip(self) -> list[int]:
        """Positions of the slices that are shown side by side, evenly spaced."""
        return sorted({round(place) for place in np.linspace(0, len(self.slices) - 1, STRIP_LENGTH)})

    @property
    def first_shown(self) -> int:
        """Position of the slice that the slider starts at: the middle."""
        return len(self.slices) // 2


def worst_median_best(cases: pd.DataFrame) -> dict[str, int]:
    """Return the index labels of the cases with the lowest, the middle and the highest Dice; fewer of fewer cases."""
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
    reference: np.ndarray,
    predicted: np.ndarray,
    spacing_mm: Spacing,
) -> GalleryCase:
    """Return the slices of a case around both masks.

    Args:
        rank: Such as worst.
        case_id: The case.
        metrics: The case's numbers.
        image: Grey values, shape [Z, Y, X], LPS.
        reference: Boolean mask on the same grid.
        predicted: Boolean mask on the same grid; may be empty.
        spacing_mm: Voxel edge lengths along Z, Y, X.
    """
    either = reference | predicted
    rows, columns = crop_around(either, spacing_mm=spacing_mm)
    indices = slice_indices(either, num_slices=image.shape[0])
    image, reference, predicted = (volume[:, rows, columns] for volume in (image, reference, predicted))
    black, white = np.percentile(image[indices], WINDOW_PERCENTILES)
    grey = np.clip((image - black) / max(white - black, 1e-6) * 255, 0, 255).astype(np.uint8)
    return GalleryCase(
        rank=rank,
        case_id=case_id,
        metrics=metrics,
        shape_vox=(image.shape[1], image.shape[2]),
        spacing_mm=(spacing_mm[1], spacing_mm[2]),
        slices=[
            Slice(
                label=slice_label(index, reference[index], predicted[index]),
                image_uri=webp_uri(grey[index]),
                reference_path=outline(reference[index]),
                predicted_path=outline(predicted[index]),
            )
            for index in indices
        ],
    )


def missing_case(rank: str, case_id: str, metrics: dict[str, float], *, reason: str) -> GalleryCase:
    """Return a case without pictures."""
    return GalleryCase(
        rank=rank, case_id=case_id, metrics=metrics, shape_vox=(0, 0), spacing_mm=(1.0, 1.0), missing=reason
    )


def webp_uri(grey: np.ndarray) -> str:
    """Return an 8-bit picture [Y, X] as a data URI."""
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, format="WEBP", quality=WEBP_QUALITY, method=6)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def outline(mask: np.ndarray) -> str:
    """Return the outline of a boolean mask [Y, X] as SVG path data.

    One unit is half a voxel; the origin is the outer corner of the first voxel.
    """
    padded = np.pad(mask.astype(float), 1)
    lines = contour_generator(z=padded).lines(0.5)
    return "".join(_path(np.rint(2 * line - 1).astype(int)) for line in lines)  # type: ignore[operator]


def _path(points: np.ndarray) -> str:
    """Return a closed line through points [N, 2] in (x, y), with relative steps; steps in one direction become one."""
    steps = np.diff(points, axis=0)
    starts = np.flatnonzero(np.r_[True, (steps[1:] != steps[:-1]).any(axis=1)])
    merged = np.add.reduceat(steps, starts, axis=0)[:-1]  # z draws the last
    return f"M{points[0][0]} {points[0][1]}l{' '.join(f'{x} {y}' for x, y in merged)}z".replace(" -", "-")
