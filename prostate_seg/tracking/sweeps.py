"""The run of a multirun: made before its jobs start, kept up to date by each trial, closed after the last.

A sweep is known by a place: its folder, or the storage and name of its study. The same place again goes on with the same run.
"""

import json
import logging
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities import Run

from prostate_seg.common.address import resolved_uri, shown_address
from prostate_seg.common.errors import InputError
from prostate_seg.common.files import md5_of_text
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import workspace_of
from prostate_seg.operations.job import Job, Outcome, command_of
from prostate_seg.tracking.journal import RECORDS, Header, Record, Spool, new_local_id, read_lines, waiting
from prostate_seg.tracking.recorded_runs import artifact_text
from prostate_seg.tracking.run_tree import ALL, KEY, Level, Place, RunTree, now_ms
from prostate_seg.tracking.store import open_store

log = logging.getLogger(__name__)

Row = tuple[Mapping[str, str], float]
"""What a trial had set that others had not, and its objective."""
Draw = Callable[[Path, Sequence[Row]], object]
"""Draws figures of the trials into a folder."""

FOLD = "fold.index"
"""A sweep over this trains one setting in parts: a setting is as good as the mean of its folds."""
NUM_PAST_FOLDS = 50
"""Newest folds that an estimate of time looks at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What the trials of a sweep came to."""

    sweep_id: str
    rows: list[Row]
    best_run: Run | None
    """A trial of the best setting; None when none has an objective."""
    has_folds: bool
    """Whether the sweep went over folds."""


def begin_multirun(cfg: Config, place: Path, *, is_sweep: bool) -> None:
    """Make the pipeline, and for a sweep its run, so that jobs in other processes find both.

    Raises:
        InputError: If the store cannot be reached or written, unless mlflow.on_unreachable has that recorded on disk.
    """
    if cfg.mlflow.tracking_uri is None:
        return
    record = {
        "do": "multirun",
        "pipeline": cfg.mlflow.name,
        "pipeline_key": new_local_id(),
        "fresh": cfg.mlflow.fresh,
        "stage": cfg.stage or ALL,
        "place": str(place) if is_sweep else None,
        "key": new_local_id(),
        "start_ms": now_ms(),
    }
    try:
        store = open_store(cfg.mlflow, cache=workspace_of(cfg).cache)
        store.ask(lambda: begin(RunTree(store), record), locked=True)
    except InputError as error:
        if cfg.mlflow.on_unreachable != "spool":
            raise
        _keep(cfg, record, error)


def end_multirun(cfg: Config, place: Path, *, draw: Draw) -> str | None:
    """Close the sweep's run, if there is one, with figures of its trials and its outcome.

    Returns:
        What to type to train the best setting; None also where the store cannot be asked, which stops nothing.
    """
    if cfg.mlflow.tracking_uri is None:
        return None
    try:
        store = open_store(cfg.mlflow, cache=workspace_of(cfg).cache)
        return end(RunTree(store), place, draw=draw)
    except InputError as error:
        _keep(cfg, {"do": "end_multirun", "place": str(place)}, error)
        return None


def mark_complete(cfg: Config, place: Path) -> None:
    """Note that a study has all of its trials: the sweep is FINISHED then, whatever became of some of them."""
    try:
        store = open_store(cfg.mlflow, cache=workspace_of(cfg).cache)
        store.ask(lambda: complete(RunTree(store), place))
    except InputError as error:
        _keep(cfg, {"do": "complete", "place": str(place)}, error)


def begin(tree: RunTree, record: Record) -> Run | None:
    """Make what a multirun begins with, unless it is there; return the sweep's run. Call with the lock held."""
    tree.close_orphans()
    name, start_ms = record["pipeline"], record["start_ms"]
    pipeline = tree.pipeline(name, fresh=record["fresh"], key=record["pipeline_key"], start_ms=start_ms)
    if record["place"] is None:
        return None
    place = Path(record["place"])
    key, sweep = sweep_key(place), f"sweep/{place.name}"

    def make() -> Run:
        where = Place(level=Level.sweep, pipeline=name, stage=record["stage"], sweep=sweep)
        tags = {"sweep.key": key, "sweep.folder": str(place)}
        parent_id = str(pipeline.info.run_id)
        return tree.create(sweep, where, parent_id=parent_id, tags=tags, start_ms=start_ms, key=record["key"])

    found = tree.found_or_made(lambda: tree.sweeps(key), make)
    if found.data.tags.get(KEY) != record["key"]:  # the same place again: a sweep that goes on
        tree.take_over(found, {"sweep.complete": "false"})
    tree.reopen(pipeline)
    return found


