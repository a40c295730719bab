"""Run tree in MLflow: pipeline > stage > fold, and pipeline > sweep > trial > fold.

Every run carries the tags level, pipeline, stage, fold and sweep, so that a flat search finds what the tree shows. Parents are
created, and their status changed, only while the store's lock is held. A pipeline is RUNNING exactly while one of its stages
is; it belongs to no process. Runs of dead processes are closed as KILLED at the next start.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from itertools import zip_longest
from typing import Any

from mlflow.entities import Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.utils import chunk_list, get_results_from_paginated_fn

from prostate_seg.operations.job import Outcome
from prostate_seg.operations.process import is_alive, is_silent, process_tags
from prostate_seg.provenance.ds_version import LOCAL_ID
from prostate_seg.tracking.journal import new_local_id
from prostate_seg.tracking.records import NONE, Level, TreePosition, now_ms
from prostate_seg.tracking.store import leader_election
from prostate_seg.tracking.store.connection import ABSENT, Store

log = logging.getLogger(__name__)

NAMES_PER_CALL = 100
"""Params or tags that a server takes in one call."""
POINTS_PER_CALL = 500
"""Metric values sent beside them; a server takes 1,000 values of all kinds together."""
PARENT = "mlflow.parentRunId"
"""MLflow's tag with the id of the run above."""
DESCRIPTION = "mlflow.note.content"
"""MLflow's tag with the description of a run, in Markdown."""
COPIED_DESCRIPTION = "mlflow.note.copied"
"""Tag of a pipeline: the description that it has from a stage; one that differs was edited by a person."""
KEY = "record.key"
"""Tag with the local id of a run, by which replication finds it again; unique."""
REUSED_FROM = "reused_from"
"""Tag of a run that represents one of another pipeline or sweep: the id of that."""
CLOSED_BY = "closed_by"
"""Tag of a run that another process closed because its own had died."""
SUPERSEDED_BY = "superseded_by"
"""Tag of a deleted run: the later run of its stage that replaced it."""
COPIED_FROM = "bundle.copied_from"
"""Tag of a run that came in a bundle: the store that it was packed in."""
CLUSTER_KEY, NUM_STARTS = "cluster.key", "cluster.num_starts"
"""Tags of a cluster job: its key, the same each time the cluster starts it, and the number of starts."""
SILENT_ON_ANOTHER_HOST = timedelta(hours=1)
"""A run of another host may be closed, on request, after this long without a heartbeat."""
MAX_CANDIDATES = 50
"""Newest pipelines or sweeps of one name that a search returns."""


