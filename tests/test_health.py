"""Health checks report problems with a fix."""

import subprocess
from pathlib import Path

import pytest

from prostate_seg.config.workspace import Workspace
from prostate_seg.operations import health
from prostate_seg.operations.health import Severity
from prostate_seg.stages import doctor
from prostate_seg.tracking.journal import Header, Journal
from prostate_seg.tracking.records import LogData


def workspace(root: Path) -> Workspace:
    return Workspace(root=root, data=root / "data", cache=root / ".cache")


def test_locked_packages_are_good_with_any_build_suffix(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("torch==2.13.0\nHydra_core==1.4.0\n")
    assert health.check_packages(lock, {"torch": "2.13.0+cu128", "hydra-core": "1.4.0"}).severity is Severity.good


def test_absent_package_of_a_tool_is_good(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("torch==2.13.0\nruff==0.15.0\n")
    check = health.check_packages(lock, {"torch": "2.13.0"})
    assert (check.severity, check.text) == (Severity.good, "1 as locked, 1 of extras and tools are not installed")


def test_missing_package_is_bad_and_another_version_is_a_note(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("torch==2.13.0\nmonai==1.6.0\n")
    missing = health.check_packages(lock, {"torch": "2.13.0"})
    assert (missing.severity, missing.text, missing.fix) == (Severity.bad, "missing: monai", "make setup")
    other = health.check_packages(lock, {"torch": "2.12.0", "monai": "1.6.0"})
    assert (other.severity, other.text) == (Severity.note, "not as locked: torch 2.12.0, not 2.13.0")


def test_folder_without_free_space_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "LEAST_FREE_GIB", 1e9)
    finding = health.check_folder("cache", tmp_path / "not" / "yet")
    assert finding.severity is Severity.bad
    assert finding.fix


def test_folder_that_cannot_be_written_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(health.tempfile, "TemporaryFile", refuse)
    finding = health.check_folder("workspace", tmp_path)
    assert finding.severity is Severity.bad
    assert finding.text == f"{tmp_path} cannot be written: Permission denied"


def test_git_is_good_when_clean_and_a_note_when_dirty_or_absent(tmp_path: Path) -> None:
    assert health.check_git(tmp_path).severity is Severity.note
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    (tmp_path / "a").write_text("1")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    assert health.check_git(tmp_path).severity is Severity.good
    (tmp_path / "a").write_text("2")
    assert "not committed" in health.check_git(tmp_path).text


def test_corrupted_record_is_bad_and_the_fix_keeps_it(tmp_path: Path) -> None:
    assert health.check_record(workspace(tmp_path)).severity is Severity.good
    (tmp_path / "DS_VERSION.json").write_text("{")
    finding = health.check_record(workspace(tmp_path))
    assert finding.severity is Severity.bad
    assert finding.fix.startswith("mv ")


def test_leftovers_of_killed_writes_are_listed(tmp_path: Path) -> None:
    assert health.check_leftovers(workspace(tmp_path)).severity is Severity.good
    (tmp_path / ".tmp-abc").mkdir()
    finding = health.check_leftovers(workspace(tmp_path))
    assert finding.severity is Severity.note
    assert ".tmp-abc" in finding.fix


def test_unreplicated_journal_is_listed_with_its_store(tmp_path: Path) -> None:
    assert doctor.check_journals(tmp_path / "absent").severity is Severity.good
    header = Header(what="train of p", address="http://store", experiment="e")
    journal = Journal.create(tmp_path, header, name="train")
    journal.append(LogData(run="r"))
    assert doctor.check_journals(tmp_path).severity is Severity.good  # a running process will send it
    journal.release()
    finding = doctor.check_journals(tmp_path)
    assert (finding.severity, finding.fix) == (Severity.note, "stage=sync")
    assert finding.text == f"1 pending in {tmp_path}, for http://store"
