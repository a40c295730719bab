"""What tells whether two studies are the same picture: a hash of the voxels, and a thumbnail that survives small changes.

A thumbnail is the middle of a study on a coarse grid, [Z, Y, X] in LPS, with only the structures of a few millimetres left:
neither a bias field nor noise, neither another scale of the intensities nor another pixel size changes it much. Nothing here
knows patients or splits.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from itertools import product

import numpy as np
from scipy import ndimage

from prostate_seg.imaging.geometry import Geometry, Volume

THUMBNAIL_SHAPE = (16, 50, 50)
"""Voxels of a thumbnail."""

THUMBNAIL_SPACING_MM = (3.0, 2.0, 2.0)
"""Their edges: the middle 48 x 100 x 100 mm, which hold the gland."""

BAND_MM = (1.0, 3.0)
"""Standard deviations of the two Gaussians whose difference keeps the structures in between."""

MAX_CONTRAST = 3.0
"""Standard deviations at which a thumbnail is clipped, so that a few bright voxels do not decide."""

MAX_SHIFT_VOX = (2, 4, 4)
"""Shifts that are tried on a pair: 6 mm along z, 8 mm in the plane."""

COARSE = 2
"""Voxels along each axis that make one of the copies on which all pairs are compared first."""

BLOCK, WIDE_BLOCK = 256, 512
"""So many studies are compared with so many others at once, and only their coarse copies are in memory."""

COARSE_SIMILARITY = 0.25
"""Least correlation of the coarse copies of a pair that is compared closely; it decides nothing but the time taken, 1.2 ms for
each pair above it. Measured: 0.35 and more for real scans shifted by up to 6, 8 and 8 mm, where half a coarse voxel costs most;
0.13 at most for different patients of five studies, and 0.25 or more for 1 of 120 pairs of phantom patients."""

SAME_PICTURE = 0.64
"""Least correlation of near-identical images.

Measured on 53 studies of several centres (1,378 pairs): 0.34 at most for different patients, 0.73 for two series of one
visit. Copies of two studies that were shifted, cropped or made noisy have 0.66 and more; phantom patients, whom one formula
draws, 0.36 at most. So the margin is wide towards different patients and thin towards copies. That is meant: a pair found by
mistake stops a run, and PI-CAI alone has 1.1 million pairs. Were their correlations normal about 0, as is assumed for want of
more data, the largest would be 0.51 (4.8 standard deviations, where the largest of 1,378 pairs is 3.2). A copy that was
changed more than those measured can pass; two patients whose images are found are named in fold.not_duplicates."""


def voxels_sha1(volume: Volume) -> str:
    """Return a hash of shape and values that does not depend on file format, compression, axis order or integer type."""
    values = np.ascontiguousarray(volume.array, dtype=np.float32)
    digest = hashlib.sha1(repr(values.shape).encode(), usedforsecurity=False)
    digest.update(values.data)
    return digest.hexdigest()


def thumbnail(image: Volume) -> np.ndarray:
    """Return the thumbnail of a study, int8 of shape `THUMBNAIL_SHAPE`; its own centre is that of the study."""
    z, y, x = (
        _mean_weights(image.geometry, axis, num_vox=num_vox, edge_mm=edge_mm)
        for axis, (num_vox, edge_mm) in enumerate(zip(THUMBNAIL_SHAPE, THUMBNAIL_SPACING_MM, strict=True))
    )
    array = image.array.astype(np.float32)
    array -= array.mean()  # what a small study does not reach is its mean: a dark border would make all of them alike
    small = np.tensordot(z, y @ (array @ x.T), axes=1)
    fine, broad = (
        ndimage.gaussian_filter(small, [0.0, *(sd_mm / edge_mm for edge_mm in THUMBNAIL_SPACING_MM[1:])])
        for sd_mm in BAND_MM
    )
    band = fine - broad
    contrast = np.clip(band / max(float(band.std()), 1e-12), -MAX_CONTRAST, MAX_CONTRAST)
    return np.rint(contrast * (127 / MAX_CONTRAST)).astype(np.int8)


def similarity(first: np.ndarray, second: np.ndarray) -> float:
    """Return the highest correlation of two thumbnails over small shifts, -1 to 1."""
    spectrum = np.fft.rfftn(_normalised(first)) * np.conj(np.fft.rfftn(_normalised(second)))
    correlation = np.fft.irfftn(spectrum, s=first.shape, axes=(0, 1, 2))
    nearby = np.roll(correlation, MAX_SHIFT_VOX, axis=(0, 1, 2))
    return float(nearby[tuple(slice(2 * shift + 1) for shift in MAX_SHIFT_VOX)].max())


def same_pictures(thumbnails: Mapping[str, np.ndarray]) -> dict[tuple[str, str], float]:
    """Return the pairs that are nearly one picture, with their similarity.

    All pairs are compared on coarse copies by matrix products (1,500 studies in 7 s), and what is alike there closely.
    """
    names = sorted(thumbnails)
    found = {}
    for i, j in _alike([thumbnails[name] for name in names]):
        value = similarity(thumbnails[names[i]], thumbnails[names[j]])
        if value >= SAME_PICTURE:
            found[names[i], names[j]] = value
    return found


def _mean_weights(geometry: Geometry, axis: int, *, num_vox: int, edge_mm: float) -> np.ndarray:
    """Return the weight of each voxel along an axis in each thumbnail voxel's mean, float32; 0 beyond the study."""
    edges_mm = geometry.spacing_mm[axis] * (np.arange(geometry.shape_vox[axis] + 1) - geometry.shape_vox[axis] / 2)
    wanted_mm = edge_mm * (np.arange(num_vox + 1) - num_vox / 2)
    shared_mm = np.minimum(wanted_mm[1:, None], edges_mm[1:]) - np.maximum(wanted_mm[:-1, None], edges_mm[:-1])
    return (np.clip(shared_mm, 0, None) / edge_mm).astype(np.float32)