class RunTree:
    """Finds, creates and closes runs in one experiment."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.client = store.client

    def pipeline(self, name: str, *, fresh: bool, key: str | None = None, start_ms: int | None = None) -> Run:
        """Return the newest pipeline of that name that began in this store, or a new one. Call with the lock held."""

        def search() -> list[Run]:
            tags = {"level": Level.pipeline, "pipeline": name}
            found = self.search(tags, newest_first=True, limit=MAX_CANDIDATES)
            return [run for run in found if COPIED_FROM not in run.data.tags]

        def create() -> Run:
            position = TreePosition(level=Level.pipeline, pipeline=name)
            run = self.create(name, position, parent_id=None, key=key, start_ms=start_ms)
            self.client.set_terminated(run.info.run_id, Outcome.finished)  # RUNNING only while a stage is
            return run

        return self.find_or_create(search, create, fresh=fresh)

    def find_or_create(self, search: Callable[[], list[Run]], create: Callable[[], Run], *, fresh: bool = False) -> Run:
        """Return the newest of the runs, or a new one: the same for all processes that call it at once. Lock held."""
        found = [] if fresh else search()
        own = None if found else create()
        if not self.store.is_server:  # all processes share the lock
            return found[0] if own is None else own
        if fresh and own is not None:
            leader_election.claim(self.client, own, leader_election.YES)
            return own
        leader = leader_election.elect(self.client, found, own, search)
        return self.find_or_create(search, create, fresh=True) if leader is None else leader

    def sweep(self, key: str) -> Run | None:
        """Return the sweep of this key: the claimed one, or the newest, as on a local store; None if there is none."""
        found = self.sweeps(key)
        claimed = (run for run in found if run.data.params.get(leader_election.CLAIM) == leader_election.YES)
        return next(iter((*claimed, *found)), None)

    def sweeps(self, key: str) -> list[Run]:
        """Return the sweeps of this key, newest first; there are several only during an election."""
        tags = {"level": Level.sweep, "sweep.key": key}
        return self.search(tags, newest_first=True, limit=MAX_CANDIDATES)

    def create(
        self,
        name: str,
        position: TreePosition,
        *,
        parent_id: str | None,
        tags: Mapping[str, str] | None = None,
        start_ms: int | None = None,
        key: str | None = None,
    ) -> Run:
        """Create a RUNNING run, owned by this process unless it is a pipeline; return the existing run of the same key."""
        if key is not None and (existing := self.find(key)) is not None:
            return existing
        owner = {} if position.level is Level.pipeline else process_tags()
        parent = {} if parent_id is None else {PARENT: parent_id}
        return self.client.create_run(
            self.store.experiment_id,
            run_name=name,
            start_time=start_ms or now_ms(),
            tags={**position.model_dump(mode="json"), **owner, **parent, **(tags or {}), KEY: key or new_local_id()},
        )

    def find(self, key: str) -> Run | None:
        """Return the run of this key, deleted or not."""
        query, view = f"tags.`{KEY}` = '{key}'", ViewType.ALL
        return next(iter(self.client.search_runs([self.store.experiment_id], query, view, max_results=1)), None)

    def link(self, source: Run, name: str, position: TreePosition, *, parent_id: str) -> Run:
        """Create a closed run that represents `source` at another position, with its params, metrics and hashes."""
        tags = {
            key: value
            for key, value in source.data.tags.items()
            if key == DESCRIPTION
            or (not key.startswith(("mlflow.", "process.")) and key not in (*position.model_dump(mode="json"), KEY))
        }
        tags[REUSED_FROM] = source_of(source)
        tags["reused_pipeline"] = source.data.tags.get("pipeline", NONE)
        key, start_ms = f"link of {source.info.run_id} in {parent_id}", source.info.start_time
        link = self.create(name, position, parent_id=parent_id, tags=tags, start_ms=start_ms, key=key)
        self.log(link.info.run_id, params=source.data.params, metrics=source.data.metrics)
        self.client.set_terminated(link.info.run_id, source.info.status, source.info.end_time)
        return link

    def link_reused(self, run: Run, upstream: Mapping[str, Mapping[str, Any]]) -> None:
        """Link the runs of other pipelines that a stage's run depends on into its own pipeline. Call with the lock held."""
        pipeline_id = run.data.tags[PARENT]
        for name, origin in upstream.items():
            stage = name.split(".")[0]
            linked = self.children(pipeline_id, stage=stage)
            is_linked = any(one.data.tags.get(REUSED_FROM, origin["run_id"]) == origin["run_id"] for one in linked)
            source = self.get(origin["run_id"]) if origin["run_id"] and origin["unchanged"] and not is_linked else None
            if source is not None and source.data.tags.get(PARENT) != pipeline_id:
                position = TreePosition(level=Level.stage, pipeline=run.data.tags["pipeline"], stage=stage)
                self.link(source, stage, position, parent_id=pipeline_id)
                self.log(pipeline_id, metrics=source.data.metrics)

    def log(
        self,
        run_id: str,
        *,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        metrics: Mapping[str, float] | None = None,
        points: Sequence[Metric] = (),
    ) -> None:
        """Log params, tags, last metrics and points of curves, in as few calls as a server takes."""
        stamp = now_ms()
        all_points = [*points, *(Metric(key, value, stamp, 0) for key, value in (metrics or {}).items())]
        param_batches = chunk_list([Param(key, value) for key, value in (params or {}).items()], NAMES_PER_CALL)
        tag_batches = chunk_list([RunTag(key, value) for key, value in (tags or {}).items()], NAMES_PER_CALL)
        batches = zip_longest(param_batches, tag_batches, chunk_list(all_points, POINTS_PER_CALL), fillvalue=())
        for some_params, some_tags, some_points in batches:
            self.client.log_batch(run_id, params=some_params, tags=some_tags, metrics=some_points)

    def reopen(self, run: Run) -> None:
        """Set a run to RUNNING again: a parent while a run below it is RUNNING. Call with the lock held."""
        self.client.update_run(run.info.run_id, status="RUNNING")

    def resume(self, run: Run, tags: Mapping[str, str] | None = None) -> None:
        """Continue a run that another process began. Call with the lock held."""
        self.log(run.info.run_id, tags={**process_tags(), **(tags or {})})
        self.reopen(run)

    def resume_cluster_job(self, cluster_key: str) -> Run | None:
        """Resume the run that a cluster job began when it was started before; None without one. Lock held."""
        runs = self.search({CLUSTER_KEY: cluster_key}, newest_first=True)
        begun = next((run for run in runs if run.info.status != Outcome.finished), None)
        if begun is not None:
            self.resume(begun, {NUM_STARTS: str(int(begun.data.tags[NUM_STARTS]) + 1)})
            log.info("go on in run %s, that this job began when it was started before", begun.info.run_id)
        return begun

    def settle(self, run_id: str, outcome: Outcome, *, ended_ms: int | None = None) -> None:
        """Close a pipeline with the outcome of the run that ended last, unless a run below it is RUNNING. Lock held.

        That is the run that ended just now, with `outcome`; in a replay, where it ended at `ended_ms`, later ones may have.
        """
        if self.search({PARENT: run_id}, status="RUNNING", limit=1):
            return
        if ended_ms is not None:
            ended = [run for run in self.children(run_id) if REUSED_FROM not in run.data.tags]
            last = max(ended, key=lambda run: run.info.end_time or 0, default=None)
            if last is not None and (last.info.end_time or 0) > ended_ms:
                outcome, ended_ms = Outcome(last.info.status), last.info.end_time
        self.client.set_terminated(run_id, outcome, ended_ms)

    def describe(self, pipeline_id: str) -> None:
        """Give a pipeline the description of its stage that ended last, unless a person has edited it. Lock held."""
        described = [run for run in self.children(pipeline_id) if DESCRIPTION in run.data.tags]
        tags = self.client.get_run(pipeline_id).data.tags
        if described and tags.get(DESCRIPTION) == tags.get(COPIED_DESCRIPTION):
            text = max(described, key=lambda run: run.info.end_time or 0).data.tags[DESCRIPTION]
            self.log(pipeline_id, tags={DESCRIPTION: text, COPIED_DESCRIPTION: text})

    def children(self, run_id: str, *, status: Outcome | None = None, **tags: str) -> list[Run]:
        """Return the runs of this program directly below one that have these tags, and ended so, oldest first."""
        return [run for run in self.search({PARENT: run_id, **tags}, status=status) if "level" in run.data.tags]

    def supersede(self, run: Run, *, folds: set[str]) -> None:
        """Delete the earlier runs that this one replaces: ended before it began, without a fold that this one lacks.

        A run that is replicated late may itself have been replaced by then. Call with the lock held.
        """
        tags, info = run.data.tags, run.info
        for other in self.children(tags[PARENT], stage=tags["stage"], level=tags["level"]):
            is_same_trial = tags["level"] == Level.stage or other.info.run_name == info.run_name
            if other.info.run_id == info.run_id or not is_same_trial:
                continue
            others_folds = set(other.data.tags.get("folds", NONE).split(",")) - {NONE}
            is_finished = other.info.status == Outcome.finished and REUSED_FROM not in other.data.tags
            if _ended_before(other, run) and others_folds <= folds:
                self.delete_with_folds(other, replaced_by=str(info.run_id))
            elif _ended_before(run, other) and is_finished and folds <= others_folds:
                self.delete_with_folds(run, replaced_by=str(other.info.run_id))
                return

    def delete_with_folds(self, run: Run, *, replaced_by: str) -> None:
        """Move a run and those below it to MLflow's trash, from which they can be restored."""
        for child in self.children(run.info.run_id):
            self.client.delete_run(child.info.run_id)
        self.client.set_tag(run.info.run_id, SUPERSEDED_BY, replaced_by)
        self.client.delete_run(run.info.run_id)

    def deleted_by_hand(self, **tags: str) -> list[Run]:
        """Return the deleted runs with these tags that no later run has replaced, newest first."""
        found = self.search(tags, newest_first=True, deleted=True, limit=MAX_CANDIDATES)
        return [run for run in found if SUPERSEDED_BY not in run.data.tags]

    def how_to_restore(self, run: Run) -> str:
        """Return why a run is in MLflow's trash and the command that restores it."""
        info, later = run.info, run.data.tags.get(SUPERSEDED_BY)
        why = f"was replaced by run {later}" if later else "was deleted"
        command = f"MLFLOW_TRACKING_URI={self.store.address} mlflow runs restore --run-id {info.run_id}"
        return (
            f"run {info.run_id} ({info.run_name}) {why}\nRestore it on the MLflow page (Deleted), or with\n  {command}"
        )

    def close_orphans(self, *, close_silent: bool = False) -> list[Run]:
        """Close the RUNNING runs whose process has died, settle their pipelines, and return the closed runs. Lock held.

        With `close_silent`, runs of other hosts without a heartbeat for an hour count as dead.
        """
        running = self.search(status="RUNNING")
        pipelines = [run for run in running if run.data.tags.get("level") == Level.pipeline]

        def is_dead(run: Run) -> bool:
            return is_alive(run.data.tags) is False or (close_silent and is_silent_elsewhere(run))

        closed = [run for run in running if run not in pipelines and is_dead(run)]
        for run in closed:
            self.client.set_tag(run.info.run_id, CLOSED_BY, "a later start: its process had ended without closing it")
            self.client.set_terminated(run.info.run_id, Outcome.killed)
        for pipeline in pipelines:
            self.settle(pipeline.info.run_id, Outcome.killed)
        return closed

    def get(self, run_id: str, *, or_deleted: bool = False) -> Run | None:
        """Return a run by its id or local id; None if there is none, or it is deleted."""
        try:
            run = self.find(run_id) if LOCAL_ID.fullmatch(run_id) else self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code not in ABSENT:
                raise
            return None
        return run if run is not None and (or_deleted or not is_deleted(run)) else None

    def search(
        self,
        tags: Mapping[str, str] | None = None,
        *,
        status: str | None = None,
        newest_first: bool = False,
        limit: int | None = None,
        deleted: bool = False,
    ) -> list[Run]:
        """Return active runs with these tags, or only deleted ones, oldest first unless `newest_first`."""
        terms = [f"tags.`{key}` = '{value}'" for key, value in (tags or {}).items()]
        terms += [f"attributes.status = '{status}'"] if status else []
        view = ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY
        order = [f"attributes.start_time {'DESC' if newest_first else 'ASC'}", "attributes.run_id ASC"]

        def page(size: int, token: str | None) -> list[Run]:
            experiment, query = [self.store.experiment_id], " and ".join(terms)
            return self.client.search_runs(experiment, query, view, size, order, token)

        return list(get_results_from_paginated_fn(page, 1000, limit))


def is_deleted(run: Run) -> bool:
    """Return whether a run is in MLflow's trash."""
    return bool(run.info.lifecycle_stage == "deleted")


def position_of(run: Run) -> TreePosition:
    """Return the position of a run in the tree, from its tags."""
    return TreePosition.model_validate({name: run.data.tags[name] for name in TreePosition.model_fields})


def source_of(run: Run) -> str:
    """Return the id of the run that a run represents; its own unless it is a link."""
    return str(run.data.tags.get(REUSED_FROM, run.info.run_id))


def is_silent_elsewhere(run: Run) -> bool:
    """Return whether a run of another host has sent no heartbeat for an hour."""
    return is_alive(run.data.tags) is None and is_silent(run.data.tags, since=SILENT_ON_ANOTHER_HOST)


def _ended_before(one: Run, other: Run) -> bool:
    return one.info.end_time is not None and one.info.end_time <= other.info.start_time
