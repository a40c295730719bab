"""Metrics of one case: a predicted mask against its reference.

Masks are binary, indexed [Z, Y, X]; z increases from the apex (inferior) to the base (superior), the LPS order of
`imaging.geometry`. Distances are in mm, areas in mm2, volumes in mL. A missed gland has finite, bad values, so that no mean
silently excludes it. Overlap is in `overlap`, statistics over cases in `statistics`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from scipy.spatial import cKDTree

from prostate_seg.imaging.geometry import Spacing, bounding_box
from prostate_seg.segmentation.overlap import SliceCounts, as_mask_pair, slice_counts

SURFACE_TOLERANCE_MM = 2.0
"""Tolerance of NSD: four voxels in-plane, less than one 3 mm slice."""
HD_PERCENTILE = 95.0
"""Percentile of the directed surface distances in HD95; the maximum would depend on a single voxel."""
ALL_GLAND = 255
"""Neighbour code of 2 x 2 x 2 voxels that are all gland."""
ROUNDING_MM = 1e-6
"""A distance that exceeds a tolerance by less than this is a rounding error (3 * 0.1 mm is not 0.3 mm in binary)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseMetrics:
    """All metrics of one case."""

    dice: float
    iou: float
    hd95_mm: float
    """Symmetric 95th-percentile Hausdorff distance."""
    assd_mm: float
    """Average symmetric surface distance."""
    nsd_2mm: float
    """Normalised surface Dice: fraction of the area of both surfaces within 2 mm of the other."""
    volume_reference_ml: float
    volume_predicted_ml: float
    volume_difference_ml: float
    """Predicted minus reference volume."""
    volume_difference_percent: float
    """The same in percent of the reference; NaN when only the reference is empty."""
    dice_apex: float
    dice_mid: float
    dice_base: float
    """Dice in the thirds of the reference's extent, see `dice_by_thirds`; NaN when a third has no slice."""
    missed_gland: bool
    """Whether the prediction is empty although the reference is not."""


def case_metrics(
    reference: np.ndarray, predicted: np.ndarray, *, spacing_mm: Spacing, counts: SliceCounts | None = None
) -> CaseMetrics:
    """Return all metrics of one case; a missed gland has Dice 0, NSD 0 and the image diagonal as HD95 and ASSD.

    Args:
        reference: Binary mask, shape [Z, Y, X], z from apex to base.
        predicted: Binary mask on the same grid.
        spacing_mm: Voxel edge lengths along Z, Y, X.
        counts: `slice_counts` of the masks; None counts them.

    Raises:
        ValueError: If a mask is not binary or not 3-D, if the shapes differ, or if the spacing is not positive.
    """
    reference, predicted = as_mask_pair(reference, predicted)
    counts = counts or slice_counts(reference, predicted)
    distances = surface_distances(reference, predicted, spacing_mm=spacing_mm)
    apex, mid, base = dice_by_thirds(counts)
    voxel_ml = float(np.prod(spacing_mm)) / 1000.0
    reference_vox, predicted_vox = int(counts.reference_vox.sum()), int(counts.predicted_vox.sum())
    difference_vox = predicted_vox - reference_vox
    percent_without_reference = np.nan if predicted_vox else 0.0
    return CaseMetrics(
        dice=counts.dice(),
        iou=counts.iou(),
        hd95_mm=hd95_mm(distances),
        assd_mm=assd_mm(distances),
        nsd_2mm=normalised_surface_dice(reference, predicted, spacing_mm=spacing_mm, tolerance_mm=SURFACE_TOLERANCE_MM),
        volume_reference_ml=reference_vox * voxel_ml,
        volume_predicted_ml=predicted_vox * voxel_ml,
        volume_difference_ml=difference_vox * voxel_ml,
        volume_difference_percent=100 * difference_vox / reference_vox if reference_vox else percent_without_reference,
        dice_apex=apex,
        dice_mid=mid,
        dice_base=base,
        missed_gland=predicted_vox == 0 < reference_vox,
    )


# --- overlap -------------------------------------------------------------------------------------------------------


