"""Files that stage=fetch writes beside public data: SOURCE.json, LICENCE.txt and cases.csv.

They contain no time, so that data fetched twice have equal hashes.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import read_json, write_csv, write_json, write_text
from prostate_seg.data.cases import FILE_NAME, REFERENCE_BY, read_attributes
from prostate_seg.data.public.public_sets import PublicSet

NOTE = "SOURCE.json"
MARKSHEET = "marksheet.csv"
"""PI-CAI's table of studies with their centres."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedArchive:
    """An archive that was unpacked in full."""

    url: str
    checksum: str
    is_published: bool
    """Whether the checksum was published; otherwise it is that of the first download."""
    revision: str = ""
    """Commit of an archive made by GitHub."""
    files: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceNote:
    """Source of the data in a folder."""

    source: str
    archives: Mapping[str, FetchedArchive] = field(default_factory=dict)


def read_note(data: Path) -> SourceNote | None:
    """Return the SOURCE.json of an earlier fetch; None if there is none.

    Raises:
        InputError: If this module did not write it.
    """
    path = data / NOTE
    if not path.is_file():
        return None
    try:
        content = read_json(path)
        archives = {name: FetchedArchive(**one) for name, one in content["archives"].items()}
        return SourceNote(source=content["source"], archives=archives)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); it is written by stage=fetch only\nMove it away and fetch into a new data.root."
        ) from error


def write_note(data: Path, note: SourceNote, about: PublicSet, *, labels: Mapping[str, int] | None) -> None:
    """Write SOURCE.json, with the label of each name in the masks, and LICENCE.txt."""
    known = {"title": about.title, "page": about.page, "licence": about.licence, "cite": list(about.cite)}
    write_json(data / NOTE, {**asdict(note), **known, "masks_by": about.masks_by, "labels": labels})
    write_text(data / "LICENCE.txt", "\n".join(describe(about)) + "\n")


def describe(about: PublicSet) -> list[str]:
    """Return title, licence and citations as lines of text."""
    return [
        about.title,
        f"page:    {about.page}",
        f"licence: {about.licence}",
        f"masks:   by {about.masks_by}",
        *(f"cite:    {reference}" for reference in about.cite),
    ]


def add_case_rows(data: Path, case_ids: Collection[str], *, masks_by: str) -> None:
    """Add a row to cases.csv for each case without one: the author of its mask and, if known, its centre."""
    known = {case_id: dict(row) for case_id, row in read_attributes(data).items()}
    centres = {}
    if (data / MARKSHEET).is_file():
        sheet = pd.read_csv(data / MARKSHEET, dtype=str, keep_default_na=False)
        if {"patient_id", "study_id", "center"} <= set(sheet.columns):
            centres = dict(zip(sheet["patient_id"] + "_" + sheet["study_id"], sheet["center"], strict=True))
    for case_id in case_ids:
        centre = {"centre": centres.get(case_id, "")} if centres else {}
        known.setdefault(case_id, {REFERENCE_BY: masks_by, **centre})
    table = pd.DataFrame.from_dict(known, orient="index").fillna("").sort_index()
    write_csv(data / FILE_NAME, table.rename_axis("case_id").reset_index())
