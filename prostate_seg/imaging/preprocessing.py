"""Preprocessing of a study for the network, and the inverse for its probabilities.

Arrays are [Z, Y, X] in LPS; spacings are (z, y, x) in mm. The network's grid is a window of the resampled study: all slices,
a square of every slice, padded where it extends beyond the study. It has the axes of the study's own grid, so that every step
is separable, and only the window is resampled.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
from scipy import ndimage
from scipy.interpolate import BSpline

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import md5_of_text
from prostate_seg.common.settings import parse_group, plain
from prostate_seg.imaging.geometry import Box, Geometry, Shape, Spacing, Volume, bounding_box
from prostate_seg.imaging.quality import whole_gland
from prostate_seg.imaging.regions import Regions, region_bits
from prostate_seg.imaging.settings import WHOLE_GLAND, PreprocessConfig
from prostate_seg.imaging.target_grid import spacing_in_words

SAME_SPACING_TOLERANCE = 1e-5
"""Relative difference up to which two spacings are equal; over 1,000 voxels it shifts by a hundredth of a voxel."""
SPLINE_MARGIN_VOX = 12
"""Source voxels kept around a window; the prefilter of a cubic B-spline decays by 0.27 a voxel, so that 1e-7 of it is lost."""
EDGE_VOX = 1e-6
"""A voxel centre exactly on the edge of a grid counts as outside, as in ITK, whatever the rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessSettings(PreprocessConfig):
    """All settings that decide the input of the network; inference repeats them."""

    spacing_mm: tuple[float, float, float] | None
    image_size: int
    """As numbers, which `target_grid` chose where the config has auto."""
    whole_gland_labels: tuple[int, ...] | None
    """None takes every label above 0."""
    zones: dict[str, tuple[int, ...]]
    """Labels of each zone, by name; empty for the whole gland alone."""

    @classmethod
    def of(cls, config: PreprocessConfig, *, regions: Regions, chosen: Mapping[str, Any]) -> "PreprocessSettings":
        """Return the settings of a config, with the values chosen for those that are auto."""
        zones = {name: labels for name, labels in regions.items() if name != WHOLE_GLAND}
        own = {"whole_gland_labels": regions[WHOLE_GLAND], "zones": zones}
        return parse_group(cls, plain(config) | chosen | own)

    @property
    def regions(self) -> Regions:
        """Labels of each region, the whole gland first and then the zones by name."""
        return {WHOLE_GLAND: self.whole_gland_labels, **{name: self.zones[name] for name in sorted(self.zones)}}

    @property
    def grid(self) -> str:
        """The network's grid in words."""
        return f"{spacing_in_words(self.spacing_mm)}, {self.image_size} x {self.image_size} voxels a slice"

    def as_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return cast(dict[str, Any], plain(self))

    @property
    def digest(self) -> str:
        """The md5 of the settings, the same on every machine."""
        return md5_of_text(repr(sorted(self.as_dict().items())))


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessed:
    """Input of the network for one study."""

    image: Volume
    """Intensities, [Z, image_size, image_size], uint8 or float32."""
    mask: Volume | None
    """Regions as bits (`regions.region_bits`), same grid, uint8, so the whole gland alone 0 or 1; None without a reference."""
    gland_kept_fraction: float
    """Fraction of the reference's voxels that lie in the window; NaN without a reference."""


def preprocess_study(image: Volume, mask: Volume | None, *, settings: PreprocessSettings) -> Preprocessed:
    """Resample and crop a study, and its reference if there is one, to the network's grid.

    The mask has integer labels on the study's grid.

    Raises:
        InputError: If crop "mask" lacks a mask, or the kept region has no intensity range.
    """
    gland = None if mask is None else whole_gland(mask.array, labels=settings.whole_gland_labels)
    resampled = resampled_geometry(image.geometry, spacing_mm=settings.spacing_mm)
    window = _window(resampled, image.geometry, gland, settings=settings)
    inside = _box(axis_index(window, resampled), resampled.shape_vox)
    pixels = _scaled(_resample_image(image, _sub_geometry(window, inside)), settings=settings)
    array = np.full(window.shape_vox, pixels.min(), dtype=pixels.dtype)  # voxels outside the study get its lowest value
    array[inside] = pixels
    preprocessed = Volume(array=array, geometry=window)
    if mask is None or gland is None:
        return Preprocessed(image=preprocessed, mask=None, gland_kept_fraction=float("nan"))

    # The regions by nearest neighbour, and the fraction of the gland's own voxels whose centres lie in the window.
    reference = np.zeros(window.shape_vox, dtype=np.uint8)
    index = axis_index(_sub_geometry(window, inside), image.geometry)
    nearest = [
        np.clip(np.floor(axis + 0.5).astype(int), 0, size - 1) for axis, size in zip(index, gland.shape, strict=True)
    ]
    reference[inside] = region_bits(mask.array[np.ix_(*nearest)], settings.regions)
    kept = gland[_box(axis_index(image.geometry, window), window.shape_vox)]
    return Preprocessed(
        image=preprocessed,
        mask=Volume(array=reference, geometry=window),
        gland_kept_fraction=int(kept.sum()) / max(1, int(gland.sum())),
    )


