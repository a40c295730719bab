"""Verification reports unchanged, changed or missing, with the files of a folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from prostate_seg.config.workspace import Workspace
from prostate_seg.provenance.environment import packages
from prostate_seg.provenance.hashing import hash_paths
from prostate_seg.provenance.record import key_of, path_of
from prostate_seg.provenance.source_files import code_key, source_files
from prostate_seg.provenance.verification import as_json, as_table, compare

SETTINGS = {"seed": 1, "data": {"root": None}, "preprocess": {"image_size": 160}, "fold": {}, "train": {"x": 1}}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    root = tmp_path / "workspace"
    (root / "preprocess" / "images").mkdir(parents=True)
    (root / "preprocess" / "images" / "a.nii.gz").write_text("a")
    (root / "preprocess" / "dataset.csv").write_text("b")
    (root / "prepared").mkdir()
    (root / "prepared" / "kfold.json").write_text("{}")
    return Workspace(root=root, data=tmp_path / "elsewhere", cache=tmp_path / ".cache")


@pytest.fixture
def record(workspace: Workspace) -> dict[str, Any]:
    code = source_files("prepare")
    hashed = hash_paths([workspace.preprocess, workspace.kfold_json, *code], cache=workspace.cache)
    return {
        "inputs": {"preprocess": hashed[workspace.preprocess].md5},
        "outputs": {"prepared/kfold.json": hashed[workspace.kfold_json].md5},
        "code": {code_key(path): hashed[path].md5 for path in code},
        "files": {"preprocess": dict(hashed[workspace.preprocess].files)},
        "packages": {"numpy": packages()["numpy"]},
        "settings": SETTINGS,
    }


def test_unchanged_workspace_is_reported_as_the_same(workspace: Workspace, record: dict[str, Any]) -> None:
    items = compare("prepare", record, settings=SETTINGS, workspace=workspace)
    assert {item.verdict for item in items} == {"same"}
    assert {item.kind for item in items} == {"inputs", "outputs", "code", "packages", "config"}


def test_every_kind_of_difference_is_found(workspace: Workspace, record: dict[str, Any]) -> None:
    (workspace.preprocess / "dataset.csv").write_text("other")
    (workspace.preprocess / "images" / "a.nii.gz").unlink()
    (workspace.preprocess / "images" / "b.nii.gz").write_text("new")
    workspace.kfold_json.unlink()
    record["code"]["prostate_seg/gone.py"] = "0" * 32
    record["packages"] = {"numpy": "0.1", "no-such-package": "1.0"}
    now = SETTINGS | {"seed": 2, "train": {"x": 2}}
    items = {(item.kind, item.name): item for item in compare("prepare", record, settings=now, workspace=workspace)}
    different = {key: item.verdict for key, item in items.items() if item.verdict != "same"}
    assert different == {
        ("inputs", "preprocess"): "changed",
        ("outputs", "prepared/kfold.json"): "missing",
        ("code", "prostate_seg/gone.py"): "missing",
        ("packages", "numpy"): "changed",
        ("packages", "no-such-package"): "missing",
        ("config", "seed"): "changed",
    }  # train.x does not change the output of prepare
    assert items["inputs", "preprocess"].files == (
        "changed dataset.csv", "missing images/a.nii.gz", "new images/b.nii.gz",
    )  # fmt: skip
    table = as_table(items.values())
    assert "prepare     config    changed  seed: 1 -> 2" in table
    assert max(len(line) for line in table) <= 100
    assert {row["verdict"] for row in json.loads(as_json(items.values()))} == {"same", "changed", "missing"}


def test_keys_and_paths_round_trip(workspace: Workspace) -> None:
    for path, key in (
        (workspace.root / "model" / "fold0", "model/fold0"),
        (workspace.data / "images", "data/images"),
        (workspace.data, "data"),
        (Path("/other/place/file.json"), "/other/place/file.json"),
    ):
        assert key_of(path, workspace) == key
        assert path_of(key, workspace) == path
