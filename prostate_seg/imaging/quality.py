"""Named checks on a case that could be read.

A finding that is an error refuses the case; a warning is listed. Arrays are [Z, Y, X] in LPS, volumes in mL. Nothing here
changes a voxel, and nothing here knows files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull

from prostate_seg.imaging.geometry import Geometry, Volume

MIN_SLICES = 3
"""A volume with fewer slices has no apex, mid-gland and base."""

PLAUSIBLE_VOLUME_ML = (15.0, 263.0)
"""Smallest and largest gland among the public PI-CAI studies."""

SOLID_FRACTION = 0.85
"""Part of its convex outline in axial slices that a gland fills; five reference masks fill 0.96. Less is a warning."""

LEAKED_FRACTION = 0.7
"""A mask that fills less is refused: PI-CAI's faulty mask of 11050_1001070, which spills out to the front, fills 0.59."""

MIN_HOLES_ML = 0.05
"""Smaller holes are single voxels, which expert masks have too."""

SIDES = (("inferior", "superior"), ("anterior", "posterior"), ("right", "left"))
"""What lies beyond the first and the last voxel along z, y and x."""

TOUCHING = np.ones((3, 3, 3), dtype=bool)
"""Voxels are connected when they share a face, an edge or a corner."""

MAX_LISTED = 5
"""Numbers that a message lists before it says how many more there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a check has to say about a case."""

    case_id: str
    check: str
    """Name of the check, such as grids_differ."""
    is_error: bool
    """Whether the case cannot be used."""
    message: str
    """The rule, the value and the next step, without case and check."""


def check_case(case_id: str, image: Volume, mask: Volume, *, labels: Sequence[int] | None) -> list[Finding]:
    """Return all findings on a case.

    Args:
        case_id: Named in each finding.
        image: T2-weighted volume.
        mask: Its reference, labels as in the file.
        labels: Mask labels that are gland; None takes every label above 0.
    """
    return [
        *check_image(case_id, image),
        *check_pair(case_id, image, mask),
        *check_mask(case_id, mask, labels=labels),
    ]


def check_image(case_id: str, image: Volume) -> list[Finding]:
    """Return what is wrong with an image: `few_slices`, `nan`, `constant_image`."""
    findings = []
    if min(image.array.shape) < MIN_SLICES:
        shape = "x".join(str(size) for size in image.array.shape)
        message = f"an image has at least {MIN_SLICES} slices, and this has {shape} voxels (z, y, x); export all slices"
        findings.append(_error(case_id, "few_slices", message))
    if num_bad := _num_not_finite(image.array):
        findings.append(_not_finite(case_id, "image", num_bad, image.array.size))
    elif image.array.min() == image.array.max():
        message = f"the image has no intensity range: every voxel is {image.array.flat[0]:g}; export it again"
        findings.append(_error(case_id, "constant_image", message))
    return findings


def check_pair(case_id: str, image: Volume, mask: Volume) -> list[Finding]:
    """Return `grids_differ` when image and mask are on different grids."""
    if image.geometry.is_same_grid(mask.geometry):
        return []
    message = (
        "image and mask are on different grids\n"
        f"  image {image.geometry}\n  mask  {mask.geometry}\n"
        "Re-export the mask on the T2 grid, or list the case under data.exclude."
    )
    return [_error(case_id, "grids_differ", message)]


def check_mask(case_id: str, mask: Volume, *, labels: Sequence[int] | None) -> list[Finding]:
    """Return what is wrong with a mask, and what is unusual about its gland.

    Errors are `nan`, `label_not_integer`, `empty_mask`, `wanted_label_absent` and, for a mask that has leaked, `not_compact`;
    warnings are `several_components`, `holes`, `implausible_volume`, `mask_touches_border` and a milder `not_compact`.
    """
    if findings := _check_labels(case_id, mask.array, labels=labels):
        return findings
    gland = whole_gland(mask.array, labels=labels)
    box = _bounding_box(gland)
    return [
        *_check_volume(case_id, gland[box], mask.geometry),
        *_check_border(case_id, box, gland.shape),
        *_check_components(case_id, gland[box], mask.geometry),
        *_check_holes(case_id, gland[box], mask.geometry),
        *_check_outline(case_id, gland[box]),
    ]


def whole_gland(mask_array: np.ndarray, *, labels: Sequence[int] | None) -> np.ndarray:
    """Return where the gland is.

    Args:
        mask_array: Labels, any shape.
        labels: Labels that are gland; None takes every label above 0.

    Returns:
        bool array of the same shape.
    """
    return mask_array > 0 if labels is None else np.isin(mask_array, labels)


def solid_fraction(gland: np.ndarray) -> float:
    """Return the part of its convex outline that a gland fills, over all axial slices.

    Args:
        gland: bool array [Z, Y, X] with at least one voxel.

    Returns:
        Area of the gland over the area of the convex hulls of its slices, 0 to 1; 1 for a box.
    """
    slices = gland[gland.any(axis=(1, 2))]
    return int(slices.sum()) / sum(_hull_area(one) for one in slices)


def _error(case_id: str, check: str, message: str) -> Finding:
    return Finding(case_id=case_id, check=check, is_error=True, message=message)


def _warning(case_id: str, check: str, message: str) -> Finding:
    return Finding(case_id=case_id, check=check, is_error=False, message=message)


def _num_not_finite(array: np.ndarray) -> int:
    return 0 if array.dtype.kind in "iub" else int(array.size - np.count_nonzero(np.isfinite(array)))


