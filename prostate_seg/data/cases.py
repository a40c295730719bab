"""Cases of a data set: the image and the mask of each study, paired by name, and attributes such as centre from cases.csv.

The name is the case id, in Unicode NFC. The columns of cases.csv are copied to dataset.csv and, with the results, to
evaluation/cases.csv, where results are compared by them; values are text, empty if unknown. Nothing here opens an image.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from prostate_seg.common.errors import InputError, listed
from prostate_seg.common.suggestions import closest
from prostate_seg.data.dataset import OWN_COLUMNS
from prostate_seg.data.layouts import Listing, Stems, list_files, nfc
from prostate_seg.imaging.geometry import Finding

ROLE = "t2w?|ax|tra|mask|seg|segmentation|labels?|gt|roi|prostate|gland|whole[ _-]?gland|zones?|0000"
"""Last words of a file name that describe the kind of file and not the study."""
FILE_NAME = "cases.csv"
REFERENCE_BY = "reference_by"
"""Column with the author of a reference mask, a person or a network."""
RESERVED = frozenset(
    (
        *OWN_COLUMNS,
        *("fold", "dice", "iou", "hd95_mm", "assd_mm", "nsd_2mm"),
        *("volume_reference_ml", "volume_predicted_ml", "volume_difference_ml", "volume_difference_percent"),
        *("dice_apex", "dice_mid", "dice_base", "missed_gland", "volume_tertile", "region"),
        "all",  # the group of all cases in comparisons
    )
)
"""Columns of the project's own tables."""

Attributes = Mapping[str, Mapping[str, str]]
"""Column and value of each case, by case id."""


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
    root: Path,
    *,
    patient_pattern: str,
    exclude: Collection[str],
    exclude_others: bool = False,
    masks_required: bool = True,
) -> tuple[list[Case], list[Finding]]:
    """Pair the images and masks of a data set by name.

    Args:
        root: The data folder, in one of the layouts of `layouts`.
        patient_pattern: Regular expression whose group 1 on the case id is the patient id.
        exclude: Case ids to leave out, without a finding.
        exclude_others: Whether `exclude` may name cases of another data set, too.
        masks_required: Whether an image without a mask is an error.

    Returns:
        The cases sorted by id, and the findings on the other files: `image_without_mask`, `mask_without_image`,
        `duplicate_stem` and `no_patient_id` are errors, `ignored_file` and `no_attributes` are warnings.

    Raises:
        InputError: If the layout is not clear, a folder is missing, there are no images, `exclude` names an unknown case, or
            cases.csv is not a valid table.
    """
    listing, attributes = list_files(root, masks_required=masks_required), read_attributes(root)
    unknown = dict.fromkeys(next(iter(attributes.values()), {}), "")
    known, excluded = {*listing.images, *listing.masks}, {nfc(case_id) for case_id in exclude}
    if (unknown_ids := sorted(excluded - known)) and not exclude_others:
        raise InputError(f"data.exclude: must name cases of {root}, which has no {_suggested(unknown_ids, known)}")
    findings = _files_without_case(listing)
    cases = []
    for case_id in sorted(known - excluded):
        patient = re.search(patient_pattern, case_id)
        problem = _pairing_problem(case_id, listing, masks_required=masks_required)
        if problem is not None:
            findings.append(Finding(*problem, is_error=True, case_id=case_id))
        elif patient is None or not patient.group(1):
            message = (
                f"the name does not match data.patient_pattern {patient_pattern!r}; rename the files, or correct it"
            )
            findings.append(Finding("no_patient_id", message, is_error=True, case_id=case_id))
        else:
            cases.append(
                Case(
                    case_id=case_id,
                    patient_id=patient.group(1),
                    study_id=case_id[patient.end(1) :].removeprefix("_"),
                    image=listing.images[case_id][0],
                    mask=next(iter(listing.masks.get(case_id, [])), None),
                    attributes=attributes.get(case_id, unknown),
                )
            )
            if attributes and case_id not in attributes:
                message = f"{FILE_NAME} has no row for it, so that its attributes are unknown; add one"
                findings.append(Finding("no_attributes", message, case_id=case_id))
    return cases, findings


def read_attributes(root: Path) -> Attributes:
    """Read cases.csv of a data folder; without the file no case has attributes.

    Raises:
        InputError: If it is no table with a row per case id, or has a column of the project's own tables.
    """
    path = root / FILE_NAME
    if not path.is_file():
        return {}
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True, encoding="utf-8-sig")
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}\nSave it as UTF-8 with commas, one row per case.") from error
    if not isinstance(table.index, pd.RangeIndex):  # pandas takes the first values of too long rows as the index
        raise InputError(
            f"{path}: a row must have a value for each of the {len(table.columns)} columns of the header, and has more; "
            "name all columns, or delete the commas at the ends of the rows"
        )
    if "case_id" not in table.columns:
        names = ", ".join(map(str, table.columns))
        raise InputError(f"{path}: must have a column case_id, has {names}; rename one, or separate columns by commas")
    # Spreadsheet programs write empty rows and columns; pandas names the latter Unnamed.
    table = table[table["case_id"] != ""]
    empty = [name for name in table.columns if name.startswith("Unnamed: ") and not table[name].any()]
    table = table.drop(columns=empty)
    ids = table["case_id"].map(nfc)
    if repeated := listed(sorted(set(ids[ids.duplicated()])), most=10):
        raise InputError(f"{path}: must have one row per case, has several of {repeated}; keep one of each")
    taken = [column for column in table.columns if column != "case_id" and column in RESERVED]
    if taken:
        raise InputError(f"{path}: {', '.join(taken)}: columns of the project's own tables; name them otherwise")
    return table.drop(columns="case_id").set_index(ids).to_dict("index")  # type: ignore[return-value]


def _files_without_case(listing: Listing) -> list[Finding]:
    """Return `ignored_file` for each file that is not read, unless the error about its mask gives the reason."""
    reasons = dict.fromkeys(listing.ignored, "is no image by its suffix and is ignored; convert or remove it")
    for case_id, one in listing.unread.items():
        if case_id in listing.images or case_id not in listing.masks:
            reasons[one.path] = f"is not read: {one.reason}"
    return [Finding("ignored_file", f"{_names([path])} {why}", case_id=path.name) for path, why in reasons.items()]


def _suggested(case_ids: Sequence[str], known: Collection[str]) -> str:
    """Return unknown ids, each with the id that it may stand for, and the next step."""
    near = {case_id: closest(case_id, sorted(known)) for case_id in case_ids}
    named = [f"{one} (did you mean {other}?)" if other else one for one, other in near.items()]
    return f"{listed(named)}\nCorrect or remove these ids: the case of a misspelt one would be used."


def _pairing_problem(case_id: str, listing: Listing, *, masks_required: bool) -> tuple[str, str] | None:
    """Return check and message if a case is not one image and one mask."""
    images, masks, unread = listing.images, listing.masks, listing.unread.get(case_id)
    for kind, paths in (("image", images.get(case_id, [])), ("mask", masks.get(case_id, []))):
        if len(paths) > 1:
            return "duplicate_stem", f"a case has one {kind}, and there are {_names(paths)}; keep one of them"
    if case_id not in images:
        step = f"{_names([unread.path])} is not read: {unread.reason}" if unread else _near_name(case_id, masks, images)
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