def resampled_geometry(geometry: Geometry, *, spacing_mm: Spacing | None) -> Geometry:
    """Return the grid of the whole study at another spacing, with the same centre; the grid itself where nothing changes."""
    if spacing_mm is None or np.allclose(spacing_mm, geometry.spacing_mm, rtol=SAME_SPACING_TOLERANCE, atol=0):
        return geometry
    extent_mm = np.array(geometry.shape_vox) * geometry.spacing_mm
    shape = np.maximum(1, np.round(extent_mm / spacing_mm)).astype(int)
    step = np.array(spacing_mm) / geometry.spacing_mm
    first = (np.array(geometry.shape_vox) - 1) / 2 - (shape - 1) / 2 * step
    return replace(geometry.window(first, shape), spacing_mm=spacing_mm)


def restore_probability(probability: np.ndarray, *, window: Geometry, original: Geometry) -> np.ndarray:
    """Resample probabilities from the network's grid to the study's own grid, linearly; float32, 0 outside the window."""
    restored = np.zeros(original.shape_vox, dtype=np.float32)
    box = _box(axis_index(original, window), window.shape_vox)
    if all(part.stop > part.start for part in box):
        restored[box] = interpolate(probability, axis_index(_sub_geometry(original, box), window), order=1)
    return restored


