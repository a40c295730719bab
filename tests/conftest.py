"""Shared fixtures and helpers: real data if available, the launcher as a subprocess, configs, small volumes."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from prostate_seg.cli import config_folder
from prostate_seg.imaging.geometry import Geometry, Volume

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers with two threads each slow each other down on two cores

ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"

Launch = Callable[..., subprocess.CompletedProcess[str]]


def pytest_addoption(parser: pytest.Parser) -> None:
    text = (
        "record the runs of test projects in the stack of docker/compose.yaml, one stack per project, as a plain user"
    )
    parser.addoption("--stack", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--stack"):
        os.environ["TESTS_USE_STACK"] = "yes"  # for tests.project_helpers


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--stack"):
        for item in items:
            if item.get_closest_marker("file_store"):
                item.add_marker(pytest.mark.skip(reason="its store is a file"))


def composed(*overrides: str, name: str = "config", folder: Path | None = None) -> DictConfig:
    """Compose a config as the launcher does; `folder` is added to the search path."""
    with initialize_config_dir(config_dir=str(config_folder())):
        search = [] if folder is None else [f"hydra.searchpath=[file://{folder}]"]
        return compose(name, overrides=["paths.root=.", *overrides, *search])


@pytest.fixture(autouse=True)
def reset_tracking_store() -> Iterator[None]:
    """Reset MLflow's global tracking store after each test, because code under test sets it for the whole process."""
    yield
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].set_tracking_uri(None)
        sys.modules["mlflow"].set_registry_uri(None)
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_EXPERIMENT_ID"):
            os.environ.pop(name, None)


@pytest.fixture
def shared_data() -> Path:
    """Folder of real prostate MRI beside the project, not part of it."""
    if not SHARED_DATA.is_dir():
        pytest.skip("real data is absent: ../shared/data")
    return SHARED_DATA


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Run `python -m prostate_seg` in a temporary folder, which is its workspace."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        env.pop("PROSTATE_SEG_ROOT", None)
        command = [sys.executable, "-m", "prostate_seg", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600, check=False)

    return run


@pytest.fixture
def cube_volume() -> Volume:
    """A 20 x 60 x 60 study at 3 x 0.5 x 0.5 mm with a bright block, values 0 to 100."""
    geometry = Geometry(
        shape_vox=(20, 60, 60),
        spacing_mm=(3.0, 0.5, 0.5),
        origin_mm=(-14.75, -14.75, -28.5),
        direction=(1, 0, 0, 0, 1, 0, 0, 0, 1),
    )
    array = np.random.default_rng(0).normal(20, 2, size=geometry.shape_vox).clip(0, 100).astype(np.float32)
    array[5:15, 20:40, 20:40] += 60
    return Volume(array=array, geometry=geometry)
