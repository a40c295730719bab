"""Sweeps on the command line: grids, pairs and studies; failed, pruned and killed trials; and their records."""

import re
from pathlib import Path

import optuna
import pytest
from mlflow import MlflowClient

from prostate_seg.sweeping.study import latest_attempts, original_number
from tests.conftest import ROOT
from tests.project_helpers import FAULTY, HARD_USE, Project, copy_of, until
from tests.server_helpers import mlflow_server, postgres_server, why_no_postgres

STUDY = ["-m", "+sweep=optuna", "stage=train"]
ONE_FOLD = ["fold.index=0", "mlflow=off"]


@pytest.fixture
def project(prepared: Project, tmp_path: Path) -> Project:
    return copy_of(prepared, tmp_path / "project")


def trials_of(project: Project, name: str = "baseline") -> list[optuna.trial.FrozenTrial]:
    """Return the latest attempt of each trial."""
    storage = optuna.storages.RDBStorage(f"sqlite:///{project.folder}/optuna.db")
    return list(latest_attempts(optuna.load_study(study_name=name, storage=storage)).values())


def run(project: Project, *arguments: str, program: str = "-m prostate_seg", code: int = 0) -> str:
    done = project.run(*arguments, program=program)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def settings_of(project: Project, number: int) -> dict[str, str]:
    lines = (project.folder / f"sweeps/baseline/{number}/.hydra/overrides.yaml").read_text().splitlines()
    return dict(line.removeprefix("- ").split("=", 1) for line in lines)


@pytest.mark.slow
def test_study_killed_at_three_moments_ends_with_its_trials_each_trained_once(project: Project) -> None:
    sweep = [*STUDY, "hydra.sweeper.n_trials=3"]
    text = run(project, "kill", "claim", *sweep, program=str(FAULTY), code=-9)
    assert "study baseline: 3 of 3 trials are missing" in text
    assert [trial.params for trial in trials_of(project)] == [{}]  # at the start of the first trial
    run(project, "kill", "fold1", *sweep, program=str(FAULTY), code=-9)  # during its training
    settings = settings_of(project, 0)
    text = run(project, "kill", "tell", *sweep, program=str(FAULTY), code=-9)  # between the second and the third
    assert "fold 0 had finished before training was stopped, and is kept" in text
    assert [trial.state.name for trial in trials_of(project)] == ["COMPLETE", "RUNNING"]
    second = original_number(trials_of(project)[1])  # retries of the first trial have numbers too
    weights = project.folder / f"sweeps/baseline/{second}/model/fold0/weights.safetensors"
    before = weights.stat().st_mtime_ns

    text = run(project, *sweep)
    assert "study baseline: 2 of 3 trials are missing" in text
    assert "train is skipped: run " in text
    assert weights.stat().st_mtime_ns == before
    trials = trials_of(project)
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3
    assert settings.items() - {("mlflow.skip_finished", "true")} <= settings_of(project, 0).items()
    folders = [path for path in (project.folder / "sweeps/baseline").iterdir() if path.is_dir()]
    numbers = [original_number(trial) for trial in trials]
    assert numbers[:2] == [0, second]
    assert sorted(path.name for path in folders) == sorted(map(str, numbers))
    runs = {str(run.info.run_name): run for run in project.runs(level="trial")}
    assert sorted(runs) == sorted(f"trial {number}" for number in numbers)
    assert len(project.runs(level="trial")) == 3
    for trial in trials:
        assert runs[f"trial {original_number(trial)}"].data.metrics["objective"] == trial.value
    assert {run.info.status for run in project.runs()} == {"FINISHED"}
    assert (
        project.only(level="sweep").data.tags["best_trial"]
        == f"trial {original_number(max(trials, key=lambda one: one.value))}"
    )

    text = run(project, *sweep)
    assert "study baseline: 0 of 3 trials are missing" in text
    assert "train FINISHED" not in text


