"""What MLflow is told of one stage: its run, the runs of its folds, and how they stand to the runs around them."""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Run
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from prostate_seg.config import OnRerun, as_container, science_of
from prostate_seg.errors import InputError, Pruned
from prostate_seg.tracking.address import resolved_uri
from prostate_seg.tracking.job import Job, Outcome, command_line
from prostate_seg.tracking.process import user_name
from prostate_seg.tracking.record import Hashes, flat
from prostate_seg.tracking.run_tree import ALL, NONE, Level, Place, RunTree, now_ms
from prostate_seg.tracking.stage_run import StageRun
from prostate_seg.tracking.store import STORE_ERRORS, Store, open_store, unusable
from prostate_seg.tracking.sweeps import sweep_key, update_sweep
from prostate_seg.tracking.writer import Writer

log = logging.getLogger(__name__)

SECONDS_TO_CLOSE = 30.0
"""A store that fails at the end of a stage is tried again for this long."""
LONGEST_PARAM = 6000
"""Characters of a param; MLflow cuts longer ones."""
LONGEST_TAG = 5000
"""Characters of a tag; MLflow's databases hold a little more."""
SHOWN_PACKAGES = ("torch", "monai", "numpy", "scipy", "simpleitk", "hydra-core", "mlflow", "dvc", "prostate-seg")
"""Packages whose versions are tags; packages.txt has all."""
NEVER_REPLACED = ("register",)
"""Stages whose earlier runs stay: the versions of the registry are shown with them."""
CLUSTER_KEY, NUM_STARTS = "cluster.key", "cluster.num_starts"
"""Tags of a job of a cluster: what it is known by when it is started again, and how often it was started."""


def open_branch(stage_run: StageRun) -> "Branch":
    """Open the store and, in it, the run of a stage.

    Raises:
        InputError: If the store cannot be reached or written.
    """
    _drop_foreign_run_id()
    store = open_store(stage_run.cfg.mlflow, cache=stage_run.workspace.cache)
    branch = store.ask(lambda: _make_run(stage_run, store), locked=True)
    store.ask(branch.log_start)
    return branch


def _make_run(stage_run: StageRun, store: Store) -> "Branch":
    """Close what died, find or make the parents, and open the run. Call with the lock held."""
    cfg, job, tree = stage_run.cfg, stage_run.job, RunTree(store)
    begun = _taken_over(job, tree)  # before orphans are closed: it may look like one
    for orphan in tree.close_orphans():
        log.info("closed as KILLED: run %s (%s)", orphan.info.run_id, orphan.info.run_name)
    pipeline = tree.pipeline(cfg.mlflow.name, fresh=cfg.mlflow.fresh and job.sweep_folder is None)
    sweep = tree.sweep(sweep_key(job.sweep_folder)) if job.sweep_folder else None
    place = Place(
        level=Level.stage if sweep is None else Level.trial,
        pipeline=cfg.mlflow.name,
        stage=stage_run.stage,
        fold=ALL if cfg.fold.index is None else str(cfg.fold.index),
        sweep=NONE if sweep is None else str(sweep.info.run_name),
    )
    run = begun or tree.create(
        stage_run.stage if sweep is None else f"trial {job.number}",
        place,
        parent_id=(sweep or pipeline).info.run_id,
        tags=None if job.cluster_key is None else {CLUSTER_KEY: job.cluster_key, NUM_STARTS: "1"},
        start_ms=int(stage_run.started * 1000),
    )
    tree.reopen(pipeline)
    return Branch(stage_run, tree, place, run=run, pipeline=pipeline, sweep=sweep)


def _taken_over(job: Job, tree: RunTree) -> Run | None:
    """Return the run that a cluster's job began when it was started before, as this process's; None without one."""
    if job.cluster_key is None:
        return None
    runs = tree.search(filters={CLUSTER_KEY: job.cluster_key}, newest_first=True)
    begun = next((run for run in runs if run.info.status != Outcome.finished.value), None)
    if begun is not None:
        tree.take_over(begun, {NUM_STARTS: str(int(begun.data.tags[NUM_STARTS]) + 1)})
        log.info("go on in run %s, that this job began when it was started before", begun.info.run_id)
    return begun


