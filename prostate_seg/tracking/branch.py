"""What MLflow is told of one stage: its run, the runs of its folds, and how they stand to the runs around them."""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from prostate_seg.common.address import resolved_uri, shown_address
from prostate_seg.common.errors import InputError, Pruned
from prostate_seg.common.files import md5_of_text
from prostate_seg.config.schema import as_container, science_of
from prostate_seg.operations.job import Outcome, command_line
from prostate_seg.operations.process import user_name
from prostate_seg.provenance.code_digests import CODE_LISTING, code_listing
from prostate_seg.provenance.ds_version import recording_workspace
from prostate_seg.provenance.environment import GitState
from prostate_seg.provenance.record import Hashes, flat
from prostate_seg.tracking.journal import DELIVERED, Header, Record, Spool, new_local_id, plain, remove_delivered
from prostate_seg.tracking.replication import Delivery
from prostate_seg.tracking.run_tree import ALL, NONE, RunTree, now_ms
from prostate_seg.tracking.stage_run import StageRun
from prostate_seg.tracking.store import open_store
from prostate_seg.tracking.sweeps import begun_on_disk, sweep_key
from prostate_seg.tracking.writer import Writer

log = logging.getLogger(__name__)

SECONDS_TO_CLOSE = 30.0
"""A store that fails at the end of a stage is tried again for this long; what it then lacks waits for stage=sync."""
LONGEST_PARAM = 6000
"""Characters of a param; MLflow cuts longer ones."""
LONGEST_TAG = 5000
"""Characters of a tag; MLflow's databases hold a little more."""
SHOWN_PACKAGES = ("torch", "monai", "numpy", "scipy", "simpleitk", "hydra-core", "mlflow", "dvc", "prostate-seg")
"""Packages whose versions are tags; packages.txt has all."""
NEVER_REPLACED = ("register",)
"""Stages whose earlier runs stay: the versions of the registry are shown with them."""


def open_branch(stage_run: StageRun) -> "Branch":
    """Open the store and, in it, the run of a stage; or record the stage on disk, if mlflow.on_unreachable says so.

    Raises:
        InputError: If the store cannot be reached or written.
    """
    _drop_foreign_run_id()
    cfg = stage_run.cfg
    spool_root = Path(cfg.paths.spool)
    remove_delivered(spool_root)
    header = Header(
        what=f"{stage_run.stage} of {cfg.mlflow.name}",
        address=shown_address(resolved_uri(str(cfg.mlflow.tracking_uri))),
        experiment=cfg.mlflow.experiment,
        workspace=str(recording_workspace(cfg, stage_run.workspace).root.absolute()),
        cache=str(stage_run.workspace.cache.absolute()),
    )
    spool = Spool.create(spool_root, header, name=stage_run.stage)
    branch = Branch(stage_run, spool)
    try:
        branch.begin()
    except BaseException as error:
        is_kept = isinstance(error, InputError) and cfg.mlflow.on_unreachable == "spool"
        if not is_kept:
            spool.remove()
            raise
        log.warning("%s", str(error).splitlines()[0])
        log.warning("this run is recorded in %s; when the store can be reached, stage=sync sends it", spool.folder)
    branch.start_writing()
    return branch


