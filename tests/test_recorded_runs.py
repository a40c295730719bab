"""The per-case results of a run are found by its id, its pipeline or a link to it; a run without results is refused."""

from dataclasses import replace
from typing import NoReturn

import pytest
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from prostate_seg.common.errors import InputError
from prostate_seg.tracking import sweeps
from prostate_seg.tracking.recorded_runs import (
    RecordedTrial,
    find_run,
    open_tree,
    provenance_of,
    recorded_cases,
    recorded_stages,
    recorded_trials,
    repeats_of,
    sweep_of,
)
from prostate_seg.tracking.records import Level, TreePosition
from prostate_seg.tracking.store.run_tree import PARENT, RunTree
from tests.test_run_tree import SETTINGS


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> RunTree:
    folder = tmp_path_factory.mktemp("store")
    return open_tree(replace(SETTINGS, tracking_uri=f"sqlite:///{folder}/mlflow.db"), cache=folder)


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
    run_id = evaluation.info.run_id
    assert found == (run_id, f"p evaluate {run_id[:8]}", "case_id,dice\nä,1\n")
    assert recorded_cases(tree, pipeline.info.run_id) == found


def test_link_is_resolved_to_the_run_with_the_results(tree: RunTree) -> None:
    measured = add(tree, tree.pipeline("p", fresh=True), cases="x")
    second = tree.pipeline("second", fresh=True)
    add(tree, second, reused_from=str(measured.info.run_id))
    assert recorded_cases(tree, second.info.run_id)[0] == measured.info.run_id


def test_trial_has_its_own_table_and_a_sweep_none(tree: RunTree) -> None:
    pipeline = tree.pipeline("p", fresh=True)
    sweep = add(tree, pipeline, level=Level.sweep)
    trial = add(tree, sweep, level=Level.trial, cases="x")
    assert recorded_cases(tree, trial.info.run_id)[2] == "x"
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


def test_run_of_another_program_is_refused_and_is_no_part_of_a_pipeline(tree: RunTree) -> None:
    pipeline = tree.pipeline("p", fresh=True)
    other = tree.client.create_run(tree.store.experiment_id, tags={PARENT: pipeline.info.run_id}, run_name="notes")
    tree.client.set_terminated(other.info.run_id)
    with pytest.raises(InputError, match=r"\(notes\) was not recorded by prostate_seg\nName a pipeline"):
        recorded_stages(tree, other.info.run_id)
    with pytest.raises(InputError, match="recorded nothing"):
        recorded_stages(tree, pipeline.info.run_id)


def refuse(*_: str) -> NoReturn:
    raise MlflowException("API request failed")


def test_run_is_not_absent_because_the_store_fails(tree: RunTree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree.client, "get_run", refuse)
    with pytest.raises(InputError, match=r"cannot be used: API request failed\nCheck the address"):
        find_run(tree, "0" * 32)


