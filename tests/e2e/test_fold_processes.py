"""Parallel folds equal sequential folds, and all end if one fails."""

import signal
from pathlib import Path

import psutil
import pytest

from prostate_seg.common.progress import num_cores
from tests.project_helpers import Project, copy_of, only_in_hard_use, wait_for

pytestmark = pytest.mark.slow

SIDE_BY_SIDE = ["stage=train", "machine.num_parallel_folds=2"]


def test_parallel_folds_equal_sequential_folds(prepared: Project, tmp_path: Path) -> None:
    """Bit-identical for the same number of threads, with the same records."""
    share = str(max(1, num_cores() // 2))
    one, two = copy_of(prepared, tmp_path / "one"), copy_of(prepared, tmp_path / "two")
    done = one.run("stage=train", OMP_NUM_THREADS=share)
    assert done.returncode == 0, done.stdout + done.stderr
    done = two.run(*SIDE_BY_SIDE)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("weights.safetensors", "history.csv", "summary.json"):
        for fold in ("fold0", "fold1"):
            first, second = (project.folder / "model" / fold / name for project in (one, two))
            assert first.read_bytes() == second.read_bytes(), (fold, name)
    for project in (one, two):
        for fold in ("0", "1"):
            run = project.only(level="fold", fold=fold)
            assert run.info.status == "FINISHED"
            history = project.client.get_metric_history(run.info.run_id, "train/loss")
            assert [metric.step for metric in history] == [1, 2]
            assert "history.png" in {Path(path).name for path in project.artifacts(run)}
    for fold in (0, 1):
        assert any(line.split()[-6:-4] == [str(fold), "2"] for line in done.stdout.splitlines()), done.stdout


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=only_in_hard_use), (signal.SIGTERM, 143)]
)
def test_stopped_parallel_training_leaves_no_process_and_resumes(
    prepared: Project,
    tmp_path: Path,
    number: int,
    code: int,
) -> None:
    project = copy_of(prepared, tmp_path / "project")
    process = project.start(*SIDE_BY_SIDE, "train.max_epochs=5000")
    checkpoints = [project.folder / ".training" / f"fold{fold}" / "checkpoints" for fold in (0, 1)]
    for folder in checkpoints:
        wait_for(folder)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert "Traceback" not in output
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    assert {run.info.status for run in project.runs(level="fold")} == {"KILLED"}
    done = project.run(*SIDE_BY_SIDE, "train.max_epochs=5000", "train.max_minutes=0.01")
    assert done.returncode == 0, done.stdout + done.stderr


def test_killed_process_is_an_error_with_its_fold(prepared: Project, tmp_path: Path) -> None:
    project = copy_of(prepared, tmp_path / "project")
    process = project.start(*SIDE_BY_SIDE, "train.max_epochs=5000")
    wait_for(project.folder / ".training" / "fold1" / "checkpoints")
    children = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "spawn_main" in " ".join(child.cmdline())
    ]
    children[0].send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "its process ended unexpectedly (exit code -9)" in output
    assert "Traceback" not in output
