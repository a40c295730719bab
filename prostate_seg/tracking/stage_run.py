"""The run of one stage, from its first second to its last: what is recorded wherever a store is used or not.

open_stage_run  opens the branch of the run tree, unless mlflow=off
close           hashes what the stage touched, writes its entry of DS_VERSION.json and lets the branch log and close
"""

import importlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prostate_seg.common.address import project_root
from prostate_seg.config.schema import Config, as_container, science_of
from prostate_seg.config.workspace import FoldRecord, StageResult, Workspace, null_fold_record
from prostate_seg.operations.job import Job, Outcome, command_line, outcome_of
from prostate_seg.operations.process import now_text
from prostate_seg.provenance import ds_version
from prostate_seg.provenance.code_digests import code_digests
from prostate_seg.provenance.environment import Surroundings, look_around
from prostate_seg.provenance.lineage import ancestors
from prostate_seg.provenance.record import Hashes, hash_stage
from prostate_seg.provenance.redaction import Redactor

if TYPE_CHECKING:
    from prostate_seg.tracking.branch import Branch

log = logging.getLogger(__name__)

NOT_IN_RECORD = ("diff", "untracked", "problem")
"""Of the state of git: what is an artifact or a warning."""


def open_stage_run(cfg: Config, workspace: Workspace, job: Job) -> "StageRun":
    """Open the run of a stage.

    Raises:
        InputError: If the tracking store, or DS_VERSION.json, cannot be used.
    """
    ds_version.read_entries(workspace)  # one that cannot be read stops the stage now, not when it has finished
    run = StageRun(cfg, workspace, job)
    if cfg.mlflow.tracking_uri is not None:
        run.branch = importlib.import_module("prostate_seg.tracking.branch").open_branch(run)  # mlflow takes seconds
    return run


class StageRun:
    """One stage of one job while it runs."""

    def __init__(self, cfg: Config, workspace: Workspace, job: Job) -> None:
        assert cfg.stage is not None
        self.cfg = cfg
        self.stage = cfg.stage
        self.workspace = workspace
        self.job = job
        self.started = time.time()
        self._clock = time.monotonic()
        self.redactor = Redactor(settings={"overrides": job.overrides, **as_container(cfg)})
        self.surroundings: Surroundings = look_around(Path.cwd())
        if self.surroundings.git.problem:
            log.warning("this run records no commit or no diff, because git refuses: %s", self.surroundings.git.problem)
        self.branch: Branch | None = None
        self.result: StageResult | None = None

    @property
    def run_id(self) -> str | None:
        """Id of the run in the store."""
        return None if self.branch is None else self.branch.run_id

    @property
    def seconds(self) -> float:
        """Time since the start, whatever the clock was set to meanwhile."""
        return time.monotonic() - self._clock

    @contextmanager
    def open_fold(self, index: int) -> Iterator[FoldRecord]:
        """Record the training of one fold: a run of its own below this one."""
        if self.branch is None:
            with null_fold_record(index) as nobody:
                yield nobody
            return
        fold = self.branch.open_fold(index)
        try:
            yield fold
        except BaseException as error:
            fold.close(outcome_of(error))
            raise
        fold.close(Outcome.finished)

    def finish(self, result: StageResult) -> None:
        """Take what the stage read, wrote and measured."""
        self.result = result

    def close(self, outcome: Outcome, error: BaseException | None = None) -> None:
        """Write down what is now known and close the run.

        Raises:
            InputError: If it can neither be sent nor kept; the stage's files are complete then all the same.
        """
        where = "" if self.branch is None else f", run {self.branch.run_id} of {self.cfg.mlflow.name}"
        log.info("%s %s after %.1f s%s", self.stage, outcome.value, self.seconds, where)
        record: dict[str, Any] | None = None
        hashes: Hashes | None = None
        if outcome is Outcome.finished and self.result is not None:
            hashes = hash_stage(self.stage, self.result.inputs, self.result.outputs, workspace=self.workspace)
            record = self._record(hashes)
            ds_version.write_entry(
                ds_version.recording_workspace(self.cfg, self.workspace), ds_version.entry_name(self.cfg), record
            )
        if self.branch is None:
            return
        try:
            self.branch.close(outcome, record, hashes, error)
        finally:
            if record is not None:
                ds_version.replace_ids(ds_version.recording_workspace(self.cfg, self.workspace), self.branch.spool.ids)

    def _record(self, hashes: Hashes) -> dict[str, Any]:
        """Return the entry of DS_VERSION.json, without secrets."""
        around = self.surroundings
        git = {name: value for name, value in asdict(around.git).items() if name not in NOT_IN_RECORD}
        record = {
            "run_id": self.run_id,
            "pipeline": self.cfg.mlflow.name,
            "pipeline_run_id": None if self.branch is None else self.branch.pipeline_id,
            "experiment": self.cfg.mlflow.experiment,
            "finished_at": now_text(),
            "seconds": round(self.seconds, 1),
            "command": command_line(self.job),
            "overrides": list(self.job.overrides),
            "settings": science_of(self.cfg),
            "metrics": {} if self.result is None else dict(self.result.metrics),
            "sought": {} if self.result is None else self.result.objectives,
            "inputs": {key: hashed.md5 for key, hashed in hashes.inputs.items()},
            "outputs": {key: hashed.md5 for key, hashed in hashes.outputs.items()},
            "inputs_changed_while_running": self._changed_inputs(hashes),
            "upstream": ancestors(hashes.inputs, self._other_entries(), workspace=self.workspace),
            "code": {key: hashed.md5 for key, hashed in hashes.code.items()},
            "code_digests": code_digests(self.stage),
            "git": git,
            "packages": around.packages,
            "machine": around.machine,
        }
        people_wrote = ("command", "overrides", "settings", "git")
        return {key: self.redactor.tree(value) if key in people_wrote else value for key, value in record.items()}

    def _other_entries(self) -> Mapping[str, Mapping[str, Any]]:
        """Return what is known of the other stages; a temporary workspace of DVC's starts with what the project knows."""
        networks = replace(self.workspace, root=self.workspace.model.parent)
        entries = ds_version.read_entries(self.workspace) | ds_version.read_entries(networks)
        if not entries and os.environ.get("DVC_ROOT"):
            entries = ds_version.read_entries(replace(self.workspace, root=project_root()))
        return {name: entry for name, entry in entries.items() if name.split(".")[0] != self.stage}

    def _changed_inputs(self, hashes: Hashes) -> Sequence[str]:
        now = time.time()  # a file from the future, as after the clock was set back, says nothing
        changed = [key for key, hashed in hashes.inputs.items() if self.started < hashed.newest_mtime <= now]
        for key in changed:
            log.warning("%s was written to while %s ran: its recorded hash is that of the end", key, self.stage)
        return changed
