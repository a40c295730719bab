"""A study is done if and only if its mask is that of its record, with this input and this model."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prostate_seg.data.predictions import State, Target, new_mask, note_dicom_seg, state_of, write_volumes
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


def state(target: Target, *, input_md5: str = "i", model_md5: str = "m", rule_md5: str | None = None) -> State:
    return state_of(target, input_md5=input_md5, model_md5=model_md5, rule_md5=rule_md5)


def test_a_written_mask_is_done_only_for_its_input_and_model(target: Target) -> None:
    assert state(target) is State.absent
    write(target)
    assert state(target) is State.done
    assert state(target, input_md5="other") is State.foreign
    assert state(target, model_md5="other") is State.foreign
    assert state(target, rule_md5="other") is State.absent  # written again with the verdict of the rule


def test_a_changed_or_copied_mask_is_foreign(target: Target) -> None:
    write(target)
    target.mask.write_bytes(b"drawn by hand")
    assert state(target) is State.foreign
    target.record.unlink()
    assert state(target) is State.foreign


def test_a_prediction_stopped_before_the_mask_is_written_is_not_done(target: Target) -> None:
    with pytest.raises(KeyboardInterrupt), new_mask(target, ROW) as path:
        path.write_bytes(b"half")
        raise KeyboardInterrupt
    assert state(target) is State.absent
    assert list(target.mask.parent.iterdir()) == []


def test_after_a_stop_the_previous_mask_is_distinguished_from_the_new_one(target: Target) -> None:
    write(target)
    write_new = new_mask(target, ROW | {"model_md5": "new"})
    path = write_new.__enter__()
    path.write_bytes(b"new mask")
    # The process is killed between the record and the rename of the mask.
    target.record.write_text('{"input_md5": "i", "model_md5": "new", "mask_md5": "of the new mask"}')
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


def test_volumes_contain_every_existing_mask_and_every_refusal(target: Target) -> None:
    write(target)
    gone = replace(target, scan=Scan(name="gone", path=target.scan.path))
    with new_mask(gone, ROW | {"name": "gone", "mask": "masks/gone.mha"}) as path:
        path.write_bytes(b"mask")
    gone.mask.unlink()
    write_volumes(target.output, errors=[{"name": "bad", "error": "missing slice", "mask": "masks/bad.nii.gz"}])
    rows = list(csv.DictReader((target.output / "volumes.csv").open()))
    assert [(row["name"], row["volume_ml"], row["num_slices"], row["error"]) for row in rows] == [
        ("bad", "", "", "missing slice"),
        ("a/t2", "40.5", "12", ""),
    ]


def test_half_a_record_of_a_killed_process_is_no_row(target: Target) -> None:
    write(target)
    left = target.record.parent / ".tmp-host-1-ab" / target.record.name
    left.parent.mkdir()
    left.write_text('{"name": ')
    assert write_volumes(target.output, errors=[])["name"].tolist() == ["a/t2"]


def test_the_most_doubtful_study_comes_first(tmp_path: Path) -> None:
    for name, expected in {"b": 0.9, "a": 0.95, "c": 0.2, "d": None}.items():
        target = Target(scan=Scan(name=name, path=tmp_path / f"{name}.mha"), output=tmp_path)
        with new_mask(target, ROW | {"name": name, "mask": f"masks/{name}.mha", "expected_dice": expected}) as path:
            path.write_bytes(b"mask")
    table = write_volumes(tmp_path, errors=[{"name": "refused", "error": "missing slice"}])
    assert table["name"].tolist() == ["refused", "d", "c", "b", "a"]


def test_a_new_mask_removes_the_dicom_seg_of_the_mask_before(target: Target) -> None:
    write(target)
    target.dicom_seg.parent.mkdir(parents=True)
    target.dicom_seg.write_bytes(b"object of the first mask")
    write(target, voxels=b"second mask")
    assert not target.dicom_seg.exists()


def test_a_missing_dicom_seg_leaves_the_mask_done_and_is_a_warning_until_it_is_written(target: Target) -> None:
    def warnings() -> object:
        return write_volumes(target.output, errors=[]).loc[0, "warnings"]

    write(target)
    note_dicom_seg(target, error="its images have no SliceThickness")
    assert state(target) is State.done
    assert warnings() == "its images have no SliceThickness"
    note_dicom_seg(target, error=None)
    assert warnings() == ""


@pytest.mark.parametrize(
    "name", ["a (1)", "a=b", "a#1", "O'Neil", "Müller ä", "two\nlines", 'comma, and "quotes"', "$x$"]
)
def test_every_name_round_trips_through_files_and_table(tmp_path: Path, name: str) -> None:
    target = Target(scan=Scan(name=name, path=tmp_path / f"{name}.nii.gz"), output=tmp_path / "out")
    with new_mask(target, ROW | {"name": name, "mask": f"masks/{name}.nii.gz"}) as path:
        path.write_bytes(b"mask")
    write_volumes(target.output, errors=[])
    (row,) = csv.DictReader((target.output / "volumes.csv").open(encoding="utf-8", newline=""))
    assert (row["name"], (target.output / row["mask"]).read_bytes()) == (name, b"mask")
    assert state(target) is State.done