def dice_by_thirds(counts: SliceCounts) -> tuple[float, float, float]:
    """Return Dice in the apex, mid-gland and base thirds of the reference, after PROMISE12 (Litjens 2014).

    The extent from the first to the last slice with reference gland is cut into three equal lengths, and a slice belongs
    to the third that contains its centre: 4 slices are split 1 2 1, 5 slices 2 1 2. Slices below the extent count with the
    apex and slices above it with the base, so that over-segmentation is penalised. NaN for a third without slices, and for all
    three when the reference is empty.
    """
    gland = np.flatnonzero(counts.reference_vox)
    if gland.size == 0:
        return np.nan, np.nan, np.nan
    nearest = np.clip(np.arange(len(counts.reference_vox)), gland[0], gland[-1]) - gland[0]
    of_slice = third_of_slice(int(gland[-1] - gland[0] + 1))[nearest]
    apex, mid, base = (
        counts.of(of_slice == third).dice() if (of_slice == third).any() else np.nan for third in range(3)
    )
    return apex, mid, base


def third_of_slice(num_slices: int) -> np.ndarray:
    """Return the third that contains the centre of each slice: 0 apex, 1 mid-gland, 2 base; shape [num_slices]."""
    # The centre of slice i is at (2 i + 1) / (2 n) of the extent; in integers no centre is rounded across a boundary.
    return 3 * (2 * np.arange(num_slices) + 1) // (2 * num_slices)


def pooled_iou(counts_of_cases: Iterable[SliceCounts]) -> float:
    """Return the IoU of gland slices, pooled over the voxels of all cases; the public demo's metric, kept for comparison.

    Slices without reference gland are excluded, so that over-segmentation beyond apex and base is not penalised. Large glands
    and fine grids weigh more.

    Raises:
        ValueError: If no case has a slice with gland.
    """
    with_gland = [counts.of(counts.reference_vox > 0) for counts in counts_of_cases]
    if not any(counts.reference_vox.size for counts in with_gland):
        raise ValueError(
            f"pooled IoU needs at least one reference slice with gland, got none in {len(with_gland)} cases."
        )
    return SliceCounts(*map(np.concatenate, zip(*with_gland, strict=True))).iou()


# --- surface distances ---------------------------------------------------------------------------------------------


def surface_distances(
    reference: np.ndarray, predicted: np.ndarray, *, spacing_mm: Spacing
) -> tuple[np.ndarray, np.ndarray]:
    """Return the exact distances in mm from each surface voxel of two masks to the surface of the other.

    Surface voxels are those with a face neighbour outside the mask; outside the image counts as outside the mask (mask minus
    its binary erosion, as MONAI's `get_mask_edges`). Distances are between voxel centres; an empty mask has none, and those
    of the other mask are the image diagonal. Arguments as in `case_metrics`.
    """
    reference, predicted = as_mask_pair(reference, predicted)
    _check_spacing(spacing_mm)
    diagonal_mm = float(np.linalg.norm(np.multiply(reference.shape, spacing_mm)))
    box = bounding_box(reference | predicted)
    first, second = surface(reference[box]), surface(predicted[box])
    measure = partial(_directed_mm, spacing_mm=spacing_mm, empty_mm=diagonal_mm)
    return measure(first, second), measure(second, first)


def hd95_mm(distances_mm: tuple[np.ndarray, np.ndarray]) -> float:
    """Return the larger of the two directed 95th percentiles (as MONAI; percentiles interpolate linearly).

    It is the image diagonal when exactly one mask is empty, 0.0 when both are.
    """
    return max((float(np.percentile(part, HD_PERCENTILE)) for part in distances_mm if part.size), default=0.0)


def assd_mm(distances_mm: tuple[np.ndarray, np.ndarray]) -> float:
    """Return the mean over the distances of both surfaces together (as MONAI with `symmetric=True`).

    Every surface voxel has the same weight, so the larger surface has more; the mean of the two directed means, which some
    papers call ASSD, differs when the surfaces differ in size. Empty masks as in `hd95_mm`.
    """
    both = np.concatenate(distances_mm)
    return float(both.mean()) if both.size else 0.0