def _alike(thumbnails: Sequence[np.ndarray]) -> Iterator[tuple[int, int]]:
    """Yield the pairs i < j whose coarse copies correlate over shifts as large as `similarity` tries."""
    shifts = list(product(*(range(-most // COARSE, most // COARSE + 1) for most in MAX_SHIFT_VOX)))
    total = len(thumbnails)
    for start, other in ((i, j) for i in range(0, total, BLOCK) for j in range(i, total, WIDE_BLOCK)):
        block, wide = _coarse(thumbnails[start : start + BLOCK]), _coarse(thumbnails[other : other + WIDE_BLOCK])
        flat = wide.reshape(len(wide), -1).T
        best = np.full((len(block), len(wide)), -1.0, dtype=np.float32)
        for shift in shifts:
            np.maximum(best, np.roll(block, shift, axis=(1, 2, 3)).reshape(len(block), -1) @ flat, out=best)
        i, j = np.nonzero(best >= COARSE_SIMILARITY)
        yield from ((a, b) for a, b in zip((i + start).tolist(), (j + other).tolist(), strict=True) if a < b)


def _coarse(thumbnails: Sequence[np.ndarray]) -> np.ndarray:
    """Return copies of some thumbnails with `COARSE` voxels along each axis made one, normalised, shape [N, Z, Y, X]."""
    coarse = np.empty((len(thumbnails), *(size // COARSE for size in THUMBNAIL_SHAPE)), dtype=np.float32)
    for number, one in enumerate(thumbnails):
        sums = one.astype(np.int16)
        for axis in range(sums.ndim):  # strided sums: a mean over small axes takes 15 times as long
            before = (slice(None),) * axis
            sums = reduce(np.add, (sums[(*before, slice(first, None, COARSE))] for first in range(COARSE)))
        coarse[number] = _normalised(sums)
    return coarse


def _normalised(values: np.ndarray) -> np.ndarray:
    """Return values with mean 0 and norm 1, float32; zeros for a thumbnail without contrast."""
    centred = values.astype(np.float32) - values.mean(dtype=np.float32)
    return centred / max(float(np.linalg.norm(centred)), 1e-12)
