"""Repeats in a sweep over seed: mean and standard deviation of Dice over seeds and over folds, on the run of the sweep."""

import csv
import logging
import re
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from mlflow.entities import Run

from prostate_seg.operations.job import Outcome
from prostate_seg.tracking.recorded_runs import CASES, FOLD, SEED, artifact_text
from prostate_seg.tracking.store.run_tree import RunTree

log = logging.getLogger(__name__)

BEST_DICE = re.compile(r"val/best_dice_fold(\d+)")
"""Metrics of a training with the best val Dice of each fold."""


class Score(NamedTuple):
    """Dice of a fold or case of a trial."""

    seed: str
    fold: str
    dice: float


def log_repeats(tree: RunTree, sweep_id: str, trials: Sequence[Run]) -> None:
    """Log mean and SD over seeds and over folds of each setting with two seeds or more; of a single one also as metrics."""
    finished = [run for run in trials if run.info.status == Outcome.finished]
    settings, repeated, groups = by_setting(finished)
    if SEED not in repeated:
        return
    for values, runs in groups.items():
        label = ", ".join(f"{name}={value}" for name, value in zip(settings, values, strict=True))
        validation = [score for run in runs for score in _validation_scores(run)]
        test = [score for run in runs for score in _test_scores(tree, run)]
        for name, scores in (("val/best_dice", validation), ("test/dice", test)):
            if len({score.seed for score in scores}) < 2:
                continue
            found = _summary_of_repeats(scores)
            text = ", ".join(f"{what.replace('sd_', 'SD over ')} {value:.4f}" for what, value in found.items())
            log.info("%s%s of seeds %s: %s", f"{label}: " if label else "", name, _seeds_of(scores), text)
            if not settings:
                tree.log(sweep_id, metrics={f"repeats/{name}_{what}": value for what, value in found.items()})


def _validation_scores(run: Run) -> list[Score]:
    """Return the best val Dice of each fold of a training."""
    folds = ((BEST_DICE.fullmatch(name), value) for name, value in run.data.metrics.items())
    return [Score(run.data.params[SEED], fold[1], value) for fold, value in folds if fold is not None]


def _test_scores(tree: RunTree, run: Run) -> list[Score]:
    """Return the Dice of each case of an evaluation, of the first region."""
    text = artifact_text(tree, run, CASES) if run.data.tags.get("stage") == "evaluate" else None
    rows = list(csv.DictReader((text or "").splitlines()))
    regions = [row.get("region") for row in rows]
    return [
        Score(run.data.params[SEED], row["fold"], float(row["dice"]))
        for row, region in zip(rows, regions, strict=True)
        if region == regions[0] and row["dice"]
    ]


def _summary_of_repeats(scores: Sequence[Score]) -> dict[str, float]:
    """Return the mean of the seeds' means, their SD, and the SD of the folds' means."""
    by_seed, by_fold = (_means_by(scores, key) for key in ("seed", "fold"))
    sds = {"sd_seeds": statistics.stdev(by_seed)} | (
        {"sd_folds": statistics.stdev(by_fold)} if len(by_fold) > 1 else {}
    )
    return {"mean": statistics.fmean(by_seed), **sds}


def _means_by(scores: Sequence[Score], key: str) -> list[float]:
    groups: dict[str, list[float]] = {}
    for score in scores:
        groups.setdefault(getattr(score, key), []).append(score.dice)
    return [statistics.fmean(values) for values in groups.values()]


def _seeds_of(scores: Sequence[Score]) -> str:
    return ", ".join(sorted({score.seed for score in scores}, key=int))


def by_setting(trials: Sequence[Run]) -> tuple[list[str], list[str], dict[tuple[str, ...], list[Run]]]:
    """Return the settings that differ between trials, which of fold and seed do, and the trials by values of the settings."""
    names = sorted({name for run in trials for name in run.data.params})
    varied = [name for name in names if len({run.data.params.get(name) for run in trials}) > 1]
    settings = [name for name in varied if name not in (FOLD, SEED)]
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in trials:
        groups.setdefault(tuple(run.data.params.get(name, "") for name in settings), []).append(run)
    return settings, [name for name in varied if name in (FOLD, SEED)], groups
