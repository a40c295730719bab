"""What a prediction leaves in its output folder, and what is there already.

masks/ NAME.nii.gz or as the input, overlays/ NAME.png, dicom_seg/ NAME.dcm where asked for, records/ NAME.json, and
volumes.csv with a row per study. A mask is put in place after the record that has its hash: a study is done exactly when
both agree, so that a stopped prediction goes on where it was and no mask is taken for that of another model. Its DICOM SEG is
written from the mask afterwards, and removed before another mask takes its place.
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
    "name",
    "volume_ml",
    "num_slices",
    "mean_confidence",
    "fold_agreement",
    "warnings",
    "error",
    "mask",
    "input",
    "model",
    "input_md5",
    "model_md5",
)
"""Of volumes.csv."""


class State(Enum):
    """What is there of a study's prediction."""

    absent = "absent"
    done = "done"
    foreign = "foreign"
    """A mask of another input or model, or one that was changed or made elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where the prediction of a study goes."""

    scan: Scan
    output: Path

    @property
    def mask(self) -> Path:
        """In the format of the input; a DICOM series gets .nii.gz, and .mhd, which needs two files, .mha."""
        suffix = ".nii.gz" if self.scan.is_dicom else image_suffix(self.scan.path.name)
        return self.output / "masks" / f"{self.scan.name}{'.mha' if suffix == '.mhd' else suffix}"

    @property
    def overlay(self) -> Path:
        """Picture of the mask on the study."""
        return self.output / "overlays" / f"{self.scan.name}.png"

    @property
    def dicom_seg(self) -> Path:
        """The mask as DICOM SEG."""
        return self.output / "dicom_seg" / f"{self.scan.name}.dcm"

    @property
    def record(self) -> Path:
        """What is known of the mask."""
        return self.output / "records" / f"{self.scan.name}.json"


def state_of(target: Target, *, input_md5: str, model_md5: str) -> State:
    """Return what is there of a prediction."""
    if not target.mask.exists():
        return State.absent
    record = read_json(target.record) if target.record.is_file() else {}
    if record.get("mask_md5") != md5_of(target.mask):
        return State.foreign
    if (record["input_md5"], record["model_md5"]) != (input_md5, model_md5):
        return State.foreign
    return State.done


@contextmanager
def new_mask(target: Target, row: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a path to write a mask to; when the block ends, its record is written and then the mask put in place."""
    with atomic_path(target.mask) as made:
        yield made
        target.dicom_seg.unlink(missing_ok=True)
        write_json(target.record, {**row, "mask_md5": md5_of(made)})


def note_dicom_seg(target: Target, *, error: str | None) -> None:
    """Record why a mask has no DICOM SEG; None where it has one."""
    write_json(target.record, read_json(target.record) | {"dicom_seg_error": error})


def write_volumes(output: Path, *, errors: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Write volumes.csv: a row for every record whose mask is there, and for every study that was refused just now."""
    refused = {row["name"]: row for row in errors}
    records = [read_json(path) for path in (output / "records").rglob("*.json")]
    known = {row["name"]: row for row in records if (output / row["mask"]).is_file()}
    rows = [_with_all_warnings(row) for _, row in sorted((known | refused).items())]
    table = pd.DataFrame(rows, columns=list(COLUMNS)).astype({"num_slices": "Int64"})
    write_csv(output / "volumes.csv", table)
    return table


def _with_all_warnings(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**row, "warnings": "; ".join(filter(None, [row.get("warnings"), row.get("dicom_seg_error")]))}