@pytest.mark.slow
def test_failed_trials_are_recorded_and_the_sweep_continues(project: Project) -> None:
    text = run(
        project,
        "ok,raise,nan,oom,ok",
        "trainings",
        *STUDY,
        "fold.index=0",
        "hydra.sweeper.n_trials=5",
        program=str(FAULTY),
    )
    assert "2 trials trained, 0 pruned, 3 failed" in text
    trials = trials_of(project)
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "FAIL", "FAIL", "COMPLETE"]
    reasons = [str(trial.user_attrs["reason"]) for trial in trials[1:4]]
    assert reasons[0] == "RuntimeError: built-in fault"
    assert "is NaN" in reasons[1]
    assert reasons[2].startswith("OutOfMemoryError")
    runs = {str(run.info.run_name): run for run in project.runs(level="trial")}
    assert [runs[f"trial {number}"].info.status for number in range(5)] == ["FINISHED", *["FAILED"] * 3, "FINISHED"]
    assert runs["trial 1"].data.tags["trial.state"] == "failed"
    assert runs["trial 1"].data.tags["ended_by"] == "RuntimeError: built-in fault"
    assert project.only(level="sweep").info.status == "FINISHED"


@pytest.mark.slow
def test_unpromising_trials_are_pruned_and_recorded_as_such(project: Project) -> None:
    """A good learning rate first, then two that do not learn."""
    training = [
        "train.max_epochs=6",
        "train.steps_per_epoch=40",
        "model.channels=[8,16,32]",
        "model.strides=[[2,2],[2,2]]",
    ]
    space = ["hydra.sweeper.params=null", "train.learning_rate=choice(0.03,1e-7,2e-7)"]
    grid = ["hydra/sweeper/sampler=grid", "hydra.sweeper.sampler.seed=1"]
    pruner = ["hydra.sweeper.pruner.n_startup_trials=1", "hydra.sweeper.pruner.n_warmup_steps=5"]
    text = run(project, *STUDY, *training, *space, *grid, *pruner)
    assert "1 trials trained, 2 pruned, 0 failed" in text
    whole, *stopped_early = trials_of(project)
    for trial in stopped_early:
        assert trial.state.name == "PRUNED"
        assert trial.last_step == 5
        assert trial.duration is not None
        assert whole.duration is not None
        assert trial.duration < whole.duration
    assert whole.last_step == 12

    number = 1
    stopped = next(run for run in project.runs(level="trial") if run.info.run_name == f"trial {number}")
    assert stopped.info.status == "KILLED"
    assert stopped.data.tags["trial.state"] == "pruned"
    assert "is unpromising" in stopped.data.tags["ended_by"]
    folds = [run for run in project.runs(level="fold") if run.data.tags["mlflow.parentRunId"] == stopped.info.run_id]
    assert folds[-1].info.status == "KILLED"
    sweep = project.only(level="sweep")
    assert sweep.info.status == "FINISHED"
    command = sweep.data.tags["best_command"]
    assert command.startswith("python -m prostate_seg stage=train ")
    assert "+sweep" not in command
    assert re.search(
        r"best: trial \d+, objective [\d.]+; to train it here:\n  python -m prostate_seg stage=train", text
    )
    best = next(run for run in project.runs(level="trial") if run.info.run_id == sweep.data.tags["best_run_id"])
    assert f"train.learning_rate={best.data.params['train.learning_rate']}" in command


@pytest.mark.slow
def test_two_objectives_have_a_pareto_front_and_parallel_trials_have_own_folders(project: Project) -> None:
    side_by_side = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweeper.n_jobs=2"]
    text = run(
        project, "-m", "+sweep=optuna_pareto", "stage=train", *ONE_FOLD, *side_by_side, "hydra.sweeper.n_trials=4",
        "hydra/sweeper/sampler=nsgaii",
    )  # fmt: skip
    assert "sweep: 4 trials x 1 folds = 4 fits, no past run to estimate from" in text
    trials = trials_of(project)
    assert [len(trial.values or []) for trial in trials] == [2] * 4
    assert re.search(r"best: trial \d, objective 0\.\d+, seconds ", text)
    for number in range(4):
        assert (project.folder / f"sweeps/baseline/{number}/model/fold0/weights.safetensors").is_file()
    assert not (project.folder / "model").exists()


def test_pairs_are_tried_together_and_must_have_equal_length(project: Project) -> None:
    pairs = ["-m", "+sweep=pairs", "stage=train", "mlflow=off", "fold.index=0,1"]
    run(project, *pairs, "train.learning_rate=0.001,0.002")
    folds = [(project.folder / f"model/fold{index}/config.yaml").read_text() for index in (0, 1)]
    assert ["learning_rate: 0.001" in folds[0], "learning_rate: 0.002" in folds[1]] == [True, True]
    text = run(project, *pairs, "train.learning_rate=0.001,0.002,0.003", code=2)
    assert "all swept settings must have as many values, have: fold.index 2, train.learning_rate 3" in text


