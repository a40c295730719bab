"""Run of a multirun: created before its jobs start, updated by each trial, closed after the last.

A sweep is identified by its folder, or by the storage and name of its study; a multirun there again continues the same run.
"""

import csv
import json
import logging
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import pandas as pd
from mlflow.entities import Run

from prostate_seg.common.address import resolved_uri, shown_address
from prostate_seg.common.errors import InputError, first_line
from prostate_seg.common.files import md5_of_text
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import workspace_of
from prostate_seg.operations.job import Job, Outcome, command_of
from prostate_seg.tracking import records
from prostate_seg.tracking.journal import RECORDS, Header, Journal, new_local_id, pending_journals, read_lines
from prostate_seg.tracking.recorded_runs import CASES, SEED, artifact_text, by_setting, open_tree
from prostate_seg.tracking.records import ALL, Level, TreePosition, now_ms
from prostate_seg.tracking.store.run_tree import KEY, PARENT, RunTree

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Row = tuple[Mapping[str, str], float]
"""Settings of a trial that differ between trials, as JSON or plain text, and its objective."""
Draw = Callable[[Path, Sequence[Row]], object]
"""Draws figures of the trials into a folder."""

BEST_DICE = re.compile(r"val/best_dice_fold(\d+)")
"""Metrics of a training with the best val Dice of each fold."""
Score = tuple[str, str, float]
"""Seed, fold and Dice of a fold or case."""
NUM_PAST_FOLDS = 50
"""Newest folds from which the time of a fold is estimated."""


def begin_multirun(cfg: Config, folder: Path, *, is_sweep: bool) -> None:
    """Create the pipeline and, for a sweep, its run, so that jobs in other processes find both.

    Raises:
        InputError: If the store cannot be reached or written; with mlflow.on_unreachable=journal it is written to the journal.
    """
    record = records.BeginMultirun(
        pipeline=cfg.mlflow.name,
        pipeline_key=new_local_id(),
        fresh=cfg.mlflow.fresh,
        stage=cfg.stage or ALL,
        folder=str(folder) if is_sweep else None,
        key=new_local_id(),
        start_ms=now_ms(),
    )
    _apply(cfg, record, lambda tree: tree.store.call(lambda: begin(tree, record), locked=True))


def end_multirun(cfg: Config, folder: Path, *, draw: Draw) -> str | None:
    """Close the sweep's run, if there is one, with its outcome and figures of its trials.

    Returns:
        Command that trains the best setting; None also if the store cannot be reached, which fails nothing.
    """
    return _apply(cfg, records.EndMultirun(folder=str(folder)), lambda tree: end(tree, folder, draw=draw))


def mark_complete(cfg: Config, folder: Path) -> None:
    """Mark that a study has all of its trials: its sweep is then FINISHED, whatever the outcome of some of them."""
    _apply(cfg, records.CompleteSweep(folder=str(folder)), lambda tree: tree.store.call(lambda: complete(tree, folder)))


def begin(tree: RunTree, record: records.BeginMultirun) -> Run | None:
    """Create the pipeline and the sweep's run unless they exist; return the sweep's run. Call with the lock held."""
    tree.close_orphans()
    name, start_ms = record.pipeline, record.start_ms
    pipeline = tree.pipeline(name, fresh=record.fresh, key=record.pipeline_key, start_ms=start_ms)
    if record.folder is None:
        return None
    folder = Path(record.folder)
    key, sweep = sweep_key(folder), f"sweep/{folder.name}"

    def create() -> Run:
        position = TreePosition(level=Level.sweep, pipeline=name, stage=record.stage, sweep=sweep)
        tags = {"sweep.key": key, "sweep.folder": str(folder)}
        parent_id = str(pipeline.info.run_id)
        return tree.create(sweep, position, parent_id=parent_id, tags=tags, start_ms=start_ms, key=record.key)

    found = tree.find_or_create(lambda: tree.sweeps(key), create)
    if found.data.tags.get(KEY) != record.key:  # the same folder again continues its sweep
        tree.resume(found, {"sweep.complete": "false"})
    tree.reopen(pipeline)
    return found


def complete(tree: RunTree, folder: Path) -> None:
    """Mark a sweep as complete."""
    sweep = tree.sweep(sweep_key(folder))
    if sweep is not None:
        tree.log(sweep.info.run_id, tags={"sweep.complete": "true"})


