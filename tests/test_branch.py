"""What goes to MLflow is never cut silently, every name is one that it takes, and what it refuses is sent again or counted."""

from pathlib import Path
from typing import Any

import pytest

from prostate_seg.config import parse
from prostate_seg.errors import InputError
from prostate_seg.tracking import branch, writer
from prostate_seg.tracking.branch import LONGEST_PARAM, Branch, _cut, _tag_key
from prostate_seg.tracking.job import Job, Outcome
from prostate_seg.tracking.stage_run import StageRun, open_stage_run
from prostate_seg.workspace import workspace_of
from tests.conftest import composed


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StageRun:
    """The open run of a training, in a store of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(writer, "SECONDS_BETWEEN_TRIES", 0.01)
    cfg = parse(composed("stage=train", f"mlflow.tracking_uri=sqlite:///{tmp_path}/mlflow.db"))
    job = Job(overrides=(), output_dir=tmp_path, hydra_dir=".hydra", sweep_folder=None, number=None)
    return open_stage_run(cfg, workspace_of(cfg), job)


def branch_of(training: StageRun) -> Branch:
    assert training.branch is not None
    return training.branch


def refuse_batches(training: StageRun, monkeypatch: pytest.MonkeyPatch, *, num_times: int) -> None:
    """Let the store take runs, but not the next so many batches of params, tags and metrics."""
    client, refusals = branch_of(training).tree.client, iter(range(num_times))
    log_batch = client.log_batch

    def sometimes(*arguments: Any, **keywords: Any) -> None:
        if next(refusals, None) is not None:
            raise ConnectionError("refused")
        log_batch(*arguments, **keywords)

    monkeypatch.setattr(client, "log_batch", sometimes)


def test_fold_whose_settings_are_refused_at_first_has_one_run_with_all(
    training: StageRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_batches(training, monkeypatch, num_times=2)
    with training.open_fold(0) as fold:
        fold.on_epoch_end(1, {"val/dice": 0.5})
    training.close(Outcome.failed)
    (run,) = branch_of(training).tree.children(branch_of(training).run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["fold.num_folds"] == "5"
    assert run.data.metrics == {"val/dice": 0.5}


def test_records_that_the_store_never_takes_are_counted_in_the_error(
    training: StageRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(branch, "SECONDS_TO_CLOSE", 0.1)
    refuse_batches(training, monkeypatch, num_times=10**9)
    with training.open_fold(0) as fold:
        fold.on_epoch_end(1, {"val/dice": 0.5})
    with pytest.raises(InputError, match=r"is not complete\n.*mlflow.db cannot be used: [1-9] records .* not taken"):
        training.close(Outcome.failed)


def test_long_value_is_replaced_by_where_it_stands() -> None:
    assert _cut("x" * LONGEST_PARAM, LONGEST_PARAM) == "x" * LONGEST_PARAM
    assert _cut("x" * (LONGEST_PARAM + 1), LONGEST_PARAM) == "(6001 characters, see config.yaml and hydra/)"


def test_tag_keys_are_legal_and_distinct() -> None:
    assert _tag_key("md5.inputs/data/a b-1_2.nii.gz") == "md5.inputs/data/a b-1_2.nii.gz"
    assert _tag_key("md5.inputs/ü+(1)") == "md5.inputs/:fc::2b::28:1:29:"
    assert len(_tag_key("x" * 400)) <= 250
