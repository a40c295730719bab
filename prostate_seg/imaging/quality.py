"""Named checks of a case that could be read, based on measurements that are made once.

A finding that is an error excludes the case; a warning is reported. Arrays are [Z, Y, X] in LPS, volumes in mL.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull

from prostate_seg.common.errors import listed
from prostate_seg.imaging.geometry import Finding, Spacing, Volume, bounding_box
from prostate_seg.imaging.labels import label_problem

MIN_SLICES = 3
"""A volume with fewer slices has no apex, mid-gland and base."""
PLAUSIBLE_VOLUME_ML = (15.0, 263.0)
"""Smallest and largest gland among the public PI-CAI studies."""
SOLID_FRACTION = 0.85
"""Least usual `solid_fraction`: five reference masks have 0.96."""
LEAKED_FRACTION = 0.7
"""Least accepted `solid_fraction`: PI-CAI's faulty mask of 11050_1001070, which leaks to the front, has 0.59."""
MIN_HOLES_ML = 0.05
"""Smaller holes are single voxels, which expert masks have too."""
MAX_IMAGE_DISORDER = 0.5
"""Largest `image_disorder` of ordered slices. Five real studies and eighty phantoms have 0, also when every other slice is
moved by 1 mm; slices that are sorted by name, shuffled or interleaved have 1.3 or more, two swapped slices 0.29 or more. Five
studies do not settle a limit, so that more is a warning and excludes no case."""
MAX_MASK_DISORDER = 0.35
"""Largest `mask_disorder` of ordered slices. Human masks have up to 0.18, interleaved or sorted by name 0.57 or more; two
swapped neighbours in the middle of a gland hardly change it, and are rarely found. The limit is midway and rests on five masks,
so that more is a warning."""
ORDER_SAMPLES = 64
"""Pixels along each side of a slice that `image_disorder` uses; more cost time and find no more."""
MAJORITY_FRACTION = 0.8
"""Fraction of the other masks that must agree on a label before one that differs is reported; below it a data set is mixed."""
MIN_MASKS = 5
"""Fewer masks have no majority."""
SIDES = (("inferior", "superior"), ("anterior", "posterior"), ("right", "left"))
"""Sides of the first and the last voxel along z, y and x."""
PLANES = ("axial", "coronal", "sagittal")
"""Plane of slices that are stacked along z, y and x."""
MIN_ANISOTROPY = 1.5
"""Least ratio of the largest voxel edge to the next that shows along which axis slices are stacked. Slices of T2-weighted
studies are 1.5 to 4 mm apart and pixels 0.2 to 0.8 mm wide; a volume with nearly equal edges can be cut in any plane."""
IGNORE_LABEL = 255
"""The largest label of an 8-bit file: the gland of binary masks, and unlabelled voxels in label maps."""
ANY_NEIGHBOUR = np.ones((3, 3, 3), dtype=bool)
"""Connectivity of components: voxels that share a face, an edge or a corner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceQuality:
    """Measurements of a reference mask that marks gland; `disorder` is its `mask_disorder`."""

    labels_ml: Mapping[int, float]
    """Volume of every label above 0, also of those that are not gland."""
    gland_volume_ml: float
    num_slices: int
    """Slices with gland."""
    components_ml: tuple[float, ...]
    """Volumes of the connected components, largest first."""
    holes_ml: tuple[float, ...]
    """Volumes of the enclosed holes, largest first."""
    solid_fraction: float
    gaps: tuple[int, ...]
    """Slices without gland between slices with gland, counted from 0 at the inferior end."""
    disorder: float
    touched_sides: tuple[str, ...]
    """Sides of the image that the gland reaches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseQuality:
    """Measurements of a case and the findings about it."""

    findings: list[Finding]
    image_disorder: float | None
    """See `image_disorder`; None for an image that cannot be used."""
    reference: ReferenceQuality | None
    """None for a mask that cannot be used."""