def complete(tree: RunTree, place: Path) -> None:
    """Note that the sweep of a place has all of its trials."""
    sweep = tree.sweep(sweep_key(place))
    if sweep is not None:
        tree.log(sweep.info.run_id, tags={"sweep.complete": "true"})


def end(tree: RunTree, place: Path, *, draw: Draw) -> str | None:
    """Close the run of a sweep, if there is one; return what to type to train its best setting.

    Raises:
        InputError: If the store cannot be reached or written.
    """
    store = tree.store
    summary = store.ask(lambda: _end(tree, place), locked=True)
    if summary is None or summary.best_run is None:
        return None
    command = store.ask(lambda: _log_best(tree, summary))
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), summary.rows)
        store.ask(lambda: tree.client.log_artifacts(summary.sweep_id, folder, "figures"))
    return command


def begun_on_disk(spool_root: Path, place: Path) -> Record | None:
    """Return what begins the sweep of a place, where the store has not been told of it yet."""
    for found in waiting(spool_root):
        for line in read_lines(found.folder / RECORDS):
            if line.get("do") == "multirun" and line["place"] == str(place):
                return line
    return None


def take_over(cfg: Config, job: Job, run_id: str) -> bool:
    """Return whether a run has FINISHED; where its stage is skipped in another sweep, show it there as a trial.

    Raises:
        InputError: If the store cannot be reached or written, and mlflow.on_unreachable is not spool.
    """
    try:
        store = open_store(cfg.mlflow, cache=workspace_of(cfg).cache)
    except InputError:
        if cfg.mlflow.on_unreachable != "spool":
            raise
        return True
    return store.ask(lambda: _take_over(cfg, job, RunTree(store), run_id), locked=True)


def seconds_per_fold(cfg: Config) -> float | None:
    """Return about how long a fold of this training will take, from those that have been trained; None without any.

    Raises:
        InputError: If the store cannot be reached, and mlflow.on_unreachable is not spool.
    """
    try:
        store = open_store(cfg.mlflow, cache=workspace_of(cfg).cache)
    except InputError:
        if cfg.mlflow.on_unreachable != "spool":
            raise
        return None
    tree = RunTree(store)
    past = store.ask(
        lambda: tree.search(
            level=Level.fold,
            filters={"stage": "train"},
            status=Outcome.finished.value,
            newest_first=True,
            limit=NUM_PAST_FOLDS,
        )
    )
    same_network = [run for run in past if run.data.params.get("model.name") == cfg.model.name]
    found = [_scaled_seconds(run, cfg) for run in same_network or past]
    known = [seconds for seconds in found if seconds is not None]
    if not known:
        return None
    most = float("inf") if cfg.train.max_minutes is None else 60 * cfg.train.max_minutes
    return min(statistics.median(known), most)


def sweep_key(place: Path) -> str:
    """Return the tag value by which the jobs of a multirun find their parent."""
    return md5_of_text(str(place))


def update_sweep(tree: RunTree, sweep_id: str) -> None:
    """Bring the sweep's aggregates up to date: trials done, and the best of them. Call with the lock held."""
    trials = tree.children(sweep_id, level=Level.trial.value)
    scored = _scored(trials)
    num_finished = sum(run.info.status == Outcome.finished.value for run in trials)
    metrics = {"sweep/num_trials": float(len(trials)), "sweep/num_finished": float(num_finished)}
    tags = {}
    if scored:
        best = max(scored, key=lambda run: run.data.metrics["objective"])
        metrics |= {"sweep/best_objective": best.data.metrics["objective"], **best.data.metrics}
        tags = {"best_trial": str(best.info.run_name), "best_run_id": str(best.info.run_id)}
    tree.log(sweep_id, metrics=metrics, tags=tags)


def _scored(trials: Sequence[Run]) -> list[Run]:
    return [run for run in trials if run.info.status == Outcome.finished.value and "objective" in run.data.metrics]


