"""Validation of mask labels: whole numbers from 0 to `MAX_LABEL`. `quality.whole_gland` selects those that are gland."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from prostate_seg.common.errors import listed
from prostate_seg.imaging.geometry import Volume

LABEL_TOLERANCE = 1e-3
"""Largest deviation from a whole number: rescale slopes and float32 arithmetic give values such as 0.9999999."""
MAX_LABELS = 10
"""Labels above 0 in a mask of the prostate; the finest published maps of zones and lesions have fewer."""
MAX_LABEL = 65535
"""Largest label of a 16-bit file. Only whether a label is gland is kept, so that labels need not fit into 8 bits."""
SAME_NEIGHBOUR_FRACTION = 0.5
"""Fraction of a label's voxels whose neighbour along x has the same label: more in a structure, less in an intensity image."""


def as_labels(mask: Volume) -> Volume:
    """Return a mask with its values as integers; unchanged when a value is no whole number, which `label_problem` reports."""
    array = mask.array
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        return mask
    rounded = np.rint(array)
    is_near = np.allclose(array, rounded, rtol=np.finfo(np.float32).eps, atol=LABEL_TOLERANCE)
    if np.abs(rounded).max(initial=0) > np.iinfo(np.int32).max or not is_near:
        return mask
    return replace(mask, array=rounded.astype(np.int32))


def label_problem(
    array: np.ndarray, *, labels: Sequence[int] | None, allow_others: bool = True
) -> tuple[str, str] | None:
    """Return the check that a mask fails and the message, or None when it marks gland.

    The array is finite, with labels as `as_labels` returns them; `labels` are gland, or with None every label above 0. Other
    labels are background if they are allowed.
    """
    if problem := _value_problem(array):
        return problem
    found = np.unique(array[array > 0])
    if not len(found):
        return "empty_mask", "the mask marks no voxel; draw it, or list the case under data.exclude"
    if len(found) > MAX_LABELS and (labels is None or _is_intensity(array)):
        many = f"{len(found)} labels ({found[0]:g} to {found[-1]:g}) are no label map"
        if labels is not None:
            return (
                "too_many_labels",
                f"{many}, as most voxels differ from their neighbours; threshold it and export again",
            )
        return "too_many_labels", (
            f"{many} of a prostate, which has at most {MAX_LABELS}; if it is the image, exchange images and masks; "
            "otherwise threshold it and export again, or name the labels of the gland in a map of many structures: "
            "data.whole_gland_labels=[...]"
        )
    if labels is not None and not np.isin(found, labels).any():
        return "wanted_label_absent", (
            f"data.whole_gland_labels is {listed(labels)}, and the mask has {listed(np.unique(array).tolist())}; "
            "correct the setting, or list the case under data.exclude"
        )
    if labels is not None and not allow_others and (unnamed := found[~np.isin(found, labels)]).size:
        return "unnamed_label", (
            f"zones need a name for every label, and the mask has {listed(unnamed.tolist())} beside {listed(labels)}; name it "
            "in data.labels, or set data.whole_gland_labels to those of the gland"
        )
    return None


def _value_problem(array: np.ndarray) -> tuple[str, str] | None:
    """Return the check and the message if a value is no label of a 16-bit file."""
    if array.dtype.kind == "f" and (array != np.rint(array)).any():
        off = np.abs(array - np.rint(array))
        return "label_not_integer", (
            f"mask labels are whole numbers within {LABEL_TOLERANCE:g}, and {array.flat[off.argmax()]:g} is none, as "
            f"{np.count_nonzero(off > LABEL_TOLERANCE)} of {array.size} voxels are not; this is a probability map or an "
            "interpolated mask: threshold it, or resample it with nearest neighbour, and export labels"
        )
    if array.min() < 0 or array.max() > MAX_LABEL:
        outside = array[(array < 0) | (array > MAX_LABEL)]
        return "label_out_of_range", (
            f"mask labels are from 0 to {MAX_LABEL}, and {outside.size} voxels are outside, such as {outside.flat[0]:g}; "
            "export the labels as unsigned integers, 0 for the background (255 in a signed 8-bit file is read as -1)"
        )
    return None


def _is_intensity(array: np.ndarray) -> bool:
    """Return whether the voxels of most labels have neighbours of other values, as in an image and in no label map."""
    left, right = array[..., :-1].astype(np.int64), array[..., 1:]
    num_voxels = np.bincount(left.ravel())[1:]
    num_same = np.bincount(left[left == right], minlength=len(num_voxels) + 1)[1:]
    fractions = num_same[num_voxels > 0] / num_voxels[num_voxels > 0]
    return bool(np.median(fractions) < SAME_NEIGHBOUR_FRACTION)
