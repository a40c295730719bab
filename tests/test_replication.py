"""Replication sends every record in order and exactly once, also if it is killed after any call."""

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from prostate_seg.common.errors import InputError
from prostate_seg.config.schema import Config, parse
from prostate_seg.config.workspace import StageResult, workspace_of
from prostate_seg.operations.job import Job, Outcome
from prostate_seg.provenance import ds_version
from prostate_seg.provenance.ds_version import LOCAL_ID
from prostate_seg.tracking import replication, sweeps
from prostate_seg.tracking.journal import journal_folders, pending_journals, read_lines
from prostate_seg.tracking.recorded_runs import open_tree
from prostate_seg.tracking.store.run_tree import DESCRIPTION, KEY, RunTree
from prostate_seg.tracking.sync import SyncedJournal, sync
from prostate_seg.tracking.tracked_run import TrackedRun
from tests.conftest import composed

UNREACHABLE = "http://127.0.0.1:9"
WRITES = ("create_run", "log_batch", "log_artifacts", "log_inputs", "set_terminated", "update_run", "set_tag")


class Killed(BaseException):
    """Simulates `kill -9`: no code under test catches it."""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store") / "mlflow.db"


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Config:
    """Config of a training without its store, in its own folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(replication, "SECONDS_BETWEEN_TRIES", 0.01)
    mlflow = [
        f"mlflow.tracking_uri={UNREACHABLE}",
        "mlflow.on_unreachable=journal",
        f"mlflow.experiment={request.node.name}",
    ]
    return parse(composed("stage=train", *mlflow))


def train(cfg: Config, *, name: str = "train") -> None:
    """Record a training of one fold as the callback does; its input is the output of prepare."""
    cfg, folder = replace(cfg, stage=name), Path(cfg.paths.root)
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "weights").write_text("w")
    (folder / "curve.png").write_text("a picture")
    job = Job(overrides=("seed=1",), output_dir=folder, hydra_dir=".hydra", sweep_folder=None, number=None)
    run = TrackedRun(cfg, workspace_of(cfg), job)
    with run.open_fold(0) as fold:
        for epoch in (1, 2, 3):
            fold.on_epoch_end(epoch, {"val/dice": epoch / 10, "train/loss": float("nan")})
        fold.finish({"val/best_dice": 0.3}, [folder / "curve.png"])
    inputs = [path for path in (folder / "prepare", folder / "curve.png") if path.exists() and path.name != name]
    run.finish(
        StageResult(outputs=[folder / name], inputs=inputs, metrics={"val/best_dice": 0.3}, description="Dice 0.3")
    )
    run.close(Outcome.finished)


def send(cfg: Config, database: Path) -> list[SyncedJournal]:
    settings = replace(cfg.mlflow, tracking_uri=f"sqlite:///{database}")
    journals = Path(cfg.paths.journal)
    return sync(settings, journals, workspace=workspace_of(cfg), any_address=True, draw=draw_nothing)


def draw_nothing(folder: Path, _: object) -> None:
    (folder / "trials.png").write_text("a picture")


def tree_of(cfg: Config, database: Path, *, experiment: str | None = None) -> RunTree:
    settings = replace(cfg.mlflow, tracking_uri=f"sqlite:///{database}", experiment=experiment or cfg.mlflow.experiment)
    return open_tree(settings, cache=workspace_of(cfg).cache)


def content(tree: RunTree) -> dict[str, Any]:
    """Return the content of a store, without its ids and the time of replication."""
    runs = {str(run.info.run_id): run for run in tree.search()}
    return {
        f"{run.data.tags['level']} {run.info.run_name} {run.data.tags[KEY]}": {
            "status": run.info.status,
            "times": (run.info.start_time, run.info.end_time) if run.data.tags["level"] != "pipeline" else None,
            "parent": getattr(runs.get(run.data.tags.get("mlflow.parentRunId", "")), "info", None)
            and runs[run.data.tags["mlflow.parentRunId"]].info.run_name,
            "params": run.data.params,
            "tags": {key: value for key, value in run.data.tags.items() if not key.startswith(("process", "mlflow"))},
            "points": {name: points(tree.client, run, name) for name in run.data.metrics},
            "inputs": sorted(one.dataset.name for one in run.inputs.dataset_inputs),
            "artifacts": sorted(files(tree.client, run)),
        }
        for run in runs.values()
    }


def points(client: MlflowClient, run: Run, name: str) -> list[tuple[int, int, str]]:
    return [(one.step, one.timestamp, str(one.value)) for one in client.get_metric_history(run.info.run_id, name)]


def files(client: MlflowClient, run: Run, folder: str | None = None) -> Iterator[str]:
    for info in client.list_artifacts(run.info.run_id, folder):
        yield from files(client, run, info.path) if info.is_dir else [info.path]


def fail_after(monkeypatch: pytest.MonkeyPatch, is_due: Callable[[], bool], error: BaseException) -> None:
    """Raise after writing calls if `due`: the store has executed the call, and its response is lost."""
    for name in WRITES:
        original = getattr(MlflowClient, name)

        def call(self: MlflowClient, *arguments: Any, original: Any = original, **keywords: Any) -> Any:
            answer = original(self, *arguments, **keywords)
            if is_due():
                raise error
            return answer

        monkeypatch.setattr(MlflowClient, name, call)


def test_training_without_its_store_is_recorded_on_disk_and_then_replicated(cfg: Config, database: Path) -> None:
    train(cfg)
    entry = ds_version.read_entries(workspace_of(cfg))["train"]
    assert LOCAL_ID.fullmatch(entry["run_id"])
    (found,) = pending_journals(Path(cfg.paths.journal))
    assert (found.what, found.address) == ("train of baseline", UNREACHABLE)
    logged = [line["metrics"] for line in read_lines(found.folder / "records.jsonl") if line.get("metrics")]
    (sent,) = send(cfg, database)
    assert sent.reason == ""
    assert pending_journals(Path(cfg.paths.journal)) == []
    tree = tree_of(cfg, database)
    (pipeline,) = tree.search({"level": "pipeline"})
    (stage,) = tree.search({"level": "stage"})
    (fold,) = tree.search({"level": "fold"})
    assert [run.info.status for run in (pipeline, stage, fold)] == ["FINISHED"] * 3
    assert stage.data.tags["mlflow.parentRunId"] == pipeline.info.run_id
    assert fold.data.tags["mlflow.parentRunId"] == stage.info.run_id
    dice = points(tree.client, fold, "val/dice")
    assert [(step, value) for step, _, value in dice] == [(1, "0.1"), (2, "0.2"), (3, "0.3")]
    assert [stamp for _, stamp, _ in dice] == [metrics[0][2] for metrics in logged[:3]]
    assert [value for _, _, value in points(tree.client, fold, "train/loss")] == ["nan"] * 3
    assert fold.data.params == stage.data.params
    assert pipeline.data.metrics == {"val/best_dice": 0.3}
    assert {run.data.tags[DESCRIPTION] for run in (pipeline, stage)} == {"Dice 0.3"}
    assert set(files(tree.client, fold)) == {"figures/curve.png"}
    assert {"config.yaml", "packages.txt", "provenance.json"} <= set(files(tree.client, stage))
    assert [one.dataset.name for one in stage.inputs.dataset_inputs] == ["curve.png"]
    assert stage.info.end_time < fold.info.end_time + 60_000
    now = ds_version.read_entries(workspace_of(cfg))["train"]
    assert (now["run_id"], now["pipeline_run_id"]) == (stage.info.run_id, pipeline.info.run_id)
    by_old_id = tree.get(entry["run_id"])
    assert by_old_id is not None
    assert by_old_id.info.run_id == stage.info.run_id


def test_second_sync_sends_nothing(cfg: Config, database: Path) -> None:
    train(cfg)
    assert len(send(cfg, database)) == 1
    before = content(tree_of(cfg, database))
    assert send(cfg, database) == []
    assert content(tree_of(cfg, database)) == before


def test_sync_killed_after_any_call_replicates_every_record_once(
    cfg: Config, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(cfg)
    kept = shutil.copytree(cfg.paths.journal, tmp_path / "kept")
    send(cfg, database)
    whole = content(tree_of(cfg, database))
    num_calls, kills = 0, 0
    while True:
        num_calls += 1
        experiment = f"killed after {num_calls} calls"
        shutil.copytree(kept, cfg.paths.journal, dirs_exist_ok=True)
        for path in Path(cfg.paths.journal).glob("*/records.jsonl"):
            path.write_text(path.read_text().replace(cfg.mlflow.experiment, experiment))
        left = iter(range(num_calls - 1))
        with monkeypatch.context() as patched:
            fail_after(patched, lambda left=left: next(left, None) is None, Killed())  # type: ignore[misc]
            try:
                send(cfg, database)
            except Killed:
                kills += 1
                send_again = True
            else:
                send_again = False
        if send_again:
            send(cfg, database)
        assert content(tree_of(cfg, database, experiment=experiment)) == whole, experiment
        if not send_again:
            break
    assert kills > 15


def test_store_with_lost_responses_has_every_record_once(
    cfg: Config, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = replace(cfg, mlflow=replace(cfg.mlflow, tracking_uri=f"sqlite:///{database}"))
    rng = random.Random(0)
    open_tree(here.mlflow, cache=workspace_of(here).cache)
    with monkeypatch.context() as patched:
        fail_after(patched, lambda: rng.random() < 0.2, ConnectionError("the answer was lost"))
        train(here)
    assert pending_journals(Path(cfg.paths.journal)) == []
    tree = tree_of(cfg, database)
    (fold,) = tree.search({"level": "fold"})
    assert [step for step, _, _ in points(tree.client, fold, "val/dice")] == [1, 2, 3]
    assert [run.info.status for run in tree.search()] == ["FINISHED"] * 3


def test_stages_of_two_syncs_are_linked_by_lineage(cfg: Config, database: Path) -> None:
    train(cfg, name="prepare")
    train(cfg)
    assert [one.reason for one in send(cfg, database)] == ["", ""]
    tree = tree_of(cfg, database)
    prepare, stage = tree.search({"level": "stage"})
    assert stage.data.tags["previous_run_id.prepare"] == prepare.info.run_id
    entries = ds_version.read_entries(workspace_of(cfg))
    assert entries["train"]["upstream"]["prepare"]["run_id"] == prepare.info.run_id
    assert stage.data.tags["mlflow.parentRunId"] == prepare.data.tags["mlflow.parentRunId"]


def test_later_run_supersedes_the_earlier_one_in_either_order_of_replication(
    cfg: Config, database: Path, tmp_path: Path
) -> None:
    train(cfg)
    first = shutil.move(cfg.paths.journal, tmp_path / "first")
    train(cfg)
    send(cfg, database)
    tree = tree_of(cfg, database)
    (later,) = tree.search({"level": "stage"})
    (pipeline,) = tree.search({"level": "pipeline"})
    shutil.rmtree(cfg.paths.journal)
    shutil.move(first, cfg.paths.journal)
    assert send(cfg, database)[0].reason == ""
    assert [run.info.run_id for run in tree.search({"level": "stage"})] == [later.info.run_id]
    assert len(tree.search({"level": "fold"})) == 1
    assert tree.client.get_run(pipeline.info.run_id).info.end_time == pipeline.info.end_time


def test_run_of_a_killed_process_ends_as_killed(cfg: Config, database: Path) -> None:
    train(cfg)
    (folder,) = (found.folder for found in pending_journals(Path(cfg.paths.journal)))
    lines = (folder / "records.jsonl").read_text().splitlines(keepends=True)
    epoch_2 = next(index for index, line in enumerate(lines) if '"val/dice",0.2' in line)
    (folder / "records.jsonl").write_text("".join(lines[: epoch_2 + 1]) + '{"do": "log", "ru')  # truncated by the kill
    send(cfg, database)
    tree = tree_of(cfg, database)
    assert {run.info.run_name: run.info.status for run in tree.search()} == dict.fromkeys(
        ("baseline", "train", "fold0"), "KILLED"
    )
    (fold,) = tree.search({"level": "fold"})
    assert [step for step, _, _ in points(tree.client, fold, "val/dice")] == [1, 2]


def test_sweep_without_its_store_is_replicated_as_a_sweep(cfg: Config, database: Path, tmp_path: Path) -> None:
    place = tmp_path / "grid"
    sweeps.begin_multirun(cfg, place, is_sweep=True)
    for number, rate in enumerate((0.001, 0.002)):
        trial = replace(cfg, train=replace(cfg.train, learning_rate=rate))
        words = ("stage=train", f"train.learning_rate={rate}")
        job = Job(overrides=words, output_dir=tmp_path, hydra_dir=".hydra", sweep_folder=place, number=number)
        run = TrackedRun(trial, workspace_of(trial), job)
        run.finish(StageResult(objectives={"objective": rate}))
        run.close(Outcome.finished)
    assert sweeps.end_multirun(cfg, place, draw=draw_nothing) is None
    for found in pending_journals(Path(cfg.paths.journal))[:1]:
        shutil.move(found.folder, tmp_path / found.folder.name)  # the start of the sweep is sent last
    assert [sent.reason for sent in send(cfg, database)] == [""] * 3
    shutil.move(next(tmp_path.glob("*_multirun_*")), cfg.paths.journal)
    assert [sent.reason for sent in send(cfg, database)] == [""]
    tree = tree_of(cfg, database)
    (sweep,) = tree.search({"level": "sweep"})
    trials = tree.search({"level": "trial"})
    assert (sweep.info.run_name, sweep.info.status) == ("sweep/grid", "FINISHED")
    assert [(run.info.run_name, run.data.tags["trial.state"]) for run in trials] == [
        ("trial 0", "finished"),
        ("trial 1", "finished"),
    ]
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {sweep.info.run_id}
    assert sweep.data.tags["best_run_id"] == trials[1].info.run_id
    assert sweep.data.tags["best_command"] == "python -m prostate_seg stage=train train.learning_rate=0.002"
    assert {run.info.status for run in tree.search()} == {"FINISHED"}


def test_sweep_of_a_stage_that_needs_its_store_fails_at_once(cfg: Config, tmp_path: Path) -> None:
    strict = replace(cfg, mlflow=replace(cfg.mlflow, on_unreachable="fail"))
    with pytest.raises(InputError, match=r"the tracking store http://127.0.0.1:9 cannot be used"):
        sweeps.begin_multirun(strict, tmp_path / "grid", is_sweep=True)
    job = Job(overrides=(), output_dir=tmp_path, hydra_dir=".hydra", sweep_folder=None, number=None)
    with pytest.raises(InputError, match=r"the tracking store http://127.0.0.1:9 cannot be used"):
        TrackedRun(strict, workspace_of(strict), job)
    assert journal_folders(Path(cfg.paths.journal)) == []


def test_no_planted_secret_is_stored_or_sent(
    cfg: Config, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "planted-token-0123456789")
    address = "http://ann:planted-password@127.0.0.1:9/?token=planted-query"
    secret = replace(cfg, mlflow=replace(cfg.mlflow, tracking_uri=address, name="planted"))
    words = ("stage=train", "data.exclude=[planted-token-0123456789]", f"mlflow.tracking_uri={address}")
    (tmp_path / "prostate_seg.log").write_text("used planted-token-0123456789")
    (tmp_path / "table.csv").write_text("password: planted-in-a-table\n")
    job = Job(overrides=words, output_dir=tmp_path, hydra_dir=".hydra", sweep_folder=None, number=None)
    run = TrackedRun(secret, workspace_of(secret), job)
    run.finish(StageResult(tables=[tmp_path / "table.csv"]))
    run.close(Outcome.failed, RuntimeError(f"{address} said planted-token-0123456789"))
    kept = {path: path.read_bytes() for path in Path(cfg.paths.journal).rglob("*") if path.is_file()}
    assert {"records.jsonl", "prostate_seg.log", "table.csv", "config.yaml"} <= {path.name for path in kept}
    assert not [path for path, content in kept.items() if b"planted-" in content]
    (sent,) = send(cfg, database)
    assert sent.journal.address == "http://127.0.0.1:9/"
    (stage,) = tree_of(cfg, database).search({"level": "stage"})
    (tmp_path / "shown").mkdir()
    tree_of(cfg, database).client.download_artifacts(stage.info.run_id, "", str(tmp_path / "shown"))
    assert "planted-" not in f"{stage.data.tags} {stage.data.params}"
    texts = [path.read_bytes() for path in (tmp_path / "shown").rglob("*") if path.is_file()]
    assert len(texts) > 3
    assert not [text for text in texts if b"planted-" in text]


def test_journal_of_a_running_stage_is_skipped(cfg: Config, database: Path) -> None:
    job = Job(overrides=(), output_dir=Path(), hydra_dir=".hydra", sweep_folder=None, number=None)
    run = TrackedRun(cfg, workspace_of(cfg), job)
    (sent,) = send(cfg, database)
    assert sent.reason == "is still being written or sent by another process"
    run.close(Outcome.failed)
    (sent,) = send(cfg, database)
    assert sent.reason == ""


def test_records_for_another_address_are_kept_for_it(cfg: Config, database: Path) -> None:
    train(cfg)
    settings = replace(cfg.mlflow, tracking_uri=f"sqlite:///{database}")
    arguments = {"workspace": workspace_of(cfg), "draw": draw_nothing}
    (sent,) = sync(settings, Path(cfg.paths.journal), any_address=False, **arguments)  # type: ignore[arg-type]
    assert sent.reason == f"is meant for {UNREACHABLE}; sync.any_address=true sends it here"
    assert len(pending_journals(Path(cfg.paths.journal))) == 1
