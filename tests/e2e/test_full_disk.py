"""A disk that fills up during training costs only the epoch that could not be saved."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.project_helpers import LONGER, Project, copy_of, model_hash, wait_for

pytestmark = pytest.mark.slow

MEBIBYTE = 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(file: Path) -> None:
    with file.open("wb") as stream, pytest.raises(OSError, match="No space left"):
        while True:
            stream.write(bytes(MEBIBYTE))
            stream.flush()


def test_training_resumes_after_a_full_disk(
    prepared: Project,
    small_disk: Path,
    tmp_path: Path,
) -> None:
    whole = copy_of(prepared, tmp_path / "whole")
    assert whole.run("stage=train", *LONGER).returncode == 0

    project = copy_of(prepared, small_disk / "project")
    process = project.start("stage=train", *LONGER)
    wait_for(project.folder / ".training" / "fold0" / "checkpoints")
    fill(small_disk / "filler")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert "cannot be written" in output
    assert "No space left" in output
    assert "give the same command again: training goes on after epoch" in output
    assert "Traceback" not in output

    (small_disk / "filler").unlink()
    done = project.run("stage=train", *LONGER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "go on after epoch" in done.stdout
    assert model_hash(project.folder) == model_hash(whole.folder)
