"""Overlap of two binary masks, in validation, inference and evaluation. Masks are indexed [Z, Y, X]."""

from typing import NamedTuple

import numpy as np


class SliceCounts(NamedTuple):
    """Voxel counts per axial slice, each of shape [Z]."""

    reference_vox: np.ndarray
    predicted_vox: np.ndarray
    intersection_vox: np.ndarray

    def dice(self) -> float:
        """Return 2 |R and P| / (|R| + |P|) over all slices (Dice 1945); 1.0 when both masks are empty."""
        both = self.reference_vox.sum() + self.predicted_vox.sum()
        return float(2 * self.intersection_vox.sum() / both) if both else 1.0

    def iou(self) -> float:
        """Return |R and P| / |R or P| over all slices (Jaccard 1912); 1.0 when both masks are empty."""
        union = self.union_vox.sum()
        return float(self.intersection_vox.sum() / union) if union else 1.0

    @property
    def union_vox(self) -> np.ndarray:
        """Voxels in either mask, shape [Z]."""
        return self.reference_vox + self.predicted_vox - self.intersection_vox

    def of(self, slices: slice | np.ndarray) -> "SliceCounts":
        """Return the counts of some slices."""
        return SliceCounts(*(voxels[slices] for voxels in self))


def slice_counts(reference: np.ndarray, predicted: np.ndarray) -> SliceCounts:
    """Count the voxels of two binary masks [Z, Y, X] and of their intersection in every slice."""
    reference, predicted = as_mask_pair(reference, predicted)
    # count_nonzero is many times faster on whole boolean blocks than with an axis.
    masks = (reference, predicted, reference & predicted)
    return SliceCounts(*(np.array([np.count_nonzero(axial) for axial in mask], dtype=np.int64) for mask in masks))


def dice(reference: np.ndarray, predicted: np.ndarray) -> float:
    """Return the Dice of two binary masks [Z, Y, X]; 1.0 when both are empty."""
    return slice_counts(reference, predicted).dice()


def as_mask_pair(reference: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both masks as boolean arrays [Z, Y, X]; boolean masks are not copied.

    Raises:
        ValueError: If a mask is not 3-D or has values other than 0 and 1, or if the shapes differ.
    """
    if np.shape(reference) != np.shape(predicted):
        raise ValueError(
            f"reference and predicted mask must have one shape, got {np.shape(reference)} and {np.shape(predicted)}. "
            "Bring the prediction back to the grid of the reference first."
        )
    return _as_mask(reference, name="reference"), _as_mask(predicted, name="predicted")


def _as_mask(values: np.ndarray, *, name: str) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 3:
        raise ValueError(f"{name} mask must have three axes [Z, Y, X], got shape {values.shape}.")
    mask = values.astype(bool, copy=False)
    if mask is not values and not np.array_equal(mask, values):
        raise ValueError(
            f"{name} mask must hold 0 and 1 only, got {values.dtype} from {values.min()} to {values.max()}. "
            "Threshold a probability, merge labels into the whole gland."
        )
    return mask
