"""Commands that restore the code of a run: a diff is applied only if it was recorded."""

from dataclasses import replace
from pathlib import Path

import pytest

from prostate_seg.tracking.commits import DIFF, UNTRACKED, origin_of
from prostate_seg.tracking.records import Level, TreePosition
from prostate_seg.tracking.store.connection import open_store
from prostate_seg.tracking.store.run_tree import RunTree
from tests.test_run_tree import SETTINGS


@pytest.mark.parametrize("kept", [(), (UNTRACKED,), (DIFF, UNTRACKED)])
def test_changes_are_listed_and_applied_only_if_recorded(tmp_path: Path, kept: tuple[str, ...]) -> None:
    settings = replace(SETTINGS, tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    tree = RunTree(open_store(settings, cache=tmp_path))
    tags = {"git.commit": "abc", "git.dirty": str(bool(kept)).lower(), "command": "python -m prostate_seg stage=train"}
    run = tree.create("train", TreePosition(level=Level.stage, pipeline="p"), parent_id=None, tags=tags)
    for name in kept:
        tree.client.log_text(run.info.run_id, "x", name)
    lines = origin_of(run.info.run_id, settings, cache=tmp_path)
    (started,) = (line for line in lines if line.startswith("started in"))
    assert [name for name in (DIFF, UNTRACKED) if name in started] == list(kept)
    assert any("git apply git.diff" in line for line in lines) == (DIFF in kept)
