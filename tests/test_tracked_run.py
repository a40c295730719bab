"""Values for MLflow are never truncated silently, names are valid, and refused records are retried or counted."""

from pathlib import Path
from typing import Any

import pytest

from prostate_seg.common.errors import InputError
from prostate_seg.config.schema import parse
from prostate_seg.config.workspace import StageResult, workspace_of
from prostate_seg.operations.job import Job, Outcome
from prostate_seg.tracking import replication, tracked_run
from prostate_seg.tracking.journal import pending_journals
from prostate_seg.tracking.records import LogData
from prostate_seg.tracking.tracked_run import MAX_PARAM_LENGTH, TrackedRun, _cut, _tag_key
from tests.conftest import composed


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store") / "mlflow.db"


@pytest.fixture
def training(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> TrackedRun:
    """The open run of a training, in a new experiment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(replication, "SECONDS_BETWEEN_TRIES", 0.01)
    store = [f"mlflow.tracking_uri=sqlite:///{database}", f"mlflow.experiment={request.node.name}"]
    cfg = parse(composed("stage=train", *store))
    job = Job(overrides=(), output_dir=tmp_path, hydra_dir=".hydra", sweep_folder=None, number=None)
    return TrackedRun(cfg, workspace_of(cfg), job)


def refuse_batches(training: TrackedRun, monkeypatch: pytest.MonkeyPatch, *, num_times: int) -> None:
    """Make the store accept runs, but refuse the next batches of params, tags and metrics."""
    client, refusals = training.replicator.tree.client, iter(range(num_times))
    log_batch = client.log_batch

    def sometimes(*arguments: Any, **keywords: Any) -> None:
        if next(refusals, None) is not None:
            raise ConnectionError("refused")
        log_batch(*arguments, **keywords)

    monkeypatch.setattr(client, "log_batch", sometimes)


def test_fold_whose_params_are_refused_at_first_has_one_complete_run(
    training: TrackedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_batches(training, monkeypatch, num_times=2)
    with training.open_fold(0) as fold:
        fold.on_epoch_end(1, {"val/dice": 0.5})
    training.close(Outcome.failed)
    (run,) = training.replicator.tree.children(training.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["fold.num_folds"] == "5"
    assert run.data.metrics == {"val/dice": 0.5}


def test_run_whose_output_cannot_be_hashed_has_failed(training: TrackedRun, tmp_path: Path) -> None:
    training.finish(StageResult(outputs=[tmp_path / "deleted meanwhile"]))
    with pytest.raises(InputError, match="deleted meanwhile: cannot be hashed"):
        training.close(Outcome.finished)
    run = training.replicator.tree.client.get_run(training.run_id)
    assert run.info.status == "FAILED"
    assert "deleted meanwhile: cannot be hashed" in run.data.tags["ended_by"]


def test_unacknowledged_records_stay_on_disk_and_the_stage_succeeds(
    training: TrackedRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracked_run, "SECONDS_TO_CLOSE", 0.1)
    refuse_batches(training, monkeypatch, num_times=10**9)
    with training.open_fold(0) as fold:
        fold.on_epoch_end(1, {"val/dice": 0.5})
    training.close(Outcome.failed)
    (found,) = pending_journals(Path(training.cfg.paths.journal))
    assert not found.is_locked
    assert caplog.messages[-1] == (
        f"{found.num_records} records of this run wait in {found.folder}; stage=sync sends them to {found.address}"
    )


def test_permanently_refused_record_does_not_block_others(
    training: TrackedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    with training.open_fold(0) as fold:
        training.journal.append(LogData(run=training.key, tags={"": "a tag without a name"}))
        fold.on_epoch_end(1, {"val/dice": 0.5})
    with pytest.raises(InputError, match=r"refuses 1 records of run .* see .*delivered.jsonl"):
        training.close(Outcome.failed)
    (run,) = training.replicator.tree.children(training.run_id)
    assert run.data.metrics == {"val/dice": 0.5}


def test_record_that_can_be_neither_sent_nor_stored_fails_the_stage(
    training: TrackedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracked_run, "SECONDS_TO_CLOSE", 0.1)
    refuse_batches(training, monkeypatch, num_times=10**9)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("prostate_seg.tracking.journal.os.write", full)
    with training.open_fold(0) as fold:
        fold.on_epoch_end(1, {"val/dice": 0.5})
    with pytest.raises(InputError, match=r"its files are in .*, but [1-9] records .* neither be sent nor kept"):
        training.close(Outcome.failed)


def test_long_value_is_replaced_by_where_it_is_recorded() -> None:
    assert _cut("x" * MAX_PARAM_LENGTH, MAX_PARAM_LENGTH) == "x" * MAX_PARAM_LENGTH
    assert _cut("x" * (MAX_PARAM_LENGTH + 1), MAX_PARAM_LENGTH) == "(6001 characters, see config.yaml and hydra/)"


def test_tag_keys_are_legal_and_distinct() -> None:
    assert _tag_key("md5.inputs/data/a b-1_2.nii.gz") == "md5.inputs/data/a b-1_2.nii.gz"
    assert _tag_key("md5.inputs/ü+(1)") == "md5.inputs/:fc::2b::28:1:29:"
    assert _tag_key("md5.inputs//site_a/model") == "md5.inputs/site_a/model"
    assert len(_tag_key("x" * 400)) <= 250
