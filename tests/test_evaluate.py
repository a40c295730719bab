"""Stage evaluate in process: the same bits for any number of workers, no objective, and tables of older versions."""

import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from prostate_seg.common.errors import InputError
from prostate_seg.config.schema import Config, parse
from prostate_seg.config.workspace import StageResult, Workspace, workspace_of
from prostate_seg.imaging.image_io import content_md5
from prostate_seg.stages import evaluate, load_stage
from prostate_seg.stages.report import load_report_data
from tests.conftest import composed

SMALL = ("experiment=tiny", "mlflow=off", "fold.index=0", "train.max_epochs=1", "train.steps_per_epoch=3")


def configured(root: Path, *overrides: str) -> tuple[Config, Workspace]:
    cfg = parse(composed("stage=evaluate", *SMALL, *overrides))
    cfg = replace(cfg, paths=replace(cfg.paths, root=str(root), cache=str(root / "cache"), journal=str(root / "spool")))
    return cfg, workspace_of(cfg)


def evaluated(root: Path, *, num_workers: int, num_threads: int) -> StageResult:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        return load_stage("evaluate")(*configured(root, f"machine.num_workers={num_workers}"))
    finally:
        torch.set_num_threads(before)


def files(folder: Path) -> dict[str, bytes]:
    """Return the content of every table and mask."""
    kept = [path for path in sorted(folder.rglob("*")) if path.suffix in (".csv", ".json", ".gz")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in kept}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace with four phantom cases and a barely trained network."""
    folder = tmp_path_factory.mktemp("workspace")
    cfg, workspace = configured(folder)
    for stage in ("fetch", "preprocess", "prepare", "train"):
        load_stage(stage)(replace(cfg, stage=stage), workspace)
    return folder


@pytest.fixture(scope="module")
def result(root: Path) -> StageResult:
    return evaluated(root, num_workers=1, num_threads=1)


@pytest.mark.slow
@pytest.mark.usefixtures("result")
def test_tables_and_masks_have_the_same_bits_for_any_number_of_workers_and_threads(root: Path) -> None:
    before = files(root / "evaluation")
    evaluated(root, num_workers=8, num_threads=4)
    assert len([name for name in before if name.startswith("masks/")]) == 2
    assert files(root / "evaluation") == before


@pytest.mark.usefixtures("result")
def test_every_file_is_hashed_once_and_a_changed_one_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    monkeypatch.setattr(evaluate, "content_md5", lambda path: (hashed.append(path), content_md5(path))[1])
    evaluated(root, num_workers=1, num_threads=1)
    assert len(hashed) == len(set(hashed)) == 4  # image and mask of two test cases
    monkeypatch.setattr(evaluate, "content_md5", lambda _: "another")
    with pytest.raises(InputError, match="has changed since stage=preprocess: run the pipeline again"):
        evaluated(root, num_workers=1, num_threads=1)


def test_evaluation_returns_metrics_but_no_objective(result: StageResult) -> None:
    assert result.objectives == {}
    assert 0 <= result.metrics["test/nsd_2mm"] <= 1
    assert not [name for name in result.metrics if "surface" in name]


@pytest.mark.usefixtures("result")
def test_report_on_an_evaluation_of_an_older_version_names_column_and_stage(root: Path) -> None:
    cfg, workspace = configured(root)
    cases = workspace.evaluation / "cases.csv"
    old = pd.read_csv(cases, dtype=str).rename(columns={"nsd_2mm": "surface_dice_2mm"})
    old.to_csv(cases, index=False)
    with pytest.raises(InputError, match=re.escape("cases.csv has no nsd_2mm: an older version wrote it")) as caught:
        load_report_data(cfg, workspace, workspace.evaluation)
    assert "Run stage=evaluate again" in str(caught.value)