def check_case(
    case_id: str,
    image: Volume | None,
    mask: Volume | None,
    *,
    labels: Sequence[int] | None,
    allow_others: bool = True,
) -> CaseQuality:
    """Measure a case once, and return the measurements with all findings.

    Errors are `few_slices`, `nan`, `constant_image`, `grids_differ`, `mask_is_image`, `label_not_integer`,
    `label_out_of_range`, `too_many_labels`, `empty_mask`, `wanted_label_absent`, `unnamed_label` and, for a mask that has
    leaked, `not_compact`; warnings are `not_axial`, `label_255`, `slices_out_of_order`, `several_components`, `holes`, `gap`,
    `implausible_volume`, `mask_touches_border`, a milder `not_compact` and those of reading (`Volume.warnings`).

    Args:
        case_id: Written to each finding.
        image: T2-weighted volume; None when it could not be read.
        mask: Its reference, with integer labels as `loading.read_mask` returns them; None when it could not be read.
        labels: Mask labels that are gland; None takes every label above 0.
        allow_others: Whether a mask may have other labels than these.
    """
    findings = [
        replace(doubt, message=f"{kind}: {doubt.message}")
        for kind, volume in (("image", image), ("mask", mask))
        for doubt in (volume.warnings if volume else ())
    ]
    disorder, reference = None, None
    if image is not None:
        found, disorder = _check_image(image)
        findings += found
    if image is not None and mask is not None and not image.geometry.is_same_grid(mask.geometry):
        message = (
            f"image and mask are on different grids\n  image {image.geometry}\n  mask  {mask.geometry}\n"
            "Re-export the mask on the T2 grid, or list the case under data.exclude."
        )
        findings.append(Finding("grids_differ", message, is_error=True))
    if mask is not None:
        found, reference = _check_mask(mask, image, labels=labels, allow_others=allow_others)
        findings += found
    findings = [replace(finding, case_id=case_id) for finding in findings]
    return CaseQuality(findings=findings, image_disorder=disorder, reference=reference)


def _check_image(image: Volume) -> tuple[list[Finding], float | None]:
    """Return the findings on an image and its `image_disorder`; None for an image that cannot be used."""
    array, findings = image.array, []
    if min(array.shape) < MIN_SLICES:
        shape = "x".join(str(size) for size in array.shape)
        message = f"an image has at least {MIN_SLICES} slices, and this has {shape} voxels (z, y, x); export all slices"
        findings.append(Finding("few_slices", message, is_error=True))
    if not_finite := _not_finite("image", array):
        findings.append(Finding(*not_finite, is_error=True))
    elif array.min() == array.max():
        message = f"the image has no intensity range: every voxel is {array.flat[0]:g}; export it again"
        findings.append(Finding("constant_image", message, is_error=True))
    is_usable, plane = not findings, slice_plane(image.geometry.spacing_mm)
    if plane != PLANES[0]:
        spacing = " x ".join(f"{edge_mm:.3g}" for edge_mm in image.geometry.spacing_mm)
        message = f"its slices are {plane} (spacing z, y, x {spacing} mm), not axial; use the axial series"
        findings.append(Finding("not_axial", message))
    if not is_usable:
        return findings, None
    disorder = image_disorder(np.moveaxis(array, PLANES.index(plane), 0))
    if disorder > MAX_IMAGE_DISORDER:
        message = (
            f"the image gets smoother by {disorder:.1f} mean steps between slices when a run of slices is reversed, "
            f"and {MAX_IMAGE_DISORDER:g} is the most for ordered slices; sort the slices by position, not by name, and "
            "convert again"
        )
        findings.append(Finding("slices_out_of_order", message))
    return findings, disorder


def _check_mask(
    mask: Volume, image: Volume | None, *, labels: Sequence[int] | None, allow_others: bool
) -> tuple[list[Finding], ReferenceQuality | None]:
    """Return the findings on a mask and its measurements; None for a mask that cannot be used."""
    error = _not_finite("mask", mask.array) or label_problem(mask.array, labels=labels, allow_others=allow_others)
    if image is not None and np.array_equal(image.array, mask.array):
        message = "the mask has the voxels of its image; replace it, or list the case under data.exclude"
        error = "mask_is_image", message
    if error is not None:
        return [Finding(*error, is_error=True)], None
    reference = measure_reference(mask, labels=labels)
    return _reference_findings(reference, are_labels_named=labels is not None), reference


def _not_finite(noun: str, array: np.ndarray) -> tuple[str, str] | None:
    num_bad = 0 if array.dtype.kind in "iub" else int(array.size - np.count_nonzero(np.isfinite(array)))
    message = f"every voxel is a finite number, and {num_bad} of {array.size} in the {noun} are not; export it again"
    return ("nan", message) if num_bad else None