def test_artifact_is_not_absent_because_the_store_fails(tree: RunTree, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = add(tree, tree.pipeline("p", fresh=True), cases="x")
    monkeypatch.setattr(tree.client, "download_artifacts", refuse)
    with pytest.raises(InputError, match=r"cannot be used: API request failed\nCheck the address"):
        recorded_cases(tree, evaluation.info.run_id)
    monkeypatch.setattr(tree.client, "list_artifacts", refuse)
    with pytest.raises(InputError, match=r"cannot be used: API request failed\nCheck the address"):
        provenance_of(tree, evaluation)


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
    facts = {"label": "", "settings": {}, "seed": 1, "networks_md5": "networks of 1", "text": "x"}
    assert recorded_trials(tree, sweep.info.run_id)[0] == RecordedTrial(run_id=run.info.run_id, **facts)


def test_sweep_without_an_evaluation_is_refused(tree: RunTree) -> None:
    sweep = add(tree, tree.pipeline("p", fresh=True), level=Level.sweep)
    add_trial(tree, sweep, stage="train", text=None, seed="1")
    with pytest.raises(InputError, match="has no trial with per-case results\nTrain and evaluate in one sweep"):
        recorded_trials(tree, sweep.info.run_id)


def test_label_of_a_trial_has_the_overrides_that_others_do_not_have(tree: RunTree) -> None:
    sweep = add(tree, tree.pipeline("p", fresh=True), level=Level.sweep)
    for seed, model in (("1", "unet"), ("2", "dynunet")):
        words = f"stage=evaluate seed={seed} model={model} data=picai paths.trained=models/{seed}"
        run = add_trial(tree, sweep, seed=seed, **{"model.name": model})
        tree.log(run.info.run_id, tags={"overrides": words})
    assert [one.label for one in recorded_trials(tree, sweep.info.run_id)] == ["model=unet", "model=dynunet"]


def test_sweep_of_a_pipeline_is_found_unless_the_pipeline_has_an_evaluation(tree: RunTree) -> None:
    pipeline = tree.pipeline("p", fresh=True)
    sweep = add(tree, pipeline, level=Level.sweep)
    for run in (sweep, pipeline):
        found = sweep_of(tree, run.info.run_id)
        assert found is not None
        assert found.info.run_id == sweep.info.run_id
    evaluation = add(tree, pipeline, cases="x")
    assert sweep_of(tree, evaluation.info.run_id) is None
    assert sweep_of(tree, pipeline.info.run_id) is None


def test_repeats_have_mean_and_deviation_over_seeds_and_folds_on_the_sweep(tree: RunTree) -> None:
    sweep = add(tree, tree.pipeline("p", fresh=True), level=Level.sweep)
    folds = {"1": (0.8, 0.9), "2": (0.82, 0.92), "3": (0.84, 0.94)}
    for seed, (first, second) in folds.items():
        training = add_trial(tree, sweep, seed=seed, stage="train", text=None)
        best = {"val/best_dice": 0.5, "val/best_dice_fold0": first, "val/best_dice_fold1": second}
        tree.log(training.info.run_id, metrics=best)
        rows = [f"fold0,{first},whole_gland", f"fold1,{second},whole_gland", "fold0,0.1,zone"]
        add_trial(tree, sweep, seed=seed, text="\n".join(["fold,dice,region", *rows]))
    sweeps.log_repeats(tree, sweep.info.run_id, tree.children(sweep.info.run_id))
    metrics = tree.client.get_run(sweep.info.run_id).data.metrics
    expected = {"mean": 0.87, "sd_seeds": 0.02, "sd_folds": 0.005**0.5}
    names = ("val/best_dice", "test/dice")
    assert metrics == pytest.approx(
        {f"repeats/{name}_{what}": value for name in names for what, value in expected.items()}
    )


def test_repeats_of_an_evaluation_are_the_trials_with_its_settings(tree: RunTree) -> None:
    sweep = add(tree, tree.pipeline("p", fresh=True), level=Level.sweep)
    runs = [add_trial(tree, sweep, seed=s, **{"model.name": n}) for n in "ab" for s in ("1", "2")]
    found = repeats_of(tree, runs[2].info.run_id)
    assert [one.run_id for one in found] == [run.info.run_id for run in runs[2:]]
    alone = add(tree, tree.pipeline("p", fresh=True), cases="x")
    assert repeats_of(tree, alone.info.run_id) == []
    assert repeats_of(tree, "12e4" * 8) == []


def test_a_single_seed_and_seeds_of_other_settings_are_no_repeats(
    tree: RunTree, caplog: pytest.LogCaptureFixture
) -> None:
    sweep = add(tree, tree.pipeline("p", fresh=True), level=Level.sweep)
    for seed, rate in (("1", "0.1"), ("2", "0.2")):
        add_trial(tree, sweep, seed=seed, text="fold,dice\nfold0,0.8", **{"train.learning_rate": rate})
    with caplog.at_level("INFO"):
        sweeps.log_repeats(tree, sweep.info.run_id, tree.children(sweep.info.run_id))
        assert "of seeds" not in caplog.text
        add_trial(tree, sweep, seed="3", text="fold,dice\nfold0,0.9", **{"train.learning_rate": "0.2"})
        sweeps.log_repeats(tree, sweep.info.run_id, tree.children(sweep.info.run_id))
    assert "train.learning_rate=0.2: test/dice of seeds 2, 3: mean 0.8500, SD over seeds 0.0707" in caplog.text
    assert tree.client.get_run(sweep.info.run_id).data.metrics == {}  # of which setting?
