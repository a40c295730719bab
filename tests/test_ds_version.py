"""DS_VERSION.json stays readable after kills and concurrent writes."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from prostate_seg.common.errors import InputError
from prostate_seg.config.workspace import Workspace
from prostate_seg.provenance.ds_version import read_entries, write_entry

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(root=tmp_path, data=tmp_path / "data", cache=tmp_path / ".cache")


def test_entry_replaces_that_of_its_stage_only(workspace: Workspace) -> None:
    write_entry(workspace, "train", {"run_id": "1"})
    write_entry(workspace, "prepare", {"run_id": "2"})
    write_entry(workspace, "train", {"run_id": "3"})
    assert read_entries(workspace) == {"prepare": {"run_id": "2"}, "train": {"run_id": "3"}}


def test_complete_training_replaces_entries_of_its_folds(workspace: Workspace) -> None:
    for name in ("train.fold0", "train.fold1", "prepare"):
        write_entry(workspace, name, {"run_id": name})
    assert list(read_entries(workspace)) == ["prepare", "train.fold0", "train.fold1"]
    write_entry(workspace, "train", {"run_id": "all"})
    assert list(read_entries(workspace)) == ["prepare", "train"]


def test_absent_file_has_no_entry(workspace: Workspace) -> None:
    assert read_entries(workspace) == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"stages"', "\x00"])
def test_corrupted_file_is_reported_and_kept(workspace: Workspace, text: str) -> None:
    workspace.ds_version_json.write_text(text)
    with pytest.raises(InputError, match="DS_VERSION.json: cannot be read"):
        write_entry(workspace, "train", {})
    assert workspace.ds_version_json.read_text() == text


@pytest.mark.slow
@needs_fork
def test_fifty_kills_leave_the_file_readable_and_lose_no_other_entry(workspace: Workspace) -> None:
    kept = {"run_id": "kept", "outputs": {f"file{i}": "0" * 32 for i in range(500)}}
    write_entry(workspace, "preprocess", kept)
    rng = random.Random(0)
    seen = set()
    for _ in range(50):
        child = os.fork()
        if child == 0:
            count = 0
            while True:
                count += 1
                write_entry(workspace, "train", {"count": count, "outputs": {f"file{i}": "1" * 32 for i in range(500)}})
        time.sleep(rng.uniform(0.002, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        entries = read_entries(workspace)
        assert entries["preprocess"] == kept
        assert len(entries.get("train", {"outputs": range(500)})["outputs"]) == 500
        seen.add(json.dumps(entries.get("train", {}).get("count")))
    assert len(seen) > 1  # the kills interrupted writers


@needs_fork
def test_concurrent_writers_lose_no_entry(workspace: Workspace) -> None:
    children = []
    for number in range(8):
        child = os.fork()
        if child == 0:
            for turn in range(5):
                write_entry(workspace, f"stage{number}", {"turn": turn})
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    assert read_entries(workspace) == {f"stage{number}": {"turn": 4} for number in range(8)}
