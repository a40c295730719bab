"""Checks for the inputs of a stage, before anything heavy is imported or a run is opened.

If an earlier stage writes an absent file, the message has one command for all that is missing. If only the user can provide it,
the message names the setting. The content of files is checked by the stages.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from prostate_seg.common.address import REGISTRY, RUN_ID, resolved_uri, sqlite_file
from prostate_seg.common.errors import ConfigError, InputError
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace, workspace_of
from prostate_seg.stages import STAGES

RECIPE = "recipe.json"
"""File in the folder of each trained network."""


def missing_inputs(stages: Sequence[str], cfg: Config) -> dict[str, list[Path]]:
    """Return the absent inputs of stages that run in sequence, by the stage that writes them, in the order of the pipeline.

    Raises:
        ConfigError: If a required setting of one of the stages is null.
        InputError: If a file or folder that only the user can provide is absent.
    """
    workspace = workspace_of(cfg)
    missing: dict[str, list[Path]] = {}
    for number, stage in enumerate(stages):
        _require_users_inputs(stage, cfg)
        pending = [stage]
        while pending:
            for path, source in _absent_inputs(pending.pop(), cfg, workspace):
                if source in stages[:number]:
                    continue
                if source == "fetch":
                    require_fetchable(cfg, workspace)
                if source not in missing:  # its own inputs may be absent, too
                    pending.append(source)
                missing[source] = list(dict.fromkeys([*missing.get(source, []), path]))
    return {stage: missing[stage] for stage in STAGES if stage in missing}


def _absent_inputs(stage: str, cfg: Config, workspace: Workspace) -> Iterator[tuple[Path, str]]:
    """Yield each absent input of a stage with the stage that writes it."""
    data, dataset = (workspace.data, "fetch"), (workspace.dataset_csv, "preprocess")
    folds = (workspace.kfold_json, "prepare")
    is_external = cfg.evaluate.external_root is not None
    evaluation = workspace.external_evaluation if is_external else workspace.evaluation
    indices = range(_num_folds(workspace)) if cfg.fold.index is None else [cfg.fold.index]
    tested = [dataset, folds, *((workspace.fold(index) / RECIPE, "train") for index in indices)]
    # an absent database file has no runs and no models
    store = None if cfg.mlflow.tracking_uri is None else sqlite_file(resolved_uri(cfg.mlflow.tracking_uri))
    is_registered = str(cfg.predict.model).startswith(REGISTRY)
    inputs = {
        "inspect": [data],
        "preprocess": [data],
        "prepare": [dataset],
        "train": [dataset, folds],
        "evaluate": tested if is_external else [*tested, data],
        "stress": [*tested, data],
        "report": [(evaluation / "metrics.json", "evaluate")],
        "audit": [folds] if cfg.audit.splits is None else [],
        "register": [(store, "evaluate")] if store is not None and cfg.register.run is None else [],
        "predict": [(store, "register")] if store is not None and is_registered else [],
    }
    if stage == "predict" and cfg.predict.model is None and not any(workspace.model.glob(f"fold*/{RECIPE}")):
        yield workspace.model, "train"
    yield from ((path, source) for path, source in inputs.get(stage, []) if not exists(path))


def _num_folds(workspace: Workspace) -> int:
    """Return the number of folds; 1 if it is unknown, because prepare has not run."""
    try:
        return len(json.loads(workspace.kfold_json.read_text(encoding="utf-8"))["folds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 1


def require_fetchable(cfg: Config, workspace: Workspace) -> None:
    """Refuse an absent data folder that stage=fetch does not fill: one of the user's, or one that DVC tracks."""
    tracked = Path(f"{workspace.data}.dvc")
    if tracked.is_file():
        raise InputError(f"{workspace.data} is absent, and DVC tracks it ({tracked}): bring it here with dvc pull")
    if cfg.data.source == "folder":
        what = "is empty" if workspace.data.is_dir() else "does not exist"
        raise InputError(
            f"data.root: must be a folder with images/ and masks/, or of nnU-Net's or BIDS' layout; {workspace.data} {what}\n"
            "Give the folder of your data: data=folder data.root=DIR"
        )


def _require_users_inputs(stage: str, cfg: Config) -> None:
    """Check the files and folders that settings of this stage name."""
    if stage == "predict" and cfg.predict.input is None:
        raise ConfigError("predict.input: must name an image file, a DICOM folder or a folder of either, is null")
    external = {"evaluate.external_root": cfg.evaluate.external_root}
    named: dict[str, dict[str, str | None]] = {
        "evaluate": external,
        "report": external,
        "prepare": {"fold.file": cfg.fold.file},
        "audit": {"audit.splits": cfg.audit.splits},
        "train": {"train.init": None if RUN_ID.fullmatch(cfg.train.init or "") else cfg.train.init},
        "predict": {"predict.input": cfg.predict.input, "predict.model": cfg.predict.model},
    }
    for key, path in named.get(stage, {}).items():
        if path is not None and not path.startswith(REGISTRY) and not Path(path).exists():
            raise InputError(f"{key}: there is no file or folder {path}; check the path")


def exists(path: Path) -> bool:
    """Return whether a file exists, or a folder with visible entries; an interrupted fetch leaves hidden ones only."""
    return path.is_file() or (path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir()))
