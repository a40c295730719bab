"""The recorded git state, packages and machine are the current ones."""

import subprocess
from pathlib import Path

import pytest

from prostate_seg.provenance import environment as provenance
from prostate_seg.provenance.environment import git_state, launcher_tags, machine, packages


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q", "-b", "work")
    (tmp_path / "a.py").write_text("x = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_clean_repository(repository: Path) -> None:
    state = git_state(repository)
    assert state.commit == git(repository, "rev-parse", "HEAD")
    assert state.branch == "work"
    assert not state.is_dirty
    assert state.diff == ""


def test_change_is_dirty_and_in_the_diff(repository: Path) -> None:
    (repository / "a.py").write_text("x = 2\n")
    state = git_state(repository)
    assert state.is_dirty
    assert "-x = 1\n+x = 2\n" in state.diff


def test_untracked_file_is_dirty_and_listed(repository: Path) -> None:
    (repository / "b.py").write_text("")
    state = git_state(repository)
    assert state.is_dirty
    assert state.untracked == ("b.py",)


def test_long_diff_is_truncated_with_a_note(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "LONGEST_DIFF", 200)
    (repository / "a.py").write_text("y" * 1000)
    diff = git_state(repository).diff
    assert len(diff) < 260
    assert "more characters" in diff


def test_repository_without_a_commit_and_no_repository(tmp_path: Path) -> None:
    assert git_state(tmp_path).commit == ""
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path).commit == ""


def test_packages_are_the_installed_ones() -> None:
    import numpy as np

    found = packages()
    assert found["numpy"] == np.__version__
    assert {"torch", "hydra-core", "mlflow"} <= set(found)


def test_machine_has_processor_memory_and_gpu_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = machine()
    assert {"host", "system", "python", "cpu", "num_cores", "memory_gib"} <= set(found)
    assert found["gpu"] == "none"


def test_gpu_and_driver_are_read_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = subprocess.CompletedProcess([], 0, stdout="NVIDIA A100, 550.54\nNVIDIA A100, 550.54\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    found = machine()
    assert found["gpu"] == "NVIDIA A100, NVIDIA A100"
    assert found["gpu_driver"] == "550.54"


def test_only_the_named_variables_of_the_environment_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "brave-otter")
    monkeypatch.setenv("SOMETHING_ELSE", "x")
    assert launcher_tags() == {"dvc.experiment": "brave-otter"}