def end(tree: RunTree, folder: Path, *, draw: Draw) -> str | None:
    """Close the run of a sweep, if there is one, log its repeats, and return the command that trains its best setting."""
    sweep = tree.store.call(lambda: tree.sweep(sweep_key(folder)))
    if sweep is None:
        return None
    sweep_id = str(sweep.info.run_id)
    trials = tree.store.call(lambda: _close(tree, sweep), locked=True)
    tree.store.call(lambda: log_repeats(tree, sweep_id, trials))
    log.info("the sweep is run %s of %s", sweep_id, sweep.data.tags["pipeline"])
    scored = _scored(trials)
    if not scored:
        return None
    rows, best, repeated = _compare(scored)
    if SEED in repeated and not rows[0][0]:
        return None  # seeds alone were varied: the best seed is no setting to choose

    provenance = tree.store.call(lambda: artifact_text(tree, best, "provenance.json"))
    command = command_of(json.loads(provenance)["overrides"] if provenance else [], without=repeated)
    tree.store.call(lambda: tree.log(sweep_id, tags={"best_command": command}))
    with tempfile.TemporaryDirectory() as figures:
        draw(Path(figures), rows)
        tree.store.call(lambda: tree.client.log_artifacts(sweep_id, figures, "figures"))
    return command


def begun_in_journal(journal_root: Path, folder: Path) -> records.BeginMultirun | None:
    """Return the record that begins the sweep of a folder, if it still waits in a journal."""
    for found in pending_journals(journal_root):
        for line in read_lines(found.folder / RECORDS):
            if line.get("do") == "multirun" and line["place"] == str(folder):
                return records.BeginMultirun(**line)
    return None


def reuse_finished_run(cfg: Config, job: Job, run_id: str) -> bool:
    """Return whether a run has FINISHED; link it as a trial where its stage is skipped in another sweep."""
    tree = _reachable_tree(cfg)
    return tree is None or tree.store.call(lambda: _reuse(cfg, job, tree, run_id), locked=True)


def seconds_per_fold(cfg: Config) -> float | None:
    """Estimate the time of one fold of this training from past folds; None without any."""
    tree = _reachable_tree(cfg)
    if tree is None:
        return None
    tags, finished = {"level": Level.fold, "stage": "train"}, Outcome.finished
    past = tree.store.call(lambda: tree.search(tags, status=finished, newest_first=True, limit=NUM_PAST_FOLDS))
    same_network = [run for run in past if run.data.params.get("model.name") == cfg.model.name]
    known = [seconds for run in same_network or past if (seconds := _scaled_seconds(run, cfg)) is not None]
    if not known:
        return None
    longest = float("inf") if cfg.train.max_minutes is None else 60 * cfg.train.max_minutes
    return min(statistics.median(known), longest)


def sweep_key(folder: Path) -> str:
    """Return the tag value by which the jobs of a multirun find their parent."""
    return md5_of_text(str(folder))


def update_sweep(tree: RunTree, sweep_id: str) -> list[Run]:
    """Update the aggregates of a sweep: number of trials, and the best of them; return the trials. Call with the lock held."""
    trials = tree.children(sweep_id, level=Level.trial)
    num_finished = sum(run.info.status == Outcome.finished for run in trials)
    metrics = {"sweep/num_trials": float(len(trials)), "sweep/num_finished": float(num_finished)}
    tags = {}
    if scored := _scored(trials):
        best = max(scored, key=_objective)
        metrics |= {"sweep/best_objective": _objective(best), **best.data.metrics}
        tags = {"best_trial": str(best.info.run_name), "best_run_id": str(best.info.run_id)}
    tree.log(sweep_id, metrics=metrics, tags=tags)
    return trials


def _scored(trials: Sequence[Run]) -> list[Run]:
    return [run for run in trials if run.info.status == Outcome.finished and "objective" in run.data.metrics]


def _objective(run: Run) -> float:
    return float(run.data.metrics["objective"])


def _apply(cfg: Config, record: records.MultirunRecord, apply: Callable[[RunTree], Result]) -> Result | None:
    """Apply a record to the store; write it to a journal for stage=sync if the store fails, unless no run may begin so."""
    try:
        return apply(open_tree(cfg.mlflow, cache=workspace_of(cfg).cache))
    except InputError as error:
        if isinstance(record, records.BeginMultirun) and cfg.mlflow.on_unreachable != "journal":
            raise
        log.warning("%s", first_line(error))
    address = shown_address(resolved_uri(str(cfg.mlflow.tracking_uri)))
    header = Header(what=f"multirun of {cfg.mlflow.name}", address=address, experiment=cfg.mlflow.experiment)
    journal = Journal.create(Path(cfg.paths.journal), header, name="multirun")
    journal.append(record)
    journal.flush()
    journal.release()
    log.warning("the multirun is recorded in %s; when the store can be reached, stage=sync sends it", journal.folder)
    return None


def _reachable_tree(cfg: Config) -> RunTree | None:
    """Open the store; return None if it cannot be reached and the config allows that."""
    try:
        return open_tree(cfg.mlflow, cache=workspace_of(cfg).cache)
    except InputError:
        if cfg.mlflow.on_unreachable != "journal":
            raise
        return None


