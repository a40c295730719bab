"""The row of `make bench` on the overhead of a trial in addition to its training; scripts/benchmark.py runs it."""

import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

SMALL = [
    "data.phantom.num_patients=4",
    "data.phantom.num_second_studies=0",
    "fold.num_folds=2",
    "model.channels=[8,16]",
    "model.strides=[[2,2]]",
    "train.steps_per_epoch=5",
    "train.max_epochs=2",
]
"""A training of a second: the overhead of a trial does not depend on its length."""


def trial_seconds(*, num_trials: int) -> tuple[float, float]:
    """Return the median seconds from the end of one trial to that of the next, and those of its training alone.

    The overhead includes settings from Optuna, composing, the runs of the trial and its folds, hashes, and reports to the
    study. The first trial, which imports torch and MLflow, is excluded.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = [sys.executable, "-m", "prostate_seg", "-m"]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "OPTUNA"))}

        def run(*arguments: str) -> None:
            command = [*program, *arguments, *SMALL]
            subprocess.run(command, cwd=folder, check=True, capture_output=True, env=environment)

        run("stage=fetch,preprocess,prepare", "mlflow=off")
        run("+sweep=optuna", "stage=train", f"hydra.sweeper.n_trials={num_trials}", "hydra/sweeper/pruner=none")
        return _between(folder), _trained(folder)


def _between(folder: Path) -> float:
    import optuna

    study = optuna.load_study(study_name="baseline", storage=f"sqlite:///{folder}/optuna.db")
    ends = [trial.datetime_complete for trial in study.trials if trial.datetime_complete is not None]
    return statistics.median((after - before).total_seconds() for before, after in pairwise(ends))


def _trained(folder: Path) -> float:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("prostate_seg")
    assert experiment is not None
    runs = client.search_runs(
        [experiment.experiment_id], "tags.level = 'trial'", order_by=["attributes.start_time ASC"]
    )
    return statistics.median(run.data.metrics["seconds"] for run in runs[1:])
