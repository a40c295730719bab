"""Named checks on a case that could be read, from measurements that are made once.

A finding that is an error refuses the case; a warning is listed. Arrays are [Z, Y, X] in LPS, volumes in mL. Nothing here
changes a voxel, and nothing here knows files.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull

from prostate_seg.imaging.geometry import Spacing, Volume, bounding_box
from prostate_seg.imaging.labels import label_problem, listed

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

MAX_IMAGE_DISORDER = 0.5
"""Largest `image_disorder` of a stack in order. Five real studies and eighty phantoms have 0, also when every other slice
is moved by 1 mm; sorted by name, shuffled or interleaved they have 1.3 or more, with two slices swapped 0.29 or more. Five
studies do not settle a limit; more is a warning and refuses no case, so that a mistake costs a look at the study."""

MAX_MASK_DISORDER = 0.35
"""Largest `mask_disorder` of slices in order. Human masks have up to 0.18, interleaved or sorted by name 0.57 or more; two
swapped neighbours in the middle of a gland hardly change it, and are rarely found. The limit is midway and rests on five masks:
more is a warning as well."""

ORDER_SAMPLES = 64
"""Pixels along each side of a slice that its order is judged by; more cost time and find no more."""

MOST_MASKS = 0.8
"""Part of the other masks that must agree on a label before one that differs is named; below it a data set is mixed."""

MIN_MASKS = 5
"""Fewer masks have no majority."""

SIDES = (("inferior", "superior"), ("anterior", "posterior"), ("right", "left"))
"""What lies beyond the first and the last voxel along z, y and x."""

PLANES = ("axial", "coronal", "sagittal")
"""Plane of slices that are stacked along z, y and x."""

MIN_ANISOTROPY = 1.5
"""Least ratio of the largest voxel edge to the next that says along which axis slices are stacked. Slices of T2-weighted
studies are 1.5 to 4 mm apart and pixels 0.2 to 0.8 mm wide; a volume with nearly equal edges can be cut in any plane."""

IGNORE_LABEL = 255
"""The largest label of an 8-bit file: the gland of binary masks, and in label maps the voxels that nobody labelled."""

TOUCHING = np.ones((3, 3, 3), dtype=bool)
"""Voxels are connected when they share a face, an edge or a corner."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceQuality:
    """What was measured of a reference mask that marks gland."""

    labels_ml: Mapping[int, float]
    """Volume of every label above 0, also of those that are not gland."""
    gland_volume_ml: float
    num_slices: int
    """Slices with gland."""
    components_ml: tuple[float, ...]
    """Volumes of the connected parts, largest first."""
    holes_ml: tuple[float, ...]
    """Volumes of the enclosed holes, largest first."""
    solid_fraction: float
    """Part of its convex outline in axial slices that the largest component fills."""
    gaps: tuple[int, ...]
    """Slices without gland between slices with gland, counted from 0 at the inferior end."""
    disorder: float
    """See `mask_disorder`."""
    touched_sides: tuple[str, ...]
    """Sides of the image that the gland reaches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseQuality:
    """What was measured of a case, and what there is to say about it."""

    findings: list[Finding]
    image_disorder: float | None
    """See `image_disorder`; None for an image that cannot be used."""
    reference: ReferenceQuality | None
    """None for a mask that cannot be used."""


def check_case(case_id: str, image: Volume | None, mask: Volume | None, *, labels: Sequence[int] | None) -> CaseQuality:
    """Measure a case once, and return the measurements with all findings.

    Errors are `few_slices`, `nan`, `constant_image`, `grids_differ`, `mask_is_image`, `label_not_integer`,
    `label_out_of_range`, `too_many_labels`, `empty_mask`, `wanted_label_absent` and, for a mask that has leaked,
    `not_compact`; warnings are `not_axial`, `label_255`, `slices_out_of_order`, `several_components`, `holes`, `gap`,
    `implausible_volume`, `mask_touches_border`, a milder `not_compact` and those with which
    image and mask were read (`Volume.warnings`).

    Args:
        case_id: Named in each finding.
        image: T2-weighted volume; None when it could not be read.
        mask: Its reference, with integer labels as `loading.read_mask` returns them; None when it could not be read.
        labels: Mask labels that are gland; None takes every label above 0.
    """
    image_errors = [] if image is None else _check_image(case_id, image)
    mask_errors = [] if image is None or mask is None else _check_not_image(case_id, image, mask)
    mask_errors = mask_errors or ([] if mask is None else _check_labels(case_id, mask.array, labels=labels))
    disorder = None if image is None or image_errors else image_disorder(_slices(image))
    reference = None if mask is None or mask_errors else measure_reference(mask, labels=labels)
    return CaseQuality(
        findings=[
            *_reading_warnings(case_id, image=image, mask=mask),
            *image_errors,
            *([] if image is None else _check_plane(case_id, image)),
            *_check_image_order(case_id, disorder),
            *([] if image is None or mask is None else check_pair(case_id, image, mask)),
            *mask_errors,
            *([] if reference is None or labels is not None else _check_ignore_label(case_id, reference)),
            *([] if reference is None else _check_reference(case_id, reference)),
        ],
        image_disorder=disorder,
        reference=reference,
    )


def _reading_warnings(case_id: str, **volumes: Volume | None) -> list[Finding]:
    """Return the warnings with which the volumes were read."""
    return [
        _warning(case_id, warning.check, f"{kind}: {warning.message}")
        for kind, volume in volumes.items()
        for warning in (() if volume is None else volume.warnings)
    ]


def _check_image(case_id: str, image: Volume) -> list[Finding]:
    """Return why an image cannot be used."""
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


def _check_plane(case_id: str, image: Volume) -> list[Finding]:
    plane = slice_plane(image.geometry.spacing_mm)
    if plane == PLANES[0]:
        return []
    spacing = " x ".join(f"{edge_mm:.3g}" for edge_mm in image.geometry.spacing_mm)
    message = (
        f"its slices are {plane} (spacing z, y, x {spacing} mm), and axial ones are expected; use the axial series"
    )
    return [_warning(case_id, "not_axial", message)]


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


def slice_plane(spacing_mm: Spacing) -> str:
    """Return the plane of a volume's slices, one of `PLANES`; axial where the voxels are nearly cubes.

    Args:
        spacing_mm: Voxel edges along z, y, x in LPS, so that this does not depend on how the file stores its axes.
    """
    thickest = int(np.argmax(spacing_mm))
    _, next_mm, largest_mm = sorted(spacing_mm)
    return PLANES[thickest] if largest_mm >= MIN_ANISOTROPY * next_mm else PLANES[0]


def _slices(image: Volume) -> np.ndarray:
    """Return the array with its slices along the first axis, whichever plane they lie in."""
    return np.moveaxis(image.array, PLANES.index(slice_plane(image.geometry.spacing_mm)), 0)


def check_slice_planes(spacings_mm: Mapping[str, Spacing]) -> list[Finding]:
    """Return `slice_plane_differs` for each case whose slices are in another plane than those of most cases.

    Args:
        spacings_mm: Voxel edges along z, y, x of each image in LPS, by case id.
    """
    planes = {case_id: slice_plane(spacing_mm) for case_id, spacing_mm in spacings_mm.items()}
    common, num = Counter(planes.values()).most_common(1)[0] if planes else ("", 0)
    if 2 * num <= len(planes):
        return []
    others = "the others'" if num >= len(planes) - 1 else "most others'"
    return [
        _warning(
            case_id,
            "slice_plane_differs",
            f"its slices are {plane}, {others} {common}; use its {common} series, or list the case under data.exclude",
        )
        for case_id, plane in planes.items()
        if plane != common
    ]


def check_zones(labels_of: Mapping[str, Collection[int]]) -> list[Finding]:
    """Return `zone_missing` for each mask that differs in a label from most others of its data set.

    Args:
        labels_of: The labels that are gland in each mask, by case id.
    """
    if len(labels_of) < MIN_MASKS:
        return []
    num_with = Counter(label for labels in labels_of.values() for label in labels)
    enough = MOST_MASKS * (len(labels_of) - 1)
    findings = []
    for case_id, labels in labels_of.items():
        lacking = [label for label, num in sorted(num_with.items()) if label not in labels and num >= enough]
        alone = [label for label in sorted(labels) if len(labels_of) - num_with[label] >= enough]
        if lacking or alone:
            message = (
                f"{MOST_MASKS:.0%} or more of the other masks agree on their labels, and this has {listed(sorted(labels))}"
                f"{f', lacks {listed(lacking)}' if lacking else ''}{f', alone has {listed(alone)}' if alone else ''}; "
                "a zone may be missing: look at it"
            )
            findings.append(_warning(case_id, "zone_missing", message))
    return findings


def measure_reference(mask: Volume, *, labels: Sequence[int] | None) -> ReferenceQuality:
    """Measure a mask whose labels are whole numbers and that marks gland; arguments as in `check_case`."""
    gland = whole_gland(mask.array, labels=labels)
    box = bounding_box(gland)
    part, voxel_ml = gland[box], mask.geometry.voxel_volume_ml
    components = ndimage.label(part, structure=TOUCHING)[0]
    sizes_vox = np.bincount(components.ravel())[1:]
    found, counts = np.unique(mask.array[mask.array > 0], return_counts=True)
    with_gland = part.any(axis=(1, 2))
    return ReferenceQuality(
        labels_ml={int(label): int(count) * voxel_ml for label, count in zip(found, counts, strict=True)},
        gland_volume_ml=int(sizes_vox.sum()) * voxel_ml,
        num_slices=int(with_gland.sum()),
        components_ml=tuple(float(size) * voxel_ml for size in np.sort(sizes_vox)[::-1]),
        holes_ml=tuple(float(size) * voxel_ml for size in _hole_sizes(part)),
        solid_fraction=solid_fraction(components == sizes_vox.argmax() + 1),
        gaps=tuple(int(index) + box[0].start for index in np.flatnonzero(~with_gland)),
        disorder=mask_disorder(part),
        touched_sides=_touched_sides(box, gland.shape),
    )


def image_disorder(array: np.ndarray) -> float:
    """Return how much smoother a stack gets when one run of its slices is turned round.

    Slices are as far apart as 1 minus their correlation. Every run is tried, as the 2-opt move of route planning
    (Croes 1958) does; two swapped neighbours are a run too. A stack that is upside down as a whole is in order.

    Args:
        array: Image [Z, Y, X].

    Returns:
        The saving in mean steps between neighbours: 0 for a stack in order.
    """
    thin = array[:, :: max(1, array.shape[1] // ORDER_SAMPLES), :: max(1, array.shape[2] // ORDER_SAMPLES)]
    slices = thin.reshape(len(thin), -1).astype(np.float64)
    slices -= slices.mean(axis=1, keepdims=True)
    slices /= np.maximum(np.linalg.norm(slices, axis=1, keepdims=True), np.finfo(float).tiny)
    apart = np.pad(1 - slices @ slices.T, 1)  # ends of the stack cost nothing
    steps = np.diagonal(apart, offset=1)
    savings = np.triu(steps[:-1, None] + steps[None, 1:] - apart[:-2, 1:-1] - apart[1:-1, 2:], k=1)
    return float(savings.max() / max(steps[1:-1].mean(), np.finfo(float).eps))


def mask_disorder(gland: np.ndarray) -> float:
    """Return the part of a slice that is left out although gland lies above and below it, in the worst slice.

    A gland is nearly convex, so that a slice has what two slices around it share. Slices without gland are not counted.

    Args:
        gland: bool array [Z, Y, X] with at least one voxel.

    Returns:
        Left out over left out and marked: 0 for an ellipsoid, nearly 1 where slices are shuffled.
    """
    slices = gland[gland.any(axis=(1, 2))]
    between = np.logical_or.accumulate(slices) & np.logical_or.accumulate(slices[::-1])[::-1]
    marked, filled = (part.reshape(len(slices), -1).sum(axis=1) for part in (slices, between))
    return float((1 - marked / filled).max())


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
    """Return why a mask cannot be used; at most one finding."""
    if num_bad := _num_not_finite(array):
        return [_not_finite(case_id, "mask", num_bad, array.size)]
    problem = label_problem(array, labels=labels)
    return [] if problem is None else [_error(case_id, *problem)]


def _check_not_image(case_id: str, image: Volume, mask: Volume) -> list[Finding]:
    """Return `mask_is_image` when the mask has the image's voxels."""
    if not np.array_equal(image.array, mask.array):
        return []
    message = "the mask has the voxels of its image; put the mask in its place, or list the case under data.exclude"
    return [_error(case_id, "mask_is_image", message)]


