"""Every stage once, on a command line, in one project: exit code 0 and its main output.

`find`, `link` and `reproduce` need commits and are in test_dvc.py.
"""

import shutil
from pathlib import Path

import pytest

from prostate_seg.stages import STAGES
from tests.project_helpers import Project

NEED_COMMITS = {"find", "link", "reproduce"}

CHAIN = {
    "fetch": "data/images/ph001_1.nii.gz",
    "inspect": "inspect/cases.csv",
    "preprocess": "preprocess/dataset.csv",
    "prepare": "prepared/kfold.json",
    "train": "model/fold1/weights.safetensors",
    "evaluate": "evaluation/metrics.json",
    "stress": "stress/stress.json",
    "report": "report/report.html",
    "register": "mlflow.db",
}
"""Stages of one command, with an output of each."""
COMMANDS = {
    ",".join(CHAIN): (["-m", "stress.perturbations=[gamma]", "stress.max_cases=2"], CHAIN.values()),
    "predict": (
        ["predict.model=models:/prostate_seg@challenger", "predict.input=data/images"],
        ["predictions/volumes.csv"],
    ),
    "export": ([], ["params.yaml"]),
    "audit": ([], ["prepared/kfold.json"]),
    "status": ([], ["DS_VERSION.json"]),
    "verify": ([], ["DS_VERSION.json"]),
    "compare": (["compare.runs=[evaluation,copied]"], ["comparison/comparison.csv"]),
    "sync": ([], ["mlflow.db"]),
    "bundle": (["bundle.output=runs.zip"], ["runs.zip"]),
    "doctor": ([], ["mlflow.db"]),
}


@pytest.mark.file_store
def test_every_stage_succeeds_on_a_small_project(tmp_path: Path) -> None:
    project = Project(tmp_path)
    for stage, (settings, outputs) in COMMANDS.items():
        if stage == "compare":
            shutil.copytree(tmp_path / "evaluation", tmp_path / "copied")
        if stage == "bundle":
            settings = [*settings, f"bundle.run={project.only(level='pipeline').info.run_id}"]
        done = project.run(f"stage={stage}", *settings)
        assert done.returncode == 0, f"{stage}\n{done.stdout}\n{done.stderr}"
        for path in outputs:
            assert (tmp_path / path).exists(), (stage, path)


def test_every_stage_is_included() -> None:
    assert {stage for stages in COMMANDS for stage in stages.split(",")} | NEED_COMMITS == set(STAGES)
