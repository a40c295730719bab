"""Leaks stop training; any split file can be audited, with or without images."""

import json
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from scipy import ndimage

from prostate_seg.imaging.geometry import Geometry, Volume
from prostate_seg.imaging.image_io import read_volume, write_volume
from tests.project_helpers import Project, copy_of, small_for
from tests.stage_helpers import run_stages


def run(folder: Path, *arguments: str) -> CompletedProcess[str]:
    return run_stages(folder, *arguments, *small_for(arguments))


def official_ids(shared_data: Path) -> tuple[Path, list[str]]:
    file = shared_data / "picai_folds.json"
    return file, sorted(case_id for fold in json.loads(file.read_text())["folds"] for case_id in fold["val"])


def test_official_folds_pass_and_a_plain_shuffled_kfold_splits_17_patients(shared_data: Path, tmp_path: Path) -> None:
    project = Project(tmp_path)
    file, ids = official_ids(shared_data)
    passed = run(tmp_path, "stage=audit", f"audit.splits={file}")
    assert passed.returncode == 0, passed.stderr
    assert "5 folds, 1500 cases of 1476 patients, known by their names alone" in passed.stdout
    assert "patient overlap                      passed" in passed.stdout
    assert "near-identical images                not run" in passed.stdout
    order = np.arange(len(ids))
    np.random.RandomState(12345).shuffle(order)
    tests = [sorted(ids[i] for i in part) for part in np.array_split(order, 5)]
    splits = [{"train": sorted(set(ids) - set(test)), "val": test} for test in tests]
    (tmp_path / "splits_final.json").write_text(json.dumps(splits))
    leaky = project.run("stage=audit", "audit.splits=splits_final.json", "mlflow=off")
    assert leaky.returncode == 1
    assert "17 patients are split: " in leaky.stdout
    assert "patient overlap" in leaky.stderr
    assert "Traceback" not in leaky.stderr


def test_repeated_series_of_another_patient_id_stops_prepare_and_audit(shared_data: Path, tmp_path: Path) -> None:
    data = ["data=folder", f"data.root={shared_data / 't2w'}", "data.patient_pattern='(.+)'"]
    splits = [{"train": ["11373_1001396", "10795_1000811"], "val": ["10795_1000811b", "p158020_1"]}]
    (tmp_path / "s.json").write_text(json.dumps(splits))
    audited = run_stages(tmp_path, "stage=audit", "audit.splits=s.json", *data)
    assert audited.returncode == 1
    assert "near-identical images (correlation 0.73): 10795_1000811 (train) and 10795_1000811b (val)" in audited.stderr
    assert audited.stderr.count("near-identical images (") == 1
    assert "known by the files in" in audited.stdout
    done = run_stages(tmp_path, "stage=preprocess", *data)
    assert done.returncode == 0, done.stderr
    refused = run_stages(tmp_path, "stage=prepare", "fold.num_folds=5", "seed=1", *data)
    assert refused.returncode == 1
    assert "10795_1000811 (" in refused.stderr
    assert "near-identical images" in refused.stderr
    assert not (tmp_path / "prepared").exists()