@pytest.mark.slow
def test_repeated_grid_skips_finished_trials_and_logs_their_runs(project: Project) -> None:
    grid = ["-m", "stage=train", "fold.index=0,1", "train.loss=dice,bce", "paths.trained=models/${train.loss}"]
    text = run(project, *grid)
    assert "sweep: 4 trials x 1 folds = 4 fits, no past run to estimate from" in text
    first = project.only(level="sweep").data.tags
    assert "fold.index" not in first["best_command"]
    assert first["best_command"] in text
    figures = {"figures/parallel_coordinates.png", "figures/importance.png"}
    assert project.artifacts(project.only(level="sweep")) == figures
    ids = {run.info.run_id for run in project.runs(level="trial")}

    (project.folder / "models/bce/model/fold1/history.csv").write_text("spoilt")
    text = run(project, *grid, "mlflow.skip_finished=true")
    assert re.search(r"sweep: 4 trials x 1 folds = 4 fits, about \d+ s one after the other", text)
    skipped = re.findall(r"train\.fold[01] is skipped: run (\w+) of baseline", text)
    assert len(skipped) == 3
    assert set(skipped) <= ids
    assert "train.fold1 runs again: outputs models/bce/model/fold1 is changed" in text
    second = project.runs(level="sweep")[-1]
    trials = [run for run in project.runs(level="trial") if run.data.tags["mlflow.parentRunId"] == second.info.run_id]
    assert {run.data.tags.get("reused_from") for run in trials} == {None, *skipped}
    assert (
        second.data.metrics["sweep/best_objective"]
        == project.runs(level="sweep")[0].data.metrics["sweep/best_objective"]
    )


@pytest.mark.slow
def test_stage_is_skipped_only_while_settings_inputs_and_outputs_are_the_same(project: Project) -> None:
    again = ["stage=prepare", "mlflow=off", "mlflow.skip_finished=true"]
    text = run(project, *again)
    assert "prepare is skipped: of baseline, finished 20" in text
    assert "prepare FINISHED" not in text
    assert "prepare runs again: config seed is changed" in run(project, *again, "seed=7")
    (project.folder / "prepared/kfold.json").unlink()
    assert "prepare runs again: outputs prepared/kfold.json is missing" in run(project, *again, "seed=7")
    with (project.folder / "preprocess/dataset.csv").open("a") as file:
        file.write("\n")
    assert "prepare runs again: inputs preprocess is changed" in run(project, *again, "seed=7")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-m", "+sweep=optuna", "stage=prepare"], 2, "stage: must be train for sweep=optuna, is prepare"),
        (["-m", "+sweep=optuna", "stage=evaluate"], 2, "test cases choose no setting"),
        (["+sweep=optuna", "stage=train"], 2, "a sweep is many jobs; add -m to the command"),
        ([*STUDY, "train.lerning_rate=choice(1,2)"], 2, "train.lerning_rate: unknown key"),
        ([*STUDY, "hydra.sweeper.params=null"], 2, "hydra.sweeper.params: must name a setting to search"),
        ([*STUDY, "+hydra.sweeper.objectives.test=maximize"], 2, "must be objective or seconds"),
        ([*STUDY, "hydra.sweeper.storage=mysql://x/y"], 2, "must be sqlite:///FILE or postgresql://"),
        ([*STUDY, "hydra.sweeper.storage=sqlite:///absent/optuna.db"], 1, "cannot be used"),
        ([*STUDY, "paths.root=elsewhere"], 1, "-m stage=fetch,preprocess,prepare paths.root=elsewhere"),
        (["-m", "+sweep=optun", "stage=train"], 2, "did you mean sweep=optuna?"),
    ],
)
def test_impossible_searches_are_refused_with_a_message(
    prepared: Project, arguments: list[str], code: int, message: str
) -> None:
    text = run(prepared, *arguments, "mlflow=off", code=code)
    assert message in text


@pytest.mark.slow
def test_study_with_other_settings_or_data_is_refused(project: Project) -> None:
    sweep = [*STUDY, *ONE_FOLD, "hydra.sweeper.n_trials=1"]
    run(project, *sweep)
    text = run(project, *sweep, "train.batch_size=4", code=2)
    assert "study baseline in sqlite:///" in text
    assert "train.batch_size: 8 -> 4" in text
    assert "hydra.sweeper.study_name=NAME" in text
    run(project, *sweep, "train.batch_size=4", "hydra.sweeper.study_name=smaller")
    assert [trial.state.name for trial in trials_of(project, "smaller")] == ["COMPLETE"]