class Branch:
    """The run of a stage and of its folds. What it is told is on disk at once; the writer's thread tells the store."""

    def __init__(self, stage_run: StageRun, spool: Spool) -> None:
        self.stage_run = stage_run
        self.spool = spool
        self.key = new_local_id()
        self.pipeline_key = new_local_id()
        self.folds: list[FoldBranch] = []
        self.delivery = Delivery(spool, self._connect)
        self.writer: Writer | None = None
        self.monitor: SystemMetricsMonitor | None = None

    @property
    def run_id(self) -> str:
        """The store's id of the run; a local one as long as the store has not been told of it."""
        return self.delivery.id_of(self.key)

    @property
    def pipeline_id(self) -> str:
        """The store's id of the pipeline; a local one as long as the store has not been told of the run."""
        return self.delivery.id_of(self.pipeline_key)

    def begin(self) -> None:
        """Open the run and log what is known before the stage has done anything.

        Raises:
            InputError: If the store cannot be reached or written.
        """
        cfg, job = self.stage_run.cfg, self.stage_run.job
        opening = {
            "do": "stage",
            "run": self.key,
            "pipeline": cfg.mlflow.name,
            "pipeline_key": self.pipeline_key,
            "fresh": cfg.mlflow.fresh and job.sweep_folder is None,
            "stage": self.stage_run.stage,
            "fold": ALL if cfg.fold.index is None else str(cfg.fold.index),
            "sweep_key": sweep_key(job.sweep_folder) if job.sweep_folder else None,
            "sweep": begun_on_disk(Path(cfg.paths.spool), job.sweep_folder) if job.sweep_folder else None,
            "number": job.number,
            "cluster_key": job.cluster_key,
            "start_ms": int(self.stage_run.started * 1000),
        }
        self.spool.put(opening)
        self.log_start()
        store = self.delivery.tree.store
        for number, record in self.spool.records():
            store.ask(lambda number=number, record=record: self.delivery.deliver(number, record))  # type: ignore[misc]
        if self.spool.num_refused:
            raise InputError(
                f"the tracking store {store.address} refuses the run of {self.stage_run.stage}; why is said above"
            )

    def start_writing(self) -> None:
        """Let a thread tell the store all that comes from now on, and what it has missed."""
        is_failing = self.spool.num_delivered < self.spool.num_records
        beat = partial(self.delivery.beat, self.key)
        self.writer = Writer(self.spool, self.delivery.deliver, beat=beat, is_failing=is_failing)
        if self.stage_run.cfg.mlflow.system_metrics:
            self.monitor = _Monitor(self)
            self.monitor.start()

    def put(self, record: Record) -> None:
        """Take a record; returns at once."""
        if self.writer is None:
            self.spool.put(record)
        else:
            self.writer.put(record)

    def log_start(self) -> None:
        """Log what is known before the stage has done anything: settings, code, packages, machine."""
        around, redact = self.stage_run.surroundings, self.stage_run.redactor
        params = flat(redact.tree(science_of(self.stage_run.cfg)))
        tags = {
            "command": command_line(self.stage_run.job),
            "overrides": " ".join(self.stage_run.job.overrides),
            **git_tags(around.git),
            "mlflow.source.name": f"prostate_seg stage={self.stage_run.stage}",
            "mlflow.source.type": "LOCAL",
            "mlflow.user": user_name(),
            **{f"machine.{name}": value for name, value in around.machine.items()},
            **{f"package.{name}": around.packages[name] for name in SHOWN_PACKAGES if name in around.packages},
            **around.launched_by,
        }
        shown = {key: _cut(redact.text(value), LONGEST_TAG) for key, value in tags.items() if value}
        cut = {key: _cut(value, LONGEST_PARAM) for key, value in params.items()}
        self.put({"do": "log", "run": self.key, "params": cut, "tags": shown})
        self.put_files(self._write_start)

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
        """Log the results, or what ended the run early, close it, and let it take its place.

        Raises:
            InputError: If something can neither be sent nor kept, or the store refuses it for good.
        """
        assert self.writer is not None
        if self.monitor is not None:
            self.monitor.finish()
        if record is not None and hashes is not None:
            self._put_results(record, hashes)
        self.put({"do": "log", "run": self.key, "tags": self._ending(error)})
        self.put_files(self._write_end)
        ended_ms = max(now_ms(), int(self.stage_run.started * 1000))  # a clock set back ends no run before it began
        end = {"run": self.key, "status": outcome.value, "end_ms": ended_ms}
        self.put({"do": "end", **end})
        self.put({"do": "place", **end, **self._place(outcome, error, record)})
        num_left = self.writer.close(within_seconds=SECONDS_TO_CLOSE)
        is_lost = num_left > 0 and not self.spool.flush()
        if num_left == 0 and not self.spool.num_refused:
            self.spool.remove()
            return
        self.spool.release()
        if is_lost or self.spool.num_refused:
            raise InputError(self._what_is_lost(outcome, num_left))
        folder, address = self.spool.folder, self.spool.header.address
        log.warning("%d records of this run wait in %s; stage=sync sends them to %s", num_left, folder, address)

    def _what_is_lost(self, outcome: Outcome, num_left: int) -> str:
        done = f"{self.stage_run.stage} has ended {outcome.value} and its files are in {self.stage_run.workspace.root}"
        if num_left:
            return (
                f"{done}, but {num_left} records of its run can neither be sent nor kept: {self.spool.folder} is full"
            )
        notes = self.spool.folder / DELIVERED
        return (
            f"{done}, but the tracking store refuses {self.spool.num_refused} records of run {self.run_id}: see {notes}"
        )

    def _place(self, outcome: Outcome, error: BaseException | None, record: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return what the store must know to let the run take its place among the others."""
        result = self.stage_run.result
        is_finished = record is not None and result is not None
        is_replacing = self.stage_run.cfg.mlflow.on_rerun == "supersede"
        supersedes = is_finished and is_replacing and self.stage_run.stage not in NEVER_REPLACED
        return {
            "pipeline_key": self.pipeline_key,
            "trial_state": "pruned" if isinstance(error, Pruned) else outcome.name,
            "is_finished": is_finished,
            "metrics": points_of(result.metrics, step=0) if is_finished and result is not None else [],
            "upstream": record["upstream"] if record is not None else {},
            "folds": [str(fold.index) for fold in self.folds],
            "supersedes": supersedes,
        }

    def _ending(self, error: BaseException | None) -> dict[str, str]:
        """Return tags that say what ended a run early."""
        if error is None:
            return {}
        text = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        return {"ended_by": _cut(self.stage_run.redactor.text(text), LONGEST_TAG)}

    def _put_results(self, record: Mapping[str, Any], hashes: Hashes) -> None:
        result = self.stage_run.result
        assert result is not None
        md5 = {f"md5.{kind}/{key}": value for kind in ("inputs", "outputs") for key, value in record[kind].items()}
        md5["md5.code"] = md5_of_text(code_listing(record["code_digests"]))
        upstream = {
            f"previous_run_id.{stage}" if run["unchanged"] else f"changed_since.{stage}": run["run_id"] or NONE
            for stage, run in record["upstream"].items()
        }
        tags = {_tag_key(key): value for key, value in (md5 | upstream).items()}
        tags |= dict(result.tags)
        tags["folds"] = ",".join(str(fold.index) for fold in self.folds) or NONE
        if record["inputs_changed_while_running"]:
            tags["inputs_changed_while_running"] = ", ".join(record["inputs_changed_while_running"])
        numbers = points_of({**result.metrics, **result.objectives}, step=0)
        self.put({"do": "log", "run": self.key, "tags": tags, "metrics": numbers})
        self.put({"do": "inputs", "run": self.key, "datasets": record["inputs"]})
        folders = {key: dict(one.files) for key, one in (*hashes.inputs.items(), *hashes.outputs.items()) if one.files}

        def write_record(folder: Path) -> None:
            _write_json(folder / "provenance.json", {**record, "files": folders})
            (folder / CODE_LISTING).write_text(code_listing(record["code_digests"]), encoding="utf-8")

        self.put_files(write_record)

    def put_files(self, write: Callable[[Path], object], *, run: str | None = None, to: str | None = None) -> None:
        """Keep what `write` puts into a folder, and let the run have it; a disk that is full stops nothing.

        Args:
            write: Writes into an empty folder.
            run: Local id of the run, of the stage's where absent.
            to: Folder among the run's artifacts.
        """
        try:
            folder = self._written(write)
        except OSError as error:
            log.warning("%s: some files of this run are not recorded", error)
            return
        if any(folder.iterdir()):
            is_inside = folder.is_relative_to(self.spool.folder)
            shown = folder.relative_to(self.spool.folder) if is_inside else folder
            self.put({"do": "files", "run": run or self.key, "folder": str(shown), "to": to})

    def _written(self, write: Callable[[Path], object]) -> Path:
        """Return a folder with what `write` writes: in the spool, or where temporary files lie if that is full."""
        try:
            folder = self.spool.files_folder()
            write(folder)
        except OSError:
            folder = Path(tempfile.mkdtemp(prefix="prostate_seg-"))
            write(folder)
        return folder

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

    def _connect(self) -> RunTree:
        return RunTree(open_store(self.stage_run.cfg.mlflow, cache=self.stage_run.workspace.cache))


class _Monitor(SystemMetricsMonitor):
    """MLflow's watch over processor, memory and disk, with its numbers going the way of all others."""

    def __init__(self, branch: Branch) -> None:
        super().__init__(branch.run_id, tracking_uri="http://127.0.0.1:9")  # nothing is sent to it
        self._branch = branch

    def monitor(self) -> None:
        """Look every few seconds until the stage ends, whether the store answers or not."""
        while not self._shutdown_event.is_set():
            for _ in range(self.samples_before_logging):
                self.collect_metrics()
                if self._shutdown_event.wait(self.sampling_interval):
                    return
            self.publish_metrics(self.aggregate_metrics())

    def publish_metrics(self, metrics: dict[str, float]) -> None:
        """Take the means since the last time."""
        named = {f"{self._metrics_prefix}{name}": value for name, value in metrics.items()}
        step = self._logging_step
        self._branch.put({"do": "log", "run": self._branch.key, "metrics": points_of(named, step=step)})
        self._logging_step += 1
        for monitor in self.monitors:
            monitor.clear_metrics()


class FoldBranch:
    """The run of one fold. Every call returns at once."""

    def __init__(self, branch: Branch, index: int) -> None:
        self.branch = branch
        self.index = index
        self.key = new_local_id()
        self.started_ms = now_ms()
        opening = {"do": "fold", "run": self.key, "parent": branch.key, "fold": str(index), "start_ms": self.started_ms}
        branch.put(opening)
        branch.put({"do": "log", "run": self.key, "params": self._params()})

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of an epoch."""
        self.branch.put({"do": "log", "run": self.key, "metrics": points_of(metrics, step=epoch)})

    def finish(self, metrics: Mapping[str, float], figures: Sequence[Path]) -> None:
        """Take what the fold came to."""
        self.branch.put({"do": "log", "run": self.key, "metrics": points_of(metrics, step=0)})
        self.branch.put_files(lambda folder: _copy(figures, folder), run=self.key, to="figures")

    def close(self, outcome: Outcome) -> None:
        """End the fold's run."""
        self.branch.put(
            {"do": "end", "run": self.key, "status": outcome.value, "end_ms": max(now_ms(), self.started_ms)}
        )

    def _params(self) -> dict[str, str]:
        settings = self.branch.stage_run.redactor.tree(science_of(self.branch.stage_run.cfg))
        return {key: _cut(value, LONGEST_PARAM) for key, value in flat(settings).items()}


def git_tags(state: GitState) -> dict[str, str]:
    """Return what is known of the repository as tags; what is not known is absent."""
    tags = {
        "git.commit": state.commit,
        "git.branch": state.branch,
        "git.dirty": "" if state.is_dirty is None else str(state.is_dirty).lower(),
        "git.remote": state.remote,
        "mlflow.source.git.commit": state.commit,
    }
    return {key: value for key, value in tags.items() if value}


def _drop_foreign_run_id() -> None:
    """Ignore a run that the environment names: a stage always opens its own, in its place in the tree."""
    run_id = os.environ.pop("MLFLOW_RUN_ID", None)
    if run_id:
        log.warning("MLFLOW_RUN_ID=%s is ignored: a stage opens its own run below its pipeline", run_id)


def points_of(metrics: Mapping[str, float], *, step: int) -> list[tuple[str, float | str, int, int]]:
    """Return metrics as a record has them: name, value, time and step."""
    stamp = now_ms()
    return [(name, plain(value), stamp, step) for name, value in metrics.items()]


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
