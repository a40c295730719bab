"""stage=predict on the command line: real studies, networks from a folder, without a store."""

import csv
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from prostate_seg.common.files import md5_of
from prostate_seg.imaging.image_io import read_volume
from prostate_seg.imaging.preprocessing import PreprocessSettings
from tests.imaging_helpers import dice
from tests.project_helpers import Project, wait_for
from tests.test_model_folder import save_fold

OFFLINE = ("stage=predict", "predict.model=networks", "mlflow=off")
WINDOW = PreprocessSettings(
    spacing_mm=(3.0, 0.8, 0.8),
    image_size=96,
    crop="center",
    to_8bit=True,
    intensity_percentiles=(0.5, 99.5),
    whole_gland_labels=None,
    zones={},
)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A folder with two untrained networks: their masks are arbitrary, but equal for equal voxels."""
    for number in (0, 1):
        save_fold(tmp_path / "networks", number, preprocess=WINDOW)
    return Project(tmp_path)


def predict(project: Project, *arguments: str, code: int = 0) -> str:
    done = project.run(*OFFLINE, *arguments)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def volumes(project: Project) -> dict[str, dict[str, str]]:
    with (project.folder / "predictions" / "volumes.csv").open(encoding="utf-8") as stream:
        return {row["name"]: row for row in csv.DictReader(stream)}


def mask_hashes(project: Project, output: str = "predictions") -> dict[str, str]:
    folder = project.folder / output / "masks"
    return {path.relative_to(folder).as_posix(): md5_of(path) for path in folder.rglob("*") if path.is_file()}


def test_one_study_in_three_formats_gives_the_same_mask_in_world_space(project: Project, shared_data: Path) -> None:
    scans = project.folder / "my scans"
    source = shared_data / "t2w" / "images" / "11373_1001396.mha"
    shutil.copytree(shared_data / "dicom" / "11373_1001396", scans / "ax T2 é")
    shutil.copy(source, scans / "meta.mha")
    sitk.WriteImage(sitk.ReadImage(str(source)), str(scans / "nifti.nii.gz"))
    text = predict(project, f"predict.input='{scans}'")
    masks = {
        name: read_volume(project.folder / "predictions" / "masks" / name)
        for name in ("ax T2 é.nii.gz", "meta.mha", "nifti.nii.gz")
    }
    first = next(iter(masks.values()))
    assert first.array.any()
    for name, mask in masks.items():
        assert first.geometry.is_same_grid(mask.geometry)
        assert dice(first.array, mask.array) >= 0.995, name
    rows = volumes(project)
    assert len({row["volume_ml"] for row in rows.values()}) == 1
    assert float(rows["meta"]["volume_ml"]) == pytest.approx(
        first.array.sum() * first.geometry.voxel_volume_ml, abs=1e-3
    )
    assert 0 <= float(rows["meta"]["fold_agreement"]) <= 1
    assert (project.folder / "predictions" / "overlays" / "ax T2 é.png").stat().st_size > 10_000
    assert "2 networks of networks" in text


def test_bad_studies_are_reported_and_do_not_affect_others(project: Project, shared_data: Path) -> None:
    scans = project.folder / "scans"
    shutil.copytree(shared_data / "ugly", scans / "ugly", ignore=shutil.ignore_patterns("*faulty*"))
    shutil.copy(shared_data / "t2w" / "images" / "p158020_1.nii.gz", scans / "good.nii.gz")
    text = predict(project, "predict.input=scans", code=1)
    assert "4 of 5 studies cannot be segmented" in text
    assert "ugly/dicom_missing_slice: missing slice" in text
    assert list(mask_hashes(project)) == ["good.nii.gz"]
    assert [path.name for path in (project.folder / "predictions" / "overlays").rglob("*.png")] == ["good.png"]
    rows = volumes(project)
    assert sum(bool(row["error"]) for row in rows.values()) == 4
    assert rows["good"]["error"] == ""


@pytest.mark.slow
def test_killed_prediction_resumes_with_the_same_result(project: Project, shared_data: Path) -> None:
    images = shared_data / "t2w" / "images"
    predict(project, f"predict.input={images}", "predict.output=undisturbed")
    one_by_one = (f"predict.input={images}", "machine.num_workers=1")
    process = project.start(*OFFLINE, *one_by_one)
    wait_for(project.folder / "predictions" / "masks" / "10795_1000811.mha")
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert len(mask_hashes(project)) < 5
    assert "studies are segmented already" in predict(project, *one_by_one)
    assert mask_hashes(project) == mask_hashes(project, "undisturbed")
    assert "5 of 5 studies are segmented already" in predict(project, *one_by_one)
    assert len(volumes(project)) == 5


def test_masks_of_another_model_are_replaced_only_with_overwrite(project: Project, shared_data: Path) -> None:
    image = f"predict.input={shared_data / 't2w' / 'images' / 'p158021_1.nii.gz'}"
    predict(project, image)
    before = mask_hashes(project)
    text = predict(project, image, "fold.index=0", code=1)
    assert "1 masks are there already, of another model or input" in text
    assert "predict.overwrite=true" in text
    assert mask_hashes(project) == before
    predict(project, image, "fold.index=0", "predict.overwrite=true")
    assert mask_hashes(project) != before
    record = json.loads((project.folder / "predictions" / "records" / "p158021_1.json").read_text())
    assert record["mask_md5"] == mask_hashes(project)["p158021_1.nii.gz"]
    assert record["fold_agreement"] is None  # of one network


def test_dicom_seg_overlays_its_series(project: Project, shared_data: Path) -> None:
    highdicom = pytest.importorskip("highdicom")
    series = shared_data / "dicom" / "11373_1001396"
    predict(project, f"predict.input={series}", "predict.dicom_seg=true")
    output = project.folder / "predictions"
    seg = highdicom.seg.segread(output / "dicom_seg" / "11373_1001396.dcm")
    volume = seg.get_volume(combine_segments=True)
    there = np.argwhere(volume.array > 0)
    points = (volume.affine @ np.c_[there, np.ones(len(there))].T).T[:, :3]
    mask = read_volume(output / "masks" / "11373_1001396.nii.gz")
    expected = mask.geometry.to_world(np.argwhere(mask.array))
    np.testing.assert_allclose(np.sort(points, axis=0), np.sort(expected, axis=0), atol=1e-3)
    text = predict(project, f"predict.input={shared_data / 't2w' / 'images'}", "predict.dicom_seg=true", code=1)
    assert "refers to the images of a DICOM series, and 5 studies are files" in text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "predict.input: must name an image file"),
        (("predict.input=absent.mha",), 1, "there is no file or folder absent.mha"),
        (("predict.input=.", "predict.model=absent"), 1, "predict.model: there is no file or folder absent"),
        (("predict.input=.", "predict.model=models:/prostate_seg@champion"), 1, "mlflow=off"),
        (("predict.input=.", "predict.backend=onnx"), 1, "has no network.onnx"),
        (("predict.input=.", "predict.backend=tensorrt"), 2, "must be one of torch, onnx"),
    ],
)
def test_impossible_requests_end_with_message_and_exit_code(
    project: Project, arguments: tuple[str, ...], code: int, words: str
) -> None:
    (project.folder / "x.mha").write_bytes(b"")
    assert words in predict(project, *arguments, code=code)
    assert not (project.folder / "predictions" / "masks").exists()
