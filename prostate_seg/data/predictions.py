"""Output folder of a prediction: masks, overlays, DICOM SEG, records, and volumes.csv with a row per study.

masks/ NAME.nii.gz or as the input, overlays/ NAME.png, dicom_seg/ NAME.dcm where asked for, records/ NAME.json. A mask is put
in place after the record with its hash: a study is done exactly when both agree, so that an interrupted prediction continues
where it stopped, and no mask is mistaken for that of another model. A DICOM SEG is written from its mask afterwards, and
removed before another mask replaces it.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pandas as pd

from prostate_seg.common.files import atomic_path, md5_of, read_json, write_csv, write_json
from prostate_seg.data.scans import Scan
from prostate_seg.imaging.sitk_reader import image_suffix

COLUMNS = (
    *("name", "volume_ml", "num_slices", "mean_confidence", "fold_agreement", "expected_dice", "dice_lower_bound"),
    *("verdict", "warnings", "error", "mask", "input", "model", "input_md5", "model_md5"),
)
"""Columns of volumes.csv."""


class State(Enum):
    """State of a study's prediction; foreign is a mask of another input or model, or one changed or made elsewhere."""

    absent = "absent"
    done = "done"
    foreign = "foreign"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Output files of a study."""

    scan: Scan
    output: Path

    @property
    def mask(self) -> Path:
        """Mask in the format of the input; .nii.gz for a DICOM series, and .mha for .mhd, which needs two files."""
        suffix = ".nii.gz" if self.scan.is_dicom else image_suffix(self.scan.path.name)
        return self.output / "masks" / f"{self.scan.name}{'.mha' if suffix == '.mhd' else suffix}"

    @property
    def overlay(self) -> Path:
        """Figure of the mask on the study."""
        return self.output / "overlays" / f"{self.scan.name}.png"

    @property
    def dicom_seg(self) -> Path:
        """Mask as DICOM SEG."""
        return self.output / "dicom_seg" / f"{self.scan.name}.dcm"

    @property
    def record(self) -> Path:
        """Row of volumes.csv and hash of the mask."""
        return self.output / "records" / f"{self.scan.name}.json"


def state_of(target: Target, *, input_md5: str, model_md5: str, rule_md5: str | None) -> State:
    """Return the state of a prediction; it is absent, and is repeated, if another rule gave its verdict."""
    if not target.mask.exists():
        return State.absent
    record = read_json(target.record) if target.record.is_file() else {}
    if record.get("mask_md5") != md5_of(target.mask):
        return State.foreign
    is_same = (record["input_md5"], record["model_md5"]) == (input_md5, model_md5)
    if is_same and rule_md5 is not None and record.get("rule_md5") != rule_md5:
        return State.absent
    return State.done if is_same else State.foreign


@contextmanager
def new_mask(target: Target, row: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a path for a mask; when the block ends, the record is written and then the mask put in place."""
    with atomic_path(target.mask) as temporary:
        yield temporary
        target.dicom_seg.unlink(missing_ok=True)
        write_json(target.record, {**row, "mask_md5": md5_of(temporary)})


def note_dicom_seg(target: Target, *, error: str | None) -> None:
    """Record why a mask has no DICOM SEG; None if it has one."""
    write_json(target.record, read_json(target.record) | {"dicom_seg_error": error})


def write_volumes(output: Path, *, errors: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Write volumes.csv: a row for every record with a mask, and for every study that was refused now.

    Rows are ordered by doubt: refused studies, those without expected Dice, and the others from the lowest on. The volume of
    each zone has a column after that of the gland, such as peripheral_zone_ml.
    """
    rows = {}
    for path in (output / "records").rglob("*.json"):
        if path.parent.name.startswith("."):  # a temporary folder, left by a process that was killed
            continue
        record = read_json(path)
        if (output / record["mask"]).is_file():
            rows[record["name"]] = record
    rows |= {row["name"]: dict(row) for row in errors}
    for row in rows.values():
        row["warnings"] = "; ".join(filter(None, [row.get("warnings"), row.get("dicom_seg_error")]))
    zones = {name for row in rows.values() for name in row.get("zones", {})}
    for row in rows.values():
        row |= {f"{name}_ml": zone["volume_ml"] for name, zone in row.get("zones", {}).items()}
    columns = [*COLUMNS[:2], *(f"{name}_ml" for name in sorted(zones)), *COLUMNS[2:]]
    ordered = [rows[name] for name in sorted(rows, key=lambda name: (_trust_in(rows[name]), name))]
    table = pd.DataFrame(ordered, columns=columns).astype({"num_slices": "Int64"})
    write_csv(output / "volumes.csv", table)
    return table


def _trust_in(row: Mapping[str, Any]) -> float:
    """Return the expected Dice of a row, below 0 without one, and lowest for a refused study."""
    if row.get("error") is not None:
        return -2.0
    expected: float | None = row.get("expected_dice")
    return -1.0 if expected is None else expected
