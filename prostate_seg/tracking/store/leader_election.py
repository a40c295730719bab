"""Leader election among processes that share a tracking server but no lock, and each created the same pipeline or sweep.

Candidates are runs. MLflow never changes a param once it is written, so the param `agreed` is a compare-and-set: a run is used
only after its claim `yes` was written, and deleted only after `no` was. No process uses a run that another one deletes.
"""

import time
from collections.abc import Callable, Sequence

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

CLAIM = "agreed"
YES, NO = "yes", "no"
SECONDS_TO_ELECT = 1.0
"""Wait after a candidate was created: longer than another process takes from its search to its own candidate."""
LEASE_MS = 60_000
"""A candidate older than this is elected without a claim; runs of earlier versions have none."""


def elect(
    client: MlflowClient, candidates: Sequence[Run], own: Run | None, search: Callable[[], list[Run]]
) -> Run | None:
    """Return the run that all processes use: the one already claimed, else the first that was created.

    Candidates are newest first. `own` is that of this process, created because there were none, and deleted unless it is
    elected; `search` finds the candidates again. None if each candidate has been deleted meanwhile.
    """
    if not any(_is_settled(run) for run in candidates):
        time.sleep(SECONDS_TO_ELECT)
        candidates = search()
    settled = [run for run in candidates if _is_settled(run)]
    leader = next((run for run in (*settled, *reversed(candidates)) if claim(client, run, YES)), None)
    if own is not None and leader is not None and leader.info.run_id != own.info.run_id and claim(client, own, NO):
        client.set_tag(own.info.run_id, "superseded_by", leader.info.run_id)
        client.delete_run(own.info.run_id)
    return leader


def claim(client: MlflowClient, run: Run, value: str) -> bool:
    """Write the claim of a run, to use it (YES) or to delete it (NO); return whether this value is the one that holds."""
    if CLAIM in run.data.params:
        return bool(run.data.params[CLAIM] == value)
    try:
        client.log_param(run.info.run_id, CLAIM, value)
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        return False  # another process wrote the other value first, or the run is deleted
    return True


def _is_settled(run: Run) -> bool:
    return run.data.params.get(CLAIM) == YES or time.time() * 1000 - run.info.start_time > LEASE_MS
