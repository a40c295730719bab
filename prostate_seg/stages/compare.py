"""Stage compare: differences between evaluations on the same cases, with confidence intervals and tests."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from prostate_seg.common.errors import ConfigError, InputError
from prostate_seg.common.files import atomic_folder, write_csv, write_json
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace
from prostate_seg.reporting.comparison.adaptation_curve import (
    DRAWN,
    NUM_CASES,
    adaptation_curve,
    curve_figure,
    curve_lines,
)
from prostate_seg.reporting.comparison.compare import compare, compare_repeats
from prostate_seg.reporting.comparison.figures import comparisons_figure
from prostate_seg.reporting.comparison.lines import comparison_lines
from prostate_seg.reporting.comparison.results import Repeats
from prostate_seg.reporting.figures.plots import save_png
from prostate_seg.segmentation.variance import LEVEL, POWER
from prostate_seg.steps.results import is_run, load_result, settings_of, tree_of_runs

if TYPE_CHECKING:
    from prostate_seg.tracking.store.run_tree import RunTree

log = logging.getLogger(__name__)


def run(cfg: Config, workspace: Workspace) -> None:
    """Print a table per run and write comparison/; of a sweep over the number of training cases the adaptation curve."""
    sides = load_sides(cfg, workspace)
    if len(sides) < 2:
        raise ConfigError(
            "compare.runs: must be two or more run ids or folders with a cases.csv, the baseline first, or a sweep over seed "
            f"and another setting, is [{','.join(cfg.compare.runs)}]"
        )
    is_curve = len(cfg.compare.runs) == 1 and all(NUM_CASES in side.settings for side in sides)
    with atomic_folder(workspace.comparison) as folder:
        lines = (write_curve if is_curve else write_comparisons)(cfg, folder, sides)
    for line in lines:
        log.info("%s", line)
    log.info("table and figure are in %s", workspace.comparison)


def write_comparisons(cfg: Config, folder: Path, sides: Sequence[Repeats]) -> list[str]:
    """Write comparison.csv, .json and .png, and return the tables for the terminal."""
    baseline, *others = sides
    if max(len(side.by_seed) for side in sides) > 1:
        how = {"difference": cfg.compare.difference, "level": LEVEL, "power": POWER}
        comparisons = compare_repeats(baseline, others, difference=cfg.compare.difference)
    else:
        how = {"num_bootstrap": cfg.evaluate.num_bootstrap, "seed": cfg.seed}
        first, *rest = (side.results[0] for side in sides)
        comparisons = compare(first, rest, num_bootstrap=cfg.evaluate.num_bootstrap, seed=cfg.seed)
    rows = [{"baseline": one.baseline.name, "other": one.other.name, **row} for one in comparisons for row in one.rows]
    write_csv(folder / "comparison.csv", pd.DataFrame(rows))
    write_json(folder / "comparison.json", {**how, "comparisons": [one.as_dict() for one in comparisons]})
    save_png(folder / "comparison.png", comparisons_figure(comparisons))
    return [line for one in comparisons for line in comparison_lines(one)]


def write_curve(cfg: Config, folder: Path, sides: Sequence[Repeats]) -> list[str]:
    """Write adaptation_curve.csv and .png, and return Dice against the number of training cases for the terminal."""
    points = adaptation_curve(sides, num_bootstrap=cfg.evaluate.num_bootstrap, seed=cfg.seed)
    write_csv(folder / "adaptation_curve.csv", points.drop(columns=DRAWN))
    save_png(folder / "adaptation_curve.png", curve_figure(points))
    return curve_lines(points)


def load_sides(cfg: Config, workspace: Workspace) -> list[Repeats]:
    """Read the results of each entry in compare.runs; a sweep has one setting or several, each with its seeds."""
    found: list[Repeats] = []
    tree = tree_of_runs(cfg.compare.runs, cfg, workspace)
    for text in cfg.compare.runs:
        sides = [] if tree is None else load_sweep(text, tree)
        if not sides:
            sides = [Repeats.of(load_result(text, setting="compare.runs", tree=tree))]
        for side in sides:
            if side.source in {other.source for other in found}:
                raise InputError(f"compare.runs: {text} is {side.source}, which is listed already; name another run")
            found.append(side)
    return found


def load_sweep(text: str, tree: "RunTree") -> list[Repeats]:
    """Read the results of a sweep, or of the pipeline that holds it, by setting and seed; empty for anything else."""
    from prostate_seg.tracking import recorded_runs  # imports mlflow, which folders do not need

    sweep = recorded_runs.sweep_of(tree, text) if is_run(text) else None
    if sweep is None:
        return []
    run_id, name = str(sweep.info.run_id), f"{sweep.data.tags['pipeline']} {sweep.info.run_name}"
    return settings_of(recorded_runs.recorded_trials(tree, run_id), name=name, source=run_id)
