"""Run of one stage: its provenance goes to DS_VERSION.json, with and without a tracking store.

`StageRun` records nothing else (mlflow=off); `TrackedRun` in tracked_run.py records in MLflow, too. A stage whose last run was
the same can be skipped (mlflow.skip_finished). Nothing here imports MLflow.
"""

import logging
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prostate_seg.common.address import project_root
from prostate_seg.common.settings import plain
from prostate_seg.config.schema import Config, science_of
from prostate_seg.config.workspace import StageResult, Workspace
from prostate_seg.operations.job import Job, NullRun, Outcome, command_line, outcome_of
from prostate_seg.operations.process import now_text
from prostate_seg.provenance import ds_version
from prostate_seg.provenance.code_digests import stage_code
from prostate_seg.provenance.environment import git_state, machine, packages
from prostate_seg.provenance.hashing import Hashed
from prostate_seg.provenance.record import ancestors, hashes_by_key, path_of
from prostate_seg.provenance.redaction import Redactor
from prostate_seg.provenance.verification import compare

log = logging.getLogger(__name__)

NOT_IN_RECORD = ("diff", "untracked", "problem")
"""State of git that is an artifact or a warning instead."""
Provenance = dict[str, Any]
"""Content of provenance.json; without the listings of folders (`files`) it is the stage's entry of DS_VERSION.json."""


