"""Stage evaluate in process: the same bits for any number of workers, no objective, and tables of older versions."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd
import pytest
import torch

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import read_json
from prostate_seg.config.schema import Config, parse
from prostate_seg.config.workspace import StageResult, Workspace, workspace_of
from prostate_seg.data.cases import Case
from prostate_seg.data.loading import load_case
from prostate_seg.imaging.image_io import content_md5, read_volume, write_volume
from prostate_seg.segmentation.inference.expected_dice import ExpectedDice
from prostate_seg.stages import evaluate, load_stage
from prostate_seg.stages.register import stored_trust
from prostate_seg.steps import evaluation
from prostate_seg.steps.evaluation import Evaluation
from prostate_seg.steps.leak_gate import hash_files
from prostate_seg.steps.report_data import load_report_data
from tests.conftest import composed

SMALL = ("experiment=tiny", "mlflow=off", "fold.index=0", "train.max_epochs=1", "train.steps_per_epoch=3")


def configured(root: Path, *overrides: str) -> tuple[Config, Workspace]:
    cfg = parse(composed("stage=evaluate", *SMALL, *overrides))
    cfg = replace(cfg, paths=replace(cfg.paths, root=str(root), cache=str(root / "cache"), journal=str(root / "spool")))
    return cfg, workspace_of(cfg)


def evaluated(root: Path, *, num_workers: int, num_threads: int) -> StageResult:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        return load_stage("evaluate")(*configured(root, f"machine.num_workers={num_workers}"))
    finally:
        torch.set_num_threads(before)


def files(folder: Path) -> dict[str, bytes]:
    """Return the content of every table and mask."""
    kept = [path for path in sorted(folder.rglob("*")) if path.suffix in (".csv", ".json", ".gz")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in kept}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace with four phantom cases and a barely trained network."""
    folder = tmp_path_factory.mktemp("workspace")
    cfg, workspace = configured(folder)
    for stage in ("fetch", "preprocess", "prepare", "train"):
        load_stage(stage)(replace(cfg, stage=stage), workspace)
    return folder


@pytest.fixture(scope="module")
def result(root: Path) -> StageResult:
    return evaluated(root, num_workers=1, num_threads=1)


@pytest.mark.slow
@pytest.mark.usefixtures("result")
def test_tables_and_masks_have_the_same_bits_for_any_number_of_workers_and_threads(root: Path) -> None:
    before = files(root / "evaluation")
    evaluated(root, num_workers=8, num_threads=4)
    assert len([name for name in before if name.startswith("masks/")]) == 2
    assert files(root / "evaluation") == before


@pytest.mark.usefixtures("result")
def test_every_file_is_hashed_once_and_a_changed_one_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    monkeypatch.setattr(evaluation, "content_md5", lambda path: (hashed.append(path), content_md5(path))[1])
    evaluated(root, num_workers=1, num_threads=1)
    assert len(hashed) == len(set(hashed)) == 6  # image and mask of two test cases and a val case
    monkeypatch.setattr(evaluation, "content_md5", lambda _: "another")
    with pytest.raises(InputError, match="has changed since stage=preprocess: run the pipeline again"):
        evaluated(root, num_workers=1, num_threads=1)


@pytest.mark.usefixtures("result")
def test_too_few_test_patients_have_no_expected_dice_but_signs_and_a_temperature(root: Path) -> None:
    trust = read_json(root / "evaluation" / "metrics.json")["trust"]
    assert "needs 9 test patients with a predicted gland, and there are 2" in trust["no_expected_dice"]
    table = pd.read_csv(root / "evaluation" / "expected_dice.csv")
    assert table["expected_dice"].isna().all()
    assert (table[["tta", "confidence"]] < 0).all(axis=None)
    assert table["inter_model"].isna().all()  # one network per case
    assert 0.1 <= trust["calibration"]["whole_gland"]["temperature"] <= 10
    voxels = pd.read_csv(root / "evaluation" / "calibration.csv").groupby("subset")[["outside", "inside"]].sum()
    assert (voxels.loc[["val", "test"]] > 0).all(axis=None)


@pytest.mark.usefixtures("result")
def test_a_coverage_that_two_patients_allow_has_a_calibration_that_register_stores(root: Path) -> None:
    before = read_json(root / "evaluation" / "metrics.json")["pooled"]
    cfg, workspace = configured(root, "machine.num_workers=1", "evaluate.coverage=0.5")
    load_stage("evaluate")(cfg, workspace)
    trust = read_json(root / "evaluation" / "metrics.json")["trust"]
    stored = stored_trust(trust)
    assert ExpectedDice(**stored["expected_dice"]).num_patients == 2
    assert stored["temperature"] == {"whole_gland": trust["calibration"]["whole_gland"]["temperature"]}
    assert read_json(root / "evaluation" / "metrics.json")["pooled"] == before