def _close(tree: RunTree, sweep: Run) -> list[Run]:
    """Close a sweep, FINISHED if its study is complete, else with the worst outcome of its trials; return the trials."""
    tree.close_orphans()
    trials = update_sweep(tree, sweep.info.run_id)
    statuses = {run.info.status for run in trials}
    if sweep.data.tags.get("sweep.complete") == "true" or statuses == {Outcome.finished}:
        outcome = Outcome.finished
    else:
        is_killed = bool(statuses & {Outcome.killed, "RUNNING"})
        outcome = Outcome.killed if is_killed else Outcome.failed  # a sweep without a trial has failed
    tree.client.set_terminated(sweep.info.run_id, outcome)
    tree.settle(str(sweep.data.tags[PARENT]), outcome)
    return trials


def _compare(scored: Sequence[Run]) -> tuple[list[Row], Run, list[str]]:
    """Return each setting with the mean objective of its folds and seeds, a trial of the best, and which of both was varied."""
    settings, repeated, groups = by_setting(scored)
    means = {values: statistics.fmean(map(_objective, runs)) for values, runs in groups.items()}
    rows: list[Row] = [(dict(zip(settings, values, strict=True)), mean) for values, mean in means.items()]
    return rows, groups[max(means, key=lambda values: means[values])][0], repeated


def log_repeats(tree: RunTree, sweep_id: str, trials: Sequence[Run]) -> None:
    """Log mean and SD over seeds and over folds of each setting with two seeds or more; of a single one also as metrics."""
    finished = [run for run in trials if run.info.status == Outcome.finished]
    settings, repeated, groups = by_setting(finished)
    if SEED not in repeated:
        return
    for values, runs in groups.items():
        label = ", ".join(f"{name}={value}" for name, value in zip(settings, values, strict=True))
        validation = [score for run in runs for score in _validation_scores(run)]
        test = [score for run in runs for score in _test_scores(tree, run)]
        for name, scores in (("val/best_dice", validation), ("test/dice", test)):
            table = pd.DataFrame(scores, columns=["seed", "fold", "dice"])
            by_seed, by_fold = (table.groupby(key)["dice"].agg(statistics.fmean) for key in ("seed", "fold"))
            if len(by_seed) < 2:
                continue
            found = {"mean": statistics.fmean(by_seed), "sd_seeds": statistics.stdev(by_seed)}
            if len(by_fold) > 1:
                found["sd_folds"] = statistics.stdev(by_fold)
            text = ", ".join(f"{what.replace('sd_', 'SD over ')} {value:.4f}" for what, value in found.items())
            seeds = ", ".join(sorted(by_seed.index, key=int))
            log.info("%s%s of seeds %s: %s", f"{label}: " if label else "", name, seeds, text)
            if not settings:
                tree.log(sweep_id, metrics={f"repeats/{name}_{what}": value for what, value in found.items()})


def _validation_scores(run: Run) -> Iterator[Score]:
    """Yield the best val Dice of each fold of a training."""
    for name, value in run.data.metrics.items():
        if fold := BEST_DICE.fullmatch(name):
            yield run.data.params[SEED], fold[1], value


def _test_scores(tree: RunTree, run: Run) -> Iterator[Score]:
    """Yield the Dice of each case of an evaluation, of the first region."""
    text = artifact_text(tree, run, CASES) if run.data.tags.get("stage") == "evaluate" else None
    rows = list(csv.DictReader((text or "").splitlines()))
    for row in rows:
        if row["dice"] and row.get("region") == rows[0].get("region"):
            yield run.data.params[SEED], row["fold"], float(row["dice"])


def _reuse(cfg: Config, job: Job, tree: RunTree, run_id: str) -> bool:
    source = tree.get(run_id)
    if source is None or source.info.status != Outcome.finished:
        return False
    sweep = tree.sweep(sweep_key(job.sweep_folder)) if job.sweep_folder else None
    if sweep is not None and source.data.tags.get(PARENT) != sweep.info.run_id:
        position = TreePosition(
            level=Level.trial,
            pipeline=cfg.mlflow.name,
            stage=cfg.stage or ALL,
            fold=ALL if cfg.fold.index is None else str(cfg.fold.index),
            sweep=str(sweep.info.run_name),
        )
        tree.link(source, f"trial {job.number}", position, parent_id=str(sweep.info.run_id))
        update_sweep(tree, str(sweep.info.run_id))
    return True


def _scaled_seconds(run: Run, cfg: Config) -> float | None:
    """Return the time of a past fold, scaled to the epochs and steps of this training; None if they do not compare."""
    steps, metrics = run.data.params.get("train.steps_per_epoch"), run.data.metrics
    if not {"train/minutes", "train/num_epochs"} <= set(metrics) or steps is None:
        return None
    wanted = json.dumps(cfg.train.steps_per_epoch)
    if "null" in (steps, wanted) and steps != wanted:
        return None
    share = 1.0 if steps == wanted else json.loads(wanted) / json.loads(steps)
    return 60 * metrics["train/minutes"] / metrics["train/num_epochs"] * cfg.train.max_epochs * share
