"""Stage compare: differences between evaluations on the same cases, with confidence intervals and tests."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from prostate_seg.common.address import RUN_ID
from prostate_seg.common.errors import ConfigError, InputError
from prostate_seg.common.files import atomic_folder, write_csv, write_json
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, Workspace
from prostate_seg.reporting.comparison.adaptation_curve import (
    NUM_CASES,
    adaptation_curve,
    curve_figure,
    curve_lines,
)
from prostate_seg.reporting.comparison.figures import comparisons_figure
from prostate_seg.reporting.comparison.paired import Comparison, Results, compare, comparison_lines, parse_results
from prostate_seg.reporting.comparison.repeats import Repeats, RepeatsComparison, compare_repeats, repeats_lines
from prostate_seg.reporting.figures.plots import save_png
from prostate_seg.segmentation.variance import LEVEL, POWER

if TYPE_CHECKING:
    from prostate_seg.tracking.recorded_runs import RecordedTrial

log = logging.getLogger(__name__)


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Print a table per run and write comparison/; of a sweep over the number of training cases the adaptation curve."""
    sides = load_sides(cfg, workspace)
    if len(sides) < 2:
        raise ConfigError(
            "compare.runs: must be two or more run ids or folders with a cases.csv, the baseline first, or a sweep over seed "
            f"and another setting, is [{','.join(cfg.compare.runs)}]"
        )
    if len(cfg.compare.runs) == 1 and all(NUM_CASES in side.settings for side in sides):
        return draw_curve(cfg, workspace, sides)
    baseline, *others = sides
    comparisons: Sequence[Comparison | RepeatsComparison]
    if max(len(side.by_seed) for side in sides) > 1:
        how = {"difference": cfg.compare.difference, "level": LEVEL, "power": POWER}
        comparisons = compare_repeats(baseline, others, difference=cfg.compare.difference)
        lines = [line for one in comparisons for line in repeats_lines(one)]
    else:
        how = {"num_bootstrap": cfg.evaluate.num_bootstrap, "seed": cfg.seed}
        first, *rest = (side.results[0] for side in sides)
        comparisons = compare(first, rest, num_bootstrap=cfg.evaluate.num_bootstrap, seed=cfg.seed)
        lines = [line for one in comparisons for line in comparison_lines(one)]
    rows = [{"baseline": one.baseline.name, "other": one.other.name, **row} for one in comparisons for row in one.rows]
    with atomic_folder(workspace.comparison) as folder:
        write_csv(folder / "comparison.csv", pd.DataFrame(rows))
        write_json(folder / "comparison.json", {**how, "comparisons": [one.as_dict() for one in comparisons]})
        save_png(folder / "comparison.png", comparisons_figure(comparisons))
    return _logged(lines, workspace)


def draw_curve(cfg: Config, workspace: Workspace, sides: Sequence[Repeats]) -> StageResult:
    """Print Dice against the number of training cases, and write comparison/: adaptation_curve.csv and .png."""
    points = adaptation_curve(sides, num_bootstrap=cfg.evaluate.num_bootstrap, seed=cfg.seed)
    with atomic_folder(workspace.comparison) as folder:
        write_csv(folder / "adaptation_curve.csv", pd.DataFrame([point.as_row() for point in points]))
        save_png(folder / "adaptation_curve.png", curve_figure(points))
    return _logged(curve_lines(points), workspace)


def _logged(lines: Sequence[str], workspace: Workspace) -> StageResult:
    for line in lines:
        log.info("%s", line)
    log.info("table and figure are in %s", workspace.comparison)
    return StageResult()


def load_sides(cfg: Config, workspace: Workspace) -> list[Repeats]:
    """Read the results of each entry in compare.runs; a sweep has one setting or several, each with its seeds."""
    found: list[Repeats] = []
    for text in cfg.compare.runs:
        sides = load_sweep(text, cfg, workspace)
        if not sides:
            results = load_result(text, setting="compare.runs", cfg=cfg, workspace=workspace)
            sides = [Repeats(name=results.name, source=results.source, by_seed={None: results})]
        for side in sides:
            if side.source in {other.source for other in found}:
                raise InputError(f"compare.runs: {text} is {side.source}, which is listed already; name another run")
            found.append(side)
    return found


