"""Cost estimate of a sweep before it starts: number of trainings, and their duration, estimated from past runs."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from prostate_seg.common.files import read_json
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import workspace_of

log = logging.getLogger(__name__)


def num_folds_of(cfg: Config) -> int:
    """Return the number of folds of one training: those in kfold.json, or of the settings before stage=prepare."""
    if cfg.fold.index is not None or cfg.fold.strategy == "all":
        return 1
    prepared = workspace_of(cfg).kfold_json
    return len(read_json(prepared)["folds"]) if prepared.is_file() else cfg.fold.num_folds


def log_cost_estimate(cfg: Config, *, num_trials: int, num_folds: int) -> None:
    """Log the number of trainings and their estimated time, from the folds in the tracking store."""
    num_fits = num_trials * num_folds
    time = "no past run to estimate from"
    if cfg.mlflow.tracking_uri is not None:
        from prostate_seg.tracking.sweeps import seconds_per_fold  # imports mlflow

        seconds_of_one = seconds_per_fold(cfg)
        if seconds_of_one is not None:
            seconds = num_fits * seconds_of_one
            minutes = f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
            time = f"about {f'{seconds:.0f} s' if seconds < 90 else minutes} one after the other"
    log.info("sweep: %d trials x %d folds = %d fits, %s", num_trials, num_folds, num_fits, time)


def log_grid_estimate(cfg: Config, swept: Mapping[str, Sequence[Any]], *, is_paired: bool) -> None:
    """Log the number of trainings of a grid or of pairs; of a sweep over test cases, that it has no best trial."""
    if cfg.stage == "evaluate":
        log.info(
            "a sweep of stage=evaluate has no best trial: test cases choose no setting\n"
            "Choose by the val cases: sweep stage=train."
        )
    if cfg.stage == "train":
        counts = [len(values) for values in swept.values()]
        num_folds = 1 if "fold.index" in swept else num_folds_of(cfg)
        log_cost_estimate(cfg, num_trials=max(counts) if is_paired else math.prod(counts), num_folds=num_folds)
