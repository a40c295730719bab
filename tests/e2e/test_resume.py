"""A training that is killed at any moment resumes and writes the same files."""

import random
import signal
import time
from pathlib import Path

import pytest

from tests.project_helpers import FAULTY, LONGER, Project, copy_of, model_hash, wait_for

pytestmark = pytest.mark.slow


def killed_in_fold1(prepared: Project, folder: Path) -> Project:
    """Return a copy whose training has finished fold 0 and was killed at the start of fold 1."""
    project = copy_of(prepared, folder)
    process = project.start("hang", "fold1", "stage=train", *LONGER, program=str(FAULTY))
    wait_for(folder / "hanging")
    process.kill()
    process.communicate()
    return project


def test_training_killed_at_random_moments_ends_with_the_same_files(prepared: Project, tmp_path: Path) -> None:
    whole = copy_of(prepared, tmp_path / "whole")
    start = time.monotonic()
    assert whole.run("stage=train", *LONGER).returncode == 0
    seconds = time.monotonic() - start

    stopped = copy_of(prepared, tmp_path / "stopped")
    rng = random.Random(1)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        process = stopped.start("stage=train", *LONGER)
        time.sleep(seconds * rng.uniform(0.45, 0.9))
        process.send_signal(number)
        process.communicate(timeout=60)
    done = stopped.run("stage=train", *LONGER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert model_hash(stopped.folder) == model_hash(whole.folder)
    left = [path for path in (stopped.folder / ".training").rglob("*") if path.is_file()]
    assert left == []


def test_finished_fold_is_kept_and_the_next_training_starts_from_scratch(prepared: Project, tmp_path: Path) -> None:
    project = killed_in_fold1(prepared, tmp_path / "project")
    weights = project.folder / "model" / "fold0" / "weights.safetensors"
    before = weights.stat().st_mtime_ns
    done = project.run("stage=train", *LONGER)
    assert "fold 0 had finished before training was stopped, and is kept" in done.stdout
    assert weights.stat().st_mtime_ns == before
    again = project.run("stage=train", *LONGER)
    assert "is kept" not in again.stdout
    assert "go on after" not in again.stdout


def test_stopped_training_is_not_resumed_with_other_settings(prepared: Project, tmp_path: Path) -> None:
    project = killed_in_fold1(prepared, tmp_path / "project")
    for other in ("train.learning_rate=0.001", "machine.resume=never"):
        done = project.run("stage=train", "fold.index=0", other, *LONGER)
        assert done.returncode == 0
        assert "is kept" not in done.stdout
