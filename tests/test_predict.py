"""Stage predict in process: masks, overlays, records and DICOM SEG of studies, and refusals."""

import csv
import functools
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import md5_of, read_json, write_json, write_text
from prostate_seg.config.schema import Config, parse
from prostate_seg.config.workspace import workspace_of
from prostate_seg.imaging.geometry import Geometry, Volume
from prostate_seg.imaging.image_io import read_volume, write_volume
from prostate_seg.reporting.figures.plots import save_png
from prostate_seg.stages import predict as stage
from tests.conftest import composed
from tests.dicom_helpers import Stack, write_classic
from tests.segmentation_helpers import disc_study
from tests.test_expected_dice import fitted, simulated
from tests.test_model_folder import save_fold

GEOMETRY = Geometry(
    shape_vox=(8, 32, 32), spacing_mm=(3.0, 0.5, 0.5), origin_mm=(0, 0, 0), direction=(1, 0, 0, 0, 1, 0, 0, 0, 1)
)


@pytest.fixture(autouse=True)
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one small network, which becomes the current one."""
    monkeypatch.chdir(tmp_path)
    save_fold(tmp_path / "networks", 0)
    return tmp_path / "networks"


@pytest.fixture(autouse=True)
def plain_overlays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the drawing of overlays, which takes longer than the rest of the stage."""
    monkeypatch.setattr(stage, "save_png", lambda path, _: write_text(path, "overlay"))


@functools.cache
def default_config() -> Config:
    return parse(composed("stage=predict", "predict.model=networks", "mlflow=off", "machine.num_workers=1"))


def predict(**settings: object) -> None:
    """Run the stage on the folder in/, unless settings of predict override it."""
    cfg = default_config()
    cfg = replace(cfg, predict=replace(cfg.predict, **{"input": "in", **settings}))  # type: ignore[arg-type]
    stage.run(cfg, workspace_of(cfg))


def refusal(**settings: object) -> str:
    with pytest.raises(InputError) as error:
        predict(**settings)
    return str(error.value)


def write_image(path: Path, *, seed: int = 0, geometry: Geometry = GEOMETRY) -> None:
    write_volume(path, Volume(array=disc_study(seed, num_slices=8)[0], geometry=geometry))


def write_series(folder: Path, *, without: str | None = None, seed: int = 0, description: str = "t2_tse_tra") -> None:
    """Write a study as a DICOM series with all attributes that DICOM SEG needs, except one."""

    def edit(z: int, one: Dataset) -> None:
        del one.PatientID
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        one.SeriesInstanceUID, one.SeriesDescription = f"1.2.4.{seed}", description
        one.PatientName, one.InstanceNumber, one.SliceThickness = "A^B", z + 1, 3.0
        if without:
            delattr(one, without)

    voxels = disc_study(seed, num_slices=8)[0].astype("<u2")
    write_classic(
        folder, Stack(voxels=voxels, spacing_mm=(3.0, 0.5, 0.5), axes=np.eye(3), origin_mm=(0, 0, 0)), edit=edit
    )


def rows(output: str = "predictions") -> dict[str, Mapping[str, str]]:
    with (Path(output) / "volumes.csv").open(encoding="utf-8", newline="") as stream:
        return {row["name"]: row for row in csv.DictReader(stream)}


def masks(output: str = "predictions") -> list[str]:
    folder = Path(output) / "masks"
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_an_output_inside_the_input_is_no_input_of_the_next_run(caplog: pytest.LogCaptureFixture) -> None:
    write_image(Path("in/1.nii.gz"))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            predict(output="in/results")
        predict(output="in/more results")
    assert masks("in/results") == masks("in/more results") == ["1.nii.gz"]
    assert "1 of 1 studies are segmented already" in caplog.text
    assert "results of a prediction: results/masks, results/overlays, results/records" in caplog.text


def test_an_output_beside_the_images_of_a_flat_folder_is_no_input(tmp_path: Path) -> None:
    write_image(Path("in/1.nii.gz"))
    for _ in range(2):
        predict(output="in")
    assert masks("in") == ["1.nii.gz"]


def test_an_output_inside_a_series_changes_no_hash_of_the_series() -> None:
    write_series(Path("in"))
    for _ in range(2):
        predict(output="in/results")
    assert masks("in/results") == ["in.nii.gz"]


def test_an_output_that_is_a_data_set_or_a_file_is_refused() -> None:
    write_image(Path("in/images/1_1.nii.gz"))
    Path("in/masks").mkdir()
    assert "predict.output: in is the folder of a data set" in refusal(output="in")
    Path("file").touch()
    assert "predict.output: file is a file" in refusal(output="file")


def test_ignored_files_are_listed_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("1_t2w", "1_adc", "1_mask"):
        write_image(Path(f"in/{name}.mha"))
    predict()
    assert masks() == ["1_t2w.mha"]
    assert "left out: 1 masks by their name (predict.pattern with the same word takes them): 1_mask.mha" in caplog.text
    assert "left out: 1 other sequences or planes by their name" in caplog.text


