"""Finding the cases of a data set: root/images and root/masks, one file per study in each, with equal stems.

An image may also be a folder with a DICOM series. The stem is the case id, in Unicode NFC: macOS stores an umlaut in two
characters, other systems in one. Nothing here opens an image.
"""

import difflib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from prostate_seg.data.attributes import FILE_NAME, read_attributes
from prostate_seg.errors import InputError
from prostate_seg.imaging.quality import Finding
from prostate_seg.imaging.sitk_reader import image_suffix

COMPANION_SUFFIXES = (".raw", ".zraw", ".dvc", ".md", ".txt")
"""Files that belong beside images: the voxels of a .mhd, DVC's notes, people's notes."""

COMPANION_STEMS = ("readme", "license", "licence")
"""First words of other files that are no surprise in a data folder."""

LAYOUT = "expected are images/ and masks/ with equal names, such as images/10001_1.mha and masks/10001_1.nii.gz"

Stems = Mapping[str, list[Path]]
"""The files or folders of each stem; more than one is an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseFiles:
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
) -> tuple[list[CaseFiles], list[Finding]]:
    """Pair the images and masks of a data set by name.

    Args:
        root: Folder with images/ and masks/.
        patient_pattern: Regular expression whose group 1 on the case id is the patient id.
        exclude: Case ids to leave out; nothing is said about them.
        masks_required: Whether an image without a mask is an error.

    Returns:
        The cases sorted by id, and what is wrong with the rest: `image_without_mask`, `mask_without_image`, `duplicate_stem`,
        `no_patient_id` and `unknown_exclude` are errors, `ignored_file` and `no_attributes` are warnings.

    Raises:
        InputError: If a folder is missing, there are no images, or cases.csv is no such table.
    """
    images, masks, findings = _listing(root, masks_required=masks_required)
    attributes = {_nfc(case_id): row for case_id, row in read_attributes(root).items()}
    unknown = dict.fromkeys(next(iter(attributes.values()), {}), "")
    excluded = {_nfc(case_id) for case_id in exclude}
    findings += [_unknown_exclude(case_id, {*images, *masks}) for case_id in sorted(excluded - {*images, *masks})]
    cases = []
    for case_id in sorted({*images, *masks} - excluded):
        problem = _pairing_problem(case_id, images, masks, masks_required=masks_required)
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


def _listing(root: Path, *, masks_required: bool) -> tuple[Stems, Stems, list[Finding]]:
    """Return what lies in images/ and masks/."""
    folders = [root / "images", root / "masks"]
    missing = [folder for folder in folders[: 2 if masks_required else 1] if not folder.is_dir()]
    if missing:
        raise InputError(f"there is no folder {missing[0]}; {LAYOUT}. Set data.root, or run stage=fetch first.")
    (images, ignored_images), (masks, ignored_masks) = (_by_stem(folder) for folder in folders)
    if not images:
        raise InputError(f"there is no image in {folders[0]}; {LAYOUT}. Set data.root, or run stage=fetch first.")
    return images, masks, [_ignored(path) for path in ignored_images + ignored_masks]


def _by_stem(folder: Path) -> tuple[Stems, list[Path]]:
    """Return the images of a folder by stem, and the files that are none."""
    stems: dict[str, list[Path]] = defaultdict(list)
    ignored = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        stem = _stem(path)
        if stem is not None:
            stems[stem].append(path)
        elif not _is_companion(path):
            ignored.append(path)
    return dict(stems), ignored


def _stem(path: Path) -> str | None:
    """Return the name without its image suffix, NFC; None for a file that is no image."""
    if path.name.startswith("."):
        return None
    if path.is_dir():
        return _nfc(path.name)
    suffix = image_suffix(path.name)
    return _nfc(path.name[: -len(suffix)]) if suffix and len(path.name) > len(suffix) else None


def _is_companion(path: Path) -> bool:
    name = path.name.lower()
    return name.startswith((".", *COMPANION_STEMS)) or name.endswith(COMPANION_SUFFIXES)


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _pairing_problem(case_id: str, images: Stems, masks: Stems, *, masks_required: bool) -> Finding | None:
    """Return why this stem is not one image and one mask."""
    for kind, stems in (("image", images), ("mask", masks)):
        if len(paths := stems.get(case_id, [])) > 1:
            message = f"a case has one {kind}, and there are {_names(paths)}; keep one of them"
            return _error(case_id, "duplicate_stem", message)
    if case_id not in images:
        message = f"{_names(masks[case_id])} has no image of its name in images/; add it, or list it under data.exclude"
        return _error(case_id, "mask_without_image", message)
    if masks_required and case_id not in masks:
        message = f"{_names(images[case_id])} has no mask of its name in masks/; add it, or list it under data.exclude"
        return _error(case_id, "image_without_mask", message)
    return None


def _case(case_id: str, patient: re.Match[str], *, image: Path, masks: Iterable[Path]) -> CaseFiles:
    study_id = case_id[patient.end(1) :].removeprefix("_")
    return CaseFiles(
        case_id=case_id, patient_id=patient.group(1), study_id=study_id, image=image, mask=next(iter(masks), None)
    )


def _no_patient_id(case_id: str, patient_pattern: str) -> Finding:
    message = f"the name does not match data.patient_pattern {patient_pattern!r}; rename the files or mend the pattern"
    return _error(case_id, "no_patient_id", message)


def _unknown_exclude(case_id: str, known: Collection[str]) -> Finding:
    near = difflib.get_close_matches(case_id, sorted(known), n=1)
    hint = f"did you mean {near[0]}?" if near else "look at the names in images/"
    return _error(case_id, "unknown_exclude", f"data.exclude names a case that is not there; {hint}")


def _ignored(path: Path) -> Finding:
    message = f"{path.parent.name}/{path.name} is no image by its suffix and is ignored; convert it or take it away"
    return Finding(case_id=path.name, check="ignored_file", is_error=False, message=message)


def _no_attributes(case_id: str) -> Finding:
    message = f"{FILE_NAME} has no row of it, so that its attributes are unknown; add one"
    return Finding(case_id=case_id, check="no_attributes", is_error=False, message=message)


def _error(case_id: str, check: str, message: str) -> Finding:
    return Finding(case_id=case_id, check=check, is_error=True, message=message)


def _names(paths: Iterable[Path]) -> str:
    return " and ".join(f"{path.parent.name}/{path.name}" for path in paths)
