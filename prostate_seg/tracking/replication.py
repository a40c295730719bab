"""Replication of a journal into a tracking store: each record in order and once, for live runs, stage=sync and stage=bundle.

Replication is idempotent, because a call that failed may have succeeded on the server: a run is found by its key before it is
created, points of a curve that the store already has are left out, and everything else replaces itself.
"""

import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Run
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from prostate_seg.common.address import shown_address
from prostate_seg.common.errors import InputError, first_line
from prostate_seg.common.files import write_text
from prostate_seg.operations.process import HEARTBEAT_SECONDS, now_text
from prostate_seg.provenance.ds_version import LOCAL_ID
from prostate_seg.tracking import records, sweeps
from prostate_seg.tracking.journal import Journal, merge_metrics
from prostate_seg.tracking.records import NONE, Level, Record, TreePosition
from prostate_seg.tracking.store.connection import ABSENT, STORE_ERRORS
from prostate_seg.tracking.store.run_tree import (
    CLOSED_BY,
    CLUSTER_KEY,
    COPIED_FROM,
    DESCRIPTION,
    KEY,
    NUM_STARTS,
    PARENT,
    RunTree,
    is_deleted,
    position_of,
)

log = logging.getLogger(__name__)

REFUSALS = (*ABSENT, "INVALID_STATE")
"""Error codes of a store that will never take a record; every other error may be temporary."""
IS_COMPLETE = "bundle.is_whole"
"""Tag of a copied run once all of its records have been replicated."""
_ID = re.compile(r"\b(?:local-)?[0-9a-f]{32}\b")

SECONDS_BETWEEN_TRIES = 2.0
BYTES_PER_SECOND = 2**20
"""An upload slower than this counts as hanging, once the stage has ended."""


