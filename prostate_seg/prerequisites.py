"""What a stage needs of the workspace and of the command, checked before anything heavy is imported or a run is opened.

A file that an earlier stage writes is absent: the message has one command that makes all that is missing. A file that only the
user has is absent: the message names the setting. What is inside the files is checked by the stages.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prostate_seg.common.address import resolved_uri, sqlite_file
from prostate_seg.common.errors import ConfigError, InputError
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace, workspace_of
from prostate_seg.stages import STAGES

RECIPE = "recipe.json"
"""In the folder of each trained network."""
REGISTRY = "models:/"
"""How the address of a registered model begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """A file or folder that a stage reads and an earlier one writes."""

    path: Path
    stage: str
    """The stage that writes it."""
    exists: bool


def missing_inputs(stages: Sequence[str], cfg: Config) -> dict[str, list[Path]]:
    """Return what stages that run one after the other lack, by the stage that writes it, in the order of the pipeline.

    Raises:
        ConfigError: If a setting that one of the stages cannot do without is null.
        InputError: If a file or folder that only the user can provide is absent.
    """
    workspace = workspace_of(cfg)
    missing: dict[str, list[Path]] = {}
    for number, stage in enumerate(stages):
        _require_users_inputs(stage, cfg)
        waiting = [stage]
        while waiting:
            for need in _needs(waiting.pop(), cfg, workspace):
                if need.exists or need.stage in stages[:number]:
                    continue
                if need.stage == "fetch":
                    _require_fetchable(cfg, workspace)
                if need.stage not in missing:
                    waiting.append(need.stage)
                missing[need.stage] = list(dict.fromkeys([*missing.get(need.stage, []), need.path]))
    return {stage: missing[stage] for stage in STAGES if stage in missing}


def require_data(cfg: Config) -> None:
    """Check that the data folder has something in it, for the first stage of dvc.yaml.

    Raises:
        InputError: If not; the text has the command that brings data there.
    """
    workspace = workspace_of(cfg)
    if not _has_entries(workspace.data):
        if Path(os.environ.get("DVC_ROOT", ".")).resolve() != Path.cwd():
            raise InputError(
                f"{workspace.data} is absent from this temporary workspace, which has what git and DVC track\n"
                "Track it in the project, and start again: dvc add data && git add data.dvc"
            )
        _require_fetchable(cfg, workspace)
        raise InputError(
            f"{workspace.data} is absent or empty. Make the data set that params.yaml names:\n"
            "  python -m prostate_seg --config-name from_params stage=fetch\n"
            "Or link your own data to it, with the settings of stage=export data=folder data.root=null."
        )


def _needs(stage: str, cfg: Config, workspace: Workspace) -> Iterator[Need]:
    """Yield what a stage reads of the workspace."""
    data = Need(path=workspace.data, stage="fetch", exists=_has_entries(workspace.data))
    dataset = _file(workspace.dataset_csv, "preprocess")
    folds = _file(workspace.kfold_json, "prepare")
    is_external = cfg.evaluate.external_root is not None
    if stage in ("inspect", "preprocess"):
        yield data
    elif stage == "prepare":
        yield dataset
    elif stage == "train":
        yield from (dataset, folds)
    elif stage == "evaluate":
        yield from (dataset, folds, *_networks(cfg, workspace), *([] if is_external else [data]))
    elif stage == "report":
        evaluation = workspace.external_evaluation if is_external else workspace.evaluation
        yield _file(evaluation / "metrics.json", "evaluate")
    elif stage == "audit" and cfg.audit.splits is None:
        yield folds
    elif stage == "register" and cfg.register.run is None:
        yield from _recorded(cfg, "evaluate")
    elif stage == "predict" and cfg.predict.model is None:
        exists = any(workspace.model.glob(f"fold*/{RECIPE}"))
        yield Need(path=workspace.model, stage="train", exists=exists)
    elif stage == "predict" and str(cfg.predict.model).startswith(REGISTRY):
        yield from _recorded(cfg, "register")


def _file(path: Path, stage: str) -> Need:
    return Need(path=path, stage=stage, exists=path.is_file())


def _networks(cfg: Config, workspace: Workspace) -> Iterator[Need]:
    """Yield the network of each fold that is evaluated."""
    indices = range(_num_folds(workspace)) if cfg.fold.index is None else [cfg.fold.index]
    for index in indices:
        yield _file(workspace.fold(index) / RECIPE, "train")


def _num_folds(workspace: Workspace) -> int:
    """Return how many folds there are; 1 where that is not known, which prepare will say."""
    try:
        return len(json.loads(workspace.kfold_json.read_text(encoding="utf-8"))["folds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 1


def _recorded(cfg: Config, stage: str) -> Iterator[Need]:
    """Yield the store if it is a file, without which nothing can have been recorded."""
    file = None if cfg.mlflow.tracking_uri is None else sqlite_file(resolved_uri(cfg.mlflow.tracking_uri))
    if file is not None:
        yield _file(file, stage)


def _require_fetchable(cfg: Config, workspace: Workspace) -> None:
    """Refuse an absent data folder that stage=fetch does not fill: one of the user's, or one that DVC has."""
    tracked = Path(f"{workspace.data}.dvc")
    if tracked.is_file():
        raise InputError(f"{workspace.data} is absent, and {tracked} says that DVC has it: bring it here with dvc pull")
    if cfg.data.source == "folder":
        what = "is empty" if workspace.data.is_dir() else "does not exist"
        raise InputError(
            f"data.root: must be a folder with images/ and masks/, or of nnU-Net's or BIDS' layout; {workspace.data} {what}\n"
            "Give the folder of your data: data=folder data.root=DIR"
        )


def _require_users_inputs(stage: str, cfg: Config) -> None:
    """Check the files and folders that settings of this stage name."""
    external = cfg.evaluate.external_root if stage in ("evaluate", "report") else None
    named = {
        "evaluate.external_root": external,
        "fold.file": cfg.fold.file if stage == "prepare" else None,
        "audit.splits": cfg.audit.splits if stage == "audit" else None,
        "predict.input": cfg.predict.input if stage == "predict" else None,
        "predict.model": cfg.predict.model if stage == "predict" else None,
    }
    if stage == "predict" and cfg.predict.input is None:
        raise ConfigError("predict.input: must name an image file, a DICOM folder or a folder of either, is null")
    for key, path in named.items():
        if path is not None and not path.startswith(REGISTRY) and not Path(path).exists():
            raise InputError(f"{key}: there is no file or folder {path}; check the path")


def _has_entries(folder: Path) -> bool:
    """Return whether something lies in a folder; a fetch that was stopped leaves hidden files alone."""
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
