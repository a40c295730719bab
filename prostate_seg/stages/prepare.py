"""Stage prepare: divide the patients into folds and check them for leaks."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, Workspace
from prostate_seg.data.dataset import CaseRecord
from prostate_seg.data.folds import Fold, all_train, group_names, groups, imported, kfold, write_folds
from prostate_seg.imaging.target_grid import choose_grid
from prostate_seg.steps.dataset import checked_dataset, preprocess_settings
from prostate_seg.steps.leak_gate import pass_leak_gate

log = logging.getLogger(__name__)


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Write prepared/kfold.json."""
    dataset = checked_dataset(cfg, workspace)
    cases, val_fraction, seed = list(dataset.values()), cfg.fold.val_fraction, cfg.seed
    if cfg.fold.strategy == "all":
        folds = all_train(cases, val_fraction=val_fraction, seed=seed)
    elif cfg.fold.strategy == "picai":
        assert cfg.fold.file is not None
        folds = imported(cases, file=Path(cfg.fold.file), val_fraction=val_fraction, seed=seed)
    elif cfg.fold.strategy == "groups":
        assert cfg.fold.column is not None
        folds = groups(cases, column=cfg.fold.column, val_fraction=val_fraction, seed=seed)
    else:
        folds = kfold(cases, num_folds=cfg.fold.num_folds, val_fraction=val_fraction, seed=seed)
    verdict = pass_leak_gate(cfg, workspace, folds, dataset)
    depends = grids_of_training_studies(cfg, workspace, folds, dataset)
    for line in depends:
        log.warning("%s", line)
    how: dict[str, Any] = {"strategy": cfg.fold.strategy, "seed": seed, "val_fraction": val_fraction}
    if cfg.fold.column is not None:
        how |= {"column": cfg.fold.column, "groups": group_names(cases, column=cfg.fold.column)}
        log.info(
            "%s tested by fold: %s", cfg.fold.column, ", ".join(f"{i} {name}" for i, name in enumerate(how["groups"]))
        )
    write_folds(workspace.kfold_json, folds, how=how)
    for line in describe(folds, dataset):
        log.info("%s", line)
    return StageResult(
        inputs=[workspace.preprocess, *([Path(cfg.fold.file)] if cfg.fold.file else [])],
        outputs=[workspace.kfold_json],
        metrics={"prepare/num_folds": len(folds), "prepare/num_cases": len(cases)},
        tables=[workspace.kfold_json],
        tags={"leak_gate": verdict["verdict"]} | ({"grid_depends_on_test": "; ".join(depends)} if depends else {}),
    )


def grids_of_training_studies(
    cfg: Config, workspace: Workspace, folds: Sequence[Fold], dataset: dict[str, CaseRecord]
) -> list[str]:
    """Return a line for each fold whose training studies alone would give another grid than all studies did."""
    used, lines = preprocess_settings(cfg, workspace), []
    for index, fold in enumerate(folds):
        studies = [dataset[case_id].extent for case_id in [*fold.train, *fold.val]]
        alone = replace(used, **choose_grid(cfg.preprocess, studies))
        if alone != used:
            lines.append(
                f"fold {index}: the grid depends on test studies: auto is {used.grid}, and from the training studies alone "
                f"{alone.grid}; set preprocess.spacing_mm and preprocess.image_size to numbers"
            )
    return lines


def describe(folds: Sequence[Fold], dataset: dict[str, CaseRecord]) -> list[str]:
    """Return a table: cases, patients and median gland volume of each subset of each fold."""
    lines = ["fold  subset  cases  patients  median gland"]
    for index, fold in enumerate(folds):
        for subset, case_ids in fold.subsets().items():
            cases = [dataset[case_id] for case_id in case_ids]
            num_patients = len({case.patient_id for case in cases})
            volumes = sorted(case.gland_volume_ml for case in cases)
            median = f"{volumes[len(volumes) // 2]:9.1f} mL" if volumes else "-".rjust(12)
            lines.append(f"{index:4d}  {subset:<6} {len(cases):6d} {num_patients:9d}  {median}")
    return lines
