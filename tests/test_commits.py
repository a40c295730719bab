"""Commits of runs: a diff is applied only if it was recorded, and a run is linked to each commit once."""

from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from prostate_seg.common.errors import InputError
from prostate_seg.config.schema import MlflowConfig
from prostate_seg.tracking import commits
from prostate_seg.tracking.commits import COMMITTED_IN, DIFF, UNTRACKED, link_commit, locked_outputs, origin_of
from prostate_seg.tracking.records import Level, TreePosition
from prostate_seg.tracking.store.connection import open_store
from prostate_seg.tracking.store.run_tree import RunTree
from tests.test_run_tree import SETTINGS


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> MlflowConfig:
    return replace(SETTINGS, tracking_uri=f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db")


@pytest.mark.parametrize("kept", [(), (UNTRACKED,), (DIFF, UNTRACKED)])
def test_changes_are_listed_and_applied_only_if_recorded(
    settings: MlflowConfig, tmp_path: Path, kept: tuple[str, ...]
) -> None:
    tree = RunTree(open_store(settings, cache=tmp_path))
    tags = {"git.commit": "abc", "git.dirty": str(bool(kept)).lower(), "command": "python -m prostate_seg stage=train"}
    run = tree.create("train", TreePosition(level=Level.stage, pipeline="p"), parent_id=None, tags=tags)
    for name in kept:
        tree.client.log_text(run.info.run_id, "x", name)
    lines = origin_of(run.info.run_id, settings, cache=tmp_path)
    (started,) = (line for line in lines if line.startswith("started in"))
    assert [name for name in (DIFF, UNTRACKED) if name in started] == list(kept)
    assert any("git apply git.diff" in line for line in lines) == (DIFF in kept)


def test_run_is_linked_to_each_commit_once_and_repeated_from_the_last(
    settings: MlflowConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = RunTree(open_store(settings, cache=tmp_path))
    run_id = tree.create("train", TreePosition(level=Level.stage, pipeline="p"), parent_id=None).info.run_id

    def linked(commit: str) -> str:
        match = {"train": tree.client.get_run(run_id)}
        monkeypatch.setattr(commits, "runs_of_commit", lambda *_, **__: (commit, match))
        link_commit(commit, settings, cache=tmp_path)
        return str(tree.client.get_run(run_id).data.tags[COMMITTED_IN])

    def refuse(*_: object) -> NoReturn:
        raise MlflowException("the disk is gone")

    monkeypatch.setattr(commits, "git", lambda *_: "a branch holds it")
    assert [linked(commit) for commit in ("aaa", "bbb", "aaa")] == ["aaa", "aaa bbb", "aaa bbb"]
    assert any("git checkout bbb && dvc checkout" in line for line in origin_of(run_id, settings, cache=tmp_path))
    monkeypatch.setattr(MlflowClient, "set_tag", refuse)
    with pytest.raises(InputError, match=r"mlflow.db cannot be used: the disk is gone\nCheck the address"):
        linked("ccc")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages:\n<<<<<<< HEAD\n  train: {}\n=======\n  train: {}\n", r"dvc\.lock, line 2, is not as DVC writes it"),
        ("stages: {train: {outs: [path: model]}}\n", r"dvc\.lock is not as DVC writes it \('md5'\)"),
        ("", r"dvc\.lock is not as DVC writes it"),
    ],
)
def test_damaged_dvc_lock_is_refused_with_its_line(text: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "git", lambda *_: text)
    with pytest.raises(InputError, match=rf"commit abc: {words}(.|\n)*Resolve a merge"):
        locked_outputs("abc")
