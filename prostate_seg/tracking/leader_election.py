"""How processes that share a server, but no lock, take one and the same pipeline or sweep when each has just made one.

A param of a run can be written once and never changed, whoever asks first: a run is used by all only after `agreed` was written
to it as yes, and goes away only after it was written as no. So none is taken that another process then deletes.
"""

import time
from collections.abc import Callable, Sequence

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

AGREED = "agreed"
YES, NO = "yes", "no"
SECONDS_TO_AGREE = 1.0
"""After a run has been made: longer than others take from looking for one to making one."""
OLD_MS = 60_000
"""A run from before this needs no agreement; those of earlier versions do not say that there was one."""


def agree(
    client: MlflowClient, begun: Sequence[Run], mine: Run | None, look: Callable[[], Sequence[Run]]
) -> Run | None:
    """Return the run that all take: one that others have agreed on, or else the first one made.

    Args:
        client: Asks the server.
        begun: The runs that there are, newest first.
        mine: The one that this process has made because there were none; it is deleted unless it is taken.
        look: Finds them again.

    Returns:
        None where each that was found has been deleted since.

    Raises:
        MlflowException: If the server fails.
    """
    if not any(_is_settled(run) for run in begun):
        time.sleep(SECONDS_TO_AGREE)
        begun = look()
    settled = [run for run in begun if _is_settled(run)]
    taken = next((run for run in (*settled, *reversed(begun)) if decide(client, run, YES)), None)
    if mine is not None and taken is not None and taken.info.run_id != mine.info.run_id and decide(client, mine, NO):
        client.set_tag(mine.info.run_id, "superseded_by", taken.info.run_id)
        client.delete_run(mine.info.run_id)
    return taken


def preferred(begun: Sequence[Run]) -> Run | None:
    """Return the one of some runs, newest first, that was agreed on; on a server of this process alone the newest."""
    agreed = (run for run in begun if run.data.params.get(AGREED) == YES)
    return next(iter((*agreed, *begun)), None)


def decide(client: MlflowClient, run: Run, decision: str) -> bool:
    """Return whether a run is used (YES) or goes away (NO) as this process would have it; the first to say so decides."""
    if AGREED in run.data.params:
        return bool(run.data.params[AGREED] == decision)
    try:
        client.log_param(run.info.run_id, AGREED, decision)
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        return False  # the other was written just now, or the run is deleted
    return True


def _is_settled(run: Run) -> bool:
    return run.data.params.get(AGREED) == YES or time.time() * 1000 - run.info.start_time > OLD_MS
