"""Stage doctor: one line for each thing that a run needs, with the fix for what is wrong."""

import importlib
import logging

from prostate_seg.common.errors import InputError
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, Workspace
from prostate_seg.operations.health import Finding, Severity, check_all

log = logging.getLogger(__name__)

MARKS = {Severity.good: "ok  ", Severity.note: "note", Severity.bad: "BAD "}


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Print the findings; end with an error when one of them stops runs or makes their numbers doubtful."""
    findings = check_all(cfg, workspace)
    if cfg.mlflow.tracking_uri is not None:
        findings += importlib.import_module("prostate_seg.tracking.store_health").check_store(cfg, workspace)
    for finding in findings:
        for line in _lines(finding):
            log.info("%s", line)
    bad = [finding.name for finding in findings if finding.severity is Severity.bad]
    if bad:
        raise InputError(f"{len(bad)} of {len(findings)} checks found something to fix: {', '.join(bad)}")
    return StageResult()


def _lines(finding: Finding) -> list[str]:
    lines = [f"{MARKS[finding.severity]} {finding.name:<10} {finding.text}"]
    return lines + ([f"{'':15} fix: {finding.fix}"] if finding.fix else [])