class Replicator:
    """Replicates one journal into one store. Any thread may call it; they take turns."""

    def __init__(
        self,
        journal: Journal,
        connect: Callable[[], RunTree],
        *,
        is_replay: bool = False,
        draw: sweeps.Draw = lambda *_: None,
    ) -> None:
        """Prepare the replication; with `is_replay`, another process may have replicated some of the records."""
        self.journal = journal
        self._connect = connect
        self._draw = draw
        self._is_replay = self._is_uncertain = is_replay  # whether the store may already have the next record
        self._turn = threading.Lock()
        self._curves: dict[tuple[str, str], set[tuple[str, int, float]]] = {}  # of uncertain curves, by run and name
        self.already_complete: set[str] = set()
        """Runs of a bundle that the store had before, complete or deleted."""

    @cached_property
    def tree(self) -> RunTree:
        """The store, opened when it is first needed."""
        return self._connect()

    def replicate(self, *, max_entries: int | None = None) -> None:
        """Apply the unacknowledged records of the journal to the store, in order, and acknowledge each.

        A record that the store refuses for good is noted in the journal and does not stop the others.

        Raises:
            STORE_ERRORS, InputError: If the store cannot be reached, or fails; a later call continues there.
        """
        for number, record in islice(merge_metrics(self.journal.unacknowledged()), max_entries):
            with self._turn:
                if number <= self.journal.num_acknowledged:  # by another thread, meanwhile
                    continue
                ids: Mapping[str, str] = {}
                refused = None
                try:
                    ids = self._apply(record)
                except BaseException as error:
                    if not isinstance(error, MlflowException) or error.error_code not in REFUSALS:
                        self._is_uncertain = True
                        self._curves.clear()
                        raise
                    refused = shown_address(first_line(error))
                    log.warning("the tracking store refuses a record of %s: %s", self.journal.header.what, refused)
                self._is_uncertain = self._is_replay
                self.journal.acknowledge(number, ids=ids, refused=refused)
                if isinstance(record, records.LogFiles):
                    shutil.rmtree(self._folder_of(record), ignore_errors=True)

    def id_of(self, key: str) -> str:
        """Return the store's id of a run; its local id until the store has given one."""
        return self.journal.ids.get(key, key)

    def heartbeat(self, key: str) -> None:
        """Update the heartbeat of a run, once it is in the store."""
        if key in self.journal.ids:
            self.tree.client.set_tag(self.id_of(key), "process.heartbeat", now_text())

    def _apply(self, record: Record) -> Mapping[str, str]:
        """Make the calls of one record; return the ids of the runs that it created."""
        if getattr(record, "run", None) in self.already_complete:
            return {}
        match record:
            case records.OpenStage():
                return self._open_stage(record)
            case records.OpenFold():
                return self._open_fold(record)
            case records.CopyRun():
                return self._copy_run(record)
            case records.LogData():
                self._log(record)
            case records.LogFiles():
                self._upload(record)
            case records.LogInputs():
                self.tree.client.log_inputs(self.id_of(record.run), _datasets(record.datasets))
            case records.EndRun():
                self._end(record)
            case records.EndCopy():
                self.tree.client.set_tag(self.id_of(record.run), IS_COMPLETE, "true")
                self.tree.client.set_terminated(self.id_of(record.run), record.status, record.end_ms)
            case records.SettleRun():
                self._settle(record)
            case records.BeginMultirun():
                with self.tree.store.lock:
                    if record.folder is None or self.tree.sweep(sweeps.sweep_key(Path(record.folder))) is None:
                        sweeps.begin(self.tree, record)  # a trial that was replicated earlier may have begun it
            case records.CompleteSweep():
                sweeps.complete(self.tree, Path(record.folder))
            case records.EndMultirun():
                sweeps.end(self.tree, Path(record.folder), draw=self._draw)
        return {}

    def _open_stage(self, record: records.OpenStage) -> Mapping[str, str]:
        """Close orphans, find or create the parents, and create the run, or resume that of a restarted cluster job."""
        tree = self.tree
        with tree.store.lock:
            run = tree.find(record.run)
            resumed = None
            if run is None and record.cluster_key is not None:
                resumed = tree.resume_cluster_job(record.cluster_key)  # before orphans: it may look like one
            for orphan in tree.close_orphans():
                log.info("closed as KILLED: run %s (%s)", orphan.info.run_id, orphan.info.run_name)
            name, key = record.pipeline, record.pipeline_key
            pipeline = tree.pipeline(name, fresh=record.fresh, key=key, start_ms=record.start_ms)
            sweep = tree.sweep(record.sweep_key) if record.sweep_key else None
            if sweep is None and record.sweep is not None:  # its own record waits in another journal
                sweep = sweeps.begin(tree, record.sweep)
            run = run or resumed or self._create_stage(record, sweep, parent_id=(sweep or pipeline).info.run_id)
            tree.reopen(pipeline)
        ids = {record.run: str(run.info.run_id), record.pipeline_key: str(pipeline.info.run_id)}
        return ids if resumed is None else {**ids, _resumed(str(run.info.run_id)): "yes"}

    def _create_stage(self, record: records.OpenStage, sweep: Run | None, *, parent_id: str) -> Run:
        """Create the run of a stage below its pipeline, or that of a trial below its sweep."""
        position = TreePosition(
            level=Level.stage if sweep is None else Level.trial,
            pipeline=record.pipeline,
            stage=record.stage,
            fold=record.fold,
            sweep=NONE if sweep is None else str(sweep.info.run_name),
        )
        name = record.stage if sweep is None else f"trial {record.number}"
        tags = {} if record.cluster_key is None else {CLUSTER_KEY: record.cluster_key, NUM_STARTS: "1"}
        return self.tree.create(
            name, position, parent_id=parent_id, tags=tags, start_ms=record.start_ms, key=record.run
        )

    def _open_fold(self, record: records.OpenFold) -> Mapping[str, str]:
        """Create the run of a fold, or resume that of the same fold in a restarted stage."""
        parent_id = self.id_of(record.parent)
        begun = next(iter(self.tree.children(parent_id, fold=record.fold)), None)
        if begun is None:
            position = position_of(self.tree.client.get_run(parent_id))
            position = position.model_copy(update={"level": Level.fold, "fold": record.fold})
            name, key = f"fold{record.fold}", record.run
            run = self.tree.create(name, position, parent_id=parent_id, start_ms=record.start_ms, key=key)
            return {record.run: str(run.info.run_id)}
        run_id = str(begun.info.run_id)
        if begun.data.tags.get(KEY) == record.run:
            return {record.run: run_id}
        self.tree.resume(begun)
        return {record.run: run_id, _resumed(run_id): "yes"}

    def _copy_run(self, record: records.CopyRun) -> Mapping[str, str]:
        """Create the copy of a run; the original, and a copy that is complete or deleted, stay as they are."""
        run = self.tree.find(record.run) or self.tree.get(record.run)
        if run is None:
            run = self.tree.create(
                record.name,
                record.position,
                parent_id=None if record.parent is None else self.id_of(record.parent),
                tags={COPIED_FROM: record.source},
                start_ms=record.start_ms,
                key=record.run,
            )
        elif is_deleted(run) or COPIED_FROM not in run.data.tags or run.data.tags.get(IS_COMPLETE) == "true":
            self.already_complete.add(record.run)
        if is_deleted(run):
            log.warning("%s", self.tree.how_to_restore(run))
        return {record.run: str(run.info.run_id), record.origin: str(run.info.run_id)}

    def _log(self, record: records.LogData) -> None:
        run_id = self.id_of(record.run)
        tags = {key: self._with_store_ids(value) for key, value in record.tags.items()}
        points = self._missing_points(run_id, [Metric(*point) for point in record.metrics])
        self.tree.log(run_id, params=record.params, tags=tags, points=points)

    def _missing_points(self, run_id: str, points: Sequence[Metric]) -> Sequence[Metric]:
        """Leave out the points that the store already has; its curves are read only if it may have some.

        Points are equal by step and time. In a resumed run also by step and value: training repeats the epochs after its
        last checkpoint.
        """
        is_resumed = _resumed(run_id) in self.journal.ids
        if not is_resumed and not self._is_uncertain:
            return points
        missing = []
        for point in points:
            if (run_id, point.key) not in self._curves:
                history = self.tree.client.get_metric_history(run_id, point.key)
                self._curves[run_id, point.key] = {fact for old in history for fact in _facts(old)}
            curve = self._curves[run_id, point.key]
            at_time, at_value = _facts(point)
            if at_time not in curve and not (is_resumed and at_value in curve):
                missing.append(point)
                curve |= {at_time, at_value}
        return missing

    def _upload(self, record: records.LogFiles) -> None:
        folder = self._folder_of(record)
        if not folder.is_dir():
            raise MlflowException(f"{folder} is gone", INVALID_PARAMETER_VALUE)
        provenance = folder / "provenance.json"
        if provenance.is_file():
            write_text(provenance, self._with_store_ids(provenance.read_text(encoding="utf-8")))
        self.tree.client.log_artifacts(self.id_of(record.run), str(folder), record.to)

    def _folder_of(self, record: records.LogFiles) -> Path:
        return self.journal.folder / record.folder  # an absolute path stays as it is

    def _end(self, record: records.EndRun) -> None:
        run_id = self.id_of(record.run)
        self.tree.client.set_terminated(run_id, record.status, record.end_ms)
        if self._is_uncertain and CLOSED_BY in self.tree.client.get_run(run_id).data.tags:
            self.tree.client.delete_tag(run_id, CLOSED_BY)  # another process closed it for want of this record

    def _settle(self, record: records.SettleRun) -> None:
        """Update the aggregates one level up, delete the runs that this one replaces, link those that it reuses."""
        upstream = json.loads(self._with_store_ids(json.dumps(record.upstream)))
        run_id, pipeline_id = self.id_of(record.run), self.id_of(record.pipeline_key)
        tree = self.tree
        with tree.store.lock:
            run = tree.client.get_run(run_id)
            parent_id = run.data.tags[PARENT]
            is_trial = parent_id != pipeline_id
            if is_trial:
                tree.log(run_id, tags={"trial.state": record.trial_state})
            if record.is_finished and is_trial:
                sweeps.update_sweep(tree, parent_id)
            elif record.is_finished:
                tree.log(pipeline_id, points=[Metric(*point) for point in record.metrics])
                if DESCRIPTION in run.data.tags:
                    tree.describe(pipeline_id)
            if record.is_finished and record.supersedes:
                tree.supersede(run, folds=set(record.folds))
            if record.is_finished and not is_trial:
                tree.link_reused(run, upstream)
            tree.settle(pipeline_id, record.status, ended_ms=record.end_ms if self._is_uncertain else None)

    def _with_store_ids(self, text: str) -> str:
        """Return a text with the store's ids instead of local ids, and in a bundle instead of those of its origin."""

        def store_id(match: re.Match[str]) -> str:
            key = match[0]
            if key in self.journal.ids or not LOCAL_ID.fullmatch(key):
                return self.id_of(key)
            run = self.tree.find(key)  # of another journal
            return key if run is None else str(run.info.run_id)

        return _ID.sub(store_id, text)