def _reference_findings(reference: ReferenceQuality, *, are_labels_named: bool) -> list[Finding]:
    """Return everything unusual about a reference mask."""
    others = [label for label in reference.labels_ml if label != IGNORE_LABEL]
    low_ml, high_ml = PLAUSIBLE_VOLUME_ML
    is_found = {
        # Alone it is the gland of a binary mask.
        "label_255": not are_labels_named and IGNORE_LABEL in reference.labels_ml and bool(others),
        "implausible_volume": not low_ml <= reference.gland_volume_ml <= high_ml,
        "mask_touches_border": bool(reference.touched_sides),
        "several_components": len(reference.components_ml) > 1,
        "gap": bool(reference.gaps),
        "slices_out_of_order": reference.disorder > MAX_MASK_DISORDER,
        "holes": sum(reference.holes_ml) >= MIN_HOLES_ML,
        "not_compact": reference.solid_fraction < SOLID_FRACTION,
    }
    messages = {
        "label_255": f"the mask has label {IGNORE_LABEL} beside {listed(others)}: it marks voxels to ignore, or the mask was "
        "interpolated; export it again, or name the labels of the gland: data.whole_gland_labels=[...]",
        "implausible_volume": f"the gland has {reference.gland_volume_ml:.1f} mL, and {low_ml:g} to {high_ml:g} mL are usual; "
        "check mask and spacing",
        "mask_touches_border": f"the mask reaches the image's border ({', '.join(reference.touched_sides)}), so that gland may "
        "be missing; check it",
        "several_components": f"the mask has {len(reference.components_ml)} components "
        f"({_millilitres(reference.components_ml)} mL); check for stray voxels",
        "gap": f"{len(reference.gaps)} slices between slices with gland have none ({listed(reference.gaps)}, from 0 at the "
        "inferior end); draw them",
        "slices_out_of_order": f"a slice of the mask leaves out {reference.disorder:.0%} of the gland that its neighbours have "
        f"above and below, and {MAX_MASK_DISORDER:.0%} is the most for ordered slices; check whether mask slices are shuffled "
        "or half drawn",
        "holes": f"the mask encloses holes of {_millilitres(reference.holes_ml)} mL; fill them unless they are intended",
        "not_compact": f"the mask fills {reference.solid_fraction:.0%} of its convex outline in axial slices, and glands fill "
        f"{SOLID_FRACTION:.0%} or more; it may have leaked into other tissue: check it, fix it, or list the case under "
        "data.exclude",
    }
    errors = ["not_compact"] if reference.solid_fraction < LEAKED_FRACTION else []
    return [Finding(check, messages[check], is_error=check in errors) for check, found in is_found.items() if found]


def slice_plane(spacing_mm: Spacing) -> str:
    """Return the plane of a volume's slices, one of `PLANES`; axial where the voxels are nearly cubes.

    The spacing is that in LPS (z, y, x), so that the order of the axes in the file has no influence.
    """
    thickest = int(np.argmax(spacing_mm))
    _, next_mm, largest_mm = sorted(spacing_mm)
    return PLANES[thickest] if largest_mm >= MIN_ANISOTROPY * next_mm else PLANES[0]


def check_slice_planes(spacings_mm: Mapping[str, Spacing]) -> list[Finding]:
    """Return `slice_plane_differs` for each case whose slices are in another plane than most; spacings by case id."""
    planes = {case_id: slice_plane(spacing_mm) for case_id, spacing_mm in spacings_mm.items()}
    common, num = Counter(planes.values()).most_common(1)[0] if planes else ("", 0)
    if 2 * num <= len(planes):
        return []
    others = "the others'" if num >= len(planes) - 1 else "most others'"
    findings = []
    for case_id, plane in planes.items():
        if plane != common:
            advice = f"{others} {common}; use its {common} series, or list the case under data.exclude"
            findings.append(Finding("slice_plane_differs", f"its slices are {plane}, {advice}", case_id=case_id))
    return findings


def check_zones(labels_of: Mapping[str, Collection[int]]) -> list[Finding]:
    """Return `zone_missing` for each mask that differs in a label from most others; its gland labels by case id."""
    if len(labels_of) < MIN_MASKS:
        return []
    num_with = Counter(label for labels in labels_of.values() for label in labels)
    enough = MAJORITY_FRACTION * (len(labels_of) - 1)
    findings = []
    for case_id, labels in labels_of.items():
        lacking = [label for label, num in sorted(num_with.items()) if label not in labels and num >= enough]
        alone = [label for label in sorted(labels) if len(labels_of) - num_with[label] >= enough]
        if lacking or alone:
            message = (
                f"{MAJORITY_FRACTION:.0%} or more of the other masks agree on their labels, and this has "
                f"{listed(sorted(labels))}{f', lacks {listed(lacking)}' if lacking else ''}"
                f"{f', alone has {listed(alone)}' if alone else ''}; a zone may be missing: check it"
            )
            findings.append(Finding("zone_missing", message, case_id=case_id))
    return findings