def _check_image_order(case_id: str, disorder: float | None) -> list[Finding]:
    if disorder is None or disorder <= MAX_IMAGE_DISORDER:
        return []
    message = (
        f"the image gets smoother by {disorder:.1f} mean steps between slices when a run of them is turned round, and "
        f"{MAX_IMAGE_DISORDER:g} is the most for a stack in order; sort the slices by position, not by name, and convert again"
    )
    return [_warning(case_id, "slices_out_of_order", message)]


def _check_ignore_label(case_id: str, quality: ReferenceQuality) -> list[Finding]:
    """Warn of 255 beside other labels: alone it is the gland of a binary mask."""
    others = [label for label in quality.labels_ml if label != IGNORE_LABEL]
    if not others or len(others) == len(quality.labels_ml):
        return []
    message = (
        f"label {IGNORE_LABEL} stands beside {listed(others)}: it marks voxels to ignore, or the mask was interpolated; export "
        "it again, or name the labels of the gland: data.whole_gland_labels=[...]"
    )
    return [_warning(case_id, "label_255", message)]


def _check_reference(case_id: str, quality: ReferenceQuality) -> list[Finding]:
    """Return what is unusual about a gland."""
    said = [
        ("implausible_volume", _volume_message(quality)),
        ("mask_touches_border", _border_message(quality)),
        ("several_components", _components_message(quality)),
        ("gap", _gap_message(quality)),
        ("slices_out_of_order", _order_message(quality)),
        ("holes", _holes_message(quality)),
    ]
    warnings = [_warning(case_id, check, message) for check, message in said if message]
    return [*warnings, *_check_outline(case_id, quality)]


