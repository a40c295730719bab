"""Two users in one workspace: the second waits or is refused with a message."""

from pathlib import Path

import pytest
from filelock import FileLock

from prostate_seg.common.files import md5_of, md5_of_text
from tests.project_helpers import FAULTY, Project, copy_of, wait_for

pytestmark = pytest.mark.slow


def test_stage_that_would_replace_files_in_use_is_refused(prepared: Project, tmp_path: Path) -> None:
    project = copy_of(prepared, tmp_path / "project")
    before = md5_of(project.folder / "preprocess")
    process = project.start("hang", "preprocess", "stage=preprocess", "mlflow=off", program=str(FAULTY))
    wait_for(project.folder / "hanging")
    for stage, words in (("preprocess", "would replace"), ("train", "reads")):
        refused = project.run(f"stage={stage}", "mlflow=off")
        assert refused.returncode == 1
        assert f"prostate_seg: {stage} {words} " in refused.stderr
        assert f"process {process.pid} of " in refused.stderr
        assert "Traceback" not in refused.stderr
    process.kill()
    process.communicate()
    assert md5_of(project.folder / "preprocess") == before
    done = project.run("stage=preprocess", "mlflow=off")
    assert done.returncode == 0, done.stderr


def test_training_waits_for_another_training_of_the_same_fold(prepared: Project, tmp_path: Path) -> None:
    project = copy_of(prepared, tmp_path / "project")
    place = md5_of_text(str(project.folder / ".training"))[:8]
    with FileLock(project.folder / ".cache" / f"training_{place}_fold0.lock"):
        process = project.start("stage=train", "fold.index=0", "mlflow=off", OMP_NUM_THREADS="1")
        assert process.stdout is not None
        words = "fold 0: another process trains it in this workspace; waiting until it has ended"
        assert any(words in line for line in process.stdout)
        assert not (project.folder / "model").exists()
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert (project.folder / "model" / "fold0" / "weights.safetensors").is_file()