def _keep(cfg: Config, record: Record, error: InputError) -> None:
    """Let stage=sync tell the store what this one could not."""
    what, address = f"multirun of {cfg.mlflow.name}", shown_address(resolved_uri(str(cfg.mlflow.tracking_uri)))
    header = Header(what=what, address=address, experiment=cfg.mlflow.experiment)
    spool = Spool.create(Path(cfg.paths.spool), header, name="multirun")
    spool.put(record)
    spool.flush()
    spool.release()
    log.warning("%s", str(error).splitlines()[0])
    log.warning("the multirun is recorded in %s; when the store can be reached, stage=sync sends it", spool.folder)


def _end(tree: RunTree, place: Path) -> Summary | None:
    sweep = tree.sweep(sweep_key(place))
    if sweep is None:
        return None
    sweep_id = str(sweep.info.run_id)
    tree.close_orphans()
    update_sweep(tree, sweep_id)
    trials = tree.children(sweep_id, level=Level.trial.value)
    is_complete = sweep.data.tags.get("sweep.complete") == "true"
    outcome = Outcome.finished if is_complete else _worst({run.info.status for run in trials})
    tree.client.set_terminated(sweep_id, outcome.value)
    tree.settle(str(sweep.data.tags["mlflow.parentRunId"]), outcome)
    return _summary(sweep_id, _scored(trials))


def _summary(sweep_id: str, scored: Sequence[Run]) -> Summary:
    """Compare settings, each with the mean objective of its folds."""
    names = sorted({name for run in scored for name in run.data.params})
    varied = [name for name in names if len({run.data.params.get(name) for run in scored}) > 1]
    settings = [name for name in varied if name != FOLD]
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in scored:
        groups.setdefault(tuple(run.data.params.get(name, "") for name in settings), []).append(run)
    means = {key: statistics.fmean(run.data.metrics["objective"] for run in runs) for key, runs in groups.items()}
    best = max(means, key=lambda key: means[key], default=None)
    return Summary(
        sweep_id=sweep_id,
        rows=[(dict(zip(settings, key, strict=True)), mean) for key, mean in means.items()],
        best_run=None if best is None else groups[best][0],
        has_folds=FOLD in varied,
    )


def _log_best(tree: RunTree, summary: Summary) -> str:
    """Tag the sweep with what to type to train its best setting, and return that."""
    assert summary.best_run is not None
    run = summary.best_run
    source = run.data.tags.get("reused_from", run.info.run_id)
    overrides = artifact_text(tree, source, "provenance.json")
    words = json.loads(overrides)["overrides"] if overrides else []
    command = command_of(words, without=[FOLD] if summary.has_folds else [])
    tree.log(summary.sweep_id, tags={"best_command": command})
    return command


def _take_over(cfg: Config, job: Job, tree: RunTree, run_id: str) -> bool:
    source = tree.get(run_id)
    if source is None or source.info.status != Outcome.finished.value:
        return False
    sweep = tree.sweep(sweep_key(job.sweep_folder)) if job.sweep_folder else None
    if sweep is not None and source.data.tags.get("mlflow.parentRunId") != sweep.info.run_id:
        place = Place(
            level=Level.trial,
            pipeline=cfg.mlflow.name,
            stage=cfg.stage or ALL,
            fold=ALL if cfg.fold.index is None else str(cfg.fold.index),
            sweep=str(sweep.info.run_name),
        )
        tree.link(source, f"trial {job.number}", place, parent_id=str(sweep.info.run_id))
        update_sweep(tree, str(sweep.info.run_id))
    return True


def _scaled_seconds(run: Run, cfg: Config) -> float | None:
    """Return the time of a past fold, scaled to the epochs and steps of this training; None where they do not compare."""
    steps, metrics = run.data.params.get("train.steps_per_epoch"), run.data.metrics
    if not {"train/minutes", "train/num_epochs"} <= set(metrics) or steps is None:
        return None
    wanted = json.dumps(cfg.train.steps_per_epoch)
    if "null" in (steps, wanted) and steps != wanted:
        return None
    share = 1.0 if steps == wanted else json.loads(wanted) / json.loads(steps)
    return 60 * metrics["train/minutes"] / metrics["train/num_epochs"] * cfg.train.max_epochs * share


def _worst(statuses: set[str]) -> Outcome:
    """Return KILLED before FAILED before FINISHED; a sweep without a trial has failed."""
    if statuses & {Outcome.killed.value, "RUNNING"}:
        return Outcome.killed
    return Outcome.finished if statuses == {Outcome.finished.value} else Outcome.failed
