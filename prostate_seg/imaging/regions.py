"""Regions of a mask: the whole gland and, if wanted, zones inside it. A region unites labels; labels can be in several regions.

On the network's grid the regions are the bits of one mask: the whole gland alone is 0 or 1. A predicted label map has the
values of the reference masks; no zone can leave the gland, because every voxel of the gland gets one of the gland's labels.
"""

from collections.abc import Mapping

import numpy as np

from prostate_seg.imaging.quality import whole_gland
from prostate_seg.imaging.settings import WHOLE_GLAND

SMALLEST_PROBABILITY = 1e-6
"""Bound of probabilities, and of their distance from 1, whose logarithm is taken."""

Regions = Mapping[str, tuple[int, ...] | None]
"""Labels of each region, the whole gland first and then the zones by name; None takes every label above 0."""


def region_masks(label_map: np.ndarray, regions: Regions) -> np.ndarray:
    """Return the mask of each region, bool [regions, Z, Y, X], of labels [Z, Y, X]."""
    return np.stack([whole_gland(label_map, labels=labels) for labels in regions.values()])


def region_bits(label_map: np.ndarray, regions: Regions) -> np.ndarray:
    """Return the regions of labels [Z, Y, X] as bits, uint8 of the same shape; the first region is bit 0."""
    bits = np.zeros(label_map.shape, dtype=np.uint8)
    for number, labels in enumerate(regions.values()):
        bits |= whole_gland(label_map, labels=labels).astype(np.uint8) << number
    return bits


def masks_of_bits(bits: np.ndarray, *, num_regions: int) -> np.ndarray:
    """Return the mask of each region, bool [regions, ...], of `region_bits`."""
    return np.stack([bits & (1 << number) > 0 for number in range(num_regions)])


def predicted_labels(regions: Regions) -> Regions:
    """Return the labels of each region in `label_map_of`, where every label above 0 is gland."""
    return {**regions, WHOLE_GLAND: None}


def label_map_of(gland: np.ndarray, probability: np.ndarray, regions: Regions) -> np.ndarray:
    """Return the most probable label of every voxel of the gland, 0 elsewhere.

    Args:
        gland: Predicted whole gland, bool [Z, Y, X].
        probability: Of each region, float32 [regions, Z, Y, X]; regions are independent, as a sigmoid has them.
        regions: With the labels of the whole gland if there are zones; the whole gland alone has label 1.

    Returns:
        Labels [Z, Y, X], uint8, or uint16 if a label needs it. Labels that are in the same regions become the smallest of them.
    """
    if len(regions) == 1:
        return gland.astype(np.uint8)
    labels = sorted(regions[WHOLE_GLAND] or ())
    members = np.array(
        [[one in (of_region or ()) for of_region in regions.values()] for one in labels], dtype=np.float32
    )
    inside = np.clip(probability[:, gland], SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    # The logarithm of a label's likelihood, but for a term that all labels share; argmax takes the first of equal ones.
    likelihood = members @ np.log(inside / (1 - inside))
    label_map = np.zeros(gland.shape, dtype=np.min_scalar_type(max(labels)))
    label_map[gland] = np.array(labels)[likelihood.argmax(axis=0)]
    return label_map
