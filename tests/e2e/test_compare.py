"""Comparison of two trainings of one data set, by run or folder, and refusals with their messages."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from prostate_seg.common.errors import ConfigError, InputError
from prostate_seg.config.schema import parse
from prostate_seg.config.workspace import workspace_of
from prostate_seg.stages import compare
from tests.conftest import composed
from tests.project_helpers import Project, copy_of

SHIFT = 0.125
"""Added to the Dice of one case by hand."""


@pytest.fixture(scope="module")
def trained_twice(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with two pipelines: first/ is the evaluation of baseline, evaluation/ that of the other."""
    project = copy_of(finished, tmp_path_factory.mktemp("compare") / "project")
    shutil.copytree(project.folder / "evaluation", project.folder / "first")
    done = project.run("-m", "stage=train,evaluate", "mlflow.name=second", "train.learning_rate=1e-2")
    assert done.returncode == 0, done.stdout + done.stderr
    return project


@pytest.fixture
def project(trained_twice: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """The same project as working folder of the test."""
    monkeypatch.chdir(trained_twice.folder)
    return trained_twice


def compare_here(project: Project, *runs: str) -> pd.DataFrame:
    """Compare in this process, and return comparison.csv."""
    listed = ",".join(f"'{run}'" for run in runs)
    store = f"mlflow.tracking_uri=sqlite:///{project.folder}/mlflow.db"
    cfg = parse(composed("stage=compare", f"compare.runs=[{listed}]", store))
    compare.run(cfg, workspace_of(cfg))
    return pd.read_csv(project.folder / "comparison" / "comparison.csv")


def refusal(project: Project, *runs: str) -> str:
    with pytest.raises(InputError) as caught:
        compare_here(project, *runs)
    return str(caught.value)


def evaluation(project: Project, pipeline: str) -> str:
    return str(project.only(pipeline=pipeline, stage="evaluate", level="stage").info.run_id)


def changed(project: Project, edit: Callable[[pd.DataFrame], pd.DataFrame]) -> str:
    """Write an edited copy of the first evaluation's table and return its folder."""
    (project.folder / "changed").mkdir(exist_ok=True)
    table = edit(pd.read_csv(project.folder / "first" / "cases.csv", dtype=str, keep_default_na=False))
    table.to_csv(project.folder / "changed" / "cases.csv", index=False)
    return "changed"


def test_two_runs_are_compared_and_none_is_added(project: Project) -> None:
    first, second = evaluation(project, "baseline"), evaluation(project, "second")
    num_runs = len(project.runs())
    done = project.run("stage=compare", f"compare.runs=[{first},{second}]")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(
        f"a  baseline evaluate {first[:8]} (baseline)\nb  second evaluate {second[:8]}\n4 cases of 4"
    )
    table = [line for line in done.stdout.splitlines() if not line.startswith("note: ")]
    assert max(map(len, table)) <= 120  # notes are wrapped at a terminal only
    written = {path.name for path in (project.folder / "comparison").iterdir()}
    assert written == {"comparison.csv", "comparison.json", "comparison.png"}
    assert len(project.runs()) == num_runs


def test_runs_pipelines_and_folders_give_the_same_numbers(project: Project) -> None:
    runs = [evaluation(project, name) for name in ("baseline", "second")]
    pipelines = [str(project.only(level="pipeline", pipeline=name).info.run_id) for name in ("baseline", "second")]
    found = [compare_here(project, *pair) for pair in (runs, pipelines, ["first", "evaluation"], ["first", runs[1]])]
    for other in found[1:]:
        pd.testing.assert_frame_equal(other.iloc[:, 2:], found[0].iloc[:, 2:])  # except for the names
    dice = found[0].query("subgroup == 'all' and metric == 'dice'")["difference"].item()
    a, b = (pd.read_csv(folder + "/cases.csv")["dice"].mean() for folder in ("first", "evaluation"))
    assert dice == pytest.approx(b - a)
    assert dice != 0
    assert set(found[0]["subgroup"]) == {"all", "volume_tertile", "pixels"}


def test_planted_change_is_found_in_its_subgroup(project: Project) -> None:
    def raise_dice_of_one_centre(table: pd.DataFrame) -> pd.DataFrame:
        return table.assign(centre=["A", "B", "A", "A"], dice=table["dice"].astype(float).add([0, SHIFT, 0, 0]))

    rows = compare_here(project, "first", changed(project, raise_dice_of_one_centre), "evaluation")
    assert list(rows["other"].unique()) == ["changed", "evaluation"]
    planted = rows[rows["other"] == "changed"]
    dice = planted[planted["metric"] == "dice"].set_index("group")["difference"]
    assert (dice["all"], dice["A"], dice["B"]) == (pytest.approx(SHIFT / 4), 0, pytest.approx(SHIFT))
    assert set(planted.loc[planted["metric"] != "dice", "difference"]) == {0.0}


def test_other_cases_are_refused_and_the_previous_result_is_kept(project: Project) -> None:
    compare_here(project, "first", "evaluation")
    before = (project.folder / "comparison" / "comparison.json").read_bytes()
    done = project.run("stage=compare", f"compare.runs=[first,{changed(project, lambda table: table[1:])}]")
    assert done.returncode == 1
    gone = pd.read_csv("first/cases.csv")["case_id"][0]
    assert "prostate_seg: changed and first were not evaluated on the same data:\n" in done.stderr
    assert f"  test cases of first only, 1: {gone}\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert (project.folder / "comparison" / "comparison.json").read_bytes() == before


def test_other_reference_and_a_table_of_an_older_version_are_refused(project: Project) -> None:
    other = changed(project, lambda table: table.assign(mask_md5=["x", *table["mask_md5"][1:]]))
    assert "another reference (mask_md5), 1: " in refusal(project, "first", other)
    older = changed(project, lambda table: table.drop(columns="mask_md5"))
    assert "changed: its cases.csv has no mask_md5: an older version wrote it" in refusal(project, "first", older)


def test_inputs_that_are_no_other_result_are_refused(project: Project) -> None:
    run, pipeline = evaluation(project, "baseline"), project.only(level="pipeline", pipeline="baseline").info.run_id
    assert f"{pipeline} is {run}, which is listed already" in refusal(project, run, pipeline)
    assert "which is listed already" in refusal(project, "first", "./first/")
    assert "elsewhere is neither a folder here nor the id of a run" in refusal(project, "first", "elsewhere")
    assert "model has no cases.csv" in refusal(project, "first", "model")
    assert f"there is no run {'12e4' * 8} in sqlite:///" in refusal(project, "first", "12e4" * 8)


def test_one_sweep_over_seeds_and_a_setting_is_compared_over_seeds_folds_and_patients(
    project: Project, tmp_path: Path
) -> None:
    """Both settings in one command: each seed is evaluated after its training, and the sweep keeps the table of each."""
    repeats = ["mlflow.name=repeats", "train.learning_rate=1e-3,1e-2", "train.max_epochs=1"]
    done = project.run("-m", "stage=train,evaluate", "seed=1,2", *repeats, f"paths.trained={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train.learning_rate=0.001: val/best_dice of seeds 1, 2: mean 0." in done.stdout
    assert "train.learning_rate=0.01: test/dice of seeds 1, 2: mean 0." in done.stdout
    assert re.search(r"python -m prostate_seg stage=train (?!.*seed=)", done.stdout)  # no seed is chosen
    sweep = project.only(level="sweep", pipeline="repeats")
    assert f"the sweep is run {sweep.info.run_id} of repeats" in done.stdout
    rows = compare_here(project, sweep.info.run_id)
    assert rows["other"].unique().item() == f"repeats {sweep.info.run_name} train.learning_rate=0.01"
    assert set(rows["num_seeds_baseline"]) == {2}
    dice = rows.set_index("metric").loc["dice"]
    assert dice["difference"] == pytest.approx(dice["mean_other"] - dice["mean_baseline"])
    assert dice["ci95_low"] <= dice["difference"] <= dice["ci95_high"]
    (found,) = json.loads((project.folder / "comparison" / "comparison.json").read_text())["comparisons"]
    assert (found["baseline"]["seeds"], found["other"]["seeds"]) == ([1, 2], [1, 2])
    assert found["noise_floor"]["whole_gland"]["plan"]["difference"] == 0.01
    pipeline = project.only(level="pipeline", pipeline="repeats").info.run_id
    pd.testing.assert_frame_equal(compare_here(project, pipeline), rows)


def test_a_single_run_is_refused(project: Project) -> None:
    with pytest.raises(ConfigError, match=r"compare.runs: must be two or more .*, is \[first\]"):
        compare_here(project, "first")
