"""A study is done exactly when its mask is that of its record, of this input and of this model."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prostate_seg.data.predictions import State, Target, new_mask, state_of, write_volumes
from prostate_seg.data.scans import Scan

ROW: dict[str, Any] = {
    "name": "a/t2",
    "mask": "masks/a/t2.mha",
    "input_md5": "i",
    "model_md5": "m",
    "volume_ml": 40.5,
    "num_slices": 12,
    "warnings": "",
    "error": None,
}


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target(scan=Scan(name="a/t2", path=tmp_path / "in" / "t2.mha"), output=tmp_path / "out")


def write(target: Target, voxels: bytes = b"mask") -> None:
    with new_mask(target, ROW) as path:
        path.write_bytes(voxels)


def state(target: Target, *, input_md5: str = "i", model_md5: str = "m", needs_dicom_seg: bool = False) -> State:
    return state_of(target, input_md5=input_md5, model_md5=model_md5, needs_dicom_seg=needs_dicom_seg)


def test_a_written_mask_is_done_for_its_input_and_model_alone(target: Target) -> None:
    assert state(target) is State.absent
    write(target)
    assert state(target) is State.done
    assert state(target, input_md5="other") is State.foreign
    assert state(target, model_md5="other") is State.foreign
    assert state(target, needs_dicom_seg=True) is State.absent


def test_a_mask_that_was_changed_or_brought_is_foreign(target: Target) -> None:
    write(target)
    target.mask.write_bytes(b"drawn by hand")
    assert state(target) is State.foreign
    target.record.unlink()
    assert state(target) is State.foreign


def test_a_prediction_stopped_before_the_mask_is_in_place_leaves_nothing_done(target: Target) -> None:
    with pytest.raises(KeyboardInterrupt), new_mask(target, ROW) as path:
        path.write_bytes(b"half")
        raise KeyboardInterrupt
    assert state(target) is State.absent
    assert list(target.mask.parent.iterdir()) == []


def test_a_stop_while_a_mask_is_replaced_leaves_the_old_one_to_be_told_from_the_new(target: Target) -> None:
    write(target)
    write_new = new_mask(target, ROW | {"model_md5": "new"})
    path = write_new.__enter__()
    path.write_bytes(b"new mask")
    target.record.write_text(
        '{"input_md5": "i", "model_md5": "new", "mask_md5": "of the new mask"}'
    )  # and then: killed
    assert state(target, model_md5="new") is State.foreign


@pytest.mark.parametrize(
    ("name", "mask"),
    [("x.mha", "x.mha"), ("x.mhd", "x.mha"), ("x.nii", "x.nii"), ("X.NII.GZ", "x.nii.gz"), ("x.nrrd", "x.nrrd")],
)
def test_masks_have_the_format_of_the_input(tmp_path: Path, name: str, mask: str) -> None:
    target = Target(scan=Scan(name="x", path=tmp_path / name), output=tmp_path)
    assert target.mask == tmp_path / "masks" / mask


def test_mask_of_a_series_is_nifti(tmp_path: Path) -> None:
    assert Target(scan=Scan(name="series", path=tmp_path), output=tmp_path).mask.name == "series.nii.gz"


def test_volumes_hold_every_mask_that_is_there_and_every_refusal(target: Target) -> None:
    write(target)
    gone = replace(target, scan=Scan(name="gone", path=target.scan.path))
    with new_mask(gone, ROW | {"name": "gone", "mask": "masks/gone.mha"}) as path:
        path.write_bytes(b"mask")
    gone.mask.unlink()
    write_volumes(target.output, errors=[{"name": "bad", "error": "missing slice", "mask": "masks/bad.nii.gz"}])
    rows = list(csv.DictReader((target.output / "volumes.csv").open()))
    assert [(row["name"], row["volume_ml"], row["num_slices"], row["error"]) for row in rows] == [
        ("a/t2", "40.5", "12", ""),
        ("bad", "", "", "missing slice"),
    ]
