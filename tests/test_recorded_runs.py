"""The per-case results of a run are found by its id, its pipeline or a link to it; a run without results is refused."""

import pytest
from mlflow.entities import Run

from prostate_seg.common.errors import InputError
from prostate_seg.config.schema import MlflowConfig
from prostate_seg.tracking.recorded_runs import RecordedTrial, open_tree, recorded_cases, recorded_trials
from prostate_seg.tracking.records import Level, TreePosition
from prostate_seg.tracking.store.run_tree import RunTree


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> RunTree:
    folder = tmp_path_factory.mktemp("store")
    settings = MlflowConfig(
        tracking_uri=f"sqlite:///{folder}/mlflow.db",
        experiment="one",
        name="baseline",
        on_rerun="supersede",
        on_unreachable="fail",
        fresh=False,
        skip_finished=False,
        system_metrics=False,
    )
    return open_tree(settings, cache=folder)


def add(
    tree: RunTree,
    parent: Run,
    *,
    stage: str = "evaluate",
    level: Level = Level.stage,
    cases: str | None = None,
    **tags: str,
) -> Run:
    """Add a finished run, with a table if `cases` is its text."""
    place = TreePosition(level=level, pipeline=str(parent.info.run_name), stage=stage)
    run = tree.create(stage, place, parent_id=parent.info.run_id, tags=tags)
    if cases is not None:
        tree.client.log_text(run.info.run_id, cases, "tables/cases.csv")
    tree.client.set_terminated(run.info.run_id)
    return run


def refusal(tree: RunTree, run: Run) -> str:
    with pytest.raises(InputError) as caught:
        recorded_cases(tree, run.info.run_id)
    return str(caught.value)


def test_evaluation_and_its_pipeline_give_the_same_table(tree: RunTree) -> None:
    pipeline = tree.pipeline("p", fresh=True)
    add(tree, pipeline, stage="train")
    evaluation = add(tree, pipeline, cases="case_id,dice\nä,1\n")
    found = recorded_cases(tree, evaluation.info.run_id)
    assert (found.run_id, found.text) == (evaluation.info.run_id, "case_id,dice\nä,1\n")
    assert found.name == f"p evaluate {evaluation.info.run_id[:8]}"
    assert recorded_cases(tree, pipeline.info.run_id) == found


def test_link_is_resolved_to_the_run_with_the_results(tree: RunTree) -> None:
    measured = add(tree, tree.pipeline("p", fresh=True), cases="x")
    second = tree.pipeline("second", fresh=True)
    add(tree, second, reused_from=str(measured.info.run_id))
    assert recorded_cases(tree, second.info.run_id).run_id == measured.info.run_id


def test_trial_has_its_own_table_and_a_sweep_none(tree: RunTree) -> None:
    pipeline = tree.pipeline("p", fresh=True)
    sweep = add(tree, pipeline, level=Level.sweep)
    trial = add(tree, sweep, level=Level.trial, cases="x")
    assert recorded_cases(tree, trial.info.run_id).text == "x"
    assert "is a sweep: name two of its trials" in refusal(tree, sweep)
    assert "must hold one finished evaluation, holds 0\nRun stage=evaluate in it first." in refusal(tree, pipeline)


def test_pipeline_with_two_evaluations_is_refused_with_both(tree: RunTree) -> None:
    pipeline = tree.pipeline("p", fresh=True)
    runs = [add(tree, pipeline, cases="x") for _ in range(2)]
    text = refusal(tree, pipeline)
    assert "must hold one finished evaluation, holds 2" in text
    assert all(run.info.run_id in text for run in runs)


def test_training_and_an_unknown_run_are_refused(tree: RunTree) -> None:
    training = add(tree, tree.pipeline("p", fresh=True), stage="train")
    assert f"run {training.info.run_id} (train, FINISHED) has no per-case results" in refusal(tree, training)
    with pytest.raises(InputError, match="there is no run 12e45678 in sqlite:///"):
        recorded_cases(tree, "12e45678")


def add_trial(tree: RunTree, sweep: Run, *, text: str | None = "x", stage: str = "evaluate", **params: str) -> Run:
    """Add a finished trial of a sweep."""
    tested = {"md5.inputs/models/a/model": f"networks of {params['seed']}"} if stage == "evaluate" else {}
    run = add(tree, sweep, stage=stage, level=Level.trial, cases=text, **tested)
    tree.log(run.info.run_id, params={"model.name": "unet", "fold.index": "null", **params})
    return run


def test_trials_of_a_sweep_have_their_varied_settings_and_seeds(tree: RunTree) -> None:
    sweep = add(tree, tree.pipeline("p", fresh=True), level=Level.sweep)
    add_trial(tree, sweep, stage="train", text=None, seed="1")
    trials = [add_trial(tree, sweep, text=n, seed=s, **{"model.name": n}) for n in "ab" for s in ("1", "2")]
    failed = add_trial(tree, sweep, seed="3")
    tree.client.set_terminated(failed.info.run_id, "FAILED")
    found = recorded_trials(tree, sweep.info.run_id)
    assert [one.run_id for one in found] == [run.info.run_id for run in trials]
    assert [(one.settings, one.seed, one.text) for one in found] == [
        ({"model.name": n}, s, n) for n in "ab" for s in (1, 2)
    ]
    assert found[0].networks_md5 == "networks of 1"


def test_seed_and_fold_index_are_no_settings_of_a_trial(tree: RunTree) -> None:
    sweep = add(tree, tree.pipeline("p", fresh=True), level=Level.sweep)
    run = add_trial(tree, sweep, seed="1", **{"fold.index": "0"})
    add_trial(tree, sweep, seed="2", **{"fold.index": "1"})
    expected = RecordedTrial(run_id=run.info.run_id, settings={}, seed=1, networks_md5="networks of 1", text="x")
    assert recorded_trials(tree, sweep.info.run_id)[0] == expected


def test_sweep_without_an_evaluation_is_refused(tree: RunTree) -> None:
    sweep = add(tree, tree.pipeline("p", fresh=True), level=Level.sweep)
    add_trial(tree, sweep, stage="train", text=None, seed="1")
    with pytest.raises(InputError, match="has no trial with per-case results\nTrain and evaluate in one sweep"):
        recorded_trials(tree, sweep.info.run_id)
