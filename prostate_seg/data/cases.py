"""Finding the cases of a data set: the image and the mask of each study, paired by name, wherever `layouts` finds them.

The name is the case id, in Unicode NFC. Nothing here opens an image.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from prostate_seg.data.attributes import FILE_NAME, read_attributes
from prostate_seg.data.layouts import Listing, Stems, Unread, list_files, nfc
from prostate_seg.imaging.quality import Finding

ROLE = "t2w?|ax|tra|mask|seg|segmentation|labels?|gt|roi|prostate|gland|whole[ _-]?gland|zones?|0000"
"""Last words of a name that say what a file is, and not which study it shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Where one image and its mask are."""

    case_id: str
    """Stem of the files, Unicode NFC."""
    patient_id: str
    """Group 1 of the patient pattern."""
    study_id: str
    """What follows the patient id and an underscore; empty if nothing does."""
    image: Path
    """Image file, or folder with a DICOM series."""
    mask: Path | None
    """None when there is none and none is needed."""
    attributes: Mapping[str, str] = field(default_factory=dict)
    """What cases.csv says of it, by column; the same columns for every case of a data set."""


def discover_cases(
    root: Path, *, patient_pattern: str, exclude: Collection[str], masks_required: bool = True
) -> tuple[list[Case], list[Finding]]:
    """Pair the images and masks of a data set by name.

    Args:
        root: The data folder, in one of the layouts of `layouts`.
        patient_pattern: Regular expression whose group 1 on the case id is the patient id.
        exclude: Case ids to leave out; nothing is said about them.
        masks_required: Whether an image without a mask is an error.

    Returns:
        The cases sorted by id, and what is wrong with the rest: `image_without_mask`, `mask_without_image`, `duplicate_stem`,
        `no_patient_id` and `unknown_exclude` are errors, `ignored_file` and `no_attributes` are warnings.

    Raises:
        InputError: If the layout is not clear, a folder is missing, there are no images, or cases.csv is no such table.
    """
    listing = list_files(root, masks_required=masks_required)
    images, masks, findings = listing.images, listing.masks, [_ignored(path) for path in listing.ignored]
    unread = {case_id: one for case_id, one in listing.unread.items() if case_id in masks and case_id not in images}
    findings += [_unread(one) for case_id, one in listing.unread.items() if case_id not in unread]
    attributes = {nfc(case_id): row for case_id, row in read_attributes(root).items()}
    unknown = dict.fromkeys(next(iter(attributes.values()), {}), "")
    excluded = {nfc(case_id) for case_id in exclude}
    findings += [_unknown_exclude(case_id, {*images, *masks}) for case_id in sorted(excluded - {*images, *masks})]
    cases = []
    for case_id in sorted({*images, *masks} - excluded):
        problem = _pairing_problem(case_id, listing, masks_required=masks_required)
        patient = re.search(patient_pattern, case_id)
        if problem is not None:
            findings.append(problem)
        elif patient is None or not patient.group(1):
            findings.append(_no_patient_id(case_id, patient_pattern))
        else:
            case = _case(case_id, patient, image=images[case_id][0], masks=masks.get(case_id, []))
            cases.append(replace(case, attributes=attributes.get(case_id, unknown)))
            findings += [] if case_id in attributes or not attributes else [_no_attributes(case_id)]
    return cases, findings


def _pairing_problem(case_id: str, listing: Listing, *, masks_required: bool) -> Finding | None:
    """Return why this stem is not one image and one mask."""
    images, masks = listing.images, listing.masks
    for kind, stems in (("image", images), ("mask", masks)):
        if len(paths := stems.get(case_id, [])) > 1:
            message = f"a case has one {kind}, and there are {_names(paths)}; keep one of them"
            return _error(case_id, "duplicate_stem", message)
    if case_id not in images:
        step = _step(case_id, masks, images, unread=listing.unread.get(case_id))
        return _error(case_id, "mask_without_image", f"{_names(masks[case_id])} has no image of its name; {step}")
    if masks_required and case_id not in masks:
        step = _step(case_id, images, masks, unread=None)
        return _error(case_id, "image_without_mask", f"{_names(images[case_id])} has no mask of its name; {step}")
    return None


def _step(case_id: str, of_case: Stems, others: Stems, *, unread: Unread | None) -> str:
    """Say how an image or mask without its partner gets one: most are there, under a name that differs a little."""
    if unread is not None:
        return f"{_names([unread.path])} is not read: {unread.reason}"
    near = [
        path
        for stem, paths in others.items()
        if stem not in of_case and _plain(stem) == _plain(case_id)
        for path in paths
    ]
    if near:
        return f"if it belongs to {_names(near)}, give both one name"
    return "add it, or list it under data.exclude"


def _plain(case_id: str) -> str:
    """Return a name without capitals and without the words that programs add for an image or a mask."""
    return re.sub(rf"([ _.-]+({ROLE}))+$", "", case_id.casefold())


def _case(case_id: str, patient: re.Match[str], *, image: Path, masks: Iterable[Path]) -> Case:
    study_id = case_id[patient.end(1) :].removeprefix("_")
    return Case(
        case_id=case_id, patient_id=patient.group(1), study_id=study_id, image=image, mask=next(iter(masks), None)
    )


def _no_patient_id(case_id: str, patient_pattern: str) -> Finding:
    message = (
        f"the name does not match data.patient_pattern {patient_pattern!r}; rename the files or correct the pattern"
    )
    return _error(case_id, "no_patient_id", message)


def _unknown_exclude(case_id: str, known: Collection[str]) -> Finding:
    near = difflib.get_close_matches(case_id, sorted(known), n=1)
    hint = f"did you mean {near[0]}?" if near else "look at the names of the images"
    return _error(case_id, "unknown_exclude", f"data.exclude names a case that is not there; {hint}")


def _ignored(path: Path) -> Finding:
    message = f"{path.parent.name}/{path.name} is no image by its suffix and is ignored; convert it or take it away"
    return Finding(case_id=path.name, check="ignored_file", is_error=False, message=message)


def _unread(one: Unread) -> Finding:
    message = f"{_names([one.path])} is not read: {one.reason}"
    return Finding(case_id=one.path.name, check="ignored_file", is_error=False, message=message)


def _no_attributes(case_id: str) -> Finding:
    message = f"{FILE_NAME} has no row of it, so that its attributes are unknown; add one"
    return Finding(case_id=case_id, check="no_attributes", is_error=False, message=message)


def _error(case_id: str, check: str, message: str) -> Finding:
    return Finding(case_id=case_id, check=check, is_error=True, message=message)


def _names(paths: Iterable[Path]) -> str:
    return " and ".join(f"{path.parent.name}/{path.name}" for path in paths)