def normalised_surface_dice(
    reference: np.ndarray, predicted: np.ndarray, *, spacing_mm: Spacing, tolerance_mm: float
) -> float:
    """Return the fraction of the area of both surfaces within a tolerance of the other (NSD, Nikolov et al. 2021).

    A surface consists of elements, one for each 2 x 2 x 2 voxels that are not all alike, weighted by area: counting voxels
    instead would overweight the apex and base of thick slices. Distances are between elements, as in MONAI's
    `compute_surface_dice` with `use_subvoxels=True` and in DeepMind's `surface-distance`. Arguments as in `case_metrics`;
    `tolerance_mm` is inclusive. 0.0 when exactly one mask is empty, 1.0 when both are.
    """
    reference, predicted = as_mask_pair(reference, predicted)
    _check_spacing(spacing_mm)
    if not (reference.any() and predicted.any()):
        return float(reference.any() == predicted.any())
    box = bounding_box(reference | predicted)
    codes = [_neighbour_codes(mask[box]) for mask in (reference, predicted)]
    surfaces = [(code != 0) & (code != ALL_GLAND) for code in codes]
    # The area of an element follows from its code (marching cubes) and the spacing.
    areas_mm2 = _areas_mm2(spacing_mm)
    within_mm2 = beyond_mm2 = 0.0
    for code, here, there in zip(codes, surfaces, surfaces[::-1], strict=True):
        within_mm2 += float(areas_mm2[code[here & there]].sum())  # shared elements are at distance 0
        apart = np.argwhere(here & ~there)
        # Distances beyond the tolerance are not needed, and a bounded search is faster.
        distances_mm = _nearest_mm(apart, there, spacing_mm=spacing_mm, at_most_mm=tolerance_mm + 2 * ROUNDING_MM)
        is_within, each_mm2 = distances_mm <= tolerance_mm + ROUNDING_MM, areas_mm2[code[tuple(apart.T)]]
        within_mm2 += float(each_mm2[is_within].sum())
        beyond_mm2 += float(each_mm2[~is_within].sum())
    return within_mm2 / (within_mm2 + beyond_mm2)


def _neighbour_codes(mask: np.ndarray) -> np.ndarray:
    """Return the gland voxels of each 2 x 2 x 2 voxels as bits in MONAI's order; uint8, one longer than the mask per axis."""
    padded = np.pad(mask, 1).view(np.uint8)
    z, y, x = (size + 1 for size in mask.shape)
    codes = np.zeros((z, y, x), dtype=np.uint8)
    for bit, (dz, dy, dx) in enumerate(np.ndindex(2, 2, 2)):
        codes |= padded[dz : dz + z, dy : dy + y, dx : dx + x] << (7 - bit)
    return codes


@lru_cache(maxsize=256)
def _areas_mm2(spacing_mm: Spacing) -> np.ndarray:
    """Return the area of the surface element of every neighbour code, float64 [256]."""
    # Imported late, because MONAI imports torch, which the plots of metrics do not need.
    from monai.metrics.utils import create_table_neighbour_code_to_surface_area

    return np.asarray(create_table_neighbour_code_to_surface_area(spacing_mm)[0], dtype=np.float64)


def surface(mask: np.ndarray) -> np.ndarray:
    """Return the voxels of a boolean mask [Z, Y, X] that have a face neighbour outside it or outside the array."""
    # Six shifted views of a padded copy: ten times faster than scipy's binary_erosion.
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1, 1:-1] & padded[2:, 1:-1, 1:-1]
    inside &= padded[1:-1, :-2, 1:-1]
    inside &= padded[1:-1, 2:, 1:-1]
    inside &= padded[1:-1, 1:-1, :-2]
    inside &= padded[1:-1, 1:-1, 2:]
    return mask & ~inside


def _check_spacing(spacing_mm: Spacing) -> None:
    if len(spacing_mm) != 3 or not all(0 < length < np.inf for length in spacing_mm):
        raise ValueError(f"spacing_mm must be three positive lengths along Z, Y, X, got {spacing_mm}.")


def _directed_mm(query: np.ndarray, target: np.ndarray, *, spacing_mm: Spacing, empty_mm: float) -> np.ndarray:
    """Return the distance of every query voxel to the nearest target voxel; `empty_mm` when there is no target."""
    distances_mm = np.zeros(np.count_nonzero(query))
    if not target.any():
        return distances_mm + empty_mm
    apart = np.argwhere(query & ~target)  # voxels on both surfaces are at distance 0
    if apart.size:
        distances_mm[: len(apart)] = _nearest_mm(apart, target, spacing_mm=spacing_mm)
    return distances_mm


def _nearest_mm(
    points_zyx: np.ndarray, target: np.ndarray, *, spacing_mm: Spacing, at_most_mm: float = np.inf
) -> np.ndarray:
    """Return the exact distance of each voxel index [N, 3] to the nearest target voxel; infinity beyond `at_most_mm`."""
    # A k-d tree of the surface is faster than a distance map of the volume (MONAI); a plain tree is built in half the time of
    # a balanced one and serves a single query.
    tree = cKDTree(np.argwhere(target) * np.array(spacing_mm), balanced_tree=False, compact_nodes=False)
    distances_mm, _ = tree.query(points_zyx * np.array(spacing_mm), distance_upper_bound=at_most_mm)
    return np.asarray(distances_mm)