class ReplicationThread(threading.Thread):
    """Replicates the journal of a running stage in the background: training neither waits for the store nor fails with it.

    A failed replication is tried again until it succeeds or the stage has ended; the rest stays in the journal. The thread
    also sends the heartbeat of the run.
    """

    def __init__(self, replicator: Replicator, key: str) -> None:
        """Start with the entries that the journal holds since the store failed just now; `key` is that of the stage's run."""
        super().__init__(daemon=True, name="mlflow replication")
        self._replicator, self._key = replicator, key
        self._journal = replicator.journal
        self._journal.changed.set()
        self._give_up_after: float | None = None
        self._failing_since: float | None = 0.0 if self._journal.unacknowledged() else None
        self.start()

    def close(self, *, within_seconds: float) -> int:
        """Replicate the rest and stop; return the number of records that are left.

        A store may have failed for, or take for one record, so many seconds; files may take longer.
        """
        self._give_up_after = within_seconds
        self._journal.changed.set()
        num_acknowledged, deadline = -1, 0.0
        while self.is_alive() and (self._journal.num_acknowledged != num_acknowledged or time.monotonic() < deadline):
            if self._journal.num_acknowledged != num_acknowledged:
                num_acknowledged = self._journal.num_acknowledged
                upload_seconds = self._journal.files_size() / BYTES_PER_SECOND
                deadline = time.monotonic() + within_seconds + SECONDS_BETWEEN_TRIES + upload_seconds
            self.join(0.05)
        self._journal.flush()
        return self._journal.num_records - self._journal.num_acknowledged

    def run(self) -> None:
        """Replicate until the stage has ended and nothing is left, or the store has failed for too long."""
        journal = self._journal
        next_heartbeat = time.monotonic() + HEARTBEAT_SECONDS
        while True:
            journal.changed.wait(max(0.0, next_heartbeat - time.monotonic()))
            journal.changed.clear()
            is_last = self._give_up_after is not None  # read before the replication, which then has all records
            while journal.num_acknowledged < journal.num_records:
                self._try(self._replicator.replicate, note=f"; what it misses is kept in {journal.folder}")
                if self._failing_since is None:
                    continue
                journal.flush()
                failing_seconds = time.monotonic() - self._failing_since
                if self._give_up_after is not None and failing_seconds > self._give_up_after:
                    return
                time.sleep(SECONDS_BETWEEN_TRIES)
            if is_last:
                return
            if time.monotonic() >= next_heartbeat:
                self._try(partial(self._replicator.heartbeat, self._key))
                next_heartbeat = time.monotonic() + HEARTBEAT_SECONDS

    def _try(self, send: Callable[[], object], *, note: str = "") -> None:
        """Warn once when the store begins to fail, and log when a record goes through again."""
        num_before = self._journal.num_acknowledged
        failure: Exception | None = None
        try:
            send()
        except (*STORE_ERRORS, InputError) as error:
            failure = error
        if self._failing_since is not None and self._journal.num_acknowledged > num_before:
            log.info("the tracking store %s answers again", self._journal.header.address)
            self._failing_since = None
        if failure is not None and self._failing_since is None:
            text = shown_address(first_line(failure))
            log.warning("the tracking store %s fails: %s%s", self._journal.header.address, text, note)
            self._failing_since = time.monotonic()


def _resumed(run_id: str) -> str:
    """Return the key among a journal's ids that marks a run which another process began."""
    return f"resumed {run_id}"


def _facts(point: Metric) -> tuple[tuple[str, int, float], tuple[str, int, float]]:
    return ("time", point.step, point.timestamp), ("value", point.step, point.value)


def _datasets(hashes: Mapping[str, str]) -> list[DatasetInput]:
    return [
        DatasetInput(
            Dataset(name=key, digest=md5, source_type="local", source=json.dumps({"path": key})),
            tags=[InputTag("mlflow.data.context", "input")],
        )
        for key, md5 in hashes.items()
    ]
