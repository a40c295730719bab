"""The run of a multirun: made before its jobs start, kept up to date by each trial, closed after the last."""

from pathlib import Path

from prostate_seg.config import Config
from prostate_seg.files import md5_of_text
from prostate_seg.tracking.job import Outcome
from prostate_seg.tracking.process import this_process
from prostate_seg.tracking.run_tree import Level, Place, RunTree
from prostate_seg.tracking.store import Store, open_store
from prostate_seg.workspace import workspace_of


def begin_multirun(cfg: Config, folder: Path, *, is_sweep: bool) -> None:
    """Make the pipeline, and for a sweep its run, so that jobs in other processes find both.

    Raises:
        InputError: If the store cannot be reached or written.
    """
    if cfg.mlflow.tracking_uri is None:
        return
    store = open_store(cfg.mlflow, cache=workspace_of(cfg).cache)
    store.ask(lambda: _begin(cfg, store, folder, is_sweep=is_sweep), locked=True)


def end_multirun(cfg: Config, folder: Path) -> None:
    """Close the sweep's run, if there is one, with the worst outcome of its trials.

    Raises:
        InputError: If the store cannot be reached or written.
    """
    if cfg.mlflow.tracking_uri is None:
        return
    store = open_store(cfg.mlflow, cache=workspace_of(cfg).cache)
    store.ask(lambda: _end(store, folder), locked=True)


def sweep_key(folder: Path) -> str:
    """Return the tag value by which the jobs of a multirun find their parent."""
    return md5_of_text(str(folder))


def update_sweep(tree: RunTree, sweep_id: str) -> None:
    """Bring the sweep's aggregates up to date: trials done, and the best of them. Call with the lock held."""
    trials = tree.children(sweep_id, level=Level.trial.value)
    finished = [run for run in trials if run.info.status == Outcome.finished.value]
    scored = [run for run in finished if "objective" in run.data.metrics]
    metrics = {"sweep/num_trials": float(len(trials)), "sweep/num_finished": float(len(finished))}
    tags = {}
    if scored:
        best = max(scored, key=lambda run: run.data.metrics["objective"])
        metrics |= {"sweep/best_objective": best.data.metrics["objective"], **best.data.metrics}
        tags = {"best_trial": str(best.info.run_name), "best_run_id": str(best.info.run_id)}
    tree.log(sweep_id, metrics=metrics, tags=tags)


def _begin(cfg: Config, store: Store, folder: Path, *, is_sweep: bool) -> None:
    tree = RunTree(store)
    tree.close_orphans()
    pipeline = tree.pipeline(cfg.mlflow.name, fresh=cfg.mlflow.fresh)
    if not is_sweep:
        return
    found = tree.sweep(sweep_key(folder))
    if found is not None:  # the same folder again: a sweep that goes on
        tree.log(found.info.run_id, tags=this_process().as_tags())
        tree.reopen(found)
    else:
        name = f"sweep/{folder.name}"
        place = Place(level=Level.sweep, pipeline=cfg.mlflow.name, stage=cfg.stage or "all", sweep=name)
        tags = {"sweep.key": sweep_key(folder), "sweep.folder": str(folder)}
        tree.create(name, place, parent_id=pipeline.info.run_id, tags=tags)
    tree.reopen(pipeline)


def _end(store: Store, folder: Path) -> None:
    tree = RunTree(store)
    sweep = tree.sweep(sweep_key(folder))
    if sweep is None:
        return
    tree.close_orphans()
    update_sweep(tree, sweep.info.run_id)
    outcome = _worst({run.info.status for run in tree.children(sweep.info.run_id, level=Level.trial.value)})
    tree.client.set_terminated(sweep.info.run_id, outcome.value)
    tree.settle(str(sweep.data.tags["mlflow.parentRunId"]), outcome)


def _worst(statuses: set[str]) -> Outcome:
    """Return KILLED before FAILED before FINISHED; a sweep without a trial has failed."""
    if statuses & {Outcome.killed.value, "RUNNING"}:
        return Outcome.killed
    return Outcome.finished if statuses == {Outcome.finished.value} else Outcome.failed