@pytest.mark.slow
def test_search_without_a_finished_trial_ends_with_1_and_the_reason(project: Project) -> None:
    text = run(project, *STUDY, *ONE_FOLD, "hydra.sweeper.n_trials=2", "train.batch_size=choice(0)", code=1)
    assert (
        "none of the 2 trials of study baseline has finished; the last: train.batch_size: must be from 1 to 4096"
        in text
    )


SMALLER = {
    "demo": [],
    "gpu": [],
    "quickstart": [],
    "tiny": [],
    "volumetric": ["model.strides=[[1,2,2]]", "model.num_slices=4", "train.batch_size=2"],
    "zones": [],
}


def test_every_experiment_is_in_the_test_below() -> None:
    assert set(SMALLER) == {path.stem for path in (ROOT / "configs/experiment").glob("*.yaml")}


@pytest.mark.slow
@pytest.mark.parametrize("experiment", SMALLER)
def test_experiment_runs(project: Project, experiment: str) -> None:
    chain = ["-m", "stage=preprocess,prepare,train,evaluate", f"experiment={experiment}", "mlflow=off"]
    text = run(project, *chain, *SMALLER[experiment])
    assert "evaluate FINISHED" in text


@pytest.mark.slow
def test_eight_workers_complete_a_study_on_servers_after_one_is_killed(project: Project) -> None:
    """One MLflow server and one study, both in Postgres, and two workspaces; no trial is lost or duplicated."""
    reason = why_no_postgres()
    if reason is not None:
        pytest.skip(f"no Postgres here: {reason}")
    num_workers, num_trials = 8, 32 if HARD_USE else 8
    shortest = ["fold.index=0", "train.max_epochs=1", "train.steps_per_epoch=1", "hydra/sweeper/pruner=none"]
    with (
        postgres_server("study", "mlflow") as databases,
        mlflow_server(project.folder / "server", store=databases["mlflow"], num_workers=2) as address,
    ):
        environment = {"MLFLOW_TRACKING_URI": address, "OPTUNA_STORAGE": databases["study"], "OMP_NUM_THREADS": "1"}
        sweep = [*STUDY, *shortest, "mlflow=server", f"hydra.sweeper.n_trials={num_trials}"]
        machines = (project, copy_of(project, project.folder.with_name("elsewhere")))
        workers = [machine.start(*sweep, **environment) for machine in machines * (num_workers // 2)]
        storage = optuna.storages.RDBStorage(databases["study"])
        owner = until(lambda: owner_of_a_later_trial(storage), 200)
        (victim,) = (worker for worker in workers if str(worker.pid) == owner["process.pid"])
        victim.kill()
        for worker in workers:
            text, _ = worker.communicate(timeout=500)
            assert worker.returncode == (-9 if worker is victim else 0), text

        trials = list(latest_attempts(study_in(storage)).values())
        assert [trial.user_attrs["reason"] for trial in trials if "reason" in trial.user_attrs] == []
        assert [trial.state.name for trial in trials] == ["COMPLETE"] * num_trials
        client = MlflowClient(tracking_uri=address)
        experiment = client.get_experiment_by_name("prostate_seg")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id], "tags.level = 'trial'", max_results=1000)
        finished = {run.info.run_name: run for run in runs if run.info.status == "FINISHED"}
        assert finished.keys() == {f"trial {original_number(trial)}" for trial in trials}
        assert len(runs) - len(finished) <= 1  # the trial of the killed worker
        for trial in trials:
            assert finished[f"trial {original_number(trial)}"].data.metrics["objective"] == pytest.approx(trial.value)
        (sweep_run,) = client.search_runs([experiment.experiment_id], "tags.level = 'sweep'")
        assert sweep_run.info.status == "FINISHED"


def study_in(storage: optuna.storages.RDBStorage) -> optuna.Study:
    return optuna.load_study(study_name="baseline", storage=storage)


def owner_of_a_later_trial(storage: optuna.storages.RDBStorage) -> dict[str, str] | None:
    """Return the owner of a running trial, once another trial is complete."""
    if "baseline" not in optuna.study.get_all_study_names(storage):
        return None
    trials = study_in(storage).trials
    owners = [trial.user_attrs.get("owner") for trial in trials if trial.state.name == "RUNNING"]
    return next(filter(None, owners), None) if any(trial.state.name == "COMPLETE" for trial in trials) else None