def _not_finite(case_id: str, what: str, num_bad: int, num_voxels: int) -> Finding:
    message = f"every voxel is a finite number, and {num_bad} of {num_voxels} in the {what} are not; export it again"
    return _error(case_id, "nan", message)


def _check_labels(case_id: str, array: np.ndarray, *, labels: Sequence[int] | None) -> list[Finding]:
    """Return why there is no gland to look at; at most one finding."""
    if num_bad := _num_not_finite(array):
        return [_not_finite(case_id, "mask", num_bad, array.size)]
    if array.dtype.kind == "f" and (array != np.rint(array)).any():
        example = array[array != np.rint(array)].flat[0]
        message = f"mask labels are whole numbers, and {example:g} is none; export labels, not probabilities"
        return [_error(case_id, "label_not_integer", message)]
    if not (array > 0).any():
        return [_error(case_id, "empty_mask", "the mask marks no voxel; draw it, or list the case under data.exclude")]
    if labels is not None and not np.isin(array, labels).any():
        message = (
            f"data.whole_gland_labels wants {_listed(labels)}, and the mask has {_listed(np.unique(array))}; "
            "mend the setting, or list the case under data.exclude"
        )
        return [_error(case_id, "wanted_label_absent", message)]
    return []


def _check_volume(case_id: str, gland: np.ndarray, geometry: Geometry) -> list[Finding]:
    volume_ml = int(gland.sum()) * geometry.voxel_volume_ml
    low_ml, high_ml = PLAUSIBLE_VOLUME_ML
    if low_ml <= volume_ml <= high_ml:
        return []
    message = f"the gland has {volume_ml:.1f} mL, and {low_ml:g} to {high_ml:g} mL are usual; look at mask and spacing"
    return [_warning(case_id, "implausible_volume", message)]


def _check_border(case_id: str, box: tuple[slice, ...], shape: tuple[int, ...]) -> list[Finding]:
    touched = [
        side
        for part, size, (first, last) in zip(box, shape, SIDES, strict=True)
        for side, touches in ((first, part.start == 0), (last, part.stop == size))
        if touches
    ]
    if not touched:
        return []
    message = f"the mask reaches the image's border ({', '.join(touched)}), so that gland may be missing; look at it"
    return [_warning(case_id, "mask_touches_border", message)]


def _check_components(case_id: str, gland: np.ndarray, geometry: Geometry) -> list[Finding]:
    sizes_vox = _component_sizes(ndimage.label(gland, structure=TOUCHING)[0])
    if len(sizes_vox) == 1:
        return []
    message = (
        f"the mask has {len(sizes_vox)} components ({_millilitres(sizes_vox, geometry)} mL); look for stray voxels"
    )
    return [_warning(case_id, "several_components", message)]


def _check_holes(case_id: str, gland: np.ndarray, geometry: Geometry) -> list[Finding]:
    background = ndimage.label(~np.pad(gland, 1))[0]
    sizes_vox = _component_sizes(np.where(background == background[0, 0, 0], 0, background))
    if sizes_vox.sum() * geometry.voxel_volume_ml < MIN_HOLES_ML:
        return []
    message = f"the mask encloses holes of {_millilitres(sizes_vox, geometry)} mL; fill them if they are slips"
    return [_warning(case_id, "holes", message)]


def _check_outline(case_id: str, gland: np.ndarray) -> list[Finding]:
    """Check the largest component: a prostate is nearly convex in axial slices, a mask that has leaked is not."""
    components = ndimage.label(gland, structure=TOUCHING)[0]
    fraction = solid_fraction(components == np.bincount(components.ravel())[1:].argmax() + 1)
    if fraction >= SOLID_FRACTION:
        return []
    message = (
        f"the mask fills {fraction:.0%} of its convex outline in axial slices, and glands fill {SOLID_FRACTION:.0%} or more; "
        "it may have leaked into other tissue: look at it, mend it, or list the case under data.exclude"
    )
    return [Finding(case_id=case_id, check="not_compact", is_error=fraction < LEAKED_FRACTION, message=message)]


def _bounding_box(gland: np.ndarray) -> tuple[slice, ...]:
    occupied = [np.flatnonzero(gland.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
    return tuple(slice(int(index[0]), int(index[-1]) + 1) for index in occupied)


def _hull_area(gland_slice: np.ndarray) -> float:
    """Return the area in pixels of the convex hull of a slice [Y, X], pixel corners included."""
    rows = np.flatnonzero(gland_slice.any(axis=1))
    first = gland_slice[rows].argmax(axis=1)
    past_last = gland_slice.shape[1] - gland_slice[rows, ::-1].argmax(axis=1)
    corners = [np.column_stack([y, x]) for y in (rows, rows + 1) for x in (first, past_last)]
    return float(ConvexHull(np.concatenate(corners)).volume)


def _component_sizes(components: np.ndarray) -> np.ndarray:
    """Return the sizes in voxels of all labels above 0, largest first."""
    sizes = np.bincount(components.ravel())[1:]
    return np.sort(sizes[sizes > 0])[::-1]


def _millilitres(sizes_vox: np.ndarray, geometry: Geometry) -> str:
    return _listed([f"{size * geometry.voxel_volume_ml:.3g}" for size in sizes_vox])


def _listed(values: Sequence[object] | np.ndarray) -> str:
    more = f" and {len(values) - MAX_LISTED} more" if len(values) > MAX_LISTED else ""
    return ", ".join(str(value) for value in values[:MAX_LISTED]) + more
