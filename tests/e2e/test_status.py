"""stage=status on the command line: a plain table in a log, JSON, short run time, and no recorded run."""

import json
from pathlib import Path

from prostate_seg.config.schema import STAGE_SETTINGS
from tests.project_helpers import Project, copy_of


def test_status_lists_every_stage(prepared: Project, tmp_path: Path) -> None:
    project = copy_of(prepared, tmp_path / "copy")
    done = project.run("stage=status", "mlflow=off")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["stage", "state", "finished,", "UTC", "took", "result", "why"]
    states = {line.split()[0]: line.split()[1] for line in lines[1:]}
    current = ("fetch", "preprocess", "prepare")
    assert states == {stage: "current" if stage in current else "missing" for stage in STAGE_SETTINGS}
    assert "\x1b" not in done.stdout
    (project.folder / "prepared" / "kfold.json").unlink()
    done = project.run("stage=status", "status.format=json", "preprocess.image_size=64", "mlflow=off")
    rows = {row["stage"]: row for row in json.loads(done.stdout)}
    assert rows["preprocess"]["reasons"] == ["preprocess.image_size 96 -> 64"]
    assert rows["prepare"]["reasons"] == ["prepared/kfold.json is missing", "preprocess is stale"]


def test_changed_settings_are_listed_with_the_command_of_the_run(prepared: Project, tmp_path: Path) -> None:
    project = copy_of(prepared, tmp_path / "copy")
    done = project.run("stage=status", "preprocess.image_size=64")
    assert "preprocess.image_size 96 -> 64" in done.stdout
    assert "python -m prostate_seg stage=status mlflow=off data.phantom.num_patients=4" in done.stdout
    assert not (project.folder / "mlflow.db").exists()


def test_a_corrupted_record_is_reported(tmp_path: Path) -> None:
    (tmp_path / "DS_VERSION.json").write_text("{")
    done = Project(tmp_path).run("stage=status")
    assert done.returncode == 1
    assert "DS_VERSION.json: cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
