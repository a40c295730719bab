"""git: state, revisions and diffs, with git's own error messages."""

import logging
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prostate_seg.common.errors import InputError
from prostate_seg.config.schema import Config, parse
from prostate_seg.config.workspace import workspace_of
from prostate_seg.operations import health
from prostate_seg.operations.health import Severity
from prostate_seg.operations.job import Job
from prostate_seg.provenance.environment import GitState, git_state
from prostate_seg.provenance.git import GitError, git
from prostate_seg.tracking import commits, reproduction, stage_run
from tests.conftest import ROOT, composed

LOCK = "stages: {train: {outs: [{path: model, md5: abc.dir}]}}\n"


def parsed(*overrides: str) -> Config:
    return parse(composed(*overrides))


def run_git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in a subfolder of a larger repository, as after `dvc init --subdir`; the current folder."""
    folder = tmp_path / "repository" / "studies" / "prostate"
    (folder / ".dvc").mkdir(parents=True)
    (folder / ".dvc" / "config").write_text("")
    (folder / "dvc.lock").write_text(LOCK)
    (folder / "prostate_seg").mkdir()
    (folder / "prostate_seg" / "a.py").write_text("x = 1\n")
    run_git(tmp_path / "repository", "init", "-q", "-b", "work")
    run_git(tmp_path / "repository", "add", ".")
    run_git(tmp_path / "repository", "commit", "-qm", "first")
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(folder)
    return folder


def test_dvc_lock_in_a_subfolder_of_a_repository_is_found(project: Path) -> None:
    commit = commits.commit_of("HEAD")
    assert commit == run_git(project, "rev-parse", "HEAD")
    assert commits.locked_outputs(commit) == {"train": {"model": "abc.dir"}}


def test_commit_without_dvc_lock_is_refused_with_the_folder_that_was_searched(project: Path) -> None:
    run_git(project, "rm", "-q", "dvc.lock")
    run_git(project, "commit", "-qm", "second")
    with pytest.raises(InputError, match=r"has no dvc\.lock in .*studies/prostate") as error:
        commits.locked_outputs(commits.commit_of("HEAD"))
    assert "Run dvc repro" in str(error.value)


def test_state_of_a_project_in_a_subfolder_is_that_of_its_repository(project: Path) -> None:
    (project / "prostate_seg" / "a.py").write_text("x = 2\n")
    state = git_state(project)
    assert (state.branch, state.is_dirty, state.problem) == ("work", True, "")
    assert "+++ b/studies/prostate/prostate_seg/a.py" in state.diff


def test_diff_can_be_applied_with_any_diff_settings_of_the_user(project: Path) -> None:
    for setting in ("diff.noprefix", "diff.mnemonicPrefix", "diff.relative"):
        run_git(project, "config", setting, "true")
    (project / "prostate_seg" / "a.py").write_text("x = 2\n")
    diff = git_state(project).diff
    run_git(project, "checkout", "-q", "--", ".")
    git(project.parents[1], "apply", "-", stdin=diff)
    assert (project / "prostate_seg" / "a.py").read_text() == "x = 2\n"


def test_code_of_a_run_in_a_subfolder_is_restored_from_its_commit(project: Path, tmp_path: Path) -> None:
    tree: Any = None
    run: Any = SimpleNamespace(data=SimpleNamespace(tags={}))
    workspace = workspace_of(parsed("stage=status"))
    code = reproduction._different_code({"prostate_seg/a.py": ""}, project, workspace)
    assert code == ["prostate_seg/a.py"]
    md5 = reproduction.hash_paths([project / "prostate_seg" / "a.py"], cache=workspace.cache)
    record = {
        "git": {"commit": commits.commit_of("HEAD"), "is_dirty": False},
        "code": {"prostate_seg/a.py": md5[project / "prostate_seg" / "a.py"].md5},
    }
    with reproduction._code(tree, run, record, workspace, tmp_path) as (folder, source):
        assert (folder / "prostate_seg" / "a.py").read_text() == "x = 1\n"
        assert source.startswith("commit ")


def test_repository_of_another_user_is_reported_with_gits_message(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    state = git_state(project)
    assert "dubious ownership" in state.problem
    assert "safe.directory" in state.problem
    assert state == GitState(problem=state.problem)  # nothing else can be read
    assert state.is_dirty is None
    finding = health.check_git(project)
    assert finding.severity is Severity.bad
    assert "dubious ownership" in finding.text
    assert finding.fix == f"git config --global --add safe.directory {project.parents[1]}"
    with pytest.raises(InputError, match="dubious ownership"):
        commits.commit_of("HEAD")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a folder away")
def test_repository_that_belongs_to_another_user_is_refused_by_git_itself(project: Path) -> None:
    for path in (project.parents[1], project.parents[1] / ".git"):
        os.chown(path, 12345, 12345)
    assert "dubious ownership" in git_state(project).problem


def test_run_in_a_refused_repository_warns_and_records_no_state_of_git(
    project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    monkeypatch.setattr(stage_run.ds_version, "read_entries", lambda *_: {})
    cfg = parsed("stage=prepare", "mlflow=off")
    job = Job(overrides=(), output_dir=project, hydra_dir=".hydra", sweep_folder=None, number=None)
    with caplog.at_level(logging.WARNING):
        run = stage_run.StageRun(cfg, workspace_of(cfg), job)
    assert "git config --global --add safe.directory" in caplog.text
    assert run.git == GitState(problem=run.git.problem)


def test_state_of_a_clean_repository(project: Path) -> None:
    assert git_state(project) == GitState(commit=commits.commit_of("HEAD"), branch="work", is_dirty=False)


def test_folder_outside_of_a_repository_has_no_state_and_no_problem(tmp_path: Path) -> None:
    assert git_state(tmp_path) == GitState()
    assert health.check_git(tmp_path).fix == "git init && git add . && git commit"


def test_repository_without_a_commit_is_neither_clean_nor_dirty(tmp_path: Path) -> None:
    run_git(tmp_path, "init", "-q", "-b", "work")
    (tmp_path / "a").write_text("")
    state = git_state(tmp_path)
    assert (state.commit, state.branch, state.is_dirty, state.problem) == ("", "work", None, "")
    assert health.check_git(tmp_path).fix == "git add . && git commit"


def test_detached_head_has_its_commit(project: Path) -> None:
    run_git(project, "checkout", "-q", "--detach")
    state = git_state(project)
    assert (state.commit, state.branch, state.is_dirty) == (commits.commit_of("HEAD"), "(detached)", False)


def test_damaged_repository_is_a_problem_and_not_the_absence_of_one(project: Path) -> None:
    top = project.parents[1]
    (top / ".git" / "HEAD").write_text("")
    assert "not a git repository" in git_state(project).problem
    finding = health.check_git(project)
    assert (finding.severity, finding.fix) == (Severity.bad, f"git -C {project} fsck")


def test_repository_with_lost_objects_has_its_commit_and_the_reason_for_no_diff(project: Path) -> None:
    commit = commits.commit_of("HEAD")
    blob = run_git(project, "rev-parse", "HEAD:./prostate_seg/a.py")
    (project / "prostate_seg" / "a.py").write_text("x = 2\n")
    (project.parents[1] / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    state = git_state(project)
    assert (state.commit, state.is_dirty, state.diff) == (commit, True, "")
    assert blob[:7] in state.problem


def test_absent_git_is_a_problem_only_where_there_is_a_repository(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "not installed" in git_state(project).problem
    assert git_state(tmp_path / "elsewhere") == GitState()
    assert health.check_git(project).fix == "install git"
    with pytest.raises(InputError, match="git is not installed"):
        commits.commit_of("HEAD")


def test_unknown_revision_is_refused_with_its_name(project: Path) -> None:
    with pytest.raises(InputError, match="nosuch: is the name of no commit"):
        commits.commit_of("nosuch")


def test_git_error_has_message_and_code_of_git(tmp_path: Path) -> None:
    with pytest.raises(GitError, match="not a git repository") as error:
        git(tmp_path, "status")
    assert error.value.code == 128


def test_hook_of_a_project_in_a_subfolder_links_there_and_only_when_its_dvc_lock_changes(
    project: Path, tmp_path: Path
) -> None:
    other = project.parent / "other"
    shutil.copytree(project, other)
    called = tmp_path / "called"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$PWD $* ${{GIT_INDEX_FILE-unset}}" >> {called}\n')
    python.chmod(0o755)
    for folder in (project, other, project):
        script = str(ROOT / "scripts" / "install_hooks.sh")
        subprocess.run([script, str(python)], cwd=folder, check=True, capture_output=True)
    (project / "prostate_seg" / "a.py").write_text("x = 3\n")
    run_git(project, "commit", "-qam", "no results")
    assert not called.exists()
    (project / "dvc.lock").write_text(LOCK.replace("abc", "def"))
    run_git(project, "commit", "-qam", "results")
    assert called.read_text() == f"{project} -m prostate_seg stage=link unset\n"
