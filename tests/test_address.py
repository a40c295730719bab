"""Location of the store, and its address in messages."""

from pathlib import Path

import pytest

from prostate_seg.common.address import project_root, resolved_uri, shown_address, sqlite_file


def test_relative_file_lies_at_the_root_of_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path / "deep" / "er")
    assert resolved_uri("sqlite:///mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"


def test_outside_of_a_repository_it_lies_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    assert project_root() == tmp_path


def test_inside_a_temporary_workspace_of_dvc_it_lies_in_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = tmp_path / ".dvc" / "tmp" / "exps" / "standalone" / "abc"
    (workspace / ".git").mkdir(parents=True)
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert project_root() == tmp_path


def test_absolute_file_stays_where_it_is() -> None:
    assert resolved_uri("sqlite:////data/m.db") == "sqlite:////data/m.db"
    assert sqlite_file("sqlite:////data/m.db?timeout=3") == Path("/data/m.db")
    assert sqlite_file("http://localhost:5000") is None


def test_absolute_file_of_windows_stays_where_it_is() -> None:
    for address in ("sqlite:///C:/data/m.db", r"sqlite:///C:\data\m.db"):
        assert resolved_uri(address) == address
        assert str(sqlite_file(f"{address}?timeout=3")) == address.removeprefix("sqlite:///")


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://ann:pw@host:5000/x", "http://host:5000/x"),
        ("postgresql://ann:pw@host/mlflow?sslmode=require&password=x", "postgresql://host/mlflow"),
        ("sqlite:////data/m.db", "sqlite:////data/m.db"),
    ],
)
def test_shown_address_has_no_user_password_or_query(uri: str, shown: str) -> None:
    assert shown_address(uri) == shown