def test_accepted_near_duplicate_passes_every_gate_with_its_reason(tmp_path: Path) -> None:
    grid = Geometry(
        shape_vox=(16, 60, 60), spacing_mm=(3.0, 1.5, 1.5), origin_mm=(0, 0, 0), direction=tuple(np.eye(3).ravel())
    )
    rng = np.random.default_rng(0)
    pixels = ndimage.gaussian_filter(rng.normal(size=(2, *grid.shape_vox)), [0, 1, 1.5, 1.5]) * 1000 + 500
    images = {"a_1": pixels[0], "b_1": pixels[0] + rng.normal(0, 5, grid.shape_vox), "c_1": pixels[1]}
    for number, (case_id, array) in enumerate(images.items()):
        gland = np.zeros(grid.shape_vox, np.uint8)
        gland[3:13, 18 + number : 42, 18:42] = 1
        write_volume(tmp_path / f"data/images/{case_id}.nii.gz", Volume(array=array.astype(np.float32), geometry=grid))
        write_volume(tmp_path / f"data/masks/{case_id}.nii.gz", Volume(array=gland, geometry=grid))
    settings = ["data=folder", f"data.root={tmp_path / 'data'}", "preprocess.image_size=64", "fold.num_folds=3"]
    pair = 'fold.not_duplicates=["a_1/b_1: two patients, says the register"]'
    done = run_stages(tmp_path, "stage=preprocess", *settings)
    assert done.returncode == 0, done.stderr
    refused = run_stages(tmp_path, "stage=prepare", *settings)
    assert refused.returncode == 1
    assert "near-identical images (correlation" in refused.stderr
    assert "fold.not_duplicates=[" in refused.stderr
    for stage in ("prepare", "audit"):
        passed = run_stages(tmp_path, f"stage={stage}", pair, *settings)
        assert passed.returncode == 0, passed.stderr
        assert "lets near-identical images pass: a_1 and b_1 (correlation" in passed.stdout + passed.stderr
        assert "): two patients, says the register" in passed.stdout + passed.stderr
    assert "near-identical images                passed (1 pair overruled)" in passed.stdout
    idle = run_stages(tmp_path, "stage=audit", pair.replace("b_1", "c_1"), *settings)
    assert idle.returncode == 1
    assert "changes nothing: a_1/c_1: their images are not near-identical" in idle.stdout + idle.stderr


def test_intensities_scaled_by_the_whole_data_set_stop_training(prepared: Project, tmp_path: Path) -> None:
    project = copy_of(prepared, tmp_path / "project")
    images = sorted((project.folder / "preprocess/images").glob("*.nii.gz"))
    for path in images:  # as if intensities had been scaled by all studies together
        volume = read_volume(path)
        scaled = np.clip(volume.array.astype(np.float32) * 0.8 + 5, 0, 255).astype(np.uint8)
        write_volume(path, type(volume)(array=scaled, geometry=volume.geometry))
    refused = run(project.folder, "stage=train")
    assert refused.returncode == 1
    assert "intensities from outside the study: ph001_1" in refused.stderr
    assert "Run stage=preprocess again" in refused.stderr


def test_patient_in_two_subsets_of_kfold_json_stops_training(prepared: Project, tmp_path: Path) -> None:
    project = copy_of(prepared, tmp_path / "project")
    file = project.folder / "prepared/kfold.json"
    content = json.loads(file.read_text())
    fold = content["folds"][0]
    fold["val"].append(fold["test"][0])
    file.write_text(json.dumps(content))
    refused = run(project.folder, "stage=train")
    assert refused.returncode == 1
    assert f"fold 0: case in two parts: {fold['test'][0]} (val) and {fold['test'][0]} (test)" in refused.stderr


def test_oracle_crop_is_marked_in_training_and_fails_an_audit(prepared: Project, tmp_path: Path) -> None:
    project = copy_of(prepared, tmp_path / "project")
    done = project.run("-m", "stage=preprocess,prepare", "preprocess.crop=mask")
    assert done.returncode == 0, done.stderr
    assert project.only(level="stage", stage="prepare").data.tags["leak_gate"] == "leaks: oracle crop"
    refused = run(project.folder, "stage=audit", "preprocess.crop=mask")
    assert refused.returncode == 1
    assert "oracle crop: ph001_1" in refused.stderr
    clean = run(prepared.folder, "stage=audit")
    assert clean.returncode == 0, clean.stderr
    assert "intensities from outside the study   passed\n" in clean.stdout + "\n"


@pytest.mark.parametrize(
    ("text", "message"), [("[1]", "a split file is JSON of one of these forms"), ("{", "is no JSON")]
)
def test_invalid_split_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.json").write_text(text)
    refused = run(tmp_path, "stage=audit", "audit.splits=s.json")
    assert refused.returncode == 1
    assert message in refused.stderr
