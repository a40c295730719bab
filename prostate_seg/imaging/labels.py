"""Which values a mask may have, and what is wrong with one that has others.

A label is a whole number from 0 to `MAX_LABEL`; whether it is gland is for `quality.whole_gland` to say. Nothing here
knows cases.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from prostate_seg.imaging.geometry import Volume

LABEL_TOLERANCE = 1e-3
"""A value this near a whole number is that label: a rescale slope, or a program that computes in float32, gives 0.9999999."""

MAX_LABELS = 10
"""Labels above 0 in a mask of the prostate; the finest of zones and lesions that are published have fewer."""

MAX_LABEL = 65535
"""Largest label of a 16-bit file. Only whether a label is gland is kept, so that labels need not fit into 8 bits."""

SAME_NEIGHBOUR_FRACTION = 0.5
"""Part of a label's voxels whose neighbour along x has the same label: more in a structure, less in an intensity."""

MAX_LISTED = 5
"""Numbers that a message lists before it says how many more there are."""


def as_labels(mask: Volume) -> Volume:
    """Return a mask with its values as integers.

    Args:
        mask: Values as in the file, any dtype.

    Returns:
        The mask with an integer array; the mask as it is when a value is no whole number within `LABEL_TOLERANCE`, for
        `label_problem` to name.
    """
    array = mask.array
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        return mask
    rounded = np.rint(array)
    is_near = np.allclose(array, rounded, rtol=np.finfo(np.float32).eps, atol=LABEL_TOLERANCE)
    if np.abs(rounded).max(initial=0) > np.iinfo(np.int32).max or not is_near:
        return mask
    return replace(mask, array=rounded.astype(np.int32))


def label_problem(array: np.ndarray, *, labels: Sequence[int] | None) -> tuple[str, str] | None:
    """Return the check that a mask fails and the message, or None when it marks gland.

    Args:
        array: Labels as `as_labels` returns them; all finite.
        labels: Labels that are gland; None takes every label above 0.
    """
    if array.dtype.kind == "f" and (array != np.rint(array)).any():
        return "label_not_integer", _fraction_message(array)
    if array.min() < 0 or array.max() > MAX_LABEL:
        return "label_out_of_range", _range_message(array)
    found = np.unique(array[array > 0])
    if not len(found):
        return "empty_mask", "the mask marks no voxel; draw it, or list the case under data.exclude"
    if len(found) > MAX_LABELS and (labels is None or _is_intensity(array)):
        return "too_many_labels", _number_message(found, labels=labels)
    if labels is not None and not np.isin(found, labels).any():
        return "wanted_label_absent", (
            f"data.whole_gland_labels wants {listed(labels)}, and the mask has {listed(np.unique(array))}; "
            "correct the setting, or list the case under data.exclude"
        )
    return None


def listed(values: Sequence[object] | np.ndarray) -> str:
    """Return the first values, and how many more there are."""
    more = f" and {len(values) - MAX_LISTED} more" if len(values) > MAX_LISTED else ""
    return ", ".join(str(value) for value in values[:MAX_LISTED]) + more


def _fraction_message(array: np.ndarray) -> str:
    off = np.abs(array - np.rint(array))
    return (
        f"mask labels are whole numbers within {LABEL_TOLERANCE:g}, and {array.flat[off.argmax()]:g} is none, as "
        f"{np.count_nonzero(off > LABEL_TOLERANCE)} of {array.size} voxels are not; this is a probability map or an "
        "interpolated mask: threshold it, or resample it with nearest neighbour, and export labels"
    )


def _range_message(array: np.ndarray) -> str:
    outside = array[(array < 0) | (array > MAX_LABEL)]
    return (
        f"mask labels are from 0 to {MAX_LABEL}, and {outside.flat[0]:g} stands in {outside.size} voxels; export the labels "
        "as unsigned integers, 0 for the background (255 in a signed 8-bit file is read as -1)"
    )


def _number_message(found: np.ndarray, *, labels: Sequence[int] | None) -> str:
    range_of = f"{len(found)} labels ({found[0]:g} to {found[-1]:g}) are no label map"
    if labels is not None:
        return f"{range_of}, as most voxels differ from their neighbours; threshold it and export again"
    return (
        f"{range_of} of a prostate, which has at most {MAX_LABELS}; threshold it and export again, or name the labels of "
        "the gland in a map of many structures: data.whole_gland_labels=[...]"
    )


def _is_intensity(array: np.ndarray) -> bool:
    """Return whether the voxels of most labels have neighbours of other values, as in an image and in no label map."""
    left, right = array[..., :-1].astype(np.int64), array[..., 1:]
    num_voxels = np.bincount(left.ravel())[1:]
    num_same = np.bincount(left[left == right], minlength=len(num_voxels) + 1)[1:]
    fractions = num_same[num_voxels > 0] / num_voxels[num_voxels > 0]
    return bool(np.median(fractions) < SAME_NEIGHBOUR_FRACTION)
