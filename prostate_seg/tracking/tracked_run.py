"""Run of a stage and runs of its folds in MLflow: written to a journal, which a background thread replicates."""

import itertools
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from prostate_seg.common.address import resolved_uri, shown_address
from prostate_seg.common.errors import InputError, Pruned, first_line
from prostate_seg.common.files import md5_of_text
from prostate_seg.common.settings import flat, plain
from prostate_seg.config.schema import Config, science_of
from prostate_seg.config.workspace import FoldRecord, StageResult, Workspace
from prostate_seg.operations.job import Job, Outcome, command_line, outcome_of
from prostate_seg.operations.process import user_name
from prostate_seg.provenance.code_digests import CODE_LISTING, code_listing
from prostate_seg.provenance.ds_version import recording_workspace
from prostate_seg.provenance.environment import launcher_tags, packages
from prostate_seg.tracking import records
from prostate_seg.tracking.journal import ACKNOWLEDGED, Header, Journal, new_local_id, remove_replicated
from prostate_seg.tracking.recorded_runs import open_tree
from prostate_seg.tracking.records import ALL, NONE, LogData, metric_points, now_ms
from prostate_seg.tracking.replication import ReplicationThread, Replicator
from prostate_seg.tracking.stage_run import Provenance, StageRun
from prostate_seg.tracking.store.run_tree import DESCRIPTION
from prostate_seg.tracking.sweeps import begun_in_journal, sweep_key

log = logging.getLogger(__name__)

SECONDS_TO_CLOSE = 30.0
"""Time for which a failing store is tried again at the end of a stage; the rest waits in the journal for stage=sync."""
MAX_PARAM_LENGTH = 6000
"""Characters of a param; MLflow cuts longer ones."""
MAX_TAG_LENGTH = 5000
"""Characters of a tag; MLflow's databases hold a little more."""
SHOWN_PACKAGES = ("torch", "monai", "numpy", "scipy", "simpleitk", "hydra-core", "mlflow", "dvc", "prostate-seg")
"""Packages whose versions are tags; packages.txt has all."""
NEVER_REPLACED = ("register",)
"""Stages whose earlier runs stay: versions in the registry link to them."""


