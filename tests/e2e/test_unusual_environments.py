"""Unusual environments: read-only data, links, names that need quoting, a full TMPDIR, a clock that is set back."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.project_helpers import SMALL, Project, clean_environment, copy_of

pytestmark = pytest.mark.slow

ODD_NAME = "Ätna 1, 50% #1 {x} 'q' 前列腺"


def mounted(folder: Path, *options: str) -> Path:
    """Mount a file system at the folder, or skip the test."""
    folder.mkdir()
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    return folder


@pytest.fixture
def read_only_data(prepared: Project, tmp_path: Path) -> Iterator[Path]:
    folder = mounted(tmp_path / "read only", "--bind", str(prepared.folder / "data"))
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def nearly_full(tmp_path: Path) -> Iterator[Path]:
    """A temporary folder with space for a probe of a few bytes, and no more than two pages."""
    folder = mounted(tmp_path / "tmp", "-t", "tmpfs", "-o", "size=64k", "tmpfs")
    try:
        (folder / "filler").write_bytes(bytes(13 * 4096))
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_read_only_data_through_a_link_in_a_folder_that_needs_quoting(read_only_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / ODD_NAME
    folder.mkdir()
    (folder / "my data é").symlink_to(Path("..") / read_only_data.name, target_is_directory=True)
    (folder / "link").symlink_to(".", target_is_directory=True)
    small = [setting for setting in SMALL if not setting.startswith("data.phantom")]
    places = ["data=folder", "data.root='my data é'", "paths.root=link"]
    command = [sys.executable, "-m", "prostate_seg", "-m", "stage=preprocess,prepare", *places, *small]
    done = subprocess.run(command, cwd=folder, env=clean_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "prepared" / "kfold.json").is_file()
    assert {run.info.status for run in Project(folder).runs()} == {"FINISHED"}


def test_full_tmpdir_does_not_affect_a_recorded_stage(prepared: Project, nearly_full: Path, tmp_path: Path) -> None:
    project = copy_of(prepared, tmp_path / "project")
    done = project.run("stage=prepare", TMPDIR=str(nearly_full))
    assert done.returncode == 0, done.stdout + done.stderr
    run = project.only(stage="prepare")
    assert run.info.status == "FINISHED"
    assert {"config.yaml", "provenance.json", "packages.txt"} <= project.artifacts(run)


def test_no_run_ends_before_its_start_if_the_clock_is_set_back(prepared: Project, tmp_path: Path) -> None:
    project = copy_of(prepared, tmp_path / "project")
    for program in (str(Path(__file__).with_name("clock_back.py")), "-m prostate_seg"):
        done = project.run("stage=prepare", program=program)
        assert done.returncode == 0, done.stderr
        assert "FINISHED after -" not in done.stdout
        assert "was written to while" not in done.stdout
        run = project.only(level="stage")  # each has superseded the previous one
        assert run.info.status == "FINISHED"
        assert run.info.end_time >= run.info.start_time
