"""One network trained by two processes under torchrun: the result of one process, one record, and failures."""

import csv
import json
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from tests.fork_server import python_folder
from tests.project_helpers import Project, copy_of, only_in_hard_use, until

pytestmark = pytest.mark.slow

TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node=2 -m prostate_seg"
TRAINING = ["stage=train", "fold.index=0", "train.precision=fp32", "train.batch_size=5"]
TRAINING += ["train.max_epochs=4", "train.steps_per_epoch=6"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def forked() -> dict[str, str]:
    """Environment in which torchrun's processes are forks, which import no library again."""
    return {"PYTHON_EXEC": str(python_folder() / "python")}


@pytest.fixture(scope="module")
def alone(prepared: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose fold was trained by one process."""
    project = copy_of(prepared, tmp_path_factory.mktemp("alone") / "project")
    done = project.run(*TRAINING, "mlflow=off", **ONE_THREAD)
    assert done.returncode == 0, done.stdout + done.stderr
    return project


def history(project: Project) -> dict[str, np.ndarray]:
    rows = list(csv.DictReader((project.folder / "model/fold0/history.csv").open()))
    return {key: np.array([float(row[key] or "nan") for row in rows]) for key in rows[0]}


def require_same(project: Project, alone: Project) -> None:
    """Check that two trainings have the same result up to rounding.

    The gradient of a bias before a batch norm is rounding error, which Adam scales to full steps; the norm cancels it, and
    the EMA weights nearly cancel it. A running variance is a mean of squared activations: its rounding grows with its size.
    """
    ours, theirs = history(project), history(alone)
    assert ours.keys() == theirs.keys()
    for key, values in ours.items():
        tolerance = 0.01 if key.startswith("val/") else 1e-4
        np.testing.assert_allclose(values, theirs[key], rtol=0, atol=tolerance, err_msg=key)
    weights, expected = (load_file(one.folder / "model/fold0/weights.safetensors") for one in (project, alone))
    for name, value in weights.items():
        tolerance = 0.05 if name.endswith(("conv.bias", "running_mean")) else 2e-4
        relative = 2e-3 if name.endswith("running_var") else 0
        np.testing.assert_allclose(value, expected[name], rtol=relative, atol=tolerance, err_msg=name)


def test_two_processes_give_the_result_of_one_and_one_record(
    prepared: Project, alone: Project, forked: dict[str, str], tmp_path: Path
) -> None:
    project = copy_of(prepared, tmp_path / "project")
    done = project.run(*TRAINING, program=TORCHRUN, **forked)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    assert text.count("best val Dice: fold 0") == 1
    require_same(project, alone)
    for level in ("pipeline", "stage", "fold"):
        run = project.only(level=level)
        assert run.info.status == "FINISHED"
    losses = project.client.get_metric_history(project.only(level="fold").info.run_id, "train/loss")
    assert [metric.step for metric in losses] == [1, 2, 3, 4]
    assert project.only(level="stage").data.tags["num_processes"] == "2"
    evaluated = project.run("stage=evaluate", "fold.index=0", "mlflow=off")
    assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
    assert json.loads((project.folder / "evaluation/summary.json").read_text())["test"]["dice"] >= 0

    # The second process continues.
    again = project.run(*TRAINING, "mlflow.skip_finished=true", program=TORCHRUN, **forked)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "is skipped: run " in again.stdout + again.stderr


@only_in_hard_use
@pytest.mark.parametrize("victim", [0, 1])
def test_training_resumes_after_one_of_its_processes_was_killed(victim: int, prepared: Project, tmp_path: Path) -> None:
    project = copy_of(prepared, tmp_path / "project")
    slow = [*TRAINING, "train.max_epochs=15"]
    started = project.start(*slow, program=TORCHRUN)
    until(lambda: len(list((project.folder / ".training/fold0/checkpoints").glob("epoch*.safetensors"))) > 0, 120)
    workers = [one for one in psutil.Process(started.pid).children() if "prostate_seg" in " ".join(one.cmdline())]
    (process,) = [one for one in workers if one.environ()["RANK"] == str(victim)]
    process.send_signal(signal.SIGKILL)
    text, _ = started.communicate(timeout=120)
    assert started.returncode == 1
    assert "Signal 9 (SIGKILL)" in text
    if victim == 1:  # torchrun stops the first process, or that process detects the lost connection
        assert project.only(level="stage").info.status in ("KILLED", "FAILED")
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]
    done = project.run(*slow, program=TORCHRUN)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    assert "where training was stopped" in text
    assert len(history(project)["epoch"]) == 15


def test_refusal_is_shown_once_with_its_exit_code(prepared: Project, forked: dict[str, str]) -> None:
    done = prepared.run("stage=train", "train.batch_size=1", "mlflow=off", program=TORCHRUN, **forked)
    assert done.returncode == 1  # torchrun's own
    assert "exitcode  : 2" in done.stderr
    assert "train.batch_size: must be at least the 2 processes" in done.stderr
    assert done.stderr.count("prostate_seg: ") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stage=evaluate"], "torchrun: its 2 processes share one stage=train, is stage=evaluate"),
        (["stage=train", "machine.num_parallel_folds=2"], "machine.num_parallel_folds: must be 1 with torchrun"),
    ],
)
def test_unsupported_commands_are_refused(arguments: list[str], message: str, prepared: Project) -> None:
    torchrun = {
        "TORCHELASTIC_RUN_ID": "one",
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
    }
    done = prepared.run(*arguments, "mlflow=off", **torchrun)
    assert done.returncode == 2
    assert message in done.stderr