class StageRun(NullRun):
    """One stage of one job while it runs, recorded in DS_VERSION.json alone."""

    key: str | None = None
    """Local id of the run; None without a tracking store."""
    pipeline_key: str | None = None
    ids: Mapping[str, str] = MappingProxyType({})
    """Ids of runs in the tracking store by local id."""

    def __init__(self, cfg: Config, workspace: Workspace, job: Job) -> None:
        """Collect what is known before the stage starts.

        Raises:
            InputError: If DS_VERSION.json cannot be read: the stage stops now, not when it has finished.
        """
        assert cfg.stage is not None
        ds_version.read_entries(workspace)
        self.cfg, self.stage, self.workspace, self.job = cfg, cfg.stage, workspace, job
        self.git, self.machine = git_state(Path.cwd()), machine()
        if self.git.problem:
            log.warning("this run records no commit or no diff, because git refuses: %s", self.git.problem)
        self.redactor = Redactor(settings={"overrides": job.overrides, **plain(cfg)})
        self.result: StageResult | None = None
        self.started = time.time()
        self._clock = time.monotonic()  # unlike self.started, it never goes back

    @property
    def run_id(self) -> str | None:
        """Id of the run in the tracking store, its local id until that has given one; None without a store."""
        return self._id_of(self.key)

    def _id_of(self, key: str | None) -> str | None:
        return None if key is None else self.ids.get(key, key)

    def finish(self, result: StageResult) -> None:
        """Keep the result of the stage for `close`."""
        self.result = result

    def close(self, outcome: Outcome, error: BaseException | None = None) -> None:
        """Hash what the stage read and wrote, write its entry of DS_VERSION.json, and close the run.

        Raises:
            InputError: If a file cannot be hashed, or something can neither be sent nor kept.
        """
        shown = "" if self.run_id is None else f", run {self.run_id} of {self.cfg.mlflow.name}"
        log.info("%s %s after %.1f s%s", self.stage, outcome, time.monotonic() - self._clock, shown)
        recording = ds_version.recording_workspace(self.cfg, self.workspace)
        provenance: Provenance | None = None
        try:
            if outcome is Outcome.finished and self.result is not None:
                provenance = self._provenance(self.result)
                entry = {name: value for name, value in provenance.items() if name != "files"}
                ds_version.write_entry(recording, ds_version.entry_name(self.cfg), entry)
        except BaseException as failure:  # such as an output that cannot be hashed
            self._close(outcome_of(failure), failure, None)
            raise
        try:
            self._close(outcome, error, provenance)
        finally:
            if provenance is not None:
                ds_version.replace_ids(recording, self.ids)

    def _close(self, outcome: Outcome, error: BaseException | None, provenance: Provenance | None) -> None:
        """Record the end in the tracking store; the provenance is None for a stage that did not finish."""

    def _provenance(self, result: StageResult) -> Provenance:
        """Return the provenance of a finished stage, without secrets."""
        redact, code = self.redactor, stage_code(self.stage, cache_folder=self.workspace.cache)
        inputs = hashes_by_key(result.inputs, workspace=self.workspace)
        outputs = hashes_by_key(result.outputs, workspace=self.workspace)
        git = {name: value for name, value in asdict(self.git).items() if name not in NOT_IN_RECORD}
        return {
            "run_id": self.run_id,
            "pipeline": self.cfg.mlflow.name,
            "pipeline_run_id": self._id_of(self.pipeline_key),
            "experiment": self.cfg.mlflow.experiment,
            "finished_at": now_text(),
            "seconds": round(time.monotonic() - self._clock, 1),
            "command": redact.tree(command_line(self.job)),
            "overrides": redact.tree(list(self.job.overrides)),
            "settings": redact.tree(science_of(self.cfg)),
            "metrics": dict(result.metrics),
            "sought": dict(result.objectives),
            "inputs": {key: hashed.md5 for key, hashed in inputs.items()},
            "outputs": {key: hashed.md5 for key, hashed in outputs.items()},
            "inputs_changed_while_running": self._changed_while_running(inputs),
            "upstream": ancestors(inputs, self._upstream_entries(), workspace=self.workspace),
            "code": code.files,
            "code_digests": code.digests,
            "git": redact.tree(git),
            "packages": packages(),
            "machine": self.machine,
            "files": {key: dict(hashed.files) for key, hashed in (inputs | outputs).items() if hashed.files},
        }

    def _changed_while_running(self, inputs: Mapping[str, Hashed]) -> list[str]:
        """Return the inputs that were written to since the stage started, and warn of them."""
        now = time.time()  # a time in the future, as after the clock was set back, is no evidence
        changed = [key for key, hashed in inputs.items() if self.started < hashed.newest_mtime <= now]
        for key in changed:
            log.warning("%s was written to while %s ran: its recorded hash is that of the end", key, self.stage)
        return changed

    def _upstream_entries(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the entries of the other stages; in a temporary workspace of DVC, at first those of the project."""
        entries = ds_version.known_entries(self.workspace)
        if not entries and os.environ.get("DVC_ROOT"):
            entries = ds_version.read_entries(replace(self.workspace, root=project_root()))
        return {name: entry for name, entry in entries.items() if name.split(".")[0] != self.stage}


def finished_before(cfg: Config, workspace: Workspace, job: Job) -> StageResult | None:
    """Return the result of the stage's last run if that had the same settings, inputs and code, and its outputs are in place.

    Versions of packages are not compared; stage=verify compares them. None if the stage must run; the reason is logged.

    Raises:
        InputError: If DS_VERSION.json or the tracking store cannot be used.
    """
    name = ds_version.entry_name(cfg)
    entry = ds_version.read_entries(ds_version.recording_workspace(cfg, workspace)).get(name)
    if entry is None or not entry["outputs"]:  # those outside of the workspace, as of register, are not compared
        return None
    reason = _reason_to_run(name, entry, cfg, workspace, job)
    if reason:
        log.info("%s runs again: %s", name, reason)
        return None
    log.info(
        "%s is skipped:%s of %s, finished %s, had the same settings, inputs and code, and its outputs are in place",
        name,
        "" if entry["run_id"] is None else f" run {entry['run_id']}",
        entry["pipeline"],
        entry["finished_at"],
    )
    return StageResult(metrics=entry["metrics"], objectives=entry["sought"])


def _reason_to_run(name: str, entry: Mapping[str, Any], cfg: Config, workspace: Workspace, job: Job) -> str:
    """Return what differs from the last run of a stage, or that the store no longer has it; empty if nothing does."""
    redact = Redactor(settings={"overrides": job.overrides, **plain(cfg)})
    settings = redact.tree(science_of(cfg))
    for item in compare(name, entry, settings=settings, workspace=workspace, deciding_only=True):
        if item.verdict != "same":
            return f"{item.kind} {item.name} is {item.verdict}"
    if cfg.stage not in settings:  # its own settings, such as report.mixed_folds, are recorded as overrides alone
        words = [*redact.tree(list(job.overrides)), *entry["overrides"]]
        if other := [word for word in words if word.startswith(f"{cfg.stage}.") and words.count(word) == 1]:
            return f"only one of the two had {other[0]}"
    if cfg.stage == "train" and "@" in (cfg.train.init or "") and not _starts_from(cfg, workspace, entry["inputs"]):
        return f"{cfg.train.init} is another version by now"
    run_id = entry["run_id"]
    if cfg.mlflow.tracking_uri is not None and run_id is not None:
        from prostate_seg.tracking.sweeps import reuse_finished_run  # imports mlflow, which mlflow=off does without

        if not reuse_finished_run(cfg, job, run_id):
            return f"run {run_id} of it is not among the finished runs of this store"
    return ""


def _starts_from(cfg: Config, workspace: Workspace, inputs: Iterable[str]) -> bool:
    """Return whether a training with these inputs started from the version that train.init, an alias, names now."""
    from prostate_seg.tracking.registry import fetch_networks  # imports mlflow

    folder, *_ = fetch_networks(str(cfg.train.init), cfg.mlflow, workspace, setting="train.init")
    return any(path_of(key, workspace).absolute().is_relative_to(folder.absolute()) for key in inputs)