class TrackedRun(StageRun):
    """Run of a stage and of its folds. Records are on disk at once; a thread replicates them into the store."""

    key: str
    pipeline_key: str

    def __init__(self, cfg: Config, workspace: Workspace, job: Job) -> None:
        """Open the run in the tracking store, or in a journal only if mlflow.on_unreachable allows it.

        Raises:
            InputError: If the store cannot be reached or written, or DS_VERSION.json cannot be read.
        """
        super().__init__(cfg, workspace, job)
        ignored = os.environ.pop("MLFLOW_RUN_ID", None)
        if ignored:  # MLflow would put the stage's metrics into it
            log.warning("MLFLOW_RUN_ID=%s is ignored: a stage opens its own run below its pipeline", ignored)
        journal_root = Path(cfg.paths.journal)
        remove_replicated(journal_root)
        header = Header(
            what=f"{self.stage} of {cfg.mlflow.name}",
            address=shown_address(resolved_uri(str(cfg.mlflow.tracking_uri))),
            experiment=cfg.mlflow.experiment,
            workspace=str(recording_workspace(cfg, workspace).root.absolute()),
            cache=str(workspace.cache.absolute()),
        )
        self.journal = Journal.create(journal_root, header, name=self.stage)
        self.replicator = Replicator(self.journal, lambda: open_tree(cfg.mlflow, cache=workspace.cache))
        self.key, self.pipeline_key, self.ids = new_local_id(), new_local_id(), self.journal.ids
        self.folds: list[str] = []
        self._open()
        self.thread = ReplicationThread(self.replicator, self.key)
        self._is_ending = threading.Event()
        self._system_metrics = threading.Thread(target=self._log_system_metrics, daemon=True, name="system metrics")
        if cfg.mlflow.system_metrics:
            self._system_metrics.start()

    def _open(self) -> None:
        """Open the run in the store and log what is known before the stage starts."""
        try:
            self._log_start()
            store = self.replicator.tree.store
            while self.journal.num_acknowledged < self.journal.num_records:
                store.call(partial(self.replicator.replicate, max_entries=1))
            if self.journal.num_refused:
                refused = f"the tracking store {store.address} refuses the run of {self.stage}"
                raise InputError(f"{refused}; the warnings above have the reason")
        except BaseException as error:
            if not isinstance(error, InputError) or self.cfg.mlflow.on_unreachable != "journal":
                self.journal.remove()
                raise
            folder = self.journal.folder
            log.warning("%s", first_line(error))
            log.warning("this run is recorded in %s; when the store can be reached, stage=sync sends it", folder)

    def _log_system_metrics(self) -> None:
        """Log MLflow's system metrics until the end of the run; MLflow's own thread ends when the store fails."""
        sampler = SystemMetricsMonitor(self.run_id, tracking_uri="http://127.0.0.1:9")  # nothing is sent to it
        for step in itertools.count():
            for _ in range(sampler.samples_before_logging):
                sampler.collect_metrics()
                if self._is_ending.wait(sampler.sampling_interval):
                    return
            means = {f"system/{name}": value for name, value in sampler.aggregate_metrics().items()}
            self.journal.append(LogData(run=self.key, metrics=metric_points(means, step=step)))
            for monitor in sampler.monitors:
                monitor.clear_metrics()

    def append_files(self, write: Callable[[Path], object], *, run: str | None = None, to: str | None = None) -> None:
        """Keep the files that `write` puts into an empty folder, as artifacts of a run below `to`; a full disk is a warning.

        They belong to the run of the stage unless the local id of another is given.
        """
        try:
            try:
                folder = self.journal.files_folder()
                write(folder)
            except OSError:  # the journal's disk is full
                folder = Path(tempfile.mkdtemp(prefix="prostate_seg-"))
                write(folder)
        except OSError as error:
            log.warning("%s: some files of this run are not recorded", error)
            return
        if any(folder.iterdir()):
            is_inside = folder.is_relative_to(self.journal.folder)
            shown = folder.relative_to(self.journal.folder) if is_inside else folder
            self.journal.append(records.LogFiles(run=run or self.key, folder=str(shown), to=to))

    @contextmanager
    def open_fold(self, index: int) -> Iterator[FoldRecord]:
        """Record one fold: a run below that of the stage."""
        fold = _TrackedFold(self, new_local_id())
        started_ms = now_ms()
        self.journal.append(records.OpenFold(run=fold.key, parent=self.key, fold=str(index), start_ms=started_ms))
        self.journal.append(LogData(run=fold.key, params=self._params()))
        self.folds.append(str(index))
        outcome = Outcome.finished
        try:
            yield fold
        except BaseException as error:
            outcome = outcome_of(error)
            raise
        finally:
            self.journal.append(records.EndRun(run=fold.key, status=outcome, end_ms=max(now_ms(), started_ms)))

    def _close(self, outcome: Outcome, error: BaseException | None, provenance: Provenance | None) -> None:
        """Log the results, or the error that ended the run, close it, and wait for the replication of the rest.

        Raises:
            InputError: If a record can neither be sent nor kept, or the store refuses it for good.
        """
        self._is_ending.set()
        if self.cfg.mlflow.system_metrics:
            self._system_metrics.join()
        if provenance is not None and self.result is not None:
            self._log_results(self.result, provenance)
        if error is not None:
            ended_by = self.redactor.text(f"{type(error).__name__}: {first_line(error)}")
            self.journal.append(LogData(run=self.key, tags={"ended_by": _cut(ended_by, MAX_TAG_LENGTH)}))
        self.append_files(self._write_end)
        ended_ms = max(now_ms(), int(self.started * 1000))  # a clock set back ends no run before it began
        self.journal.append(records.EndRun(run=self.key, status=outcome, end_ms=ended_ms))
        is_replacing = self.cfg.mlflow.on_rerun == "supersede" and self.stage not in NEVER_REPLACED
        self.journal.append(
            records.SettleRun(
                run=self.key,
                pipeline_key=self.pipeline_key,
                status=outcome,
                end_ms=ended_ms,
                trial_state="pruned" if isinstance(error, Pruned) else outcome.name,
                is_finished=provenance is not None,
                metrics=() if provenance is None else metric_points(provenance["metrics"], step=0),
                upstream={} if provenance is None else provenance["upstream"],
                folds=tuple(self.folds),
                supersedes=provenance is not None and is_replacing,
            )
        )
        self._finish_replication(outcome)

    def _finish_replication(self, outcome: Outcome) -> None:
        num_left = self.thread.close(within_seconds=SECONDS_TO_CLOSE)
        journal = self.journal
        is_lost = num_left > 0 and not journal.flush()
        if num_left == 0 and not journal.num_refused:
            journal.remove()
            return
        journal.release()
        where = f"{self.stage} has ended {outcome} and its files are in {self.workspace.root}"
        if is_lost:
            raise InputError(
                f"{where}, but {num_left} records of its run can neither be sent nor kept: {journal.folder} is full"
            )
        if journal.num_refused:
            raise InputError(
                f"{where}, but the tracking store refuses {journal.num_refused} records of run {self.run_id}: "
                f"see {journal.folder / ACKNOWLEDGED}"
            )
        folder, address = journal.folder, journal.header.address
        log.warning("%d records of this run wait in %s; stage=sync sends them to %s", num_left, folder, address)

    def _log_start(self) -> None:
        """Append the records that open the run, with settings, code, packages and machine."""
        cfg, job = self.cfg, self.job
        folder = job.sweep_folder
        self.journal.append(
            records.OpenStage(
                run=self.key,
                pipeline=cfg.mlflow.name,
                pipeline_key=self.pipeline_key,
                fresh=cfg.mlflow.fresh and folder is None,
                stage=self.stage,
                fold=ALL if cfg.fold.index is None else str(cfg.fold.index),
                sweep_key=None if folder is None else sweep_key(folder),
                sweep=None if folder is None else begun_in_journal(Path(cfg.paths.journal), folder),
                number=job.number,
                cluster_key=job.cluster_key,
                start_ms=int(self.started * 1000),
            )
        )
        self.journal.append(LogData(run=self.key, params=self._params(), tags=self._start_tags()))
        self.append_files(self._write_start)

    def _start_tags(self) -> dict[str, str]:
        """Return tags of command, code, machine and packages; what is not known has none."""
        versions = packages()
        tags = {
            "command": command_line(self.job),
            "overrides": " ".join(self.job.overrides),
            "git.commit": self.git.commit,
            "git.branch": self.git.branch,
            "git.dirty": "" if self.git.is_dirty is None else str(self.git.is_dirty).lower(),
            "git.remote": self.git.remote,
            "mlflow.source.git.commit": self.git.commit,
            "mlflow.source.name": f"prostate_seg stage={self.stage}",
            "mlflow.source.type": "LOCAL",
            "mlflow.user": user_name(),
            **{f"machine.{name}": value for name, value in self.machine.items()},
            **{f"package.{name}": versions[name] for name in SHOWN_PACKAGES if name in versions},
            **launcher_tags(),
        }
        return {key: _cut(self.redactor.text(value), MAX_TAG_LENGTH) for key, value in tags.items() if value}

    def _params(self) -> dict[str, str]:
        settings = flat(self.redactor.tree(science_of(self.cfg)))
        return {key: _cut(value, MAX_PARAM_LENGTH) for key, value in settings.items()}

    def _log_results(self, result: StageResult, provenance: Provenance) -> None:
        """Log hashes, lineage and metrics of a stage that has finished."""
        code = code_listing(provenance["code_digests"])
        tags = {"folds": ",".join(self.folds) or NONE}
        tags |= {f"md5.{kind}/{key}": md5 for kind in ("inputs", "outputs") for key, md5 in provenance[kind].items()}
        tags["md5.code"] = md5_of_text(code)
        for stage, run in provenance["upstream"].items():
            name = "previous_run_id" if run["unchanged"] else "changed_since"
            tags[f"{name}.{stage}"] = run["run_id"] or NONE
        # MLflow shows them in this order
        tags = {**result.tags, **{_tag_key(key): value for key, value in tags.items()}}
        if result.description:
            tags[DESCRIPTION] = _cut(self.redactor.text(result.description), MAX_TAG_LENGTH)
        if provenance["inputs_changed_while_running"]:
            tags["inputs_changed_while_running"] = ", ".join(provenance["inputs_changed_while_running"])
        points = metric_points({**result.metrics, **result.objectives}, step=0)
        self.journal.append(LogData(run=self.key, tags=tags, metrics=points))
        self.journal.append(records.LogInputs(run=self.key, datasets=provenance["inputs"]))

        def write(folder: Path) -> None:
            (folder / "provenance.json").write_text(json.dumps(provenance, indent=1), encoding="utf-8")
            (folder / CODE_LISTING).write_text(code, encoding="utf-8")

        self.append_files(write)

    def _write_start(self, folder: Path) -> None:
        redact = self.redactor
        resolved = redact.tree(plain(self.cfg))
        (folder / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False), encoding="utf-8")
        for path in (self.job.output_dir / self.job.hydra_dir).glob("*.yaml"):
            redact.copy_file(path, folder / "hydra" / path.name)
        listing = "".join(f"{name}=={version}\n" for name, version in packages().items())
        (folder / "packages.txt").write_text(listing, encoding="utf-8")
        for name, text in (("git.diff", self.git.diff), ("git_untracked.txt", "\n".join(self.git.untracked))):
            if text:
                (folder / name).write_text(redact.text(text), encoding="utf-8")

    def _write_end(self, folder: Path) -> None:
        for path in self.job.output_dir.glob("*.log"):
            self.redactor.copy_file(path, folder / "log" / path.name)
        if self.result is not None:
            _copy(self.result.figures, folder / "figures")
            _copy(self.result.reports, folder / "report")
            for path in self.result.tables:
                self.redactor.copy_file(path, folder / "tables" / path.name)


