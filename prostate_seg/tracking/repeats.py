"""Repeats in a sweep over seed: mean and standard deviation of Dice over seeds and over folds, on the run of the sweep."""

import csv
import logging
import re
import statistics
from collections.abc import Iterator, Sequence

import pandas as pd
from mlflow.entities import Run

from prostate_seg.operations.job import Outcome
from prostate_seg.tracking.recorded_runs import CASES, SEED, artifact_text, by_setting
from prostate_seg.tracking.store.run_tree import RunTree

log = logging.getLogger(__name__)

BEST_DICE = re.compile(r"val/best_dice_fold(\d+)")
"""Metrics of a training with the best val Dice of each fold."""
Score = tuple[str, str, float]
"""Seed, fold and Dice of a fold or case."""


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
            table = pd.DataFrame(scores, columns=["seed", "fold", "dice"])
            by_seed, by_fold = (table.groupby(key)["dice"].agg(statistics.fmean) for key in ("seed", "fold"))
            if len(by_seed) < 2:
                continue
            found = {"mean": statistics.fmean(by_seed), "sd_seeds": statistics.stdev(by_seed)}
            if len(by_fold) > 1:
                found["sd_folds"] = statistics.stdev(by_fold)
            text = ", ".join(f"{what.replace('sd_', 'SD over ')} {value:.4f}" for what, value in found.items())
            seeds = ", ".join(sorted(by_seed.index, key=int))
            log.info("%s%s of seeds %s: %s", f"{label}: " if label else "", name, seeds, text)
            if not settings:
                tree.log(sweep_id, metrics={f"repeats/{name}_{what}": value for what, value in found.items()})


def _validation_scores(run: Run) -> Iterator[Score]:
    """Yield the best val Dice of each fold of a training."""
    for name, value in run.data.metrics.items():
        if fold := BEST_DICE.fullmatch(name):
            yield run.data.params[SEED], fold[1], value


def _test_scores(tree: RunTree, run: Run) -> Iterator[Score]:
    """Yield the Dice of each case of an evaluation, of the first region."""
    text = artifact_text(tree, run, CASES) if run.data.tags.get("stage") == "evaluate" else None
    rows = list(csv.DictReader((text or "").splitlines()))
    for row in rows:
        if row["dice"] and row.get("region") == rows[0].get("region"):
            yield run.data.params[SEED], row["fold"], float(row["dice"])