def test_an_unreadable_file_is_listed_and_does_not_affect_other_studies() -> None:
    write_image(Path("in/1.nii.gz"))
    Path("in/2.nii.gz").symlink_to("gone.nii.gz")
    text = refusal()
    assert "1 of 2 studies cannot be segmented" in text
    assert "2.nii.gz: broken link to gone.nii.gz; restore or remove it" in text
    assert masks() == ["1.nii.gz"]
    assert {name: row["error"] for name, row in rows().items()} == {
        "1": "",
        "2.nii.gz": "broken link to gone.nii.gz; restore or remove it",
    }


def test_a_study_deleted_after_its_prediction_is_refused() -> None:
    write_image(Path("elsewhere.nii.gz"))
    Path("in").mkdir()
    Path("in/1.nii.gz").symlink_to("../elsewhere.nii.gz")
    write_image(Path("in/2.nii.gz"), seed=1)
    predict()
    Path("elsewhere.nii.gz").unlink()
    assert "1.nii.gz: broken link to ../elsewhere.nii.gz" in refusal()
    assert masks() == ["1.nii.gz", "2.nii.gz"]


def test_an_image_that_is_a_mask_is_refused() -> None:
    write_volume(Path("in/1.nii.gz"), Volume(array=disc_study(0, num_slices=8)[1], geometry=GEOMETRY))
    assert "this one has only 0, 1: it looks like a mask; give the image" in refusal(input="in/1.nii.gz")
    assert masks() == []


def test_studies_of_any_name_are_segmented_and_recognised_as_done(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stage, "save_png", save_png)
    names = ["$x$ (1) a=b #2", "two\nlines of O'Neil", "Müller, 日本"]
    for seed, name in enumerate(names):
        write_image(Path("in") / f"{name}.nii.gz", seed=seed)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            predict()
    assert set(masks()) == {f"{name}.nii.gz" for name in names}
    assert {name: row["mask"] for name, row in rows().items()} == {name: f"masks/{name}.nii.gz" for name in names}
    assert {path.stem for path in Path("predictions/overlays").iterdir()} == set(names)
    assert "3 of 3 studies are segmented already" in caplog.text


def test_a_sagittal_study_has_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    sagittal = replace(GEOMETRY, direction=(0, 0, 1, 1, 0, 0, 0, 1, 0))  # the file's slices are stacked along world x
    for seed in range(3):
        write_image(Path(f"in/{seed}.mha"), seed=seed, geometry=sagittal if seed == 2 else GEOMETRY)
    with caplog.at_level(logging.INFO):
        predict()
    assert {name: "its slices are sagittal" in row["warnings"] for name, row in rows().items()} == {
        "0": False,
        "1": False,
        "2": True,
    }
    assert "its slices are sagittal" in caplog.text


def test_a_series_of_another_sequence_has_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    titles: dict[str, str] = {}
    monkeypatch.setattr(stage, "overlay_figure", lambda *_, title, **__: titles.update({title[0]: title}))
    for seed, description in enumerate(("t2_tse_tra", "ep2d_diff_tra_ADC", "T2 TSE SAG")):
        write_series(Path(f"in/{seed}"), seed=seed, description=description)
    predict()
    assert ["series description" in row["warnings"] for _, row in sorted(rows().items())] == [False, True, True]
    assert 'the series description is "ep2d_diff_tra_ADC", and an axial T2-weighted' in rows()["1"]["warnings"]
    assert all(titles[name].endswith("see the warnings") == bool(row["warnings"]) for name, row in rows().items())
    assert titles["1"].endswith("see the warnings")


def calibrate(networks: Path) -> None:
    """Store a calibration of expected Dice with the networks, as stage=register does."""
    rows, dice = simulated(20, rng=np.random.default_rng(0))
    write_json(networks / "trust.json", {"expected_dice": asdict(fitted(rows, dice)), "temperature": {}})


