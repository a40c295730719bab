"""A project folder with launcher and DVC, its runs, and functions that wait for a condition."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from prostate_seg.provenance.hashing import hash_paths
from prostate_seg.tracking.store.paths import fix_paths
from tests.conftest import ROOT
from tests.fork_server import IS_AVAILABLE, ForkedProcess, run_forked

SMALL = [
    "data.phantom.num_patients=4",
    "data.phantom.num_second_studies=0",
    "data.phantom.field_of_view_mm=100",
    "data.phantom.gland_volume_range_ml=[25,50]",
    "preprocess.spacing_mm=[3,0.8,0.8]",
    "preprocess.image_size=96",
    "fold.num_folds=2",
    "model.channels=[8,16]",
    "model.strides=[[2,2]]",
    "train.steps_per_epoch=2",
    "train.max_epochs=2",
    "evaluate.num_bootstrap=100",
]
LONGER_RECORDED = ["train.max_epochs=8", "train.steps_per_epoch=12"]
"""A training of a few seconds, for tests that stop it."""
LONGER = [*LONGER_RECORDED, "mlflow=off"]
HARD_USE = "HARD_USE" in os.environ
"""Whether tests that repeat a thing do so as often as `make hard-use` wants, which takes an hour."""
LOGIN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
LAUNCHER = "-m prostate_seg"
FAULTY = Path(__file__).parent / "e2e" / "faulty.py"
"""Program that runs the launcher with an injected fault."""
Value = TypeVar("Value")
only_in_hard_use = pytest.mark.skipif(not HARD_USE, reason="a longer variant, run by make hard-use")


@dataclass(frozen=True)
class Project:
    """A folder with a workspace and a store."""

    folder: Path

    def run(self, *arguments: str, program: str = LAUNCHER, **environment: str) -> subprocess.CompletedProcess[str]:
        command, env = self._command(arguments, program, environment)
        if is_forked(program, arguments):
            given = command[1 + len(program.split()) :]
            return run_forked(program, given, folder=self.folder, environment=env, timeout=300)
        return subprocess.run(
            command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=300, check=False
        )

    def start(
        self, *arguments: str, program: str = LAUNCHER, **environment: str
    ) -> "subprocess.Popen[str] | ForkedProcess":
        command, env = self._command(arguments, program, environment)
        if is_forked(program, arguments):
            return ForkedProcess(program, command[1 + len(program.split()) :], folder=self.folder, environment=env)
        return subprocess.Popen(
            command, cwd=self.folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def _command(
        self, arguments: tuple[str, ...], program: str, environment: dict[str, str]
    ) -> tuple[list[str], dict[str, str]]:
        command = [sys.executable, *program.split(), *arguments, *small_for(arguments)]
        names_a_store = any(argument.startswith(("mlflow=", "mlflow.tracking_uri=")) for argument in arguments)
        if not uses_stack() or names_a_store:
            return command, clean_environment() | environment
        return [*command, "mlflow=server"], clean_environment() | {"MLFLOW_TRACKING_URI": self.store} | environment

    @property
    def store(self) -> str:
        """Tracking URI: a file in the folder of the project, or with the option --stack a server stack, as a plain user."""
        if not uses_stack():
            return f"sqlite:///{self.folder}/mlflow.db"
        from tests.stack_helpers import stack_of  # which imports this module

        return stack_of(self.folder).plain_user

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self.store)

    def runs(self, *, deleted: bool = False, **tags: str) -> list[Run]:
        """Return runs, oldest first."""
        experiment = self.client.get_experiment_by_name("prostate_seg")
        assert experiment is not None
        view = ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY
        query = " and ".join(f"tags.{key} = '{value}'" for key, value in tags.items())
        order = ["attributes.start_time ASC"]
        return list(self.client.search_runs([experiment.experiment_id], query, run_view_type=view, order_by=order))

    def only(self, **tags: str) -> Run:
        (run,) = self.runs(**tags)
        return run

    def artifacts(self, run: Run, folder: str = "") -> set[str]:
        found = set()
        for info in self.client.list_artifacts(run.info.run_id, folder or None):
            found |= self.artifacts(run, info.path) if info.is_dir else {info.path}
        return found


def is_forked(program: str, arguments: Sequence[str]) -> bool:
    """Return whether a program runs in a fork; processes of loky (joblib) hang in a fork."""
    starts_workers = any("joblib" in argument for argument in arguments)
    return IS_AVAILABLE and program in (LAUNCHER, str(FAULTY)) and not starts_workers


def uses_stack() -> bool:
    return "TESTS_USE_STACK" in os.environ


def copy_of(project: Project, folder: Path) -> Project:
    """Return an independent copy of a project; the paths in its store are those of the copy."""
    shutil.copytree(project.folder, folder)
    if (folder / "mlflow.db").exists():
        fix_paths(folder / "mlflow.db", experiment="prostate_seg")
    return Project(folder)


def model_hash(folder: Path) -> str:
    return hash_paths([folder / "model"], cache=folder / ".hashes")[folder / "model"].md5


def small_for(arguments: tuple[str, ...]) -> list[str]:
    """Return the settings of a small run except those that a test overrides."""
    given = {argument.split("=")[0] for argument in arguments}
    return [setting for setting in SMALL if setting.split("=")[0] not in given]


def clean_environment() -> dict[str, str]:
    """Return the environment without variables that change where or how runs are recorded."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "DVC", "PROSTATE_SEG"))}
    login = {key: value for key, value in os.environ.items() if key in LOGIN and uses_stack()}
    return kept | login | {"PYTHONPATH": str(ROOT)}


def dvc_md5(repository: Path, *paths: Path) -> dict[str, str]:
    """Return the md5 that `dvc add` computes for copies of the paths in a new repository."""
    env = {**os.environ, "DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(repository / "site")}
    subprocess.run(["git", "init", "-q"], cwd=repository, check=True)
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "-q"], cwd=repository, check=True, env=env)
    for path in paths:
        subprocess.run(["cp", "-rL", str(path), str(repository / path.name)], check=True)
    names = [path.name for path in paths]
    subprocess.run([*dvc, "add", "-q", *names], cwd=repository, check=True, env=env)
    return {name: yaml.safe_load((repository / f"{name}.dvc").read_text())["outs"][0]["md5"] for name in names}


def wait_for(path: Path, seconds: float = 90) -> None:
    until(path.exists, seconds)


def until(condition: Callable[[], Value], seconds: float) -> Value:
    """Return the first true value of a condition."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
    return value


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
