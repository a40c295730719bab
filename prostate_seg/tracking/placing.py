"""Where the run of a stage belongs among the runs that a store has: below which parents, and in whose place.

Only the store knows, so this is found out when a run is delivered: at once, or days later by stage=sync. Call all of it with
the store's lock held; all of it may be called again.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlflow.entities import Metric, Run

from prostate_seg.operations.job import Outcome
from prostate_seg.tracking.journal import Record
from prostate_seg.tracking.run_tree import NONE, Level, Place, RunTree
from prostate_seg.tracking.sweeps import begin, update_sweep

log = logging.getLogger(__name__)

CLUSTER_KEY, NUM_STARTS = "cluster.key", "cluster.num_starts"
"""Tags of a job of a cluster: what it is known by when it is started again, and how often it was started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The run of a stage and its pipeline."""

    run: Run
    pipeline: Run
    is_resumed: bool
    """Whether an earlier start of the same job has begun the run."""


def open_stage(tree: RunTree, record: Record) -> Opened:
    """Close what died, find or make the parents, and open the run."""
    made = tree.find(record["run"])
    begun = (
        None if made is not None else _taken_over(tree, record["cluster_key"])
    )  # before orphans: it may look like one
    for orphan in tree.close_orphans():
        log.info("closed as KILLED: run %s (%s)", orphan.info.run_id, orphan.info.run_name)
    name, start_ms = record["pipeline"], record["start_ms"]
    pipeline = tree.pipeline(name, fresh=record["fresh"], key=record["pipeline_key"], start_ms=start_ms)
    sweep = tree.sweep(record["sweep_key"]) if record["sweep_key"] else None
    if sweep is None and record["sweep"] is not None:  # that it began waits in the spool too
        sweep = begin(tree, record["sweep"])
    cluster_key = record["cluster_key"]
    run = (
        made
        or begun
        or tree.create(
            record["stage"] if sweep is None else f"trial {record['number']}",
            Place(
                level=Level.stage if sweep is None else Level.trial,
                pipeline=name,
                stage=record["stage"],
                fold=record["fold"],
                sweep=NONE if sweep is None else str(sweep.info.run_name),
            ),
            parent_id=(sweep or pipeline).info.run_id,
            tags=None if cluster_key is None else {CLUSTER_KEY: cluster_key, NUM_STARTS: "1"},
            start_ms=start_ms,
            key=record["run"],
        )
    )
    tree.reopen(pipeline)
    return Opened(run=run, pipeline=pipeline, is_resumed=begun is not None)


def place(tree: RunTree, record: Record, *, run_id: str, pipeline_id: str) -> None:
    """Let a run take its place: aggregates one level up, what it replaces away, what it reuses beside it."""
    run = tree.client.get_run(run_id)
    parent_id = run.data.tags["mlflow.parentRunId"]
    if parent_id != pipeline_id:
        tree.log(run_id, tags={"trial.state": record["trial_state"]})
    if not record["is_finished"]:
        return
    if parent_id != pipeline_id:
        update_sweep(tree, parent_id)
    else:
        tree.log(pipeline_id, points=[Metric(name, float(value), *when) for name, value, *when in record["metrics"]])
    if record["supersedes"]:
        _supersede(tree, run, folds=set(record["folds"]))
    if parent_id == pipeline_id:
        _link_reused(tree, run, record["upstream"])


def _supersede(tree: RunTree, run: Run, *, folds: set[str]) -> None:
    """Delete the earlier runs that this one replaces: ended before it began, and with no fold that it lacks.

    A run that is delivered late may itself have been replaced by then.
    """
    tags, info = run.data.tags, run.info
    for other in tree.children(tags["mlflow.parentRunId"], stage=tags["stage"], level=tags["level"]):
        is_same_trial = tags["level"] == Level.stage.value or other.info.run_name == info.run_name
        if other.info.run_id == info.run_id or not is_same_trial:
            continue
        others_folds = set(other.data.tags.get("folds", NONE).split(",")) - {NONE}
        if _ended_before(other, run) and others_folds <= folds:
            tree.delete_with_folds(other, replaced_by=str(info.run_id))
        elif _ended_before(run, other) and _is_finished_here(other) and folds <= others_folds:
            tree.delete_with_folds(run, replaced_by=str(other.info.run_id))
            return


def _is_finished_here(run: Run) -> bool:
    return run.info.status == Outcome.finished.value and "reused_from" not in run.data.tags


def _ended_before(one: Run, other: Run) -> bool:
    return one.info.end_time is not None and one.info.end_time <= other.info.start_time


def _link_reused(tree: RunTree, run: Run, upstream: Mapping[str, Mapping[str, Any]]) -> None:
    """Show, in a pipeline that has not run them itself, the runs of another pipeline that this one rests on."""
    pipeline_id = run.data.tags["mlflow.parentRunId"]
    for name, origin in upstream.items():
        stage = name.split(".")[0]
        there = tree.children(pipeline_id, stage=stage)
        is_there = any(one.data.tags.get("reused_from", origin["run_id"]) == origin["run_id"] for one in there)
        source = tree.get(origin["run_id"]) if origin["run_id"] and origin["unchanged"] and not is_there else None
        if source is not None and source.data.tags.get("mlflow.parentRunId") != pipeline_id:
            where = Place(level=Level.stage, pipeline=run.data.tags["pipeline"], stage=stage)
            tree.link(source, stage, where, parent_id=pipeline_id)
            tree.log(pipeline_id, metrics=source.data.metrics)


def _taken_over(tree: RunTree, cluster_key: str | None) -> Run | None:
    """Return the run that a cluster's job began when it was started before, as this process's; None without one."""
    if cluster_key is None:
        return None
    runs = tree.search(filters={CLUSTER_KEY: cluster_key}, newest_first=True)
    begun = next((run for run in runs if run.info.status != Outcome.finished.value), None)
    if begun is not None:
        tree.take_over(begun, {NUM_STARTS: str(int(begun.data.tags[NUM_STARTS]) + 1)})
        log.info("go on in run %s, that this job began when it was started before", begun.info.run_id)
    return begun
