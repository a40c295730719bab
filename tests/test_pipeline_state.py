"""State of each stage: current, stale with reasons, or missing."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prostate_seg.config.schema import STAGE_SETTINGS, parse, science_of
from prostate_seg.config.workspace import Workspace
from prostate_seg.operations.job import Job
from prostate_seg.provenance import hashing
from prostate_seg.provenance.code_digests import code_digests
from prostate_seg.provenance.ds_version import known_entries, write_entry
from prostate_seg.provenance.hashing import hash_paths
from prostate_seg.provenance.pipeline_state import (
    as_json,
    as_rows,
    command_of_newest,
    pipeline_states,
)
from prostate_seg.provenance.record import key_of
from prostate_seg.provenance.source_files import PACKAGE, code_key
from prostate_seg.stages import status
from prostate_seg.tracking.stage_run import finished_before
from tests.conftest import composed

SETTINGS: dict[str, Any] = {
    "seed": 1,
    "data": {"root": None, "source": "folder"},
    "preprocess": {"image_size": 160},
    "fold": {"num_folds": 5, "index": None},
    "model": {"name": "unet"},
    "train": {"max_epochs": 2},
    "evaluate": {"threshold": 0.5},
}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A workspace in which preprocess, prepare and train have run."""
    made = Workspace(root=tmp_path / "w", data=tmp_path / "data", cache=tmp_path / "cache")
    for path in (made.data / "images" / "a", made.dataset_csv, made.kfold_json, made.fold(0) / "weights"):
        path.parent.mkdir(parents=True)
        path.write_text("x")
    enter(made, "preprocess", [made.data], [made.preprocess], [], metrics={"preprocess/num_cases": 7.0})
    enter(made, "prepare", [made.preprocess], [made.kfold_json], ["preprocess"])
    enter(
        made,
        "train",
        [made.preprocess, made.kfold_json],
        [made.model],
        ["preprocess", "prepare"],
        {"val/best_dice": 0.8765},
    )
    return made


def enter(
    workspace: Workspace,
    name: str,
    inputs: Sequence[Path],
    outputs: Sequence[Path],
    upstream: Sequence[str],
    metrics: dict[str, float] | None = None,
    settings: dict[str, Any] = SETTINGS,
    finished_at: str = "2026-01-02T03:04:05+00:00",
    command: str = "python -m prostate_seg",
    own: str = "fold.index=0",
) -> None:
    """Write the entry of a run of a stage."""
    code = [PACKAGE / "common" / "errors.py", PACKAGE / "common" / "files.py"]
    hashed = hash_paths([*inputs, *outputs, *code], cache=workspace.cache)
    entry = {
        "run_id": f"id of {name}",
        "pipeline": "baseline",
        "finished_at": finished_at,
        "seconds": 12.3,
        "command": f"{command} stage={name}",
        "overrides": [f"stage={name}", "data.root=a b", own],
        "settings": settings,
        "metrics": metrics or {},
        "sought": {},
        "upstream": {one: {"run_id": f"id of {one}", "unchanged": True} for one in upstream},
        "packages": {"no-such-package": "1.0"},
        "inputs": {key_of(path, workspace): hashed[path].md5 for path in inputs},
        "outputs": {key_of(path, workspace): hashed[path].md5 for path in outputs},
        "code": {code_key(path): hashed[path].md5 for path in code},
    }
    write_entry(workspace, name, entry)


def states(workspace: Workspace, settings: dict[str, Any] = SETTINGS) -> dict[str, tuple[str, list[str]]]:
    return {one.stage: (one.state, list(one.reasons)) for one in pipeline_states(workspace, settings=settings)}


def test_recorded_stages_are_current_and_the_others_missing(workspace: Workspace) -> None:
    found = states(workspace)
    assert list(found) == [stage for stage in STAGE_SETTINGS if stage != "fetch"]
    current = ("preprocess", "prepare", "train")
    assert found == {stage: ("current" if stage in current else "missing", []) for stage in found}


def test_an_empty_workspace_has_nothing_and_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    empty = Workspace(root=tmp_path, data=tmp_path / "data", cache=tmp_path / "cache")
    assert states(empty, {**SETTINGS, "data": {"source": "phantom"}}) == dict.fromkeys(STAGE_SETTINGS, ("missing", []))
    with caplog.at_level("INFO"):
        status.run(parse(composed("stage=status")), empty)
    assert f"No stage has run in {tmp_path}." in caplog.text


def test_a_changed_setting_makes_its_stage_and_all_later_ones_stale(workspace: Workspace) -> None:
    found = states(workspace, {**SETTINGS, "fold": {"num_folds": 3, "index": None}})
    assert found["preprocess"] == ("current", [])
    assert found["prepare"] == ("stale", ["fold.num_folds 5 -> 3"])
    assert found["train"] == ("stale", ["prepare is stale"])


def test_changed_files_are_listed_for_the_stages_that_read_or_wrote_them(workspace: Workspace) -> None:
    workspace.dataset_csv.write_text("other")
    found = states(workspace)
    assert found["preprocess"] == ("stale", ["preprocess changed"])
    assert found["prepare"] == ("stale", ["preprocess changed", "preprocess is stale"])
    (workspace.data / "images" / "a").unlink()
    (workspace.data / "images").rmdir()
    workspace.data.rmdir()
    assert states(workspace)["preprocess"] == ("stale", ["data is missing", "preprocess changed"])


