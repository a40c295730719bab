"""Tables of the preprocessed data set: dataset.csv, thumbnails.npy, reference_quality.csv, and contract.json with its settings.

Paths in dataset.csv are relative to the data folder, so that the file is the same on every machine. reference_quality.csv has a
row for every case, used or not; a cell is empty where a file could not be read or measured, and volumes are in mL.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import read_json, write_csv, write_json
from prostate_seg.imaging.fingerprint import THUMBNAIL_SHAPE
from prostate_seg.imaging.geometry import Finding
from prostate_seg.imaging.preprocessing import PreprocessSettings
from prostate_seg.imaging.quality import CaseQuality
from prostate_seg.imaging.target_grid import StudyExtent


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
    """Hash of the decoded image, independent of its file format."""
    num_slices: int
    spacing_z_mm: float
    spacing_y_mm: float
    spacing_x_mm: float
    orientation: str
    """Axis code of the file, such as LPS."""
    gland_volume_ml: float
    """Volume of the reference on its own grid."""
    gland_reach_mm: float
    gland_edge_mm: float
    """As in `target_grid.StudyExtent`."""
    gland_kept_fraction: float
    """Fraction of the reference inside the network's window."""
    oracle_crop: bool
    """Whether the window was placed with the reference."""
    warnings: str
    """Names of the checks that gave a warning, joined by semicolons."""
    attributes: Mapping[str, str] = field(default_factory=dict)
    """Row of cases.csv of the data folder; its columns follow the others."""

    @property
    def extent(self) -> StudyExtent:
        """Size and position of the gland, from which a grid is chosen."""
        spacing_mm = (self.spacing_z_mm, self.spacing_y_mm, self.spacing_x_mm)
        return StudyExtent(spacing_mm=spacing_mm, gland_reach_mm=self.gland_reach_mm, gland_edge_mm=self.gland_edge_mm)


OWN_COLUMNS = tuple(one.name for one in fields(CaseRecord) if one.name != "attributes")
"""Columns that dataset.csv always has."""
QUALITY_COLUMNS = (
    *("case_id", "used", "gland_volume_ml", "num_slices", "num_components", "holes_ml", "solid_fraction", "gaps"),
    *("mask_disorder", "image_disorder", "labels", "findings"),
)
"""Columns of reference_quality.csv, of `ReferenceQuality` and `CaseQuality`; `labels` has volumes, as in 1:20.1 2:24.3."""


def write_dataset(path: Path, records: Sequence[CaseRecord]) -> None:
    """Write dataset.csv, one row per case, sorted by case id."""
    rows = [asdict(record) for record in sorted(records, key=lambda record: record.case_id)]
    rows = [row | row.pop("attributes") for row in rows]
    columns = dict.fromkeys([*OWN_COLUMNS, *(name for row in rows for name in row)])
    write_csv(path, pd.DataFrame(rows, columns=list(columns)), float_format="%.6g")


def read_dataset(path: Path) -> dict[str, CaseRecord]:
    """Read dataset.csv, by case id.

    Raises:
        InputError: If it is absent, lacks a column, or has a case id that is no file name.
    """
    if not path.is_file():
        raise InputError(f"{path} is absent: run stage=preprocess first")
    columns = [str(name) for name in pd.read_csv(path, nrows=0).columns]
    absent = [name for name in OWN_COLUMNS if name not in columns]
    if absent:
        raise InputError(
            f"{path} has no column {', '.join(absent)}: an older version wrote it; run stage=preprocess again"
        )
    # Text stays as it is, ids such as 007 included.
    text = {one.name for one in fields(CaseRecord) if one.type is str} | (set(columns) - set(OWN_COLUMNS))
    table = pd.read_csv(path, dtype=dict.fromkeys(text, str), keep_default_na=False)
    records = {}
    for row in table.to_dict("records"):
        own: dict[str, Any] = {name: row.pop(name) for name in OWN_COLUMNS}
        record = CaseRecord(**own, attributes={str(name): value for name, value in row.items()})
        if not record.case_id or "/" in record.case_id or "\0" in record.case_id:  # it becomes part of output paths
            raise InputError(
                f"{path}: a case id is the name of a file, and {record.case_id!r} is none: run stage=preprocess again"
            )
        records[record.case_id] = record
    return records


def join_thumbnails(path: Path, folder: Path, *, case_ids: Collection[str]) -> None:
    """Write one array with a row per case, in the order of dataset.csv, from a file per case; one at a time is in memory."""
    shape = (len(case_ids), *THUMBNAIL_SHAPE)
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(np.int8), shape=shape)
    for row, case_id in zip(rows, sorted(case_ids), strict=True):
        row[:] = np.load(folder / f"{case_id}.npy")