class Branch:
    """The run of a stage and of its folds."""

    def __init__(
        self, stage_run: StageRun, tree: RunTree, place: Place, *, run: Run, pipeline: Run, sweep: Run | None
    ) -> None:
        self.stage_run = stage_run
        self.tree = tree
        self.place = place
        self.run = run
        self.run_id = str(run.info.run_id)
        self.pipeline_id = str(pipeline.info.run_id)
        self.sweep_id = None if sweep is None else str(sweep.info.run_id)
        self.folds: list[FoldBranch] = []
        self.writer = Writer(tree.store, run_id=self.run_id)
        self.monitor = self._monitor() if stage_run.cfg.mlflow.system_metrics else None

    def log_start(self) -> None:
        """Log what is known before the stage has done anything: settings, code, packages, machine."""
        around, redact = self.stage_run.surroundings, self.stage_run.redactor
        params = flat(redact.tree(science_of(self.stage_run.cfg)))
        tags = {
            "command": command_line(self.stage_run.job),
            "overrides": " ".join(self.stage_run.job.overrides),
            "git.commit": around.git.commit,
            "git.branch": around.git.branch,
            "git.dirty": str(around.git.is_dirty).lower(),
            "git.remote": around.git.remote,
            "mlflow.source.git.commit": around.git.commit,
            "mlflow.source.name": f"prostate_seg stage={self.stage_run.stage}",
            "mlflow.source.type": "LOCAL",
            "mlflow.user": user_name(),
            **{f"machine.{name}": value for name, value in around.machine.items()},
            **{f"package.{name}": around.packages[name] for name in SHOWN_PACKAGES if name in around.packages},
            **around.launched_by,
        }
        shown = {key: _cut(redact.text(value), LONGEST_TAG) for key, value in tags.items() if value}
        self.tree.log(self.run_id, params={k: _cut(v, LONGEST_PARAM) for k, v in params.items()}, tags=shown)
        self._log_files(self._write_start)

    def open_fold(self, index: int) -> "FoldBranch":
        """Open the run of a fold below the stage's."""
        fold = FoldBranch(self, index)
        self.folds.append(fold)
        return fold

    def close(
        self,
        outcome: Outcome,
        record: Mapping[str, Any] | None,
        hashes: Hashes | None,
        error: BaseException | None,
    ) -> None:
        """Log the results, or what ended the run early, and close it, then bring the parents up to date.

        Raises:
            InputError: If the store does not take it.
        """
        if self.monitor is not None:
            self.monitor.finish()
        try:
            num_lost = self.writer.close(within_seconds=SECONDS_TO_CLOSE)
            if num_lost:
                raise OSError(f"{num_lost} records of this run were not taken")
            if record is not None and hashes is not None:
                self._log_results(record, hashes)
            self.tree.log(self.run_id, tags=self._ending(outcome, error))
            self._log_files(self._write_end)
            ended_ms = max(
                now_ms(), int(self.stage_run.started * 1000)
            )  # a clock that was set back ends no run before it began
            self.tree.client.set_terminated(self.run_id, outcome.value, end_time=ended_ms)
            with self.tree.store.lock:
                if record is not None:
                    self._update_parents(record)
                self.tree.settle(self.pipeline_id, outcome)
        except STORE_ERRORS as error:
            raise InputError(
                f"{self.stage_run.stage} has ended {outcome.value} and its files are in {self.stage_run.workspace.root}, "
                f"but run {self.run_id} is not complete\n{unusable(self.tree.store.address, error)}"
            ) from error

    def _ending(self, outcome: Outcome, error: BaseException | None) -> dict[str, str]:
        """Return tags that say what ended a run early, and of a trial what it is to its sweep."""
        pruned = isinstance(error, Pruned)
        state = {} if self.sweep_id is None else {"trial.state": "pruned" if pruned else outcome.name}
        if error is None:
            return state
        text = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        return state | {"ended_by": _cut(self.stage_run.redactor.text(text), LONGEST_TAG)}

    def _log_results(self, record: Mapping[str, Any], hashes: Hashes) -> None:
        result = self.stage_run.result
        assert result is not None
        md5 = {
            f"md5.{kind}/{key}": value for kind in ("inputs", "outputs", "code") for key, value in record[kind].items()
        }
        upstream = {
            f"previous_run_id.{stage}" if run["unchanged"] else f"changed_since.{stage}": run["run_id"] or NONE
            for stage, run in record["upstream"].items()
        }
        tags = {_tag_key(key): value for key, value in (md5 | upstream).items()}
        tags |= dict(result.tags)
        tags["folds"] = ",".join(str(fold.index) for fold in self.folds) or NONE
        if record["inputs_changed_while_running"]:
            tags["inputs_changed_while_running"] = ", ".join(record["inputs_changed_while_running"])
        self.tree.log(self.run_id, tags=tags, metrics={**result.metrics, **result.sought})
        self.tree.client.log_inputs(self.run_id, [_dataset(key, md5) for key, md5 in record["inputs"].items()])
        folders = {key: dict(one.files) for key, one in (*hashes.inputs.items(), *hashes.outputs.items()) if one.files}
        self._log_files(lambda folder: _write_json(folder / "provenance.json", {**record, "files": folders}))

    def _update_parents(self, record: Mapping[str, Any]) -> None:
        """Let the new run take its place: aggregates one level up, what it replaces away, what it reuses beside it."""
        result = self.stage_run.result
        assert result is not None
        if self.sweep_id is not None:
            update_sweep(self.tree, self.sweep_id)
        else:
            self.tree.log(self.pipeline_id, metrics=result.metrics)
        if self.stage_run.cfg.mlflow.on_rerun is OnRerun.supersede and self.place.stage not in NEVER_REPLACED:
            self._supersede()
        if self.sweep_id is None:
            self._link_reused(record["upstream"])

    def _supersede(self) -> None:
        """Delete the earlier runs that this one replaces: ended before it began, and with no fold that it lacks."""
        parent = self.sweep_id or self.pipeline_id
        mine = {str(fold.index) for fold in self.folds}
        for run in self.tree.children(parent, stage=self.place.stage, level=self.place.level.value):
            ended = run.info.end_time is not None and run.info.end_time <= self.run.info.start_time
            theirs = set(run.data.tags.get("folds", NONE).split(",")) - {NONE}
            same_trial = self.sweep_id is None or run.info.run_name == self.run.info.run_name
            if run.info.run_id != self.run_id and ended and theirs <= mine and same_trial:
                self.tree.delete_with_folds(run, replaced_by=self.run_id)

    def _link_reused(self, upstream: Mapping[str, Mapping[str, Any]]) -> None:
        """Show, in a pipeline that has not run them itself, the runs of another pipeline that this one rests on."""
        for name, origin in upstream.items():
            stage = name.split(".")[0]
            there = self.tree.children(self.pipeline_id, stage=stage)
            is_there = any(run.data.tags.get("reused_from", origin["run_id"]) == origin["run_id"] for run in there)
            source = (
                self.tree.get(origin["run_id"]) if origin["run_id"] and origin["unchanged"] and not is_there else None
            )
            if source is not None and source.data.tags.get("mlflow.parentRunId") != self.pipeline_id:
                place = Place(level=Level.stage, pipeline=self.place.pipeline, stage=stage)
                self.tree.link(source, stage, place, parent_id=self.pipeline_id)
                self.tree.log(self.pipeline_id, metrics=source.data.metrics)

    def _log_files(self, write: Callable[[Path], object]) -> None:
        """Log what `write` puts into a folder."""
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            if any(Path(folder).iterdir()):
                self.tree.client.log_artifacts(self.run_id, folder)

    def _write_start(self, folder: Path) -> None:
        redact, job, around = self.stage_run.redactor, self.stage_run.job, self.stage_run.surroundings
        resolved = redact.tree(as_container(self.stage_run.cfg))
        (folder / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False), encoding="utf-8")
        for path in (job.output_dir / job.hydra_dir).glob("*.yaml"):
            redact.copy_file(path, folder / "hydra" / path.name)
        listing = "".join(f"{name}=={version}\n" for name, version in around.packages.items())
        (folder / "packages.txt").write_text(listing, encoding="utf-8")
        if around.git.diff:
            (folder / "git.diff").write_text(redact.text(around.git.diff), encoding="utf-8")
        if around.git.untracked:
            (folder / "git_untracked.txt").write_text(redact.text("\n".join(around.git.untracked)), encoding="utf-8")

    def _write_end(self, folder: Path) -> None:
        redact, result = self.stage_run.redactor, self.stage_run.result
        for path in self.stage_run.job.output_dir.glob("*.log"):
            redact.copy_file(path, folder / "log" / path.name)
        if result is not None:
            _copy(result.figures, folder / "figures")
            _copy(result.reports, folder / "report")
            for path in result.tables:
                redact.copy_file(path, folder / "tables" / path.name)

    def _monitor(self) -> SystemMetricsMonitor:
        uri = resolved_uri(str(self.stage_run.cfg.mlflow.tracking_uri))
        monitor = SystemMetricsMonitor(self.run_id, tracking_uri=uri)
        monitor.start()
        return monitor