def external_copies(root: Path, folder: Path, *, noise: float) -> Path:
    """Return a data folder with the four images, which `noise` changes, and their masks, under other patients' names."""
    for image in sorted((root / "data" / "images").iterdir()):
        mask, name = root / "data" / "masks" / image.name, image.name.replace("ph", "other")
        volume = read_volume(image)
        values = volume.array + np.random.default_rng(0).normal(0, noise, volume.array.shape)
        if noise:
            write_volume(folder / "images" / name, replace(volume, array=np.rint(values).astype(np.int16)))
            labels = read_volume(mask)
            labels.array[labels.array.shape[0] // 2, 0, 0] = 1  # another mask file
            write_volume(folder / "masks" / name, labels)
        else:
            for kind, path in (("images", image), ("masks", mask)):
                (folder / kind).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, folder / kind / name)
    return folder


def refuse(*_: object, **__: object) -> NoReturn:
    pytest.fail("must not be called")


def test_copied_external_files_are_refused_before_an_image_is_read(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    external = external_copies(root, tmp_path, noise=0)
    monkeypatch.setattr(evaluate, "load_case", refuse)
    monkeypatch.setattr(Evaluation, "predictor_of", refuse)
    monkeypatch.setattr(evaluate, "segment", refuse)
    with pytest.raises(InputError, match="4 of 4 external images are in the data set of the trained folds") as caught:
        load_stage("evaluate")(*configured(root, f"evaluate.external_root={external}"))
    assert str(caught.value).count("identical image files") == 4
    assert not (root / "evaluation_external").exists()


def test_all_near_duplicates_in_an_external_folder_are_named_without_segmenting_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    external, read = external_copies(root, tmp_path, noise=20), []
    monkeypatch.setattr(evaluate, "segment", refuse)
    monkeypatch.setattr(
        evaluate, "load_case", lambda case, **how: (read.append(case.case_id), load_case(case, **how))[1]
    )
    with pytest.raises(InputError, match="4 of 4 external images are in the data set of the trained folds") as caught:
        load_stage("evaluate")(*configured(root, f"evaluate.external_root={external}", "machine.num_workers=1"))
    assert str(caught.value).count("near-identical images") == 4
    assert "fold.not_duplicates" in str(caught.value)
    assert sorted(read) == sorted(set(read))  # each image was decoded once
    assert len(read) == 4


def test_overruled_near_duplicates_in_an_external_folder_are_segmented(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    external = external_copies(root, tmp_path, noise=20)
    names = [path.name.split(".")[0] for path in sorted((root / "data" / "images").iterdir())]
    pairs = ",".join(f'"{name}/{name.replace("ph", "other")}: two patients"' for name in names)
    result = load_stage("evaluate")(
        *configured(root, f"evaluate.external_root={external}", f"fold.not_duplicates=[{pairs}]")
    )
    assert 0 <= result.metrics["test/dice"] <= 1
    assert caplog.text.count("fold.not_duplicates lets near-identical images pass") == 4


def test_external_case_whose_files_cannot_be_hashed_has_no_hashes(tmp_path: Path) -> None:
    (tmp_path / "gone_1.nii.gz").symlink_to(tmp_path / "absent.nii.gz")
    case = Case(
        case_id="gone_1", patient_id="gone", study_id="1", image=tmp_path / "gone_1.nii.gz", mask=None, attributes={}
    )
    fingerprint = hash_files(case)
    assert (fingerprint.patient_id, fingerprint.image_md5, fingerprint.mask_md5) == ("gone", None, None)


def test_network_of_some_training_cases_is_evaluated_and_one_of_other_cases_refused(root: Path) -> None:
    known = Evaluation.of(*configured(root))
    fold = known.folds[0]
    replace(known, folds={0: replace(fold, train=[*fold.train, "more_1"])}).predictor_of([0])
    for other in (replace(fold, train=["other_1"]), replace(fold, val=["other_1"])):
        with pytest.raises(InputError, match="was trained on other cases than kfold.json now lists"):
            replace(known, folds={0: other}).predictor_of([0])


def test_evaluation_returns_metrics_but_no_objective(result: StageResult) -> None:
    assert result.objectives == {}
    assert 0 <= result.metrics["test/nsd_2mm"] <= 1
    assert not [name for name in result.metrics if "surface" in name]


@pytest.mark.usefixtures("result")
def test_report_on_an_evaluation_of_an_older_version_names_column_and_stage(root: Path) -> None:
    cfg, workspace = configured(root)
    cases = workspace.evaluation / "cases.csv"
    old = pd.read_csv(cases, dtype=str).rename(columns={"nsd_2mm": "surface_dice_2mm"})
    old.to_csv(cases, index=False)
    with pytest.raises(InputError, match=re.escape("cases.csv has no nsd_2mm: an older version wrote it")) as caught:
        load_report_data(cfg, workspace, workspace.evaluation)
    assert "Run stage=evaluate again" in str(caught.value)