def read_thumbnails(path: Path, *, case_ids: Collection[str]) -> dict[str, np.ndarray]:
    """Return the thumbnail of each case, int8 of `fingerprint.THUMBNAIL_SHAPE`, mapped into memory.

    Raises:
        InputError: If the file is not the array of these cases.
    """
    try:
        rows = np.load(path, mmap_mode="r") if path.is_file() else []
    except (ValueError, EOFError) as error:  # pickles are refused: opening one can run any code
        raise InputError(f"{path} is no array: run stage=preprocess again") from error
    if len(rows) != len(case_ids):
        raise InputError(f"{path} has {len(rows)} of {len(case_ids)} thumbnails: run stage=preprocess again")
    return dict(zip(sorted(case_ids), rows, strict=True))


def write_quality_table(
    path: Path, quality_of: Mapping[str, CaseQuality], *, findings: Sequence[Finding], used: Collection[str]
) -> None:
    """Write reference_quality.csv from measurements by case id, sorted; a bad case without measurements gets a row too.

    `findings` are all those on the data set, `used` the ids of the cases that were not refused.
    """
    bad = {finding.case_id for finding in findings if finding.is_error}
    rows = []
    for case_id in sorted({*quality_of, *bad}):
        checks = {finding.check for finding in findings if finding.case_id == case_id}
        row: dict[str, object] = {"case_id": case_id, "used": case_id in used, "findings": ";".join(sorted(checks))}
        quality = quality_of.get(case_id)
        if quality is not None and (reference := quality.reference) is not None:
            row |= {
                "gland_volume_ml": f"{reference.gland_volume_ml:.4g}",
                "num_slices": str(reference.num_slices),
                "num_components": str(len(reference.components_ml)),
                "holes_ml": f"{sum(reference.holes_ml):.3g}",
                "solid_fraction": f"{reference.solid_fraction:.3g}",
                "gaps": str(len(reference.gaps)),
                "mask_disorder": f"{reference.disorder:.3g}",
                "labels": " ".join(
                    f"{label}:{volume_ml:.1f}" for label, volume_ml in sorted(reference.labels_ml.items())
                ),
            }
        if quality is not None and quality.image_disorder is not None:
            row["image_disorder"] = f"{quality.image_disorder:.3g}"
        rows.append(row)
    write_csv(path, pd.DataFrame(rows, columns=list(QUALITY_COLUMNS)))


def write_contract(
    path: Path, settings: PreprocessSettings, *, labels: Mapping[str, int] | None, auto: Sequence[str] = ()
) -> None:
    """Write the settings, the label of each name, the settings that were chosen from the data set, and the settings' hash."""
    names = None if labels is None else dict(labels)
    write_json(path, {"preprocess": settings.as_dict(), "labels": names, "auto": list(auto), "hash": settings.digest})


def recorded_labels(path: Path) -> dict[str, int] | None:
    """Return the label of each name in the data set, as stage=preprocess found them."""
    labels: dict[str, int] | None = _read_contract(path).get("labels")
    return labels


def chosen_settings(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Return the values that stage=preprocess chose for settings that are auto.

    Raises:
        InputError: If contract.json is absent, or stage=preprocess was given values instead.
    """
    if not names:
        return {}
    contract = _read_contract(path)
    used = {name: contract["preprocess"][name] for name in names}
    if given := [name for name in names if name not in contract.get("auto", [])]:
        raise _other_preprocessing(path, [f"{name}: is {used[name]}, wanted auto" for name in given])
    return used


def _read_contract(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path} is absent: run stage=preprocess first")
    contract: dict[str, Any] = read_json(path)
    return {**contract, "preprocess": {"zones": {}, **contract["preprocess"]}}  # older versions had no zones


def require_contract(path: Path, settings: PreprocessSettings) -> None:
    """Raise InputError, with each difference, unless the data set was preprocessed with these settings."""
    used, wanted = _read_contract(path)["preprocess"], settings.as_dict()
    differences = [
        f"{name}: is {used.get(name)}, wanted {value}" for name, value in wanted.items() if used.get(name) != value
    ]
    if differences:
        raise _other_preprocessing(path, differences)


def _other_preprocessing(path: Path, differences: Sequence[str]) -> InputError:
    return InputError(
        f"{path} was written with other preprocessing than this run asks for:\n  "
        + "\n  ".join(differences)
        + "\nRun the pipeline again from stage=preprocess, or take those overrides back."
    )