def test_changed_code_is_counted(workspace: Workspace) -> None:
    path = workspace.root / "DS_VERSION.json"
    content = json.loads(path.read_text())
    code = content["stages"]["prepare"]["code"]
    code.update(dict.fromkeys(list(code)[:2], "0" * 32))
    path.write_text(json.dumps(content))
    assert states(workspace)["prepare"] == ("stale", ["2 source files changed"])


def test_code_that_decides_no_number_leaves_a_stage_current(workspace: Workspace) -> None:
    path = workspace.root / "DS_VERSION.json"
    content = json.loads(path.read_text())
    entry = content["stages"]["prepare"]
    entry["code_digests"] = code_digests("prepare")
    entry["code"] = dict.fromkeys(entry["code"], "0" * 32)  # other comments, the same syntax tree
    path.write_text(json.dumps(content))
    assert states(workspace)["prepare"] == ("current", [])
    entry["code_digests"]["prostate_seg/data/folds.py"] = "0" * 32
    path.write_text(json.dumps(content))
    assert states(workspace)["prepare"] == ("stale", ["1 source files changed"])


def test_folds_trained_separately_replace_the_training(workspace: Workspace) -> None:
    path = workspace.root / "DS_VERSION.json"
    content = json.loads(path.read_text())
    whole = content["stages"].pop("train")
    whole["settings"] = {**SETTINGS, "fold": {"num_folds": 5, "index": 1}}
    content["stages"]["train.fold1"] = whole
    path.write_text(json.dumps(content))
    found = states(workspace)
    assert found["train.fold1"] == ("current", [])
    assert "train" not in found


def test_networks_in_another_folder_are_found_and_an_unfinished_training_is_reported(
    workspace: Workspace, tmp_path: Path
) -> None:
    elsewhere = replace(workspace, trained=tmp_path / "trial")
    elsewhere.training.mkdir(parents=True)
    content = json.loads((workspace.root / "DS_VERSION.json").read_text())
    train = content["stages"].pop("train")
    (workspace.root / "DS_VERSION.json").write_text(json.dumps(content))
    assert states(elsewhere)["train"] == ("missing", [])  # a finished training leaves the folder, and here no record
    (elsewhere.training / "fold0").mkdir()
    reason = "is running, or was stopped and goes on with the same command"
    assert states(elsewhere)["train"] == ("missing", [reason])
    (elsewhere.root / "model").rename(elsewhere.model)
    train["outputs"] = {str(elsewhere.model): train["outputs"]["model"]}
    write_entry(replace(elsewhere, root=elsewhere.model.parent), "train", train)
    assert states(elsewhere)["train"] == ("current", [])


def test_report_with_another_setting_of_its_own_is_not_skipped(workspace: Workspace, tmp_path: Path) -> None:
    def is_skipped(*overrides: str) -> bool:
        job = Job(overrides=overrides, output_dir=tmp_path, hydra_dir=".hydra", sweep_folder=None, number=None)
        cfg = parse(composed("stage=report", "mlflow=off", "fold.index=0", *overrides))
        return finished_before(cfg, workspace, job) is not None

    settings = science_of(parse(composed("stage=report", "fold.index=0")))
    enter(workspace, "report", [workspace.model], [workspace.preprocess], [], settings=settings)
    assert is_skipped()
    assert not is_skipped("report.mixed_folds=a")
    enter(
        workspace,
        "report",
        [workspace.model],
        [workspace.preprocess],
        [],
        settings=settings,
        own="report.mixed_folds=a",
    )
    assert is_skipped("report.mixed_folds=a")
    assert not is_skipped()


def test_unchanged_files_are_not_read_again(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    states(workspace)

    def refuse(path: str, info: object) -> None:
        raise AssertionError(f"{path} is read again")

    monkeypatch.setattr(hashing, "_hash_file", refuse)
    assert states(workspace)["train"] == ("current", [])


def test_rows_and_json_contain_time_and_reasons(workspace: Workspace) -> None:
    found = pipeline_states(
        workspace, settings={**SETTINGS, "train": {"max_epochs": 3}, "seed": 2, "model": {"name": "x"}}
    )
    rows = {row[0]: row for row in as_rows(found)}
    assert rows["preprocess"] == ["preprocess", "current", "2026-01-02 03:04:05", "12 s", "cases 7", ""]
    assert rows["train"][4:] == [
        "best_dice 0.8765",
        "seed 1 -> 2; model.name unet -> x; train.max_epochs 2 -> 3; and 1 more",
    ]
    assert rows["report"] == ["report", "missing", "", "", "", ""]
    rows = {row["stage"]: row for row in json.loads(as_json(found))}
    assert rows["train"]["state"] == "stale"
    assert rows["train"]["run_id"] == "id of train"
    assert sorted(rows["train"]["other_settings"]) == ["model.name", "seed", "train.max_epochs"]
    assert rows["train"]["metrics"] == {"val/best_dice": 0.8765}


def test_the_command_of_the_newest_run_can_be_typed(workspace: Workspace) -> None:
    enter(
        workspace,
        "prepare",
        [workspace.preprocess],
        [workspace.kfold_json],
        [],
        finished_at="2026-02-02T00:00:00+00:00",
    )
    assert command_of_newest(known_entries(workspace)) == "python -m prostate_seg stage=status 'data.root=a b'"


def test_the_command_of_a_dvc_run_uses_from_params(workspace: Workspace) -> None:
    command = "python -m prostate_seg --config-name from_params"
    enter(workspace, "prepare", [], [], [], finished_at="2026-02-02T00:00:00+00:00", command=command)
    command = command_of_newest(known_entries(workspace))
    assert command == "python -m prostate_seg --config-name from_params stage=status 'data.root=a b'"