def test_masks_have_expected_dice_lower_bound_and_verdict_and_the_most_doubtful_comes_first(
    networks: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []
    monkeypatch.setattr(stage, "overlay_figure", lambda *_, title, **__: titles.append(title))
    calibrate(networks)
    for seed in range(3):
        write_image(Path(f"in/{seed}.nii.gz"), seed=seed)
    Path("in/bad.nii.gz").write_bytes(b"")
    with caplog.at_level(logging.INFO):
        refusal(min_expected_dice=0.0)
    found = list(rows().values())
    assert found[0]["name"] == "bad"
    assert [row["verdict"] for row in found] == ["", "accept", "accept", "accept"]
    expected = [float(row["expected_dice"]) for row in found[1:]]
    assert expected == sorted(expected)
    assert all(float(row["dice_lower_bound"]) <= float(row["expected_dice"]) for row in found[1:])
    assert "no expected Dice" not in caplog.text
    first = found[1]
    note = f"expected Dice {expected[0]:.2f}, at least {float(first['dice_lower_bound']):.2f}: accept"
    assert any(title.startswith(f"{first['name']} ") and note in title for title in titles)
    assert read_json(Path(f"predictions/records/{first['name']}.json"))["verdict"] == "accept"


def test_another_minimum_repeats_the_verdicts_and_the_same_does_not(segmentations: list[int], networks: Path) -> None:
    write_image(Path("in/1.nii.gz"))
    predict()
    assert (rows()["1"]["expected_dice"], rows()["1"]["verdict"]) == ("", "")
    calibrate(networks)
    for minimum in (0.0, 0.0, 1.0, 1.0):
        predict(min_expected_dice=minimum)
    assert rows()["1"]["verdict"] == "reject"
    assert len(segmentations) == 3  # without calibration, with the first minimum, with the second


@pytest.mark.parametrize("stored", [None, {"no_expected_dice": "needs 9 test patients", "temperature": {}}])
def test_a_model_without_calibration_says_how_to_get_one(
    networks: Path, caplog: pytest.LogCaptureFixture, stored: dict[str, object] | None
) -> None:
    if stored is not None:
        write_json(networks / "trust.json", stored)
    write_image(Path("in/1.nii.gz"))
    with caplog.at_level(logging.INFO):
        predict()
    reason = "register the networks with an evaluation" if stored is None else "needs 9 test patients"
    assert f"no expected Dice: {reason}" in " ".join(caplog.text.split())
    assert rows()["1"]["verdict"] == ""


def test_a_dicom_seg_has_expected_dice_and_verdict(networks: Path) -> None:
    pytest.importorskip("highdicom")
    write_series(Path("in"))
    predict(dicom_seg=True)
    before = pydicom.dcmread("predictions/dicom_seg/in.dcm")
    assert "SegmentDescription" not in before.SegmentSequence[0]
    calibrate(networks)
    predict(dicom_seg=True, min_expected_dice=1.0)
    after = pydicom.dcmread("predictions/dicom_seg/in.dcm")
    assert after.SegmentSequence[0].SegmentDescription.startswith("expected Dice 0.")
    assert after.SegmentSequence[0].SegmentDescription.endswith(": reject")
    assert after.SOPInstanceUID != before.SOPInstanceUID


@pytest.fixture
def segmentations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets an entry whenever a study is segmented."""
    pytest.importorskip("highdicom")
    calls: list[int] = []
    real = stage.predict
    monkeypatch.setattr(stage, "predict", lambda *args, **more: (calls.append(1), real(*args, **more))[1])
    return calls


def test_a_mask_is_kept_if_its_dicom_seg_cannot_be_written(segmentations: list[int]) -> None:
    write_series(Path("in/good"))
    write_series(Path("in/bad"), without="SliceThickness", seed=1)
    for _ in range(2):
        text = refusal(dicom_seg=True)
        assert "1 of 2 DICOM SEG could not be written" in text
        assert "bad: no DICOM SEG can be made for this series: its images have no SliceThickness" in text
        assert "The masks are written." in text
    assert len(segmentations) == 2  # none by the second run
    assert masks() == ["bad.nii.gz", "good.nii.gz"]
    assert [path.name for path in Path("predictions/dicom_seg").iterdir()] == ["good.dcm"]
    assert Path("predictions/overlays/bad.png").is_file()
    assert read_json(Path("predictions/records/bad.json"))["mask_md5"] == md5_of(Path("predictions/masks/bad.nii.gz"))
    assert "its images have no SliceThickness" in rows()["bad"]["warnings"]
    assert rows()["bad"]["error"] == ""


def test_a_dicom_seg_is_written_from_an_existing_mask(segmentations: list[int]) -> None:
    write_series(Path("in"))
    predict()
    predict(dicom_seg=True)
    assert len(segmentations) == 1
    seg = pydicom.dcmread("predictions/dicom_seg/in.dcm")
    assert seg.pixel_array.sum() == read_volume(Path("predictions/masks/in.nii.gz")).array.sum()


def test_a_series_without_patient_id_gets_mask_and_object(segmentations: list[int]) -> None:
    write_series(Path("in"), without="PatientName")
    predict(dicom_seg=True)
    seg = pydicom.dcmread("predictions/dicom_seg/in.dcm")
    assert (seg.PatientID, seg.PatientName, seg.StudyDate) == ("", "", "")


def test_overwriting_a_mask_removes_its_dicom_seg(segmentations: list[int], networks: Path) -> None:
    write_series(Path("in"))
    predict(dicom_seg=True)
    save_fold(networks, 1)
    predict(overwrite=True)
    assert not Path("predictions/dicom_seg/in.dcm").exists()
    predict(dicom_seg=True)
    assert Path("predictions/dicom_seg/in.dcm").is_file()


def test_a_mask_is_kept_after_any_error_of_its_dicom_seg(
    segmentations: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_series(Path("in"))
    monkeypatch.setattr("highdicom.seg.Segmentation", lambda **_: [][1])
    assert "in: no DICOM SEG can be made for this series: list index out of range" in refusal(dicom_seg=True)
    assert masks() == ["in.nii.gz"]
