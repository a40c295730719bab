"""Stage compare: differences between evaluations on the same cases, with confidence intervals and tests."""

import logging
import re
from pathlib import Path

import pandas as pd

from prostate_seg.common.errors import ConfigError, InputError
from prostate_seg.common.files import atomic_folder, write_csv, write_json
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, Workspace
from prostate_seg.reporting.comparison import Results, compare, comparison_lines, parse_results
from prostate_seg.reporting.comparison_figure import comparisons_figure
from prostate_seg.reporting.plots import save_png

log = logging.getLogger(__name__)


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Print a table per run and write comparison/: comparison.csv, comparison.json and comparison.png."""
    if len(cfg.compare.runs) < 2:
        raise ConfigError(
            "compare.runs: must be two or more run ids or folders with a cases.csv, the baseline first, "
            f"is [{','.join(cfg.compare.runs)}]"
        )
    baseline, *others = load_results(cfg, workspace)
    num_bootstrap, seed = cfg.evaluate.num_bootstrap, cfg.seed
    comparisons = compare(baseline, others, num_bootstrap=num_bootstrap, seed=seed)
    rows = [{"baseline": baseline.name, "other": one.other.name, **row} for one in comparisons for row in one.rows]
    summary = {"num_bootstrap": num_bootstrap, "seed": seed, "comparisons": [one.as_dict() for one in comparisons]}
    with atomic_folder(workspace.comparison) as folder:
        write_csv(folder / "comparison.csv", pd.DataFrame(rows))
        write_json(folder / "comparison.json", summary)
        save_png(folder / "comparison.png", comparisons_figure(comparisons))
    for comparison in comparisons:
        for line in comparison_lines(comparison):
            log.info("%s", line)
    log.info("table and figure are in %s", workspace.comparison)
    return StageResult()


def load_results(cfg: Config, workspace: Workspace) -> list[Results]:
    """Read cases.csv of each run or folder in compare.runs; refuse what is neither, has none, or is listed twice."""
    found: list[Results] = []
    for text in cfg.compare.runs:
        results = load_result(text, setting="compare.runs", cfg=cfg, workspace=workspace)
        if results.source in {other.source for other in found}:
            raise InputError(f"compare.runs: {text} is {results.source}, which is listed already; name another run")
        found.append(results)
    return found


def load_result(text: str, *, setting: str, cfg: Config, workspace: Workspace) -> Results:
    """Read cases.csv of a run or folder that a setting names; refuse what is neither or has none."""
    folder = Path(text)
    if folder.is_dir():
        if not (folder / "cases.csv").is_file():
            raise InputError(f"{folder} has no cases.csv: name a folder that stage=evaluate wrote, such as evaluation")
        content = (folder / "cases.csv").read_text(encoding="utf-8")
        return parse_results(content, name=text, source=str(folder.resolve()))
    if re.fullmatch("[0-9a-f]{32}", text):
        from prostate_seg.tracking import recorded_runs  # imports mlflow, which folders do not need

        cases = recorded_runs.recorded_cases(recorded_runs.open_tree(cfg.mlflow, cache=workspace.cache), text)
        return parse_results(cases.text, name=cases.name, source=cases.run_id)
    raise InputError(
        f"{setting}: {text} is neither a folder here nor the id of a run (32 digits and letters a to f)\n"
        "MLflow's page and stage=find show the ids of runs."
    )
