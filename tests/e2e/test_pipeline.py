"""The stages in order on a small phantom: outputs and refusals."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from tests.conftest import ROOT
from tests.project_helpers import Project, only_in_hard_use
from tests.stage_helpers import run_stages

SMALL = [
    "mlflow=off",
    "data.phantom.num_patients=5",
    "data.phantom.num_second_studies=1",
    "data.phantom.field_of_view_mm=100",
    "data.phantom.gland_volume_range_ml=[25,50]",
    "preprocess.spacing_mm=[3,0.8,0.8]",
    "preprocess.image_size=96",
    "fold.num_folds=2",
    "model.channels=[8,16,32]",
    "model.strides=[[2,2],[2,2]]",
    "train.steps_per_epoch=10",
    "train.max_epochs=2",
]


def on_command_line(folder: Path, *arguments: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "prostate_seg", *arguments]
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def succeed(folder: Path, *arguments: str) -> str:
    result = run_stages(folder, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a complete pipeline; tests do not change it."""
    folder = tmp_path_factory.mktemp("pipeline")
    done = Project(folder).run("-m", "stage=fetch,preprocess,prepare,train,evaluate", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


@pytest.fixture
def workspace(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the finished workspace that a test can change."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    yield copy
    shutil.rmtree(copy)


def test_every_stage_writes_its_files(finished: Path) -> None:
    for name in (
        "data/images/ph001_1.nii.gz",
        "data/masks/ph001_2.nii.gz",
        "data/cases.csv",
        "data/phantom.csv",
        "preprocess/images/ph001_1.nii.gz",
        "preprocess/masks/ph001_1.nii.gz",
        "preprocess/dataset.csv",
        "preprocess/reference_quality.csv",
        "preprocess/preprocess_log.json",
        "preprocess/contract.json",
        "prepared/kfold.json",
        "model/fold0/weights.safetensors",
        "model/fold0/recipe.json",
        "model/fold0/history.csv",
        "model/fold0/history.png",
        "model/fold0/config.yaml",
        "model/fold1/summary.json",
        "model/folds.json",
        "evaluation/cases.csv",
        "evaluation/slices.csv",
        "evaluation/metrics.json",
        "evaluation/cases.png",
        "evaluation/overlays/worst.png",
        "evaluation/overlays/median.png",
        "evaluation/overlays/best.png",
    ):
        assert (finished / name).is_file(), name
    leftovers = [
        path for path in finished.rglob("*") if path.name.startswith((".tmp-", ".old-")) or "partial" in path.name
    ]
    assert leftovers == []


def test_every_case_is_tested_once_and_measured(finished: Path) -> None:
    table = pd.read_csv(finished / "evaluation/cases.csv")
    assert sorted(table["case_id"]) == ["ph001_1", "ph001_2", "ph002_1", "ph003_1", "ph004_1", "ph005_1"]
    assert table["dice"].between(0, 1).all()
    assert not table["oracle_crop"].any()
    assert table.loc[table["patient_id"] == "ph001", "fold"].nunique() == 1


def test_pooled_metrics_are_those_of_the_cases(finished: Path) -> None:
    table = pd.read_csv(finished / "evaluation/cases.csv")
    metrics = json.loads((finished / "evaluation/metrics.json").read_text())
    assert metrics["pooled"]["num_cases"] == 6
    assert metrics["pooled"]["num_patients"] == 5
    assert metrics["pooled"]["dice"]["mean"] == pytest.approx(table["dice"].mean())
    assert metrics["pooled"]["hd95_mm"]["median"] == pytest.approx(table["hd95_mm"].median())
    for fold, rows in table.groupby("fold"):
        assert metrics["folds"][fold]["dice"]["mean"] == pytest.approx(rows["dice"].mean())
    low, high = metrics["pooled"]["dice"]["ci95_low"], metrics["pooled"]["dice"]["ci95_high"]
    assert low <= metrics["pooled"]["dice"]["mean"] <= high


def test_predicted_mask_is_on_the_grid_of_the_original_file(finished: Path) -> None:
    for path in (finished / "evaluation/masks").rglob("*.nii.gz"):
        mask, image = sitk.ReadImage(str(path)), sitk.ReadImage(str(finished / "data/images" / path.name))
        assert mask.GetSize() == image.GetSize()
        np.testing.assert_allclose(mask.GetOrigin(), image.GetOrigin(), atol=1e-4)
        np.testing.assert_allclose(mask.GetSpacing(), image.GetSpacing(), atol=1e-6)
        np.testing.assert_allclose(mask.GetDirection(), image.GetDirection(), atol=1e-6)
        assert set(np.unique(sitk.GetArrayViewFromImage(mask))) <= {0, 1}


def test_console_shows_split_epochs_and_result_in_tables_within_80_columns(finished: Path) -> None:
    text = (finished / "stdout.txt").read_text()
    for words in (
        "fold  subset  cases",
        "fold  epoch  train loss",
        "metric ",
        "95% CI of the mean",
        "evaluate FINISHED after",
    ):
        assert words in text
    rows = [line for line in text.splitlines() if len(re.findall(r"\S {2,}\S", line)) > 1]
    assert max(map(len, rows)) <= 80


def test_true_volume_by_formula_is_that_of_the_masks(finished: Path) -> None:
    true = pd.read_csv(finished / "data/phantom.csv", index_col="case_id")["true_volume_ml"]
    found = pd.read_csv(finished / "preprocess/dataset.csv", index_col="case_id")["gland_volume_ml"]
    assert ((found / true - 1).abs() < 0.03).all()


def test_two_trainings_give_the_same_weights_and_other_folds_are_kept(workspace: Path) -> None:
    before = {fold: (workspace / f"model/fold{fold}/weights.safetensors").read_bytes() for fold in (0, 1)}
    stamp = (workspace / "model/fold1/weights.safetensors").stat().st_mtime_ns
    succeed(workspace, "stage=train", "fold.index=0", *SMALL)
    assert (workspace / "model/fold0/weights.safetensors").read_bytes() == before[0]
    assert (workspace / "model/fold1/weights.safetensors").stat().st_mtime_ns == stamp
    assert set(json.loads((workspace / "model/folds.json").read_text())) == {"fold0", "fold1"}


@pytest.mark.parametrize("stage", ["prepare", "train", "evaluate"])
def test_other_preprocessing_settings_are_refused(workspace: Path, stage: str) -> None:
    result = run_stages(workspace, f"stage={stage}", *SMALL, "preprocess.image_size=64")
    assert result.returncode == 1
    assert "image_size: is 96, wanted 64" in result.stderr


def test_fold_trained_on_other_cases_is_refused(workspace: Path) -> None:
    succeed(workspace, "stage=prepare", *SMALL, "seed=99")
    result = run_stages(workspace, "stage=evaluate", *SMALL, "seed=99")
    assert result.returncode == 1
    assert "trained on other cases than kfold.json now lists: run stage=train again" in result.stderr


def test_missing_fold_is_reported_and_the_others_can_be_evaluated(workspace: Path) -> None:
    shutil.rmtree(workspace / "model/fold1")
    result = run_stages(workspace, "stage=evaluate", *SMALL)
    assert result.returncode == 1
    assert "fold1 has no trained network: run stage=train first" in result.stderr
    assert (workspace / "evaluation/metrics.json").is_file()
    assert "in 1 folds" in succeed(workspace, "stage=evaluate", "fold.index=0", *SMALL)


def test_original_that_changed_since_preprocessing_is_refused(workspace: Path) -> None:
    kfold = json.loads((workspace / "prepared/kfold.json").read_text())
    case_id = kfold["folds"][0]["test"][0]
    shutil.copy(workspace / "data/images/ph001_2.nii.gz", workspace / f"data/images/{case_id}.nii.gz")
    if case_id == "ph001_2":
        shutil.copy(workspace / "data/images/ph003_1.nii.gz", workspace / f"data/images/{case_id}.nii.gz")
    result = run_stages(workspace, "stage=evaluate", *SMALL)
    assert result.returncode == 1
    assert f"{case_id}:" in result.stderr
    assert "has changed since stage=preprocess" in result.stderr


def test_bad_cases_stop_the_run_after_all_checks_and_keep_the_previous_result(workspace: Path) -> None:
    (workspace / "data/images/ph002_1.nii.gz").write_bytes(b"not an image")
    (workspace / "data/masks/ph003_1.nii.gz").unlink()
    before = (workspace / "preprocess/dataset.csv").read_bytes()
    result = run_stages(workspace, "stage=preprocess", *SMALL)
    assert result.returncode == 1
    assert "2 of 6 cases cannot be used" in result.stderr
    assert "ph002_1: unreadable: ph002_1.nii.gz:" in result.stderr
    assert "ph003_1: image_without_mask:" in result.stderr
    assert "data.on_bad_case=exclude" in result.stderr
    assert (workspace / "preprocess/dataset.csv").read_bytes() == before


def test_bad_cases_can_be_excluded_and_are_listed(workspace: Path) -> None:
    (workspace / "data/images/ph002_1.nii.gz").write_bytes(b"not an image")
    text = succeed(workspace, "stage=preprocess", "data.on_bad_case=exclude", *SMALL)
    assert "5 cases of 4 patients, 1 excluded" in text
    assert "ph002_1: unreadable" in text
    log = json.loads((workspace / "preprocess/preprocess_log.json").read_text())
    assert log["excluded_by_checks"] == ["ph002_1"]
    assert log["findings"][0]["check"] == "unreadable"
    table = pd.read_csv(workspace / "preprocess/reference_quality.csv", index_col="case_id")
    assert table["used"].to_dict() == {
        path.name.removesuffix(".nii.gz"): path.name != "ph002_1.nii.gz"
        for path in (workspace / "data/masks").iterdir()
    }
    assert table["findings"].dropna().to_dict() == {"ph002_1": "unreadable"}
    assert table.loc["ph002_1", "gland_volume_ml"] > 20
    assert table["image_disorder"].drop("ph002_1").eq(0).all()


def test_a_mask_without_a_zone_is_reported_also_if_it_is_refused(workspace: Path) -> None:
    for case_id, label in (("ph003_1", 1), ("ph004_1", 2)):  # the central gland alone, the peripheral zone alone
        path = str(workspace / f"data/masks/{case_id}.nii.gz")
        sitk.WriteImage(sitk.Cast(sitk.ReadImage(path) == label, sitk.sitkUInt8) * label, path)
    for kind in ("images", "masks"):
        for number in range(6, 9):
            shutil.copy(workspace / f"data/{kind}/ph001_1.nii.gz", workspace / f"data/{kind}/ph00{number}_1.nii.gz")
    text = succeed(workspace, "stage=preprocess", "data.on_bad_case=exclude", *SMALL)
    assert (
        "ph003_1: zone_missing: 80% or more of the other masks agree on their labels, and this has 1, lacks 2" in text
    )
    assert (
        "ph004_1: zone_missing: 80% or more of the other masks agree on their labels, and this has 2, lacks 1" in text
    )
    table = pd.read_csv(workspace / "preprocess/reference_quality.csv", index_col="case_id")
    assert table["used"].value_counts().to_dict() == {True: 8, False: 1}
    assert {"not_compact", "zone_missing"} <= set(table.loc["ph004_1", "findings"].split(";"))
    assert [labels.split(":")[0] for labels in table.loc[["ph003_1", "ph004_1"], "labels"]] == ["1", "2"]


def test_copied_image_under_another_patients_name_stops_prepare(workspace: Path) -> None:
    for kind in ("images", "masks"):
        shutil.copy(workspace / f"data/{kind}/ph002_1.nii.gz", workspace / f"data/{kind}/other_1.nii.gz")
        shutil.copy(workspace / f"data/{kind}/ph002_1.nii.gz", workspace / f"data/{kind}/third_1.nii.gz")
    text = succeed(workspace, "stage=preprocess", *SMALL)
    assert "identical_image" in text
    result = run_stages(workspace, "stage=prepare", *SMALL, "fold.num_folds=5")
    assert result.returncode == 1
    assert "identical image files" in result.stderr


def test_external_cases_are_segmented_by_the_ensemble_of_folds(workspace: Path) -> None:
    external = ["paths.root=other", "seed=5", "data.phantom.num_patients=2", "data.phantom.num_second_studies=0"]
    succeed(workspace, "stage=fetch", *SMALL, *external)
    text = succeed(workspace, "stage=evaluate", "evaluate.external_root=other/data", *SMALL)
    assert "2 cases of 2 patients" in text
    table = pd.read_csv(workspace / "evaluation_external/cases.csv")
    assert set(table["fold"]) == {"ensemble"}
    assert (workspace / "evaluation/metrics.json").is_file()


def test_external_images_that_were_trained_on_are_refused(workspace: Path) -> None:
    result = run_stages(workspace, "stage=evaluate", "evaluate.external_root=data", *SMALL)
    assert result.returncode == 1
    assert "6 of 6 external images are in the data set of the trained folds" in result.stderr


@pytest.mark.slow
def test_oracle_crop_is_marked_in_every_metric(workspace: Path) -> None:
    text = succeed(workspace, "stage=preprocess,prepare,train,evaluate", *SMALL, "preprocess.crop=mask")
    assert "ORACLE CROP" in text
    assert json.loads((workspace / "evaluation/metrics.json").read_text())["oracle_crop"] is True
    assert pd.read_csv(workspace / "evaluation/cases.csv")["oracle_crop"].all()
    assert pd.read_csv(workspace / "preprocess/dataset.csv")["oracle_crop"].all()


def test_final_model_has_no_test_cases_and_evaluate_suggests_the_next_step(workspace: Path) -> None:
    succeed(workspace, "stage=prepare,train", *SMALL, "fold=all", "train.max_epochs=1")
    result = run_stages(workspace, "stage=evaluate", *SMALL, "fold=all")
    assert result.returncode == 1
    assert "Use evaluate.external_root=DIR with other cases, or fold=kfold" in result.stderr


def test_case_names_with_spaces_and_non_ascii_letters_pass_all_stages(workspace: Path) -> None:
    for kind in ("images", "masks"):
        (workspace / f"data/{kind}/ph003_1.nii.gz").rename(workspace / f"data/{kind}/Müller José_1 final.nii.gz")
    succeed(workspace, "stage=preprocess,prepare,train,evaluate", *SMALL, "train.max_epochs=1")
    assert "Müller José_1 final" in set(pd.read_csv(workspace / "evaluation/cases.csv")["case_id"])
    assert list((workspace / "evaluation/masks").rglob("Müller José_1 final.nii.gz"))


def test_fetch_does_not_overwrite_images_that_are_not_a_phantom(workspace: Path) -> None:
    (workspace / "data/phantom.csv").unlink()
    before = sorted(path.name for path in (workspace / "data/images").iterdir())
    result = run_stages(workspace, "stage=fetch", *SMALL, "data.phantom.num_patients=2")
    assert result.returncode == 1
    assert "holds images that are not a phantom, and they are not overwritten" in result.stderr
    assert sorted(path.name for path in (workspace / "data/images").iterdir()) == before


@pytest.mark.slow
@only_in_hard_use
def test_folds_train_in_parallel_with_joblib(workspace: Path) -> None:
    on_command_line(
        workspace, "-m", "stage=train", "fold.index=0,1", "hydra/launcher=joblib", *SMALL, "train.max_epochs=1"
    )
    folds = json.loads((workspace / "model/folds.json").read_text())
    assert {name: row["num_epochs"] for name, row in folds.items()} == {"fold0": 1, "fold1": 1}


@pytest.mark.parametrize("spacing", ["[3,0.5,0.5]", "null"], ids=["fine spacing", "native spacing"])
def test_pipeline_runs_on_real_studies_with_two_studies_per_patient(
    shared_data: Path, tmp_path: Path, spacing: str
) -> None:
    settings = [
        "data=folder",
        f"data.root={shared_data / 't2w'}",
        "fold.num_folds=2",
        f"preprocess.spacing_mm={spacing}",
        "preprocess.image_size=auto",
    ]
    fast = ["model.channels=[8,16,32]", "model.strides=[[2,2],[2,2]]", "train.steps_per_epoch=10", "train.max_epochs=2"]
    text = succeed(tmp_path, "stage=preprocess,prepare,train,evaluate", *settings, *fast)
    assert "10795_1000811b: identical_mask: its mask file is identical to that of 10795_1000811" in text
    table = pd.read_csv(tmp_path / "evaluation/cases.csv", index_col="case_id")
    assert len(table) == 5
    assert table.loc["10795_1000811", "fold"] == table.loc["10795_1000811b", "fold"]
    dataset = pd.read_csv(tmp_path / "preprocess/dataset.csv", index_col="case_id")
    assert (dataset["gland_kept_fraction"] >= 0.995).all()


def test_dicom_series_in_place_of_an_image_gives_the_same_preprocessing(shared_data: Path, tmp_path: Path) -> None:
    case_id = "11373_1001396"
    for name, source in (
        ("mha", shared_data / f"t2w/images/{case_id}.mha"),
        ("dicom", shared_data / "dicom" / case_id),
    ):
        (tmp_path / name / "images").mkdir(parents=True)
        (tmp_path / name / "masks").mkdir()
        (tmp_path / name / "images" / source.name).symlink_to(source)
        (tmp_path / name / f"masks/{case_id}.nii.gz").symlink_to(shared_data / f"t2w/masks/{case_id}.nii.gz")
        succeed(tmp_path, "stage=preprocess", "data=folder", f"data.root={name}", f"paths.root=out_{name}")
    first, second = (
        sitk.ReadImage(str(tmp_path / f"out_{name}/preprocess/images/{case_id}.nii.gz")) for name in ("mha", "dicom")
    )
    np.testing.assert_array_equal(sitk.GetArrayFromImage(first), sitk.GetArrayFromImage(second))


@pytest.mark.slow
@pytest.mark.alone
@only_in_hard_use
def test_zones_reach_their_dice_and_are_registered_and_predicted(tmp_path: Path) -> None:
    common = ("experiment=zones", "paths.root=zones", "mlflow.name=zones")
    text = on_command_line(tmp_path, "-m", "stage=fetch,preprocess,prepare,train,evaluate,report", *common)
    metrics = json.loads((tmp_path / "zones/evaluation/metrics.json").read_text())
    dice = {name: zone["pooled"]["dice"]["mean"] for name, zone in metrics["zones"].items()}
    assert metrics["pooled"]["dice"]["mean"] >= 0.93, text
    assert dice["transition_zone"] >= 0.88, text
    assert dice["peripheral_zone"] >= 0.80, text
    promoted = ("register.promote=true", "register.min_test_patients=8")
    text = on_command_line(tmp_path, "stage=register", *promoted, *common)
    assert "passed   peripheral_zone" in text
    model = ("predict.model=models:/prostate_seg@champion", "predict.input=zones/data/images/ph001_1.nii.gz")
    on_command_line(tmp_path, "stage=predict", *model, *common)
    header = (tmp_path / "predictions/volumes.csv").read_text().splitlines()[0]
    assert header.startswith("name,volume_ml,peripheral_zone_ml,transition_zone_ml")


@pytest.mark.slow
@pytest.mark.alone
def test_quickstart_reaches_dice_093_in_native_space(tmp_path: Path) -> None:
    text = on_command_line(
        tmp_path, "-m", "stage=fetch,preprocess,prepare,train,evaluate", "experiment=quickstart", "paths.root=demo"
    )
    pooled = json.loads((tmp_path / "demo/evaluation/metrics.json").read_text())["pooled"]
    assert pooled["dice"]["mean"] >= 0.93, text
    assert pooled["num_missed_glands"] == 0
    assert "tables, masks and overlays are in demo/evaluation" in text
