"""Replicates the journals that wait on disk: the oldest first, each record in order and once.

A sync that is killed continues where it stopped: each record is acknowledged on disk, and replication is idempotent.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from filelock import Timeout

from prostate_seg.common.address import resolved_uri, shown_address
from prostate_seg.config.schema import MlflowConfig
from prostate_seg.config.workspace import Workspace
from prostate_seg.operations.job import Outcome
from prostate_seg.provenance import ds_version
from prostate_seg.tracking.journal import ACKNOWLEDGED, RECORDS, Journal, PendingJournal, pending_journals
from prostate_seg.tracking.recorded_runs import open_tree
from prostate_seg.tracking.records import EndRun, OpenFold, OpenStage, SettleRun
from prostate_seg.tracking.replication import Replicator
from prostate_seg.tracking.store.connection import explained_errors
from prostate_seg.tracking.store.run_tree import RunTree
from prostate_seg.tracking.sweeps import Draw


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncedJournal:
    """Result for one journal."""

    journal: PendingJournal
    run_id: str | None = None
    """Id in the store of the stage's run, if the journal has one."""
    reason: str = ""
    """Why some of it still waits; empty when all of it was taken."""
    is_refused: bool = False
    """Whether the store will never take some of it."""


def sync(
    settings: MlflowConfig, journal_root: Path, *, workspace: Workspace, any_address: bool, draw: Draw
) -> list[SyncedJournal]:
    """Replicate the journals that wait for the store of these settings, or with `any_address` for whichever.

    Raises:
        InputError: If the store cannot be reached, or fails; a later sync continues there.
    """
    address = shown_address(resolved_uri(str(settings.tracking_uri)))

    @cache
    def tree_of(experiment: str) -> RunTree:
        return open_tree(replace(settings, experiment=experiment), cache=workspace.cache)

    synced = []
    for pending in pending_journals(journal_root):
        if pending.address != address and not any_address:
            reason = f"is meant for {pending.address}; sync.any_address=true sends it here"
            synced.append(SyncedJournal(journal=pending, reason=reason))
        else:
            synced.append(_sync_one(pending, tree_of, draw=draw))
    return synced


def _sync_one(pending: PendingJournal, tree_of: Callable[[str], RunTree], *, draw: Draw) -> SyncedJournal:
    """Replicate one journal, and delete it once the store has taken all of it."""
    try:
        journal = Journal(pending.folder)
    except Timeout:
        return SyncedJournal(journal=pending, reason="is still being written or sent by another process")
    try:
        replicate_all(journal, tree_of, draw=draw)
        opened = (record.run for record in journal.records() if isinstance(record, OpenStage))
        run_id = next((journal.ids.get(key) for key in opened), None)
    finally:
        journal.release()
    if journal.num_refused:
        reason = f"has {journal.num_refused} records that the store refuses: see {ACKNOWLEDGED}"
        return SyncedJournal(journal=pending, run_id=run_id, reason=reason, is_refused=True)
    if journal.header.workspace:
        root, cache = Path(journal.header.workspace), Path(journal.header.cache)
        ds_version.replace_ids(Workspace(root=root, data=root, cache=cache), journal.ids)
    journal.remove()
    return SyncedJournal(journal=pending, run_id=run_id)


def replicate_all(journal: Journal, tree_of: Callable[[str], RunTree], *, draw: Draw = lambda *_: None) -> Replicator:
    """Replicate all that a journal still holds, and return the replicator.

    Raises:
        InputError: If the store cannot be reached, or fails.
    """
    _end_killed_runs(journal)
    replicator = Replicator(journal, lambda: tree_of(journal.header.experiment), is_replay=True, draw=draw)
    note = "\nWhat it has taken is noted: stage=sync goes on after that."
    with explained_errors(journal.header.address, note=note):
        replicator.replicate()
    return replicator


def _end_killed_runs(journal: Journal) -> None:
    """End the runs of a process that was killed as KILLED, at the time of its last record."""
    records = journal.records()
    ended = {record.run for record in records if isinstance(record, EndRun)}
    last_ms = int((journal.folder / RECORDS).stat().st_mtime * 1000)
    for record in reversed(records):  # folds before their stage
        if not isinstance(record, OpenStage | OpenFold) or record.run in ended:
            continue
        journal.append(EndRun(run=record.run, status=Outcome.killed, end_ms=last_ms))
        if isinstance(record, OpenStage):
            journal.append(
                SettleRun(
                    run=record.run,
                    pipeline_key=record.pipeline_key,
                    status=Outcome.killed,
                    end_ms=last_ms,
                    trial_state=Outcome.killed.name,
                )
            )
