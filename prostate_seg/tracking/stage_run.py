"""Run of one stage: provenance that is recorded with and without a tracking store.

`JournalSink` (journal_sink.py) sends it to MLflow, `NullSink` nowhere (mlflow=off). DS_VERSION.json is always written.
"""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from prostate_seg.common.address import project_root
from prostate_seg.config.schema import Config, as_container, science_of
from prostate_seg.config.workspace import FoldRecord, StageResult, Workspace, null_fold_record
from prostate_seg.operations.job import Job, Outcome, command_line
from prostate_seg.operations.process import now_text
from prostate_seg.provenance import ds_version
from prostate_seg.provenance.code_digests import code_digests
from prostate_seg.provenance.environment import Environment, current_environment
from prostate_seg.provenance.lineage import ancestors
from prostate_seg.provenance.record import Hashes, hash_stage
from prostate_seg.provenance.redaction import Redactor

log = logging.getLogger(__name__)

NOT_IN_RECORD = ("diff", "untracked", "problem")
"""State of git that is an artifact or a warning instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What is known of a run before its stage starts."""

    cfg: Config
    stage: str
    workspace: Workspace
    job: Job
    redactor: Redactor
    environment: Environment
    started: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a stage ended."""

    outcome: Outcome
    error: BaseException | None
    result: StageResult | None
    record: Mapping[str, Any] | None
    """Entry of DS_VERSION.json; None for a stage that did not finish."""
    hashes: Hashes | None


class NullSink:
    """Records nothing, for mlflow=off; JournalSink overrides all of it."""

    @property
    def run_id(self) -> str | None:
        """Id of the run in the store, or its local id; None if nothing is recorded there."""
        return None

    @property
    def pipeline_id(self) -> str | None:
        """The same of its pipeline."""
        return None

    @property
    def ids(self) -> Mapping[str, str]:
        """Ids in the store by local id."""
        return {}

    def open_fold(self, index: int) -> AbstractContextManager[FoldRecord]:
        """Record one fold: a run below that of the stage."""
        return null_fold_record(index)

    def close(self, ending: Ending) -> None:
        """Record the results and close the run.

        Raises:
            InputError: If some of it can neither be sent nor kept.
        """


def run_facts(cfg: Config, workspace: Workspace, job: Job) -> RunFacts:
    """Collect what is known before the stage starts.

    Raises:
        InputError: If DS_VERSION.json cannot be read: the stage stops now, not when it has finished.
    """
    assert cfg.stage is not None
    ds_version.read_entries(workspace)
    environment = current_environment(Path.cwd())
    if environment.git.problem:
        log.warning("this run records no commit or no diff, because git refuses: %s", environment.git.problem)
    redactor = Redactor(settings={"overrides": job.overrides, **as_container(cfg)})
    return RunFacts(cfg=cfg, stage=cfg.stage, workspace=workspace, job=job, redactor=redactor, environment=environment)


class StageRun:
    """One stage of one job while it runs."""

    def __init__(self, facts: RunFacts, sink: NullSink) -> None:
        self.facts = facts
        self.sink = sink
        self.open_fold = sink.open_fold
        self.result: StageResult | None = None
        self._clock = time.monotonic()  # unlike facts.started, it never goes back

    @property
    def run_id(self) -> str | None:
        """Id of the run in the store."""
        return self.sink.run_id

    def finish(self, result: StageResult) -> None:
        """Keep the result of the stage for `close`."""
        self.result = result

    def close(self, outcome: Outcome, error: BaseException | None = None) -> None:
        """Hash what the stage read and wrote, write its entry of DS_VERSION.json, and close the run.

        Raises:
            InputError: If something can neither be sent nor kept; the stage's files are complete all the same.
        """
        facts = self.facts
        shown = "" if self.run_id is None else f", run {self.run_id} of {facts.cfg.mlflow.name}"
        log.info("%s %s after %.1f s%s", facts.stage, outcome.value, time.monotonic() - self._clock, shown)
        recording = ds_version.recording_workspace(facts.cfg, facts.workspace)
        record: dict[str, Any] | None = None
        hashes: Hashes | None = None
        if outcome is Outcome.finished and self.result is not None:
            hashes = hash_stage(facts.stage, self.result.inputs, self.result.outputs, workspace=facts.workspace)
            record = self._record(self.result, hashes)
            ds_version.write_entry(recording, ds_version.entry_name(facts.cfg), record)
        try:
            ending = Ending(outcome=outcome, error=error, result=self.result, record=record, hashes=hashes)
            self.sink.close(ending)
        finally:
            if record is not None:
                ds_version.replace_ids(recording, self.sink.ids)

    def _record(self, result: StageResult, hashes: Hashes) -> dict[str, Any]:
        """Return the entry of DS_VERSION.json, without secrets."""
        facts, redact = self.facts, self.facts.redactor
        git = {name: value for name, value in asdict(facts.environment.git).items() if name not in NOT_IN_RECORD}
        return {
            "run_id": self.run_id,
            "pipeline": facts.cfg.mlflow.name,
            "pipeline_run_id": self.sink.pipeline_id,
            "experiment": facts.cfg.mlflow.experiment,
            "finished_at": now_text(),
            "seconds": round(time.monotonic() - self._clock, 1),
            "command": redact.tree(command_line(facts.job)),
            "overrides": redact.tree(list(facts.job.overrides)),
            "settings": redact.tree(science_of(facts.cfg)),
            "metrics": dict(result.metrics),
            "sought": result.objectives,
            "inputs": {key: hashed.md5 for key, hashed in hashes.inputs.items()},
            "outputs": {key: hashed.md5 for key, hashed in hashes.outputs.items()},
            "inputs_changed_while_running": self._changed_inputs(hashes),
            "upstream": ancestors(hashes.inputs, self._upstream_entries(), workspace=facts.workspace),
            "code": {key: hashed.md5 for key, hashed in hashes.code.items()},
            "code_digests": code_digests(facts.stage),
            "git": redact.tree(git),
            "packages": facts.environment.packages,
            "machine": facts.environment.machine,
        }

    def _upstream_entries(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the entries of the other stages; in a temporary workspace of DVC, at first those of the project."""
        workspace = self.facts.workspace
        networks = replace(workspace, root=workspace.model.parent)
        entries = ds_version.read_entries(workspace) | ds_version.read_entries(networks)
        if not entries and os.environ.get("DVC_ROOT"):
            entries = ds_version.read_entries(replace(workspace, root=project_root()))
        return {name: entry for name, entry in entries.items() if name.split(".")[0] != self.facts.stage}

    def _changed_inputs(self, hashes: Hashes) -> Sequence[str]:
        now = time.time()  # a time in the future, as after the clock was set back, is no evidence
        inputs = hashes.inputs.items()
        changed = [key for key, hashed in inputs if self.facts.started < hashed.newest_mtime <= now]
        for key in changed:
            log.warning("%s was written to while %s ran: its recorded hash is that of the end", key, self.facts.stage)
        return changed
