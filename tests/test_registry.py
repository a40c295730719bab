"""Registration: selected run, location of the tested networks, version of a name, and tags of alias changes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run

from prostate_seg.common.errors import InputError
from prostate_seg.config.workspace import Workspace
from prostate_seg.provenance.hashing import hash_paths
from prostate_seg.tracking import commits, registry
from prostate_seg.tracking.recorded_runs import find_run, recorded_cases, recorded_stages
from prostate_seg.tracking.records import Level, TreePosition
from prostate_seg.tracking.registry import Evaluated, evaluated_run, fetch_networks, move_alias
from prostate_seg.tracking.store.connection import open_store
from prostate_seg.tracking.store.run_tree import RunTree
from tests.test_run_tree import SETTINGS, stage


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> RunTree:
    folder = tmp_path_factory.mktemp("registry")
    settings = replace(SETTINGS, tracking_uri=f"sqlite:///{folder}/mlflow.db")
    return RunTree(open_store(settings, cache=folder))


def evaluation(tree: RunTree, pipeline: Run, *, of: str, cases: str = "case_id\n", named: str = "p") -> Run:
    """Add a finished evaluation of a training's networks, with all contents of its run."""
    place = TreePosition(level=Level.stage, pipeline=named, stage="evaluate")
    tags = {"previous_run_id.train": of}
    run = tree.create("evaluate", place, parent_id=pipeline.info.run_id, tags=tags)
    run_id = run.info.run_id
    for name, text in {"cases.csv": cases, "slices.csv": "", "metrics.json": "{}"}.items():
        tree.client.log_text(run_id, text, f"tables/{name}")
    upstream = {"train": {"run_id": of, "unchanged": True}, "prepare": {"run_id": "x", "unchanged": True}}
    record = {"inputs": {"model": "m"}, "upstream": upstream}
    tree.client.log_text(run_id, json.dumps(record), "provenance.json")
    tree.client.set_terminated(run_id)
    return run


def refusal(tree: RunTree, run_id: str | None, pipeline: str = "p") -> str:
    with pytest.raises(InputError) as caught:
        evaluated_run(tree, run_id, pipeline=pipeline)
    return str(caught.value)


def test_evaluation_is_found_by_its_training_fold_pipeline_or_name(tree: RunTree) -> None:
    pipeline = tree.pipeline("p", fresh=True)
    training = stage(tree, pipeline)
    place = TreePosition(level=Level.fold, pipeline="p", stage="train", fold="0")
    fold = tree.create("fold0", place, parent_id=training.info.run_id)
    first = evaluation(tree, pipeline, of=training.info.run_id)
    newest = evaluation(tree, pipeline, of="another training", cases="case_id\n1\n")
    expected = {first: [first, training, fold], newest: [newest, pipeline]}
    for one, ways in expected.items():
        for run in ways:
            found = evaluated_run(tree, run.info.run_id, pipeline="ignored")
            assert found.run_id == one.info.run_id
    by_name = evaluated_run(tree, None, pipeline="p")
    assert by_name.run_id == newest.info.run_id
    assert by_name.tables["cases.csv"] == "case_id\n1\n"
    assert registry.training_runs(by_name) == ["another training"]


def test_run_without_an_evaluation_is_refused_with_the_next_step(tree: RunTree) -> None:
    pipeline = tree.pipeline("q", fresh=True)
    training, prepare = stage(tree, pipeline), stage(tree, pipeline, "prepare")
    unfinished = stage(tree, pipeline, "evaluate")
    assert "have not been tested: run stage=evaluate first" in refusal(tree, training.info.run_id)
    assert "is neither an evaluation, nor a training" in refusal(tree, prepare.info.run_id)
    assert "has not finished (RUNNING)" in refusal(tree, unfinished.info.run_id)
    assert "there is no run ffff" in refusal(tree, "ffff")
    assert "there is no pipeline nowhere" in refusal(tree, None, pipeline="nowhere")


