"""Choice of the network's grid from the studies of a data set: `preprocess.spacing_mm=auto`, `preprocess.image_size=auto`.

Also the spacings that nnU-Net and Auto3DSeg derive from the same studies, for comparison. Spacings are (z, y, x) in mm.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prostate_seg.imaging.geometry import Geometry, Shape, Spacing, bounding_box
from prostate_seg.imaging.settings import Crop, PreprocessConfig

FINEST_IN_PLANE_MM = 0.8
"""Lower bound of the in-plane spacing: finer grids cost time and gained no Dice (docs/decisions.md)."""
SPACING_STEP_MM = 0.1
"""Spacings are rounded to multiples of this, so that a few studies more or less seldom change the grid."""
MARGIN_MM = 10.0
"""Minimum distance between a gland and the edge of the window."""
IMAGE_SIZE_STEP = 16
"""The image size is a multiple of the strides of the default networks."""
ANISOTROPY_THRESHOLD = 3.0
"""Ratio of spacings, and of sizes, from which nnU-Net treats an axis as anisotropic."""
RESAMPLED_RATIO_RANGE = (0.5, 1.5)
"""Ratios to the median spacing outside which Auto3DSeg resamples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyExtent:
    """Size of a study and position of its gland."""

    spacing_mm: Spacing
    gland_reach_mm: float
    """Largest in-plane distance, along an image axis, from the image's centre to the gland's bounding box."""
    gland_edge_mm: float
    """Longer in-plane edge of the gland's bounding box."""


def study_extent(gland: np.ndarray, geometry: Geometry) -> StudyExtent:
    """Measure a study by its gland, bool [Z, Y, X] and not empty, on the study's grid."""
    reach_mm, edge_mm = 0.0, 0.0
    for axis, part in list(enumerate(bounding_box(gland)))[1:]:
        middle, spacing_mm = geometry.shape_vox[axis] / 2, geometry.spacing_mm[axis]
        reach_mm = max(reach_mm, abs(part.start - middle) * spacing_mm, abs(part.stop - middle) * spacing_mm)
        edge_mm = max(edge_mm, (part.stop - part.start) * spacing_mm)
    return StudyExtent(spacing_mm=geometry.spacing_mm, gland_reach_mm=reach_mm, gland_edge_mm=edge_mm)


def spacing_in_words(spacing_mm: Spacing | None) -> str:
    """Return a spacing with its unit; None is that of each study."""
    return "own spacing" if spacing_mm is None else f"{' x '.join(f'{mm:.3g}' for mm in spacing_mm)} mm"


def auto_names(config: PreprocessConfig) -> list[str]:
    """Return the settings that are chosen from the data set."""
    return [name for name in ("spacing_mm", "image_size") if getattr(config, name) == "auto"]


def choose_grid(config: PreprocessConfig, studies: Sequence[StudyExtent]) -> dict[str, Any]:
    """Return values for the settings that are auto; at least one study is needed."""
    names = auto_names(config)
    chosen: dict[str, Any] = {}
    if "spacing_mm" in names:
        chosen["spacing_mm"] = auto_spacing_mm(studies)
    if "image_size" in names:
        spacing_mm: Any = chosen.get("spacing_mm", config.spacing_mm)
        chosen["image_size"] = auto_image_size(studies, spacing_mm=spacing_mm, crop=config.crop)
    return chosen


def auto_spacing_mm(studies: Sequence[StudyExtent]) -> Spacing:
    """Return the median slice spacing and the median in-plane spacing, at least `FINEST_IN_PLANE_MM`."""
    slice_mm, *in_plane_mm = median_spacing_mm([one.spacing_mm for one in studies])
    rounded = [round(round(mm / SPACING_STEP_MM) * SPACING_STEP_MM, 6) for mm in (slice_mm, max(in_plane_mm))]
    pixel_mm = max(FINEST_IN_PLANE_MM, rounded[1])
    return rounded[0], pixel_mm, pixel_mm


def auto_image_size(studies: Sequence[StudyExtent], *, spacing_mm: Spacing | None, crop: Crop) -> int:
    """Return the size of the smallest window that contains every gland with a margin, in voxels.

    `spacing_mm` is that of the network's grid; None for the studies' own, of which the finest needs the most voxels.
    """
    half_mm = max(one.gland_reach_mm if crop == "center" else one.gland_edge_mm / 2 for one in studies) + MARGIN_MM
    pixel_mm = min(min(one.spacing_mm[1:]) for one in studies) if spacing_mm is None else spacing_mm[1]
    return IMAGE_SIZE_STEP * max(2, math.ceil(2 * half_mm / pixel_mm / IMAGE_SIZE_STEP))


def median_spacing_mm(spacings_mm: Sequence[Spacing]) -> Spacing:
    """Return the median along each axis."""
    z, y, x = np.median(spacings_mm, axis=0).tolist()
    return z, y, x


def nnunet_spacing_mm(spacings_mm: Sequence[Spacing], *, shapes_vox: Sequence[Shape]) -> Spacing:
    """Return the spacing of nnU-Net's `3d_fullres` and `2d` configurations (Isensee et al. 2021, Nature Methods 18:203).

    It is the median, but the 10th percentile along an axis with over three times the spacing and under a third of the voxels of
    the others.
    """
    spacing_mm, size = np.median(spacings_mm, axis=0), np.median(shapes_vox, axis=0)
    coarse = int(spacing_mm.argmax())
    finer_mm = np.delete(spacing_mm, coarse).max()
    is_anisotropic = spacing_mm[coarse] > ANISOTROPY_THRESHOLD * finer_mm
    if is_anisotropic and size[coarse] * ANISOTROPY_THRESHOLD < np.delete(size, coarse).min():
        spacing_mm[coarse] = max(np.percentile([one[coarse] for one in spacings_mm], 10), finer_mm)
    z, y, x = spacing_mm.tolist()
    return z, y, x


def auto3dseg_spacing_mm(spacings_mm: Sequence[Spacing]) -> Spacing | None:
    """Return the spacing of Auto3DSeg's SegResNet for MRI: the median; None for the studies' own, if all are near it."""
    median_mm = median_spacing_mm(spacings_mm)
    ratios = np.percentile(spacings_mm, (0.5, 99.5), axis=0) / median_mm
    lowest, highest = RESAMPLED_RATIO_RANGE
    return median_mm if ratios[0].min() < lowest or ratios[1].max() > highest else None
