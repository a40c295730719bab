"""Stage compare: whether runs measured on the same cases differ by more than chance, and where."""

import importlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from prostate_seg.common.errors import ConfigError, InputError
from prostate_seg.common.files import atomic_folder, write_csv, write_json
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, Workspace
from prostate_seg.reporting.comparison import Comparison, Results, compare, comparison_lines, parse_results
from prostate_seg.reporting.comparison_figure import draw_comparisons

log = logging.getLogger(__name__)


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Print a table per run and write comparison/: comparison.csv, comparison.json and comparison.png."""
    if len(cfg.compare.runs) < 2:
        raise ConfigError(
            "compare.runs: must be two or more run ids or folders with a cases.csv, the baseline first, "
            f"is [{','.join(cfg.compare.runs)}]"
        )
    baseline, *others = _all_results(cfg, workspace)
    comparisons = compare(baseline, others, num_bootstrap=cfg.evaluate.num_bootstrap, seed=cfg.seed)
    with atomic_folder(workspace.comparison) as folder:
        write_csv(folder / "comparison.csv", _long_table(comparisons))
        write_json(folder / "comparison.json", _summary(comparisons, cfg))
        draw_comparisons(folder / "comparison.png", comparisons)
    for comparison in comparisons:
        for line in comparison_lines(comparison):
            log.info("%s", line)
    log.info("table and figure are in %s", workspace.comparison)
    return StageResult()


def _all_results(cfg: Config, workspace: Workspace) -> list[Results]:
    """Read every result, each once."""
    tree: Any = None
    found: list[Results] = []
    for text in cfg.compare.runs:
        if Path(text).is_dir():
            results = _results_of_folder(Path(text), name=text)
        else:
            _require_run_id(text)
            recorded = importlib.import_module(
                "prostate_seg.tracking.recorded_runs"
            )  # mlflow, which folders do without
            tree = tree or recorded.open_tree(cfg.mlflow, cache=workspace.cache)
            cases = recorded.recorded_cases(tree, text)
            results = parse_results(cases.text, name=cases.name, source=cases.run_id)
        if results.source in {other.source for other in found}:
            raise InputError(f"compare.runs: {text} is {results.source}, which is there already; name another run")
        found.append(results)
    return found


def _results_of_folder(folder: Path, *, name: str) -> Results:
    path = folder / "cases.csv"
    if not path.is_file():
        raise InputError(f"{folder} has no cases.csv: name a folder that stage=evaluate wrote, such as evaluation")
    return parse_results(path.read_text(encoding="utf-8"), name=name, source=str(folder.resolve()))


def _require_run_id(text: str) -> None:
    if not re.fullmatch("[0-9a-f]{32}", text):
        raise InputError(
            f"compare.runs: {text} is neither a folder here nor the id of a run (32 digits and letters a to f)\n"
            "The MLflow page and stage=find show the ids of runs."
        )


def _long_table(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"baseline": one.baseline.name, "other": one.other.name, **row.as_dict()}
            for one in comparisons
            for row in one.rows
        ]
    )


def _summary(comparisons: Sequence[Comparison], cfg: Config) -> dict[str, Any]:
    return {
        "num_bootstrap": cfg.evaluate.num_bootstrap,
        "seed": cfg.seed,
        "comparisons": [one.as_dict() for one in comparisons],
    }
