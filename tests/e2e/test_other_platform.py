"""Training without POSIX features that macOS and Windows lack: spawned processes, absent signals and calls."""

from pathlib import Path

import pytest

from tests.project_helpers import Project, copy_of

pytestmark = pytest.mark.slow

OTHER_PLATFORM = str(Path(__file__).with_name("other_platform.py"))


def test_folds_train_in_parallel_with_spawn_and_without_posix_calls(prepared: Project, tmp_path: Path) -> None:
    project = copy_of(prepared, tmp_path / "project")
    settings = ("machine.num_parallel_folds=2", "train.max_epochs=1")
    done = project.run("stage=train", *settings, program=OTHER_PLATFORM, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "best val Dice: fold 0" in done.stdout
    assert (project.folder / "model" / "fold1" / "weights.safetensors").is_file()
    assert {run.info.status for run in project.runs()} == {"FINISHED"}
    assert len(project.runs(level="fold")) == 2


def test_names_that_the_terminal_cannot_encode_do_not_stop_a_stage(prepared: Project, tmp_path: Path) -> None:
    project = copy_of(prepared, tmp_path / "project")
    for path in project.folder.glob("data/*/ph001_1.nii.gz"):
        path.rename(path.with_name("Ätna前列腺_1.nii.gz"))
    (project.folder / "data" / "cases.csv").unlink()
    (project.folder / "data" / "images" / "Ü.nii.gz").write_bytes(b"no image")
    arguments = ("stage=preprocess", "mlflow=off", "data.on_bad_case=exclude")
    done = project.run(*arguments, PYTHONIOENCODING="ascii", program=OTHER_PLATFORM)
    assert done.returncode == 0, done.stderr
    assert "Logging error" not in done.stderr
    assert r"\xdc: image_without_mask" in done.stdout
    logs = [path.read_text(encoding="utf-8") for path in project.folder.glob("logs/*/*preprocess/prostate_seg.log")]
    assert any("Ü: image_without_mask" in text for text in logs)