def load_sweep(text: str, cfg: Config, workspace: Workspace) -> list[Repeats]:
    """Read the results of a sweep, or of the pipeline that holds it, by setting and seed; empty for anything else."""
    if Path(text).is_dir() or not RUN_ID.fullmatch(text):
        return []
    from prostate_seg.tracking import recorded_runs  # imports mlflow, which folders do not need

    tree = recorded_runs.open_tree(cfg.mlflow, cache=workspace.cache)
    sweep = recorded_runs.sweep_of(tree, text)
    if sweep is None:
        return []
    run_id, name = str(sweep.info.run_id), f"{sweep.data.tags['pipeline']} {sweep.info.run_name}"
    return settings_of(recorded_runs.recorded_trials(tree, run_id), name=name, source=run_id)


def settings_of(trials: Sequence["RecordedTrial"], *, name: str, source: str) -> list[Repeats]:
    """Group the trials of a sweep by setting and seed; those of one seed tested different folds and are joined."""
    groups: dict[str, dict[int, list[RecordedTrial]]] = {}
    for trial in trials:
        groups.setdefault(json.dumps(trial.settings), {}).setdefault(trial.seed, []).append(trial)
    sides = []
    for key, by_seed in groups.items():
        label = next(iter(by_seed.values()))[0].label
        side = f"{name} {label}".strip()
        _require_own_networks(by_seed, name=side)
        parsed: dict[int | None, Results] = {
            seed: parse_results(joined([one.text for one in by_seed[seed]]), name=f"{side} seed {seed}", source=source)
            for seed in sorted(by_seed)
        }
        place = source if len(groups) == 1 else f"{source} {key}"
        sides.append(Repeats(name=side, source=place, by_seed=parsed, settings=json.loads(key)))
    return sides


def _require_own_networks(by_seed: Mapping[int, Sequence["RecordedTrial"]], *, name: str) -> None:
    tested: dict[str, int] = {}
    for seed, trials in by_seed.items():
        for md5 in {trial.networks_md5 for trial in trials}:
            if md5 in tested:
                raise InputError(
                    f"{name}: seeds {tested[md5]} and {seed} tested the same networks (md5 {md5}), which are no repeats\n"
                    "Train and evaluate each seed: -m stage=train,evaluate seed=1,2,3"
                )
            tested[md5] = seed


def joined(texts: Sequence[str]) -> str:
    """Return tables of one seed as one: a sweep over fold.index has a trial per fold."""
    header = texts[0].partition("\n")[0]
    rows = [text.removeprefix(header + "\n") for text in texts]
    return "".join([header, "\n", *rows])


def load_result(text: str, *, setting: str, cfg: Config, workspace: Workspace) -> Results:
    """Read cases.csv of a run or folder that a setting names; refuse what is neither or has none."""
    folder = Path(text)
    if folder.is_dir():
        if not (folder / "cases.csv").is_file():
            raise InputError(f"{folder} has no cases.csv: name a folder that stage=evaluate wrote, such as evaluation")
        content = (folder / "cases.csv").read_text(encoding="utf-8")
        return parse_results(content, name=text, source=str(folder.resolve()))
    if RUN_ID.fullmatch(text):
        from prostate_seg.tracking import recorded_runs  # imports mlflow, which folders do not need

        cases = recorded_runs.recorded_cases(recorded_runs.open_tree(cfg.mlflow, cache=workspace.cache), text)
        return parse_results(cases.text, name=cases.name, source=cases.run_id)
    raise InputError(
        f"{setting}: {text} is neither a folder here nor the id of a run (32 digits and letters a to f)\n"
        "MLflow's page and stage=find show the ids of runs."
    )
