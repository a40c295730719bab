"""Stage inspect lists good and bad cases of a data set and does not change it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from prostate_seg.common.errors import InputError
from prostate_seg.config import schema as config
from prostate_seg.config.workspace import workspace_of
from prostate_seg.imaging.geometry import Geometry, Volume
from prostate_seg.imaging.image_io import read_volume, write_volume
from prostate_seg.provenance.hashing import hash_paths
from prostate_seg.stages import inspect, preprocess
from tests.conftest import Launch, composed
from tests.nifti_helpers import pixdim, write_nifti_file


def inspected(root: Path, *overrides: str) -> tuple[pd.DataFrame, dict[str, object]]:
    cfg = config.parse(composed("stage=inspect", "data=folder", f"data.root={root}", *overrides))
    inspect.run(cfg, workspace_of(cfg))
    table = pd.read_csv("inspect/cases.csv", keep_default_na=False, dtype=str).set_index("case_id")
    return table, json.loads(Path("inspect/summary.json").read_text())


@pytest.fixture
def data(tmp_path: Path, cube_volume: Volume, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two studies of one patient and one of another, with 20 mm cubes in the centre."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("1_1", "1_2", "2_1")):
        image = Volume(array=cube_volume.array + number, geometry=cube_volume.geometry)
        gland = np.zeros(cube_volume.array.shape, np.uint8)
        gland[5:15, 20 - number : 60 - 2, 2:58] = 1
        write_volume(tmp_path / "data" / "images" / f"{name}.mha", image)
        write_volume(tmp_path / "data" / "masks" / f"{name}.nii.gz", Volume(array=gland, geometry=image.geometry))
    return tmp_path / "data"


def test_every_case_is_measured_and_the_data_stay_as_they_are(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    before = hash_paths([data], cache=data.parent / "hashes")[data].md5
    table, summary = inspected(data)
    assert list(table.index) == ["1_1", "1_2", "2_1"]
    assert table.loc["1_2", ["num_slices", "spacing_z_mm", "field_of_view_mm", "orientation", "usable"]].tolist() == [
        "20",
        "3",
        "30",
        "LPS",
        "True",
    ]
    assert float(table.loc["1_2", "gland_volume_ml"]) == pytest.approx(10 * 39 * 56 * 0.75 / 1000)
    assert (summary["num_cases"], summary["num_patients"], summary["num_patients_with_several_studies"]) == (3, 2, 1)
    assert summary["measures"]["gland_volume_ml"]["median"] == pytest.approx(16.38)  # type: ignore[index]
    assert hash_paths([data], cache=data.parent / "hashes")[data].md5 == before
    assert sorted(path.name for path in Path("inspect").iterdir()) == [
        "cases.csv",
        "contact_sheet.png",
        "findings.csv",
        "summary.json",
    ]
    assert "3 cases of 2 patients, 1 with several studies; 0 without mask; orientation LPS 3" in caplog.text
    assert "all 3 cases can be used: go on with stage=preprocess" in caplog.text


def test_bad_cases_are_in_the_outputs_before_they_are_refused(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    shutil.copy(data / "images" / "1_1.mha", data / "images" / "3_1.mha")
    (data / "images" / "4_1.mha").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    shutil.copy(data / "masks" / "1_1.nii.gz", data / "masks" / "4_1.nii.gz")
    (data / "cases.csv").write_text("case_id,centre\n1_1,A\n3_1,B\n")
    with pytest.raises(
        InputError, match=r"2 of \d cases cannot be used(.|\n)*error: 3_1: image_without_mask(.|\n)*error: 4_1: "
    ):
        inspected(data)
    shown = Path("inspect/cases.csv").read_bytes()
    table, summary = inspected(data, "data.on_bad_case=exclude")
    assert Path("inspect/cases.csv").read_bytes() == shown
    assert table.loc["3_1", "findings"] == "identical_image;image_without_mask"
    assert table.loc["4_1", ["usable", "findings", "num_slices"]].tolist() == [
        "False",
        "identical_mask;lfs_pointer;no_attributes",
        "",
    ]
    assert table["centre"].tolist() == ["A", "", "", "B", ""]
    assert (summary["num_usable"], summary["num_bad"], summary["num_without_mask"]) == (3, 2, 1)
    findings = pd.read_csv("inspect/findings.csv")
    assert list(findings["severity"][:3]) == ["error", "error", "warning"]
    assert "stage=preprocess will exclude the 2 cases that cannot be used" in caplog.text


def test_sagittal_study_among_axial_ones_is_reported_by_inspect_and_preprocess(data: Path) -> None:
    sagittal = Geometry(
        shape_vox=(60, 60, 20), spacing_mm=(0.5, 0.5, 3.0), origin_mm=(0, 0, 0), direction=tuple(np.eye(3).ravel())
    )
    for kind in ("images", "masks"):
        (file,) = (data / kind).glob("2_1.*")
        turned = np.ascontiguousarray(np.moveaxis(read_volume(file).array, 0, 2))
        write_volume(file, Volume(array=turned, geometry=sagittal, stored_orientation="PIR"))
    table, _ = inspected(data)
    assert table["findings"].tolist() == ["", "", "not_axial;slice_plane_differs"]
    cfg = config.parse(composed("stage=preprocess", "data=folder", f"data.root={data}", "preprocess.image_size=32"))
    preprocess.run(cfg, workspace_of(cfg))
    log = json.loads(Path("preprocess/preprocess_log.json").read_text())
    (named,) = [one for one in log["findings"] if one["check"] == "slice_plane_differs"]
    assert named["case_id"] == "2_1"
    assert named["message"].startswith("its slices are sagittal, the others' axial")


def test_an_image_without_orientation_is_a_warning_of_inspect_and_preprocess(data: Path) -> None:
    volume = read_volume(data / "images" / "1_1.mha")
    (data / "images" / "1_1.mha").unlink()
    path = write_nifti_file(
        data / "images" / "1_1.nii.gz", volume.array.T, pixdim=pixdim(*volume.geometry.spacing_mm[::-1])
    )
    gland = (read_volume(data / "masks" / "1_1.nii.gz").array > 0).astype(np.uint8)
    write_volume(data / "masks" / "1_1.nii.gz", read_volume(path).with_mask(gland))
    table, _ = inspected(data)
    assert table.loc["1_1", ["usable", "findings"]].tolist() == ["True", "no_orientation"]
    cfg = config.parse(composed("stage=preprocess", "data=folder", f"data.root={data}", "preprocess.image_size=32"))
    preprocess.run(cfg, workspace_of(cfg))
    log = json.loads(Path("preprocess/preprocess_log.json").read_text())
    assert {one["message"].partition(":")[0] for one in log["findings"] if one["check"] == "no_orientation"} == {
        "image",
        "mask",
    }


def test_label_that_dataset_json_calls_the_bladder_is_refused(data: Path) -> None:
    (data / "dataset.json").write_text('{"labels": {"background": 0, "bladder": 1, "prostate": 2}}')
    with pytest.raises(InputError, match=r"label 1 is 'bladder'(.|\n)*data.whole_gland_labels=\[2\]"):
        inspected(data)
    assert Path("inspect/contact_sheet.png").is_file()  # the cases are shown anyway
    cfg = config.parse(composed("stage=preprocess", "data=folder", f"data.root={data}"))
    with pytest.raises(InputError, match="label 1 is 'bladder'"):
        preprocess.run(cfg, workspace_of(cfg))
    assert not Path("preprocess").exists()


def test_images_without_masks_can_be_inspected(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    shutil.rmtree(data / "masks")
    table, summary = inspected(data)
    assert table["findings"].tolist() == ["", "", ""]
    assert summary["num_without_mask"] == 3
    assert "to train on them they need masks" in caplog.text


def test_a_data_set_without_readable_cases_is_refused(data: Path) -> None:
    for path in (data / "images").iterdir():
        path.write_bytes(b"nothing")
    for path in (data / "masks").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"none of 3 cases can be read: error: 1_1: "):
        inspected(data)


def test_a_large_data_set_lists_only_cases_with_findings(
    data: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(inspect, "MAX_ROWS", 1)
    shutil.copy(data / "masks" / "1_1.nii.gz", data / "masks" / "1_2.nii.gz")
    shutil.copy(data / "masks" / "1_1.nii.gz", data / "masks" / "2_1.nii.gz")
    inspected(data)
    assert [message for message in caplog.messages if message.startswith(("1_1 ", "1_2 ", "2_1 "))] == [
        next(message for message in caplog.messages if message.startswith("1_2 "))
    ]
    assert "and 1 more in cases.csv" in caplog.messages
    assert "and 1 more in findings.csv" in caplog.messages


def test_real_data_on_the_command_line(launch: Launch, shared_data: Path, tmp_path: Path) -> None:
    done = launch("stage=inspect", "data=folder", f"data.root={shared_data / 't2w'}")
    assert done.returncode == 0, done.stderr
    assert "5 cases of 4 patients, 1 with several studies; 0 without mask; orientation LPS 5" in done.stdout
    assert "10795_1000811b: identical_mask: its mask file is identical to that of 10795_1000811" in done.stdout
    assert not (tmp_path / "mlflow.db").exists()
    assert (tmp_path / "inspect" / "contact_sheet.png").is_file()