class FoldBranch:
    """The run of one fold. Every call returns at once; the writer's thread makes them in order."""

    def __init__(self, branch: Branch, index: int) -> None:
        self.branch = branch
        self.index = index
        self.run_id = ""
        self.logged: set[tuple[str, int, float]] = set()
        """Name, step and value of metrics that the run has from before."""
        stage = branch.place
        self.place = Place(
            level=Level.fold, pipeline=stage.pipeline, stage=stage.stage, fold=str(index), sweep=stage.sweep
        )
        self.started_ms = now_ms()
        branch.writer.put(
            lambda: self._open(self.started_ms)
        )  # alone: what fails is tried again, and a run is made once
        branch.writer.put(lambda: branch.tree.log(self.run_id, params=self._params()))

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of an epoch in one call."""
        self._put(metrics, step=epoch)

    def finish(self, metrics: Mapping[str, float], figures: Sequence[Path]) -> None:
        """Send what the fold came to."""
        self._put(metrics, step=0)
        for path in figures:
            self.branch.writer.put(
                lambda path=path: self.branch.tree.client.log_artifact(self.run_id, str(path), "figures")  # type: ignore[misc]
            )

    def close(self, outcome: Outcome) -> None:
        """End the fold's run."""
        ended = max(now_ms(), self.started_ms)
        self.branch.writer.put(
            lambda: self.branch.tree.client.set_terminated(self.run_id, outcome.value, end_time=ended)
        )

    def _put(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Send metrics but those that the run has from before: training repeats the epochs after which it goes on."""
        stamp = now_ms()

        def send() -> None:
            new = [
                Metric(name, float(value), stamp, step)
                for name, value in metrics.items()
                if (name, step, float(value)) not in self.logged
            ]
            if new:
                self.branch.tree.client.log_batch(self.run_id, metrics=new)

        self.branch.writer.put(send)

    def _open(self, started_ms: int) -> None:
        """Make the run, or go on in that of the fold in a stage that was started before."""
        tree, parent = self.branch.tree, self.branch.run_id
        begun = next(iter(tree.children(parent, fold=str(self.index))), None)
        if begun is None:
            run = tree.create(f"fold{self.index}", self.place, parent_id=parent, start_ms=started_ms)
            self.run_id = str(run.info.run_id)
            return
        self.run_id = str(begun.info.run_id)
        for name in begun.data.metrics:
            history = tree.client.get_metric_history(self.run_id, name)
            self.logged |= {(name, metric.step, metric.value) for metric in history}
        tree.take_over(begun)

    def _params(self) -> dict[str, str]:
        settings = self.branch.stage_run.redactor.tree(science_of(self.branch.stage_run.cfg))
        return {key: _cut(value, LONGEST_PARAM) for key, value in flat(settings).items()}


def _drop_foreign_run_id() -> None:
    """Ignore a run that the environment names: a stage always opens its own, in its place in the tree."""
    run_id = os.environ.pop("MLFLOW_RUN_ID", None)
    if run_id:
        log.warning("MLFLOW_RUN_ID=%s is ignored: a stage opens its own run below its pipeline", run_id)


def _dataset(key: str, md5: str) -> DatasetInput:
    dataset = Dataset(name=key, digest=md5, source_type="local", source=json.dumps({"path": key}))
    return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", "input")])


def _tag_key(key: str) -> str:
    """Return a key that MLflow takes: what it refuses becomes its code between colons, and 250 characters are the most."""
    legal = "".join(
        char if (char.isalnum() and char.isascii()) or char in "_-. :/" else f":{ord(char):x}:" for char in key
    )
    return legal if len(legal) <= 250 else f"{legal[:240]}..."


def _cut(text: str, longest: int) -> str:
    """Replace a text that is too long by a note of where it stands in full."""
    return text if len(text) <= longest else f"({len(text)} characters, see config.yaml and hydra/)"


def _copy(paths: Sequence[Path], folder: Path) -> None:
    for path in paths:
        if path.is_file():
            folder.mkdir(exist_ok=True)
            (folder / path.name).write_bytes(path.read_bytes())


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
