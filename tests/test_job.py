"""What becomes of a run follows from the error that ends it."""

import pytest

from prostate_seg.tracking.job import Outcome, outcome_of


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (KeyboardInterrupt(), Outcome.killed),
        (SystemExit(130), Outcome.killed),
        (SystemExit(143), Outcome.killed),
        (SystemExit(0), Outcome.failed),
        (SystemExit(1), Outcome.failed),
        (SystemExit("in words"), Outcome.failed),
        (ValueError("130"), Outcome.failed),
    ],
    ids=repr,
)
def test_only_signals_kill_a_run(error: BaseException, outcome: Outcome) -> None:
    assert outcome_of(error) is outcome
