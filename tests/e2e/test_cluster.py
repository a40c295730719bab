"""Jobs of a cluster are recorded like others; a preempted job resumes in its run and ends with the same weights.

Tested with submitit's local jobs, and with Slurm if it can be started.
"""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.project_helpers import HARD_USE, Project, copy_of, until
from tests.slurm_helpers import ask, slurm, why_no_slurm

pytestmark = pytest.mark.slow

NUM_EPOCHS = 20
TRAIN = ("stage=train", f"train.max_epochs={NUM_EPOCHS}", "train.steps_per_epoch=12")
"""A training that lasts some seconds after its first checkpoint, so that its job can be preempted."""

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Weights are bit-identical only for the same number of threads."""


class LocalJobs:
    """Jobs on this machine."""

    launcher = ("hydra/launcher=submitit_local",)
    environment = ONE_THREAD

    def preempt(self, launcher: subprocess.Popen[str], fold: int) -> None:
        """Send each job one of the two preemption signals."""
        tasks(launcher)[-fold].send_signal((signal.SIGUSR1, signal.SIGUSR2)[fold])


class SlurmJobs:
    """Jobs of a Slurm cluster."""

    launcher = ("hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=1")

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment | ONE_THREAD

    def preempt(self, _launcher: subprocess.Popen[str], fold: int) -> None:
        """Signal the first job, and let Slurm preempt the second."""
        job = sorted(ask(self.environment, "squeue", "--noheader", "--format=%i").split())[-fold]
        ask(self.environment, *(("scontrol", "requeue", job) if fold else ("scancel", "--signal=USR1", job)))


@pytest.fixture(params=["local", "slurm"])
def cluster(request: pytest.FixtureRequest) -> Iterator[LocalJobs | SlurmJobs]:
    reason = why_no_slurm()
    if request.param == "local":
        if reason is None and not HARD_USE:
            pytest.skip("the same is tested with Slurm; make hard-use runs both")
        yield LocalJobs()
        return
    if reason is not None:
        pytest.skip(f"no Slurm here: {reason}")
    with slurm() as environment:
        yield SlurmJobs(environment)


def tasks(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the processes of submitit's jobs on this machine, in the order of the jobs; a stopped one has none."""
    controllers = sorted(psutil.Process(launcher.pid).children(), key=psutil.Process.create_time)
    return [child for one in controllers for child in one.children() if "submitit.core._submit" in child.cmdline()]


@pytest.fixture(scope="module")
def undisturbed(prepared: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose folds were trained without an interruption."""
    project = copy_of(prepared, tmp_path_factory.mktemp("undisturbed") / "project")
    done = project.run(*TRAIN, "mlflow=off", **ONE_THREAD)
    assert done.returncode == 0, done.stdout + done.stderr
    return project


def test_preempted_jobs_resume_in_their_runs_to_the_same_weights(
    cluster: LocalJobs | SlurmJobs, prepared: Project, undisturbed: Project, tmp_path: Path
) -> None:
    project = copy_of(prepared, tmp_path / "project")
    grid = ["-m", *TRAIN, "fold.index=0,1"]
    launcher = project.start(*grid, *cluster.launcher, **cluster.environment)
    waiting, begun = {0, 1}, set[str]()

    def all_preempted() -> bool:
        """Preempt each job at its first checkpoint: they need not run at the same time."""
        for fold in sorted(waiting):
            if (project.folder / ".training" / f"fold{fold}" / "checkpoints").exists():
                begun.update(run.info.run_id for run in project.runs(level="trial"))
                cluster.preempt(launcher, fold)
                waiting.remove(fold)
        return not waiting

    until(all_preempted, 120)
    until(lambda: "KILLED" in {run.info.status for run in project.runs(level="trial")}, 60)
    output, _ = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, output

    sweep, trials = project.only(level="sweep"), project.runs(level="trial")
    assert {run.info.run_id for run in trials} == begun
    assert len(trials) == 2
    assert {run.data.tags["cluster.num_starts"] for run in trials} == {"2"}
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {sweep.info.run_id}
    assert {run.info.status for run in project.runs()} == {"FINISHED"}
    for fold in ("0", "1"):
        run = project.only(level="fold", fold=fold)
        epochs = [metric.step for metric in project.client.get_metric_history(run.info.run_id, "train/loss")]
        assert epochs == list(range(1, NUM_EPOCHS + 1))
        weights = Path("model") / f"fold{fold}" / "weights.safetensors"
        assert (project.folder / weights).read_bytes() == (undisturbed.folder / weights).read_bytes()