def test_only_the_tested_networks_are_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    workspace = Workspace(root=tmp_path, data=tmp_path / "data", cache=tmp_path / ".cache")
    workspace.fold(0).mkdir(parents=True)
    (workspace.fold(0) / "weights.safetensors").write_bytes(b"tested")
    md5 = hash_paths([workspace.model], cache=workspace.cache)[workspace.model].md5
    record: dict[str, Any] = {"inputs": {"preprocess": "x", "model": md5}}
    evaluated = Evaluated(run_id="r", pipeline="p", record=record, tables={})
    assert registry.tested_networks(evaluated, workspace, otherwise=tmp_path / "restored") == workspace.model
    (workspace.fold(0) / "weights.safetensors").write_bytes(b"trained again")
    with pytest.raises(InputError, match=r"no longer what run r tested \(md5 .*\), and DVC does not have it"):
        registry.tested_networks(evaluated, workspace, otherwise=tmp_path / "restored")


def test_version_without_a_network_is_not_that_of_its_training(
    tree: RunTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    training = stage(tree, tree.pipeline("of two folds", fresh=True))
    run_id = training.info.run_id
    tree.client.set_tag(run_id, "folds", "0,1")
    tree.client.log_text(run_id, json.dumps({"outputs": {"model": "no longer here.dir"}}), "provenance.json")
    tree.client.set_terminated(run_id)
    runs = {"both": training}
    for fold in ("0", "1"):
        place = TreePosition(level=Level.fold, pipeline="of two folds", stage="train", fold=fold)
        runs[fold] = tree.create(f"fold{fold}", place, parent_id=run_id)
    tree.client.create_registered_model("of fold 0")
    tree.client.create_model_version("of fold 0", "file:///models/1", tags={"training_run_ids": run_id})
    (tmp_path / "fold0").mkdir()
    monkeypatch.setattr(registry, "fetched", lambda *_, **__: tmp_path)
    settings = replace(SETTINGS, tracking_uri=tree.store.address)
    workspace = Workspace(root=tmp_path, data=tmp_path, cache=tmp_path / ".cache")

    def fetch(which: str) -> tuple[Path, str, str]:
        folder, version, trained_by = fetch_networks(runs[which].info.run_id, settings, workspace, setting="train.init")
        return folder, str(version), trained_by

    assert fetch("0") == (tmp_path / "fold0", "of fold 0 version 1", run_id)
    for which in ("1", "both"):
        with pytest.raises(
            InputError, match="train.init: the networks of run .* not registered, and DVC does not have"
        ):
            fetch(which)

    def killed(_: str, target: Path) -> None:
        target.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(registry.dvc_cache, "restore", killed)
    with pytest.raises(KeyboardInterrupt):
        fetch("both")
    assert list((tmp_path / ".cache/networks").iterdir()) == []  # incomplete networks are not kept for the next time


def test_only_a_changed_alias_leaves_a_tag(tree: RunTree) -> None:
    tree.client.create_registered_model("moved")
    for _ in range(2):
        tree.client.create_model_version("moved", "file:///models/1")
    move_alias(tree, "moved", "champion", to="1", why="first")
    move_alias(tree, "moved", "champion", to="1", why="again")
    move_alias(tree, "moved", "champion", to="2", why="better")
    move_alias(tree, "moved", "champion", to=None, why="withdrawn")
    tags = tree.client.get_registered_model("moved").tags
    moves = [json.loads(tags[key]) for key in sorted(tags)]
    assert [(move["from"], move["to"], move["why"]) for move in moves] == [
        (None, "1", "first"),
        ("1", "2", "better"),
        ("2", None, "withdrawn"),
    ]
    assert registry.version_of(tree, "moved", "champion") is None


@pytest.mark.parametrize(
    "uri", ["models:/nobody@champion", "models:/nobody/3", "models:/nobody", "models:/@x", "models:/"]
)
def test_an_unknown_version_is_refused_with_the_existing_ones(tree: RunTree, uri: str, tmp_path: Path) -> None:
    database = tree.store.address
    with pytest.raises(InputError, match="expected is models:/NAME@ALIAS or models:/NAME/VERSION") as caught:
        workspace = Workspace(root=tmp_path, data=tmp_path, cache=tmp_path)
        fetch_networks(uri, replace(SETTINGS, tracking_uri=database), workspace, setting="predict.model")
    assert "Known are: " in str(caught.value)


def test_deleted_pipeline_is_reported_with_the_command_that_restores_it(tree: RunTree) -> None:
    pipeline = tree.pipeline("deleted", fresh=True)
    found = evaluation(tree, pipeline, of="training", named="deleted")
    tree.client.delete_run(pipeline.info.run_id)
    command = f"MLFLOW_TRACKING_URI={tree.store.address} mlflow runs restore --run-id {pipeline.info.run_id}"
    text = refusal(tree, None, pipeline="deleted")
    assert f"pipeline deleted: run {pipeline.info.run_id} (deleted) was deleted" in text
    assert command in text
    stage(tree, tree.pipeline("deleted", fresh=False), "register")  # as at the start of stage=register
    assert command in refusal(tree, None, pipeline="deleted")
    assert command in refusal(tree, pipeline.info.run_id)
    tree.client.restore_run(pipeline.info.run_id)
    assert evaluated_run(tree, None, pipeline="deleted").run_id == found.info.run_id


def test_newer_pipeline_without_an_evaluation_is_not_skipped(tree: RunTree) -> None:
    evaluation(tree, tree.pipeline("again", fresh=True), of="training")
    stage(tree, tree.pipeline("again", fresh=True), "train")
    assert "have not been tested" in refusal(tree, None, pipeline="again")


def test_deleted_evaluation_is_reported_and_a_superseded_one_is_not(tree: RunTree) -> None:
    pipeline = tree.pipeline("r", fresh=True)
    training = stage(tree, pipeline)
    replaced = evaluation(tree, pipeline, of=training.info.run_id)
    tree.delete_with_folds(replaced, replaced_by="a later one")
    assert "have not been tested" in refusal(tree, training.info.run_id)
    deleted = evaluation(tree, pipeline, of=training.info.run_id)
    tree.client.delete_run(deleted.info.run_id)
    for run in (training, pipeline):
        assert f"mlflow runs restore --run-id {deleted.info.run_id}" in refusal(tree, run.info.run_id)


def test_deleted_run_is_reported_by_every_stage_that_needs_it(tree: RunTree) -> None:
    run = stage(tree, tree.pipeline("s", fresh=True))
    tree.client.delete_run(run.info.run_id)
    for look in (find_run, recorded_stages, recorded_cases):
        with pytest.raises(InputError, match=f"was deleted\n.*\n.*mlflow runs restore --run-id {run.info.run_id}"):
            look(tree, run.info.run_id)


def test_superseded_run_is_reported_with_its_successor(tree: RunTree) -> None:
    run = stage(tree, tree.pipeline("t", fresh=True))
    tree.delete_with_folds(run, replaced_by="0123")
    with pytest.raises(InputError, match="was replaced by run 0123"):
        find_run(tree, run.info.run_id)


def test_results_of_a_commit_whose_run_is_deleted_are_reported_as_such(tree: RunTree) -> None:
    pipeline = tree.pipeline("u", fresh=True)
    place = TreePosition(level=Level.stage, pipeline="u", stage="prepare")
    tags = {"md5.outputs/prepared": "abc"}
    run = tree.create("prepare", place, parent_id=pipeline.info.run_id, tags=tags)
    outputs = {"prepare": {"prepared": "abc"}, "train": {"model": "def"}}
    found = commits.find_matches(tree, outputs)
    assert commits.match_line(found["prepare"]) == f"{run.info.run_id}  RUNNING   u"
    assert commits.match_line(found["train"]) == "none in this store wrote these results"
    tree.client.delete_run(run.info.run_id)
    found = commits.find_matches(tree, outputs)
    assert commits.match_line(found["prepare"]) == f"{run.info.run_id}  RUNNING   u  deleted: mlflow runs restore"
    assert found["train"] is None
