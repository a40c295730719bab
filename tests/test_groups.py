"""Folds by group from preprocessing to the report, beside mixed folds of the same cases, on phantoms of two scanners."""

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import read_json
from prostate_seg.config.schema import parse
from prostate_seg.config.workspace import StageResult, workspace_of
from prostate_seg.stages import load_stage
from tests.conftest import composed

TINY = ("experiment=tiny", "mlflow=off", "train.max_epochs=1", "train.steps_per_epoch=2")
PHANTOM = "data.phantom.scanners=[standard,coarse]"
GROUPS = ("fold=groups", "fold.column=scanner")


def run(root: Path, *overrides: str, stages: tuple[str, ...]) -> StageResult | None:
    cfg = parse(composed(f"stage={stages[0]}", *TINY, PHANTOM, *overrides))
    cfg = replace(cfg, paths=replace(cfg.paths, root=str(root), cache=str(root / "cache"), journal=str(root / "spool")))
    for stage in stages:
        result = load_stage(stage)(replace(cfg, stage=stage), workspace_of(cfg))
    return result


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two workspaces on the same cases: mixed folds and folds by scanner."""
    folder = tmp_path_factory.mktemp("groups")
    run(folder / "mixed", stages=("fetch", "preprocess"))
    shutil.copytree(folder / "mixed", folder / "unseen")
    run(folder / "mixed", stages=("prepare", "train", "evaluate"))
    run(folder / "unseen", *GROUPS, stages=("prepare", "train", "evaluate"))
    return folder


def test_each_scanner_is_tested_by_a_network_that_never_saw_it(root: Path) -> None:
    unseen = root / "unseen"
    cases = pd.read_csv(unseen / "evaluation" / "cases.csv", dtype=str)
    scanner_of = cases.set_index("case_id")["scanner"]
    assert set(scanner_of) == {"standard", "coarse"}
    for fold, tested in cases.groupby("fold"):
        recipe = read_json(unseen / "model" / str(fold) / "recipe.json")
        assert set(tested["scanner"]).isdisjoint(scanner_of[[*recipe["train_ids"], *recipe["val_ids"]]])


def test_report_sets_unseen_scanners_beside_mixed_folds(root: Path) -> None:
    result = run(root / "unseen", *GROUPS, f"report.mixed_folds={root}/mixed/evaluation", stages=("report",))
    assert result is not None
    assert root / "mixed" / "evaluation" in result.inputs
    rows = pd.read_csv(root / "unseen" / "report" / "expected_elsewhere.csv").set_index("group")
    tables = {name: pd.read_csv(root / name / "evaluation" / "cases.csv") for name in ("unseen", "mixed")}
    means = {name: table.groupby("scanner")["dice"].mean() for name, table in tables.items()}
    assert rows.index.tolist() == ["coarse", "standard", "all"]
    for scanner in ("coarse", "standard"):
        assert rows.loc[scanner, "mean"] == pytest.approx(means["unseen"][scanner], abs=1e-5)
        assert rows.loc[scanner, "mean_mixed"] == pytest.approx(means["mixed"][scanner], abs=1e-5)
    assert "What to expect elsewhere" in (root / "unseen" / "report" / "report.html").read_text()


def test_mixed_folds_beside_mixed_folds_are_refused(root: Path) -> None:
    with pytest.raises(
        InputError, match="mixed_folds: goes with an evaluation of fold=groups, and kfold.json has other folds"
    ):
        run(root / "mixed", f"report.mixed_folds={root}/unseen/evaluation", stages=("report",))
