"""Table of the stages. The module of a stage is imported only when the stage runs, so that the launcher stays light.

Each module has `run(cfg: Config, workspace: Workspace)`. It returns a `StageResult`; those of `UNTRACKED_STAGES` return None.
"""

import importlib
from collections.abc import Callable

from prostate_seg.common.errors import ConfigError
from prostate_seg.common.suggestions import closest
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, Workspace

STAGES = {
    "fetch": "write the phantom data set to data/, or download a public one with its checksums and licence",
    "inspect": "summarise a data set: sizes, spacings, gland volumes, quality findings, a picture of each case",
    "preprocess": "check every case; orient, resample, crop and scale it for the network",
    "prepare": "split the patients into train, val and test per fold, and check the folds for leaks",
    "train": "train the network of each fold, and keep the weights with the best val metric",
    "evaluate": "segment the original test images and compute metrics on their own grid",
    "stress": "segment the test cases under graded perturbations: noise, coil, blur, field of view and others",
    "report": "write report/report.html, one self-contained page, and the model card",
    "register": "register evaluated networks, and promote a version that passes the gate to champion",
    "predict": "segment files, folders or DICOM series with a registered model or a folder of networks",
    "export": "write the settings that decide results to params.yaml, for DVC",
    "audit": "check any split file for leaks: patients, duplicates and near-duplicates across subsets",
    "status": "show for each stage whether it is current, stale (and why) or missing, when it ran, and its metrics",
    "verify": "compare data, results, code, packages and settings with the record of a run",
    "find": "list the runs of a commit or DVC experiment, or the commit and commands of a run",
    "link": "tag the runs whose results a commit holds with that commit",
    "reproduce": "run a recorded stage again from its commit and inputs, in another folder, and compare the results",
    "compare": "compare runs on the same cases, with confidence intervals, tests and subgroups",
    "sync": "replicate journals to a tracking store that could not be reached before",
    "bundle": "pack the runs of a pipeline into one file, or load such a file into this store",
    "doctor": "check packages, store, disk, git and folders, and close runs that killed processes left open",
}
"""Name and summary of each stage: those of the pipeline in order, then the others."""

UNTRACKED_STAGES = frozenset(
    {"inspect", "stress", "predict", "export", "audit", "status", "compare", "verify", "find", "link", "reproduce"}
    | {"sync", "bundle", "doctor"}
)
"""Stages that record no run."""

Stage = Callable[[Config, Workspace], StageResult | None]


def load_stage(name: str | None) -> Stage:
    """Import and return the function of a stage; raise a ConfigError that lists the stages if there is no such one."""
    require_stage(name)
    run: Stage = importlib.import_module(f"prostate_seg.stages.{name}").run
    return run


def require_stage(name: str | None) -> None:
    """Check that a stage exists, without importing it; raise a ConfigError if it does not; the message lists the stages."""
    if name in STAGES:
        return
    meant = closest(name, list(STAGES)) if name else None
    lines = [f"stage: unknown stage {name!r}" + (f"; did you mean {meant}?" if meant else "")] if name else []
    lines += ["Choose a stage: python -m prostate_seg stage=NAME", ""]
    lines += [f"  {stage:<11} {summary}" for stage, summary in STAGES.items()]
    lines += ["", "Several in sequence: python -m prostate_seg -m stage=preprocess,prepare,train,evaluate,report"]
    raise ConfigError("\n".join(lines))
