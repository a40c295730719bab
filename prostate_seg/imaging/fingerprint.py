"""Detection of duplicate studies: a hash of the voxels, and a thumbnail that is compared by correlation.

A thumbnail is the middle of a study on a coarse grid, [Z, Y, X] in LPS, band-passed to structures of a few millimetres, so
that bias fields, noise, intensity scales and pixel sizes hardly change it.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import reduce
from itertools import product

import numpy as np
from scipy import ndimage

from prostate_seg.imaging.geometry import Geometry, Volume

THUMBNAIL_SHAPE = (16, 50, 50)
"""Voxels of a thumbnail."""
THUMBNAIL_SPACING_MM = (3.0, 2.0, 2.0)
"""Their edges: the middle 48 x 100 x 100 mm of a study, which contain the gland."""
BAND_MM = (1.0, 3.0)
"""Standard deviations of the band-pass, a difference of two Gaussians."""
MAX_CONTRAST = 3.0
"""Standard deviations at which a thumbnail is clipped, so that a few bright voxels do not dominate the correlation."""
PACKED_STEP = 18
"""Grey levels of a thumbnail in one of a packed one, which has 15. Its similarity to the original is 0.99, and that of two
series of one visit 0.723 instead of 0.728 (five real studies)."""
MAX_SHIFT_VOX = (2, 4, 4)
"""Shifts that are tried on a pair: 6 mm along z, 8 mm in the plane."""
COARSE = 2
"""Downsampling of the thumbnails on which all pairs are compared first."""
BLOCK, WIDE_BLOCK = 256, 512
"""Studies that are compared at once with other studies, which bounds the memory of the coarse thumbnails."""
COARSE_SIMILARITY = 0.25
"""Least correlation of the coarse thumbnails of a pair that is compared at full resolution, which takes 1.2 ms. Measured: 0.35
or more for real scans shifted by up to 6, 8 and 8 mm, where half a coarse voxel costs most; 0.13 at most for different
patients of five studies, and 0.25 or more for 1 of 120 pairs of phantom patients."""
NEAR_DUPLICATE_SIMILARITY = 0.64
"""Least correlation of near-duplicates.

