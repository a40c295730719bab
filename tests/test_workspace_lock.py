"""A stage that would replace files of a running stage is refused; the lock of a killed stage is released."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import read_json, write_json
from prostate_seg.config.schema import Config, parse
from prostate_seg.config.workspace import Workspace, workspace_of
from prostate_seg.operations.workspace_lock import lock_workspace
from tests.conftest import composed


def stage_in(folder: Path, stage: str, *overrides: str) -> tuple[Config, Workspace]:
    cfg = parse(composed(f"stage={stage}", f"paths.root={folder}", *overrides))
    return cfg, workspace_of(cfg)


def locked(cfg: Config, workspace: Workspace) -> ExitStack:
    lock = lock_workspace(cfg, workspace)
    assert lock is not None
    return lock


@pytest.mark.parametrize(
    ("running", "starting", "words"),
    [
        ("preprocess", "preprocess", r"preprocess would replace .*/preprocess, with which stage=preprocess works"),
        ("preprocess", "train", r"train reads .*/preprocess, which stage=preprocess is about to replace"),
        ("train", "preprocess", r"preprocess would replace .*/preprocess, with which stage=train works"),
        ("evaluate", "train", r"train would replace .*/model, with which stage=evaluate works"),
        ("report", "evaluate", r"evaluate would replace .*/evaluation, with which stage=report works"),
        ("report", "stress", r"stress would replace .*/stress, with which stage=report works"),
        ("predict", "train", r"train would replace .*/model, with which stage=predict works"),
        ("fetch", "inspect", r"inspect reads .*/data, which stage=fetch is about to replace"),
        ("preprocess", "fetch", r"fetch would replace .*/data, with which stage=preprocess works"),
    ],
)
def test_conflicting_stage_is_refused_with_process_and_path(
    tmp_path: Path, running: str, starting: str, words: str
) -> None:
    first = locked(*stage_in(tmp_path, running))
    with pytest.raises(InputError, match=words) as caught:
        locked(*stage_in(tmp_path, starting))
    assert "(process " in str(caught.value)
    assert "Wait until it has ended" in str(caught.value)
    first.close()
    locked(*stage_in(tmp_path, starting)).close()
    assert [path.name for path in (tmp_path / ".cache" / "running").iterdir() if path.suffix == ".json"] == []


@pytest.mark.parametrize(
    ("running", "starting", "overrides"),
    [
        ("train", "train", []),
        ("train", "prepare_elsewhere", []),
        ("evaluate", "evaluate", ["evaluate.external_root=x"]),
        ("evaluate", "verify", []),
        ("predict", "predict", []),
        ("train", "predict", ["predict.model=elsewhere"]),
    ],
)
def test_stages_without_common_files_run_concurrently(
    tmp_path: Path, running: str, starting: str, overrides: list[str]
) -> None:
    first = locked(*stage_in(tmp_path, running))
    folder = tmp_path / "other" if starting.endswith("elsewhere") else tmp_path
    second = lock_workspace(*stage_in(folder, starting.removesuffix("_elsewhere"), *overrides))
    first.close()
    if second is not None:  # verify needs none
        second.close()


def test_stage_that_ends_while_its_note_is_read_does_not_conflict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = locked(*stage_in(tmp_path, "train"))

    def ends(note: Path) -> object:
        first.close()
        return read_json(note)

    monkeypatch.setattr("prostate_seg.operations.workspace_lock.read_json", ends)
    locked(*stage_in(tmp_path, "preprocess")).close()


def test_note_of_a_killed_stage_is_removed(tmp_path: Path) -> None:
    first = locked(*stage_in(tmp_path, "preprocess"))
    left = tmp_path / ".cache" / "running" / "preprocess-killed.json"
    write_json(
        left, {"stage": "preprocess", "reads": [], "replaces": [str(tmp_path / "prepared/kfold.json")], "who": "x"}
    )
    first.close()
    locked(*stage_in(tmp_path, "prepare")).close()
    assert not left.exists()


def test_networks_in_another_users_workspace_are_read_without_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked(*stage_in(tmp_path, "predict")).close()
    monkeypatch.setattr("prostate_seg.operations.workspace_lock.os.access", lambda *_: False)
    assert lock_workspace(*stage_in(tmp_path, "predict")) is None
    locked(*stage_in(tmp_path, "train")).close()
