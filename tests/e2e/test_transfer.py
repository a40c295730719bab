"""Training from the networks of another site: from a folder, an alias and a run; what an ancestor has seen is refused."""

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from prostate_seg.common.files import md5_of, read_json
from prostate_seg.data.lineage import CHECK
from prostate_seg.imaging.image_io import content_md5
from tests.project_helpers import Project, copy_of, small_for
from tests.stage_helpers import run_stages

CASES = [f"ph00{number}_1" for number in range(1, 5)]


def run(folder: Path, *arguments: str) -> CompletedProcess[str]:
    return run_stages(folder, *arguments, *small_for(arguments))


def done(folder: Path, *arguments: str) -> str:
    found = run(folder, *arguments)
    assert found.returncode == 0, found.stderr
    return found.stdout


def set_fold(project: Project, *, train: Sequence[str], val: Sequence[str], test: Sequence[str]) -> None:
    """Replace the folds of a project by one."""
    file = project.folder / "prepared/kfold.json"
    fold = {"train": list(train), "val": list(val), "test": list(test)}
    file.write_text(json.dumps({**read_json(file), "folds": [fold]}))


@pytest.fixture(scope="module")
def source(prepared: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The networks of another site, which has trained on the first three of the same four studies."""
    project = copy_of(prepared, tmp_path_factory.mktemp("source") / "project")
    set_fold(project, train=CASES[:2], val=CASES[2:3], test=CASES[3:])
    done(project.folder, "stage=train")
    return project.folder / "model"


@pytest.fixture
def project(prepared: Project, tmp_path: Path) -> Project:
    return copy_of(prepared, tmp_path / "project")


@pytest.mark.parametrize(("val", "test"), [(CASES[1], CASES[3]), (CASES[3], CASES[2])])
def test_training_on_folds_whose_val_or_test_cases_an_ancestor_has_seen_is_refused(
    project: Project, source: Path, val: str, test: str
) -> None:
    set_fold(project, train=CASES[:1], val=[val], test=[test])
    seen = val if val != CASES[3] else test
    refused = run(project.folder, "stage=train", f"train.init={source}")
    assert refused.returncode == 1
    assert (
        "fold 0: its initial weights, or weights that those started from, were trained on its val or test"
        in refused.stderr
    )
    assert f"and {seen} (" in refused.stderr
    assert f"is a study of {source} (weights" in refused.stderr
    assert "Start from weights that were not trained on them" in refused.stderr
    assert not (project.folder / "model").exists()
    assert not list((project.folder / ".cache").glob("packed/*"))  # nothing was begun


def test_trained_network_carries_the_lineage_and_its_descendants_test_cases_are_refused(
    project: Project, source: Path
) -> None:
    set_fold(project, train=CASES[:2], val=CASES[2:3], test=CASES[3:])
    text = done(project.folder, "stage=train,evaluate,report", f"train.init={source}", "train.freeze=encoder")
    assert f"fold 0 starts from network 1 of 1 of {source}" in text
    assert "fold 0: train.freeze=encoder: " in text
    summary = read_json(project.folder / "evaluation/metrics.json")["leak_gate"]
    assert summary["checks"][CHECK] == "passed (3 studies of 1 network)"
    lineage = read_json(project.folder / "model/fold0/lineage.json")
    (parent,) = lineage["ancestors"]
    assert (parent["source"], parent["train"], parent["val"]) == (str(source), [0, 1], [2])
    assert parent["weights_md5"] == md5_of(source / "fold0/weights.safetensors")
    assert parent["weights_md5"][:8] in (project.folder / "report/model_card.md").read_text()
    page = (project.folder / "report/report.html").read_text()
    assert "Initial weights" in page
    assert CHECK in page

    lineage["train"], lineage["ancestors"][0]["train"] = [0], [0, 1, 3]  # the ancestor had seen the test case, too
    dataset = (project.folder / "preprocess/dataset.csv").read_text().splitlines()
    columns, row = dataset[0].split(","), next(line for line in dataset if line.startswith(CASES[3])).split(",")
    hashes = {name: row[columns.index(name)] for name in ("image_md5", "mask_md5", "voxels_sha1")}
    lineage["studies"].append(hashes)
    (project.folder / "model/fold0/lineage.json").write_text(json.dumps(lineage))
    (project.folder / "model/fold0/lineage.npz").unlink()
    refused = run(project.folder, "stage=evaluate", f"train.init={source}")
    assert refused.returncode == 1
    assert (
        f"identical image files: ancestor-{hashes['voxels_sha1'][:12]} (train) and {CASES[3]} (test)" in refused.stderr
    )


def test_external_images_that_an_ancestor_has_seen_are_refused(project: Project, source: Path) -> None:
    """The folds of this data set do not know the external image; only the ancestor does."""
    set_fold(project, train=CASES[:2], val=CASES[2:3], test=CASES[3:])
    done(project.folder, "stage=train", f"train.init={source}")
    other = project.folder / "other"
    other.mkdir()
    done(other, "stage=fetch", "seed=77")
    image = min((other / "data/images").iterdir())
    lineage_file = project.folder / "model/fold0/lineage.json"
    lineage = read_json(lineage_file)
    lineage["studies"].append({"image_md5": content_md5(image), "mask_md5": None, "voxels_sha1": "0123456789abcdef"})
    lineage["ancestors"][0]["val"] = [3]
    (project.folder / "model/fold0/lineage.npz").unlink()
    lineage_file.write_text(json.dumps(lineage))
    refused = run(project.folder, "stage=evaluate", f"evaluate.external_root={other / 'data'}", "fold.index=0")
    assert refused.returncode == 1
    assert "1 of 4 external images are in the data set of the trained folds or of the weights" in refused.stderr
    assert f"ancestor-0123456789ab is a study of {source} (weights" in refused.stderr


def test_network_of_an_earlier_version_gives_the_verdict_unknown(project: Project, source: Path) -> None:
    old = project.folder / "old"
    shutil.copytree(source, old)
    for name in ("lineage.json", "lineage.npz"):
        (old / "fold0" / name).unlink()
    set_fold(project, train=CASES[:1], val=CASES[1:2], test=CASES[2:])
    text = done(project.folder, "stage=train,evaluate", f"train.init={old / 'fold0'}")
    assert "the leak gate cannot check whether ancestors were trained on val or test cases" in text
    summary = read_json(project.folder / "evaluation/metrics.json")["leak_gate"]
    assert summary["verdict"] == f"unknown: {CHECK}"
    assert read_json(project.folder / "model/fold0/lineage.json")["ancestors"][0]["train"] is None


def test_networks_that_this_training_replaces_are_refused(project: Project, source: Path) -> None:
    shutil.copytree(source, project.folder / "model")
    refused = run(project.folder, "stage=train", "train.init=model/fold0")
    assert refused.returncode == 1
    assert "train.init: model/fold0 must not be in model, whose networks this training replaces" in refused.stderr


@pytest.mark.slow
def test_training_from_alias_and_run_registers_its_ancestors_and_register_refuses_seen_cases(
    prepared: Project, tmp_path: Path
) -> None:
    project = copy_of(prepared, tmp_path / "project")
    set_fold(project, train=CASES[:2], val=CASES[2:3], test=CASES[3:])
    recorded(project, "-m", "stage=train,evaluate,register")
    training = project.only(stage="train", level="stage").info.run_id
    alias = "train.init=models:/prostate_seg@challenger"
    recorded(project, "-m", "stage=train,evaluate,register", alias, "mlflow.name=second")
    tags = project.only(stage="train", level="stage", pipeline="second").data.tags
    assert {name: tags[f"init.{name}"] for name in ("source", "version", "run_id", "num_studies")} == {
        "source": "models:/prostate_seg@challenger",
        "version": "prostate_seg version 1",
        "run_id": training,
        "num_studies": "3",
    }
    assert tags["leak_gate"] == "passed"
    version = project.client.get_model_version("prostate_seg", "2")
    assert version.tags["ancestors"].startswith("prostate_seg version 1 (weights ")
    check_register(project)

    again = recorded(project, "stage=train", alias, "mlflow.name=second", "mlflow.skip_finished=true")
    assert f"train runs again: {alias.removeprefix('train.init=')} is another version by now" in again
    parents = read_json(project.folder / "model/fold0/lineage.json")["ancestors"]
    assert [one["version"] for one in parents] == ["prostate_seg version 2", "prostate_seg version 1"]

    text = recorded(project, "stage=train", f"train.init={training}", "mlflow.name=third")
    assert "fold 0 starts from network 1 of 1 of prostate_seg version 1" in text
    (parent,) = read_json(project.folder / "model/fold0/lineage.json")["ancestors"]
    assert (parent["version"], parent["run_id"]) == ("prostate_seg version 1", training)
    unknown = project.run("stage=train", f"train.init={'0' * 32}", "mlflow.name=third")
    assert "there is no run 00000000" in unknown.stdout + unknown.stderr


def recorded(project: Project, *arguments: str) -> str:
    found = project.run(*arguments)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout + found.stderr


def check_register(project: Project) -> None:
    """Change what the evaluation recorded, as one of an earlier version or of other cases would have it."""
    run_id = project.only(stage="evaluate", level="stage", pipeline="second").info.run_id
    tables = {name: (project.folder / "evaluation" / name).read_text() for name in ("metrics.json", "cases.csv")}
    summary = json.loads(tables["metrics.json"])
    del summary["leak_gate"]["checks"][CHECK]
    project.client.log_text(run_id, json.dumps(summary), "tables/metrics.json")
    unchecked = project.run("stage=register", "mlflow.name=second")
    assert unchecked.returncode == 1
    assert f"did not compare its test cases with the {CHECK} of its networks" in unchecked.stdout + unchecked.stderr
    project.client.log_text(run_id, tables["metrics.json"], "tables/metrics.json")
    with (project.folder / "preprocess/dataset.csv").open(encoding="utf-8") as stream:
        md5s = {row["case_id"]: row["image_md5"] for row in csv.DictReader(stream)}
    project.client.log_text(run_id, tables["cases.csv"].replace(md5s[CASES[3]], md5s[CASES[0]]), "tables/cases.csv")
    leaking = project.run("stage=register", "mlflow.name=second")
    assert leaking.returncode == 1
    assert (
        "fold0: its initial weights, or weights that those started from, were trained on"
        in leaking.stdout + leaking.stderr
    )
    assert "is a study of prostate_seg version 1 (weights" in leaking.stdout + leaking.stderr