Measured on 53 studies of several centres (1,378 pairs): 0.34 at most for different patients, 0.73 for two series of one
visit. Copies of two studies that were shifted, cropped or made noisy have 0.66 and more; phantom patients, which share one
formula, 0.36 at most. So the margin is wide towards different patients and thin towards copies. That is intended: a pair found
by mistake stops a run, and PI-CAI alone has 1.1 million pairs. Were their correlations normal about 0, as is assumed for want
of more data, the largest would be 0.51 (4.8 standard deviations, where the largest of 1,378 pairs is 3.2). A copy that was
changed more than those measured can pass; two patients whose images are found are named in fold.not_duplicates."""


def voxels_sha1(volume: Volume) -> str:
    """Return a hash of shape and values that does not depend on file format, compression, axis order or integer type."""
    values = np.ascontiguousarray(volume.array, dtype=np.float32)
    digest = hashlib.sha1(repr(values.shape).encode(), usedforsecurity=False)
    digest.update(values.data)
    return digest.hexdigest()


def thumbnail(image: Volume) -> np.ndarray:
    """Return the thumbnail of a study, int8 of shape `THUMBNAIL_SHAPE`, with the centre of the study."""
    z, y, x = (
        _mean_weights(image.geometry, axis, num_vox=num_vox, edge_mm=edge_mm)
        for axis, (num_vox, edge_mm) in enumerate(zip(THUMBNAIL_SHAPE, THUMBNAIL_SPACING_MM, strict=True))
    )
    array = image.array.astype(np.float32)
    array -= array.mean()  # a small study is padded with its mean: a dark border would correlate with any other
    small = np.tensordot(z, y @ (array @ x.T), axes=1)
    fine, broad = (
        ndimage.gaussian_filter(small, [0.0, *(sd_mm / edge_mm for edge_mm in THUMBNAIL_SPACING_MM[1:])])
        for sd_mm in BAND_MM
    )
    band = fine - broad
    contrast = np.clip(band / max(float(band.std()), 1e-12), -MAX_CONTRAST, MAX_CONTRAST)
    return np.rint(contrast * (127 / MAX_CONTRAST)).astype(np.int8)


def packed_thumbnails(thumbnails: Sequence[np.ndarray]) -> np.ndarray:
    """Return thumbnails in 15 grey levels, two voxels in a byte, uint8 [N, 20000]; 15 kB a study after compression."""
    flat = np.array(thumbnails, dtype=np.float32).reshape(len(thumbnails), -1)
    levels = (np.rint(flat / PACKED_STEP) + 8).astype(np.uint8)
    return levels[:, ::2] << 4 | levels[:, 1::2]


def unpacked_thumbnails(packed: np.ndarray) -> np.ndarray:
    """Return packed thumbnails as int8 [N, *`THUMBNAIL_SHAPE`], in steps of `PACKED_STEP`."""
    levels = np.stack([packed >> 4, packed & 15], axis=-1).astype(np.int16) - 8
    return (levels * PACKED_STEP).clip(-127, 127).astype(np.int8).reshape(-1, *THUMBNAIL_SHAPE)


def similarity(first: np.ndarray, second: np.ndarray) -> float:
    """Return the highest correlation of two thumbnails over small shifts, -1 to 1."""
    spectrum = np.fft.rfftn(_normalised(first)) * np.conj(np.fft.rfftn(_normalised(second)))
    correlation = np.fft.irfftn(spectrum, s=first.shape, axes=(0, 1, 2))
    nearby = np.roll(correlation, MAX_SHIFT_VOX, axis=(0, 1, 2))
    return float(nearby[tuple(slice(2 * shift + 1) for shift in MAX_SHIFT_VOX)].max())


def near_duplicates(
    thumbnails: Mapping[str, np.ndarray], *, new: Collection[str] | None = None
) -> dict[tuple[str, str], float]:
    """Return the pairs of near-duplicates, with their similarity; with `new`, only those pairs that one of these names is in.

    All pairs are compared on coarse thumbnails by matrix products (1,500 studies in 7 s, one with 1,500 others in 0.4 s), and
    similar ones at full resolution.
    """
    first = sorted(thumbnails if new is None else set(new) & set(thumbnails))
    names = [*first, *sorted(set(thumbnails) - set(first))]
    found = {}
    for i, j in _similar_pairs([thumbnails[name] for name in names], num_first=len(first)):
        value = similarity(thumbnails[names[i]], thumbnails[names[j]])
        if value >= NEAR_DUPLICATE_SIMILARITY:
            one, other = sorted((names[i], names[j]))
            found[one, other] = value
    return found


def _mean_weights(geometry: Geometry, axis: int, *, num_vox: int, edge_mm: float) -> np.ndarray:
    """Return the weight of each voxel along an axis in the mean of each thumbnail voxel, float32; 0 beyond the study."""
    edges_mm = geometry.spacing_mm[axis] * (np.arange(geometry.shape_vox[axis] + 1) - geometry.shape_vox[axis] / 2)
    wanted_mm = edge_mm * (np.arange(num_vox + 1) - num_vox / 2)
    shared_mm = np.minimum(wanted_mm[1:, None], edges_mm[1:]) - np.maximum(wanted_mm[:-1, None], edges_mm[:-1])
    return (np.clip(shared_mm, 0, None) / edge_mm).astype(np.float32)


def _similar_pairs(thumbnails: Sequence[np.ndarray], *, num_first: int) -> Iterator[tuple[int, int]]:
    """Yield the pairs i < j, i < num_first, whose coarse thumbnails correlate within the shifts of `similarity`."""
    shifts = list(product(*(range(-most // COARSE, most // COARSE + 1) for most in MAX_SHIFT_VOX)))
    total = len(thumbnails)
    for start, other in ((i, j) for i in range(0, num_first, BLOCK) for j in range(i, total, WIDE_BLOCK)):
        block = _coarse(thumbnails[start : min(start + BLOCK, num_first)])
        wide = _coarse(thumbnails[other : other + WIDE_BLOCK])
        flat = wide.reshape(len(wide), -1).T
        best = np.full((len(block), len(wide)), -1.0, dtype=np.float32)
        for shift in shifts:
            np.maximum(best, np.roll(block, shift, axis=(1, 2, 3)).reshape(len(block), -1) @ flat, out=best)
        i, j = np.nonzero(best >= COARSE_SIMILARITY)
        yield from ((a, b) for a, b in zip((i + start).tolist(), (j + other).tolist(), strict=True) if a < b)


def _coarse(thumbnails: Sequence[np.ndarray]) -> np.ndarray:
    """Return thumbnails downsampled by `COARSE` along each axis and normalised, shape [N, Z, Y, X]."""
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
