"""The stages by name. A stage's module is imported only when it runs, so that the launcher stays light.

Each module has `run(cfg: Config, workspace: Workspace) -> StageResult`.
"""

import importlib
from collections.abc import Callable

from prostate_seg.common.errors import ConfigError
from prostate_seg.common.suggestions import closest
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, Workspace

STAGES = {
    "fetch": "make the phantom data set in data/, or bring a public one there, checked and with its licence",
    "inspect": "show a data set: sizes, spacings, volumes, what is wrong, and a picture of each case",
    "preprocess": "check every case; orient, resample, crop and scale it for the network",
    "prepare": "divide the patients into train, val and test, fold by fold, and look for leaks",
    "train": "fit the network, fold by fold, and keep the weights that are best on val",
    "evaluate": "segment the original test images and measure the masks on their own grid",
    "report": "put everything on one page, report/report.html, and into a model card",
    "register": "put evaluated networks into the registry, and let a version that passes the gate be champion",
    "predict": "segment files, folders or DICOM series with a registered model or a folder of networks",
    "export": "write the settings that decide results to params.yaml, for DVC",
    "audit": "look for leaks in any split file: patients, copies and near copies across the parts of a fold",
    "status": "say of each stage whether it is current, stale and why, or missing; when it ran and what came out",
    "verify": "compare data, results, code, packages and settings with what a run recorded",
    "find": "list the runs of a commit or DVC experiment, or what made a run and how to make it again",
    "link": "tell the runs whose results a commit holds that it does",
    "reproduce": "run a recorded stage again from its commit and inputs, elsewhere, and compare",
    "compare": "say by how much runs differ on the same cases, with intervals, tests and subgroups",
    "sync": "send what a store that could not be reached has missed",
    "bundle": "pack a pipeline's runs into one file, or put those of such a file into this store",
    "doctor": "check packages, store, disk, git and folders, and close what killed runs left open",
}
"""Name and sentence of each stage, in the order of the pipeline; then those that only answer."""

QUESTIONS = frozenset(
    {"inspect", "predict", "export", "audit", "status", "compare", "verify", "find", "link", "reproduce"}
    | {"sync", "bundle", "doctor"}
)
"""Stages that leave no run."""

Stage = Callable[[Config, Workspace], StageResult]


def load_stage(name: str | None) -> Stage:
    """Import and return the function of a stage.

    Raises:
        ConfigError: If there is no such stage; the text lists those that exist.
    """
    require_stage(name)
    run: Stage = importlib.import_module(f"prostate_seg.stages.{name}").run
    return run


def require_stage(name: str | None) -> None:
    """Check that there is a stage of this name, without importing it.

    Raises:
        ConfigError: If there is none; the text lists those that exist.
    """
    if name not in STAGES:
        raise ConfigError(_no_such_stage(name))


def _no_such_stage(name: str | None) -> str:
    meant = closest(name, list(STAGES)) if name else None
    lines = [f"stage: unknown stage {name!r}" + (f"; did you mean {meant}?" if meant else "")] if name else []
    lines += ["Choose a stage: python -m prostate_seg stage=NAME", ""]
    lines += [f"  {stage:<11} {sentence}" for stage, sentence in STAGES.items()]
    lines += [
        "",
        "Several, one after the other: python -m prostate_seg -m stage=preprocess,prepare,train,evaluate,report",
    ]
    return "\n".join(lines)
