"""How many trainings a sweep is, and about how long they will take, said before it starts."""

import importlib
import logging

from prostate_seg.config.schema import Config

log = logging.getLogger(__name__)


def num_folds_of(cfg: Config) -> int:
    """Return how many folds a training fits."""
    return 1 if cfg.fold.index is not None or cfg.fold.strategy == "all" else cfg.fold.num_folds


def announce(cfg: Config, *, num_trials: int, num_folds: int) -> None:
    """Say how many trainings there will be, and estimate their time from those that the store knows."""
    num_fits = num_trials * num_folds
    seconds = None
    if cfg.mlflow.tracking_uri is not None:
        seconds = importlib.import_module("prostate_seg.tracking.sweeps").seconds_per_fold(cfg)
    time = (
        "no past run to estimate from" if seconds is None else f"about {_shown(num_fits * seconds)} one after the other"
    )
    log.info("sweep: %d trials x %d folds = %d fits, %s", num_trials, num_folds, num_fits, time)


def _shown(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