def _volume_message(quality: ReferenceQuality) -> str:
    low_ml, high_ml = PLAUSIBLE_VOLUME_ML
    if low_ml <= quality.gland_volume_ml <= high_ml:
        return ""
    return (
        f"the gland has {quality.gland_volume_ml:.1f} mL, and {low_ml:g} to {high_ml:g} mL are usual; "
        "look at mask and spacing"
    )


def _border_message(quality: ReferenceQuality) -> str:
    if not quality.touched_sides:
        return ""
    sides = ", ".join(quality.touched_sides)
    return f"the mask reaches the image's border ({sides}), so that gland may be missing; look at it"


def _components_message(quality: ReferenceQuality) -> str:
    if len(quality.components_ml) == 1:
        return ""
    sizes = _millilitres(quality.components_ml)
    return f"the mask has {len(quality.components_ml)} components ({sizes} mL); look for stray voxels"


def _gap_message(quality: ReferenceQuality) -> str:
    if not quality.gaps:
        return ""
    slices = listed(quality.gaps)
    return f"{len(quality.gaps)} slices between slices with gland have none ({slices}, from 0 at the inferior end); draw them"


def _order_message(quality: ReferenceQuality) -> str:
    if quality.disorder <= MAX_MASK_DISORDER:
        return ""
    return (
        f"a slice of the mask leaves out {quality.disorder:.0%} of the gland that its neighbours have above and below, and "
        f"{MAX_MASK_DISORDER:.0%} is the most for slices in order; look whether mask slices are shuffled or half drawn"
    )