@dataclass(frozen=True, slots=True)
class _TrackedFold(FoldRecord):
    """Records of one fold. Every call returns at once."""

    run: TrackedRun
    key: str

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.run.journal.append(LogData(run=self.key, metrics=metric_points(metrics, step=epoch)))

    def finish(self, metrics: Mapping[str, float], figures: Sequence[Path]) -> None:
        self.run.journal.append(LogData(run=self.key, metrics=metric_points(metrics, step=0)))
        self.run.append_files(partial(_copy, figures), run=self.key, to="figures")


def _tag_key(key: str) -> str:
    """Return a key that MLflow takes: other characters become their code between colons; at most 250 characters.

    A path outside of the workspace is absolute, and MLflow refuses two slashes in sequence.
    """
    legal = "".join(
        char if (char.isalnum() and char.isascii()) or char in "_-. :/" else f":{ord(char):x}:"
        for char in key.replace("//", "/")
    )
    return legal if len(legal) <= 250 else f"{legal[:240]}..."


def _cut(text: str, max_length: int) -> str:
    """Replace a text that is too long by where it is recorded in full."""
    return text if len(text) <= max_length else f"({len(text)} characters, see config.yaml and hydra/)"


def _copy(paths: Sequence[Path], folder: Path) -> None:
    for path in paths:
        if path.is_file():
            folder.mkdir(exist_ok=True)
            (folder / path.name).write_bytes(path.read_bytes())