def axis_index(grid: Geometry, other: Geometry) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, for each axis of `grid`, the continuous indices of its voxel centres in `other`, which has the same axes."""
    first = other.to_index(grid.to_world((0.0, 0.0, 0.0)))
    step = np.array(grid.spacing_mm) / np.array(other.spacing_mm)
    z, y, x = (first[axis] + step[axis] * np.arange(grid.shape_vox[axis]) for axis in range(3))
    return z, y, x


def _sub_geometry(geometry: Geometry, box: Box) -> Geometry:
    return geometry.window([part.start for part in box], [part.stop - part.start for part in box])


def interpolate(
    array: np.ndarray, index: Sequence[np.ndarray], *, order: Literal[1, 3], step: Sequence[float] = (1.0, 1.0, 1.0)
) -> np.ndarray:
    """Interpolate between voxels, axis by axis, with an anti-aliasing filter where the result is coarser; float32.

    Args:
        array: Any numeric dtype, [Z, Y, X].
        index: Continuous indices into `array` along z, y and x; the result has their lengths as its shape.
        order: 1 for linear, 3 for the cubic B-spline that passes through the voxels (Unser 1999), mirrored at the ends.
        step: Voxel edge of the result along z, y and x, in voxels of `array`; up to 1 nothing is filtered.
    """
    z, y, x = (
        _weights(axis, size=size, order=order, step=float(width))
        for axis, size, width in zip(index, array.shape, step, strict=True)
    )
    in_plane = y @ (array.astype(np.float32) @ x.T)
    return np.tensordot(z, in_plane, axes=1)


def _weights(index: np.ndarray, *, size: int, order: Literal[1, 3], step: float) -> np.ndarray:
    """Return the weight of each of `size` samples at each continuous index, float32 [len(index), size].

    A source voxel already is a mean over its own width. Variances of boxes add under convolution, so that a box of width
    sqrt(step^2 - 1) makes it the mean over a voxel `step` source voxels wide, and nothing is filtered up to step 1.
    """
    width = math.sqrt(max(0.0, step**2 - 1))
    margin = order + math.ceil(width / 2)
    knots = np.arange(-margin, size + margin)
    spread = _mean_of_b_spline(index[:, None] - knots, width=width, order=order)
    # Beyond the ends the samples are mirrored for the cubic, and repeated for the linear spline.
    extended = np.pad(np.eye(size), ((margin, margin), (0, 0)), mode="reflect" if order == 3 else "edge")
    if order == 3:  # the spline passes through the samples only with these coefficients
        extended = extended @ ndimage.spline_filter1d(np.eye(size), axis=0, mode="mirror")
    weights: np.ndarray = (spread @ extended).astype(np.float32)
    return weights


def _mean_of_b_spline(position: np.ndarray, *, width: float, order: Literal[1, 3]) -> np.ndarray:
    """Return the mean of the central B-spline over an interval around each position; its value for width 0."""
    reach = (order + 1) / 2
    spline = BSpline.basis_element(np.arange(order + 2) - reach)
    if width == 0:
        return np.where(abs(position) < reach, spline(position), 0.0)
    integral = spline.antiderivative()
    above, below = (integral(np.clip(position + sign * width / 2, -reach, reach)) for sign in (1, -1))
    return (above - below) / width


def _window(
    resampled: Geometry, original: Geometry, gland: np.ndarray | None, *, settings: PreprocessSettings
) -> Geometry:
    """Return the grid of the kept square, in whole voxels of `resampled`; it may extend beyond the study."""
    if settings.crop == "center":
        center_vox = (np.array(resampled.shape_vox) - 1) / 2
    elif gland is None:
        raise InputError(
            "preprocess.crop=mask centres on the reference mask, and there is none; use preprocess.crop=center"
        )
    else:
        middle = [(part.start + part.stop - 1) / 2 for part in bounding_box(gland)]
        center_vox = resampled.to_index(original.to_world(middle))
    size = settings.image_size
    start = [0, *(int(np.floor(center - (size - 1) / 2 + 0.5)) for center in center_vox[1:])]
    return resampled.window(start, (resampled.shape_vox[0], size, size))


def _resample_image(image: Volume, target: Geometry) -> np.ndarray:
    """Return float32 intensities on a part of the resampled study.

    They are interpolated by cubic B-spline, filtered along axes that become coarser, or copied where the spacing is equal.
    """
    index = axis_index(target, image.geometry)
    if np.allclose(target.spacing_mm, image.geometry.spacing_mm, rtol=SAME_SPACING_TOLERANCE, atol=0):
        starts = [round(float(axis[0])) for axis in index]
        box = tuple(slice(start, start + len(axis)) for start, axis in zip(starts, index, strict=True))
        return image.array[box].astype(np.float32)
    step = np.array(target.spacing_mm) / np.array(image.geometry.spacing_mm)
    margins = [SPLINE_MARGIN_VOX + math.ceil(width / 2) for width in step]
    box = tuple(
        slice(max(0, int(axis[0]) - margin), min(size, int(axis[-1]) + margin + 2))
        for axis, size, margin in zip(index, image.array.shape, margins, strict=True)
    )
    within = [axis - part.start for axis, part in zip(index, box, strict=True)]
    return interpolate(image.array[box], within, order=3, step=step)


def _scaled(pixels: np.ndarray, *, settings: PreprocessSettings) -> np.ndarray:
    """Map the percentiles to 0 and 255 and round, or keep the intensities."""
    low, high = np.percentile(pixels, settings.intensity_percentiles)
    if not high > low:
        raise InputError(
            f"the kept region has no intensity range: its percentiles {settings.intensity_percentiles} are both {low:g}; "
            "check the image, or change preprocess.image_size"
        )
    if not settings.to_8bit:
        return pixels
    scaled = (np.clip(pixels, low, high) - low) * (255.0 / (high - low))
    return np.rint(scaled).astype(np.uint8)


def _box(index: Sequence[np.ndarray], shape: Shape) -> Box:
    """Return, per axis, the range of entries whose continuous index lies inside the outer edges of `shape`."""
    inside = [(axis > EDGE_VOX - 0.5) & (axis < size - 0.5 - EDGE_VOX) for axis, size in zip(index, shape, strict=True)]
    return tuple(slice(int(np.argmax(axis)), int(np.argmax(axis)) + int(axis.sum())) for axis in inside)