def measure_reference(mask: Volume, *, labels: Sequence[int] | None) -> ReferenceQuality:
    """Measure a mask whose labels are whole numbers and that marks gland; arguments as in `check_case`."""
    gland = whole_gland(mask.array, labels=labels)
    box = bounding_box(gland)
    part, voxel_ml = gland[box], mask.geometry.voxel_volume_ml
    components = ndimage.label(part, structure=ANY_NEIGHBOUR)[0]
    sizes_vox = np.bincount(components.ravel())[1:]
    # Holes are the face-connected regions of the background that do not reach the padding.
    background = ndimage.label(~np.pad(part, 1))[0]
    holes_vox = np.delete(np.bincount(background.ravel())[1:], background[0, 0, 0] - 1)
    found, counts = np.unique(mask.array[mask.array > 0], return_counts=True)
    with_gland = part.any(axis=(1, 2))
    return ReferenceQuality(
        labels_ml={int(label): int(count) * voxel_ml for label, count in zip(found, counts, strict=True)},
        gland_volume_ml=int(sizes_vox.sum()) * voxel_ml,
        num_slices=int(with_gland.sum()),
        components_ml=tuple(float(size) * voxel_ml for size in np.sort(sizes_vox)[::-1]),
        holes_ml=tuple(float(size) * voxel_ml for size in np.sort(holes_vox)[::-1]),
        solid_fraction=solid_fraction(components == sizes_vox.argmax() + 1),
        gaps=tuple(int(index) + box[0].start for index in np.flatnonzero(~with_gland)),
        disorder=mask_disorder(part),
        touched_sides=tuple(
            side
            for extent, size, (first, last) in zip(box, gland.shape, SIDES, strict=True)
            for side, touches in ((first, extent.start == 0), (last, extent.stop == size))
            if touches
        ),
    )


def image_disorder(array: np.ndarray) -> float:
    """Return how much smoother a stack gets when one run of its slices is reversed.

    The distance of two slices is 1 minus their correlation. Every run is tried, as in the 2-opt move of route planning
    (Croes 1958), which includes two swapped neighbours. A stack that is upside down as a whole is ordered. Returns the saving
    for an image [Z, Y, X] in mean distances between neighbours: 0 for an ordered stack.
    """
    thin = array[:, :: max(1, array.shape[1] // ORDER_SAMPLES), :: max(1, array.shape[2] // ORDER_SAMPLES)]
    slices = thin.reshape(len(thin), -1).astype(np.float64)
    slices -= slices.mean(axis=1, keepdims=True)
    slices /= np.maximum(np.linalg.norm(slices, axis=1, keepdims=True), np.finfo(float).tiny)
    apart = np.pad(1 - slices @ slices.T, 1)  # ends of the stack cost nothing
    steps = np.diagonal(apart, offset=1)
    # Reversing slices i to j replaces the steps (i-1, i) and (j, j+1) by (i-1, j) and (i, j+1).
    savings = np.triu(steps[:-1, None] + steps[None, 1:] - apart[:-2, 1:-1] - apart[1:-1, 2:], k=1)
    return float(savings.max() / max(steps[1:-1].mean(), np.finfo(float).eps))


def mask_disorder(gland: np.ndarray) -> float:
    """Return the fraction of a slice that is left out although gland lies above and below it, in the worst slice.

    A gland, bool [Z, Y, X] and not empty, is nearly convex, so that a slice contains the intersection of any two slices around
    it. Slices without gland are not counted. 0 for an ellipsoid, nearly 1 where slices are shuffled.
    """
    slices = gland[gland.any(axis=(1, 2))]
    between = np.logical_or.accumulate(slices) & np.logical_or.accumulate(slices[::-1])[::-1]
    marked, filled = (part.reshape(len(slices), -1).sum(axis=1) for part in (slices, between))
    return float((1 - marked / filled).max())


def whole_gland(mask_array: np.ndarray, *, labels: Sequence[int] | None) -> np.ndarray:
    """Return a bool array that is true for gland; `labels` are gland, or with None every label above 0."""
    return mask_array > 0 if labels is None else np.isin(mask_array, labels)


def solid_fraction(gland: np.ndarray) -> float:
    """Return the area of a gland over the area of the convex hulls of its axial slices, 0 to 1; 1 for a box.

    A prostate, bool [Z, Y, X] and not empty, is nearly convex in axial slices; a mask that has leaked is not.
    """
    slices = gland[gland.any(axis=(1, 2))]
    return int(slices.sum()) / sum(_hull_area(one) for one in slices)


def _hull_area(gland_slice: np.ndarray) -> float:
    """Return the area in pixels of the convex hull of a slice [Y, X], pixel corners included."""
    rows = np.flatnonzero(gland_slice.any(axis=1))
    first = gland_slice[rows].argmax(axis=1)
    past_last = gland_slice.shape[1] - gland_slice[rows, ::-1].argmax(axis=1)
    corners = [np.column_stack([y, x]) for y in (rows, rows + 1) for x in (first, past_last)]
    return float(ConvexHull(np.concatenate(corners)).volume)


def _millilitres(volumes_ml: Sequence[float]) -> str:
    return listed([f"{volume_ml:.3g}" for volume_ml in volumes_ml])