def _holes_message(quality: ReferenceQuality) -> str:
    if sum(quality.holes_ml) < MIN_HOLES_ML:
        return ""
    return f"the mask encloses holes of {_millilitres(quality.holes_ml)} mL; fill them if they are slips"


def _check_outline(case_id: str, quality: ReferenceQuality) -> list[Finding]:
    """Check the largest component: a prostate is nearly convex in axial slices, a mask that has leaked is not."""
    fraction = quality.solid_fraction
    if fraction >= SOLID_FRACTION:
        return []
    message = (
        f"the mask fills {fraction:.0%} of its convex outline in axial slices, and glands fill {SOLID_FRACTION:.0%} or more; "
        "it may have leaked into other tissue: look at it, mend it, or list the case under data.exclude"
    )
    return [Finding(case_id=case_id, check="not_compact", is_error=fraction < LEAKED_FRACTION, message=message)]


def _touched_sides(box: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(
        side
        for part, size, (first, last) in zip(box, shape, SIDES, strict=True)
        for side, touches in ((first, part.start == 0), (last, part.stop == size))
        if touches
    )


def _hole_sizes(gland: np.ndarray) -> np.ndarray:
    """Return the sizes in voxels of the background that the gland encloses, largest first."""
    background = ndimage.label(~np.pad(gland, 1))[0]
    sizes = np.bincount(background.ravel())[1:]
    return np.sort(np.delete(sizes, background[0, 0, 0] - 1))[::-1]


def _hull_area(gland_slice: np.ndarray) -> float:
    """Return the area in pixels of the convex hull of a slice [Y, X], pixel corners included."""
    rows = np.flatnonzero(gland_slice.any(axis=1))
    first = gland_slice[rows].argmax(axis=1)
    past_last = gland_slice.shape[1] - gland_slice[rows, ::-1].argmax(axis=1)
    corners = [np.column_stack([y, x]) for y in (rows, rows + 1) for x in (first, past_last)]
    return float(ConvexHull(np.concatenate(corners)).volume)


def _millilitres(volumes_ml: Sequence[float]) -> str:
    return listed([f"{volume_ml:.3g}" for volume_ml in volumes_ml])
