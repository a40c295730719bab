"""Calibration of voxel probabilities near the surface of a region: reliability, expected calibration error, temperature.

Far from the surface nearly every probability is right and near 0 or 1, and would hide the others. Voxels are counted by the
logit of their probability and their label in the reference, so that no probability has to be kept: a temperature divides the
logit of a bin, and counts of cases add up.
"""

import math
from collections.abc import Mapping

import numpy as np
from scipy import ndimage
from scipy.optimize import minimize_scalar
from scipy.special import expit

from prostate_seg.imaging.geometry import Spacing, bounding_box
from prostate_seg.segmentation.metrics import surface

NEAR_SURFACE_MM = 5.0
"""Voxels up to this distance from the reference or the predicted surface are counted."""
LARGEST_LOGIT, LOGIT_STEP = 10.0, 0.1
"""Range, symmetric around 0, and width of the bins in which voxels are counted; beyond it they are in the outermost bins."""
NUM_BINS = 10
"""Bins of equal width from 0 to 1 of the reliability diagram and the expected calibration error (Guo et al. 2017)."""
TEMPERATURES = (0.1, 10.0)
"""Range that is searched for a temperature."""


def bin_logits() -> np.ndarray:
    """Return the logit at the centre of each bin; probability 0.5 is an edge."""
    half = LOGIT_STEP / 2
    return np.arange(-LARGEST_LOGIT + half, LARGEST_LOGIT, LOGIT_STEP)


def count_near_surface(
    reference: np.ndarray, predicted: np.ndarray, probability: np.ndarray, *, spacing_mm: Spacing
) -> np.ndarray:
    """Count the voxels near either surface by logit, those outside the reference and those in it.

    Args:
        reference: Binary mask [Z, Y, X].
        predicted: Binary mask on the same grid.
        probability: Of the region, on the same grid.
        spacing_mm: Voxel edges along Z, Y, X.

    Returns:
        Counts, int64 [2, bins].
    """
    shape = (2, len(bin_logits()))
    if not (reference.any() or predicted.any()):
        return np.zeros(shape, dtype=np.int64)
    margins = [math.ceil(NEAR_SURFACE_MM / length_mm) for length_mm in spacing_mm]
    box = tuple(
        slice(max(0, extent.start - margin), extent.stop + margin)
        for extent, margin in zip(bounding_box(reference | predicted), margins, strict=True)
    )
    surfaces = surface(reference[box]) | surface(predicted[box])
    is_near = ndimage.distance_transform_edt(~surfaces, sampling=spacing_mm) <= NEAR_SURFACE_MM
    edges = expit(np.linspace(-LARGEST_LOGIT, LARGEST_LOGIT, shape[1] + 1)[1:-1]).astype(np.float32)
    number = np.searchsorted(edges, probability[box][is_near], side="right")
    return np.bincount(number + shape[1] * reference[box][is_near], minlength=math.prod(shape)).reshape(shape)


def fit_temperature(counts: np.ndarray) -> float | None:
    """Return the temperature with the lowest cross-entropy over counted voxels; None without a voxel of each label."""
    if not counts.sum(axis=1).all():
        return None
    logits = bin_logits()

    def cross_entropy(log_temperature: float) -> float:
        scaled = logits / math.exp(log_temperature)
        return float(counts[0] @ np.logaddexp(0, scaled) + counts[1] @ np.logaddexp(0, -scaled))

    low, high = (math.log(end) for end in TEMPERATURES)
    found = minimize_scalar(cross_entropy, bounds=(low, high), method="bounded", options={"xatol": 1e-4})
    return round(math.exp(found.x), 3)


def reliability(counts: np.ndarray, *, temperature: float = 1.0) -> dict[str, np.ndarray]:
    """Return the reliability diagram of counted voxels, [2, bins], whose logits are divided by a temperature.

    It has the mean probability and the fraction of voxels in the reference, NaN in empty bins, and num_voxels, each [NUM_BINS].
    """
    probability = expit(bin_logits() / temperature)
    number, both = np.minimum((probability * NUM_BINS).astype(int), NUM_BINS - 1), counts.sum(axis=0)
    num_voxels, inside, total = (
        np.bincount(number, weights=weights, minlength=NUM_BINS) for weights in (both, counts[1], both * probability)
    )
    with np.errstate(invalid="ignore"):
        return {"probability": total / num_voxels, "fraction": inside / num_voxels, "num_voxels": num_voxels}


def calibration_error(diagram: Mapping[str, np.ndarray]) -> float | None:
    """Return the mean difference of probability and fraction, weighted by voxels; None without voxels."""
    num_voxels = diagram["num_voxels"]
    if not num_voxels.any():
        return None
    return float(np.nansum(np.abs(diagram["probability"] - diagram["fraction"]) * num_voxels) / num_voxels.sum())
