"""Sends what waits in the spool: folder by folder, oldest first, each record in order and once.

A sync that is killed goes on where it was: what was delivered is noted record by record, and the one record of which nobody
knows is told in a way that does no harm twice (see delivery).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import Timeout

from prostate_seg.common.address import resolved_uri, shown_address
from prostate_seg.common.errors import InputError
from prostate_seg.config.schema import MlflowConfig
from prostate_seg.config.workspace import Workspace
from prostate_seg.operations.job import Outcome
from prostate_seg.provenance import ds_version
from prostate_seg.tracking.journal import DELIVERED, RECORDS, Spool, Waiting, as_one, waiting
from prostate_seg.tracking.recorded_runs import open_tree
from prostate_seg.tracking.replication import Delivery
from prostate_seg.tracking.run_tree import RunTree
from prostate_seg.tracking.store import STORE_ERRORS, unusable
from prostate_seg.tracking.sweeps import Draw

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What became of one folder."""

    waiting: Waiting
    run_id: str | None = None
    """The store's id of the run, where the folder has one."""
    why_not: str = ""
    """Why it still waits; empty when all of it was taken."""
    is_refused: bool = False
    """Whether the store will never take some of it."""


def sync(
    settings: MlflowConfig, spool_root: Path, *, workspace: Workspace, any_address: bool, draw: Draw
) -> list[Sent]:
    """Send what waits for the store of these settings.

    Args:
        settings: Which store.
        spool_root: The spool.
        workspace: Of this command.
        any_address: Whether to send too what was meant for a store with another address.
        draw: Draws figures of the trials of a sweep.

    Raises:
        InputError: If the store cannot be reached, or fails; what it has taken by then is not sent again.
    """
    here = shown_address(resolved_uri(str(settings.tracking_uri)))
    trees: dict[str, RunTree] = {}

    def tree_of(experiment: str) -> RunTree:
        if experiment not in trees:
            trees[experiment] = open_tree(replace(settings, experiment=experiment), cache=workspace.cache)
        return trees[experiment]

    return [
        _send(found, tree_of, draw=draw)
        if found.address == here or any_address
        else Sent(waiting=found, why_not=f"is meant for {found.address}; sync.any_address=true sends it here")
        for found in waiting(spool_root)
    ]


def _send(found: Waiting, tree_of: Callable[[str], RunTree], *, draw: Draw) -> Sent:
    """Send one folder, and delete it once all of it has been taken."""
    try:
        spool = Spool(found.folder)
    except Timeout:
        return Sent(waiting=found, why_not="is still being written or sent by another process")
    try:
        deliver_all(spool, tree_of, draw=draw)
    finally:
        spool.release()
    run_id = next((spool.ids.get(record["run"]) for _, record in spool.records() if record["do"] == "stage"), None)
    if spool.num_refused:
        why_not = f"has {spool.num_refused} records that the store refuses: see {DELIVERED}"
        return Sent(waiting=found, run_id=run_id, why_not=why_not, is_refused=True)
    if spool.header.workspace:
        root, cache = Path(spool.header.workspace), Path(spool.header.cache)
        ds_version.replace_ids(Workspace(root=root, data=root, cache=cache), spool.ids)
    spool.remove()
    return Sent(waiting=found, run_id=run_id)


def deliver_all(spool: Spool, tree_of: Callable[[str], RunTree], *, draw: Draw = lambda *_: None) -> Delivery:
    """Tell the store all that a folder still holds; return what has done so.

    Raises:
        InputError: If the store cannot be reached, or fails.
    """
    _end_what_was_killed(spool)
    delivery = Delivery(spool, lambda: tree_of(spool.header.experiment), again=True, draw=draw)
    left = ((number, record) for number, record in spool.records() if number > spool.num_delivered)
    try:
        for number, record in as_one(left):
            delivery.deliver(number, record)
    except STORE_ERRORS as error:
        raise InputError(
            f"{unusable(spool.header.address, error)}\nWhat it has taken is noted: stage=sync goes on after that."
        ) from error
    return delivery


def _end_what_was_killed(spool: Spool) -> None:
    """Let the runs of a process that could not end them end as KILLED, with its last record."""
    records = [record for _, record in spool.records()]
    opened = [record for record in records if record["do"] in ("stage", "fold")]
    ended = {record["run"] for record in records if record["do"] == "end"}
    last_ms = int((spool.folder / RECORDS).stat().st_mtime * 1000)
    for record in reversed(opened):
        if record["run"] in ended:
            continue
        end = {"run": record["run"], "status": Outcome.killed.value, "end_ms": last_ms}
        spool.put({"do": "end", **end})
        if record["do"] == "stage":
            nothing = {"metrics": [], "upstream": {}, "folds": [], "supersedes": False, "is_finished": False}
            state = {"pipeline_key": record["pipeline_key"], "trial_state": Outcome.killed.name}
            spool.put({"do": "place", **end, **nothing, **state})
