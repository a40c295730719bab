"""Cases of a data set: the image and the mask of each study, paired by name.

The name is the case id, in Unicode NFC. Nothing here opens an image.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prostate_seg.data.attributes import FILE_NAME, read_attributes
from prostate_seg.data.layouts import Stems, Unread, list_files, nfc
from prostate_seg.imaging.geometry import Finding

ROLE = "t2w?|ax|tra|mask|seg|segmentation|labels?|gt|roi|prostate|gland|whole[ _-]?gland|zones?|0000"
"""Last words of a file name that describe the kind of file and not the study."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One image and its mask."""

    case_id: str
    """Stem of the files, Unicode NFC."""
    patient_id: str
    """Group 1 of the patient pattern."""
    study_id: str
    """Rest of the case id after the patient id and an underscore; may be empty."""
    image: Path
    """Image file, or folder with a DICOM series."""
    mask: Path | None
    """None if there is no mask and none is required."""
    attributes: Mapping[str, str] = field(default_factory=dict)
    """Row of cases.csv, by column; the same columns for every case of a data set."""


def discover_cases(
    root: Path, *, patient_pattern: str, exclude: Collection[str], masks_required: bool = True
) -> tuple[list[Case], list[Finding]]:
    """Pair the images and masks of a data set by name.

    Args:
        root: The data folder, in one of the layouts of `layouts`.
        patient_pattern: Regular expression whose group 1 on the case id is the patient id.
        exclude: Case ids to leave out, without a finding.
        masks_required: Whether an image without a mask is an error.

    Returns:
        The cases sorted by id, and the findings on the other files: `image_without_mask`, `mask_without_image`,
        `duplicate_stem`, `no_patient_id` and `unknown_exclude` are errors, `ignored_file` and `no_attributes` are warnings.

    Raises:
        InputError: If the layout is not clear, a folder is missing, there are no images, or cases.csv is not a valid table.
    """
    listing = list_files(root, masks_required=masks_required)
    images, masks = listing.images, listing.masks
    cases: list[Case] = []
    findings: list[Finding] = []

    def report(case_id: str, check: str, message: str, *, is_error: bool = True) -> None:
        findings.append(Finding(check, message, is_error=is_error, case_id=case_id))

    for path in listing.ignored:
        message = f"{_names([path])} is no image by its suffix and is ignored; convert or remove it"
        report(path.name, "ignored_file", message, is_error=False)
    unread = {case_id: one for case_id, one in listing.unread.items() if case_id in masks and case_id not in images}
    for case_id, one in listing.unread.items():
        if case_id not in unread:
            report(one.path.name, "ignored_file", f"{_names([one.path])} is not read: {one.reason}", is_error=False)
    attributes = {nfc(case_id): row for case_id, row in read_attributes(root).items()}
    unknown = dict.fromkeys(next(iter(attributes.values()), {}), "")
    excluded, known = {nfc(case_id) for case_id in exclude}, {*images, *masks}
    for case_id in sorted(excluded - known):
        near = difflib.get_close_matches(case_id, sorted(known), n=1)
        hint = f"did you mean {near[0]}?" if near else "compare with the names of the images"
        report(case_id, "unknown_exclude", f"data.exclude names a case that does not exist; {hint}")

    for case_id in sorted(known - excluded):
        patient = re.search(patient_pattern, case_id)
        problem = _pairing_problem(case_id, images, masks, unread, masks_required=masks_required)
        if problem is not None:
            report(case_id, *problem)
        elif patient is None or not patient.group(1):
            rule = f"the name does not match data.patient_pattern {patient_pattern!r}"
            report(case_id, "no_patient_id", f"{rule}; rename the files or correct the pattern")
        else:
            cases.append(
                Case(
                    case_id=case_id,
                    patient_id=patient.group(1),
                    study_id=case_id[patient.end(1) :].removeprefix("_"),
                    image=images[case_id][0],
                    mask=next(iter(masks.get(case_id, [])), None),
                    attributes=attributes.get(case_id, unknown),
                )
            )
            if attributes and case_id not in attributes:
                message = f"{FILE_NAME} has no row for it, so that its attributes are unknown; add one"
                report(case_id, "no_attributes", message, is_error=False)
    return cases, findings


def _pairing_problem(
    case_id: str, images: Stems, masks: Stems, unread: Mapping[str, Unread], *, masks_required: bool
) -> tuple[str, str] | None:
    """Return check and message if a case is not one image and one mask."""
    for kind, paths in (("image", images.get(case_id, [])), ("mask", masks.get(case_id, []))):
        if len(paths) > 1:
            return "duplicate_stem", f"a case has one {kind}, and there are {_names(paths)}; keep one of them"
    if case_id not in images:
        step = _near_name(case_id, masks, images)
        if case_id in unread:
            step = f"{_names([unread[case_id].path])} is not read: {unread[case_id].reason}"
        return "mask_without_image", f"{_names(masks[case_id])} has no image of its name; {step}"
    if masks_required and case_id not in masks:
        step = _near_name(case_id, images, masks)
        return "image_without_mask", f"{_names(images[case_id])} has no mask of its name; {step}"
    return None


def _near_name(case_id: str, own: Stems, others: Stems) -> str:
    """Return the next step for a file without its partner: most partners exist, under a name that differs a little."""

    def plain(name: str) -> str:
        return re.sub(rf"([ _.-]+({ROLE}))+$", "", name.casefold())

    alike = [stem for stem in others if stem not in own and plain(stem) == plain(case_id)]
    if near := [path for stem in alike for path in others[stem]]:
        return f"if it belongs to {_names(near)}, give both one name"
    return "add it, or list it under data.exclude"


def _names(paths: Iterable[Path]) -> str:
    return " and ".join(f"{path.parent.name}/{path.name}" for path in paths)
