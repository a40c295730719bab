"""The outcome of a run follows from the error that ends it."""

import pytest

from prostate_seg.callback import StageTask
from prostate_seg.common.errors import Pruned
from prostate_seg.operations.job import NullRun, Outcome, command_of, outcome_of


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (KeyboardInterrupt(), Outcome.killed),
        (SystemExit(130), Outcome.killed),
        (SystemExit(143), Outcome.killed),
        (Pruned("hopeless"), Outcome.killed),
        (SystemExit(0), Outcome.failed),
        (SystemExit(1), Outcome.failed),
        (SystemExit("in words"), Outcome.failed),
        (ValueError("130"), Outcome.failed),
    ],
    ids=repr,
)
def test_only_signals_and_pruning_kill_a_run(error: BaseException, outcome: Outcome) -> None:
    assert outcome_of(error) is outcome


def test_command_of_a_job_excludes_the_sweep_and_is_quoted() -> None:
    overrides = ["train.loss=dice", "+sweep=optuna", "stage=train", "fold.index=1", "model.channels=[8,16]"]
    expected = "python -m prostate_seg stage=train train.loss=dice 'model.channels=[8,16]'"
    assert command_of(overrides, without=["fold.index"]) == expected


def test_run_that_hydra_left_open_is_closed_once_with_the_error_that_ended_it() -> None:
    ends: list[tuple[Outcome, BaseException | None]] = []

    class Open(NullRun):
        def close(self, outcome: Outcome, error: BaseException | None = None) -> None:
            ends.append((outcome, error))

    task = StageTask()
    task.run = Open()
    error = SystemExit(143)
    task.close(error)
    task.close(error)  # the second call closes nothing
    assert ends == [(Outcome.killed, error)]
