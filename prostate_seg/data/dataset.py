"""dataset.csv and contract.json: what preprocessing found out about the cases, and what it did to them.

Paths in the table are relative to the data folder, so that the file is the same on every machine.
"""

import csv
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import pandas as pd

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import read_json, write_csv, write_json
from prostate_seg.imaging.fingerprint import THUMBNAIL_SHAPE
from prostate_seg.imaging.preprocessing import PreprocessSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseRecord:
    """One usable case: a row of dataset.csv."""

    case_id: str
    patient_id: str
    study_id: str
    image: str
    """Path of the original image, or DICOM folder, relative to the data folder."""
    mask: str
    """Path of the original mask, relative to the data folder."""
    image_md5: str
    mask_md5: str
    voxels_sha1: str
    """Of the decoded image, whatever its file format."""
    num_slices: int
    spacing_z_mm: float
    spacing_y_mm: float
    spacing_x_mm: float
    orientation: str
    """Axis code of the file, such as LPS."""
    gland_volume_ml: float
    """Of the reference on its own grid."""
    gland_kept_fraction: float
    """Part of the reference that lies in the network's window."""
    oracle_crop: bool
    """Whether the window was placed with the reference."""
    warnings: str
    """Names of the checks that this case did not pass cleanly, joined by a semicolon."""
    attributes: Mapping[str, str] = field(default_factory=dict)
    """What cases.csv of the data folder says of it; a column each, after the others."""


OWN_COLUMNS = tuple(one.name for one in fields(CaseRecord) if one.name != "attributes")
"""Columns that dataset.csv always has."""


def write_dataset(path: Path, rows: Sequence[CaseRecord]) -> None:
    """Write dataset.csv, one row per case, sorted by case id."""
    ordered = [
        {name: value for name, value in (asdict(row) | dict(row.attributes)).items() if name != "attributes"}
        for row in sorted(rows, key=lambda row: row.case_id)
    ]
    columns = list(dict.fromkeys([*OWN_COLUMNS, *(name for row in ordered for name in row)]))
    write_csv(path, pd.DataFrame(ordered, columns=columns), float_format="%.6g")


def read_dataset(path: Path) -> dict[str, CaseRecord]:
    """Read dataset.csv, by case id.

    Raises:
        InputError: If it is absent, lacks a column, or names a case that is no file name.
    """
    if not path.is_file():
        raise InputError(f"{path} is absent: run stage=preprocess first")
    with path.open(encoding="utf-8", newline="") as stream:
        columns = next(csv.reader(stream))
    absent = [name for name in OWN_COLUMNS if name not in columns]
    if absent:
        raise InputError(
            f"{path} has no column {', '.join(absent)}: an older version wrote it; run stage=preprocess again"
        )
    text = {one.name for one in fields(CaseRecord) if one.type in (str, "str")} | (set(columns) - set(OWN_COLUMNS))
    table = pd.read_csv(path, dtype=dict.fromkeys(text, str), keep_default_na=False)
    rows = [
        CaseRecord(
            **{str(name): value for name, value in row.items() if name in OWN_COLUMNS},
            attributes={str(name): value for name, value in row.items() if name not in OWN_COLUMNS},
        )
        for row in table.to_dict("records")
    ]
    for row in rows:
        if not row.case_id or "/" in row.case_id or "\0" in row.case_id:  # it becomes part of paths that are written
            raise InputError(
                f"{path}: a case id is the name of a file, and {row.case_id!r} is none: run stage=preprocess again"
            )
    return {row.case_id: row for row in rows}


def join_thumbnails(path: Path, folder: Path, *, case_ids: Collection[str]) -> None:
    """Write one array with a row per case, sorted as dataset.csv, from files of a case each; one at a time is in memory."""
    header = {"descr": "|i1", "fortran_order": False, "shape": (len(case_ids), *THUMBNAIL_SHAPE)}
    with path.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for case_id in sorted(case_ids):
            stream.write(np.load(folder / f"{case_id}.npy").tobytes())


def read_thumbnails(path: Path, *, case_ids: Collection[str]) -> dict[str, np.ndarray]:
    """Return the thumbnail of each case, mapped into memory.

    Raises:
        InputError: If the file is absent, no array, or of another number of cases.
    """
    try:
        rows = np.load(path, mmap_mode="r") if path.is_file() else []
    except (ValueError, EOFError) as error:  # pickles are refused: opening one can run any code
        raise InputError(f"{path} is no array: run stage=preprocess again") from error
    if len(rows) != len(case_ids):
        raise InputError(f"{path} has {len(rows)} of {len(case_ids)} thumbnails: run stage=preprocess again")
    return dict(zip(sorted(case_ids), rows, strict=True))


def write_contract(path: Path, settings: PreprocessSettings) -> None:
    """Write the settings and their hash."""
    write_json(path, {"preprocess": settings.as_dict(), "hash": settings.digest})


def require_contract(path: Path, settings: PreprocessSettings) -> None:
    """Check that a workspace, or a model, was made with these settings.

    Raises:
        InputError: If it was not; the text lists each difference.
    """
    if not path.is_file():
        raise InputError(f"{path} is absent: run stage=preprocess first")
    made = read_json(path)["preprocess"]
    differences = contract_differences(made, settings.as_dict())
    if differences:
        raise InputError(
            f"{path} was written with other preprocessing than this run asks for:\n  "
            + "\n  ".join(differences)
            + "\nRun the pipeline again from stage=preprocess, or take those overrides back."
        )


def contract_differences(made: Mapping[str, object], wanted: Mapping[str, object]) -> list[str]:
    """Return one line per setting that differs."""
    return [f"{key}: is {made.get(key)}, wanted {value}" for key, value in wanted.items() if made.get(key) != value]
