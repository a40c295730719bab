"""Stage prepare: divide the patients, fold by fold, and let the leak gate look at the result."""

import logging
from collections.abc import Sequence
from pathlib import Path

from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, Workspace
from prostate_seg.data.dataset import CaseRecord
from prostate_seg.data.folds import Fold, all_train, imported, kfold, write_folds
from prostate_seg.stages.common import checked_dataset, pass_leak_gate

log = logging.getLogger(__name__)


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Write prepared/kfold.json."""
    dataset = checked_dataset(cfg, workspace)
    cases = list(dataset.values())
    folds = make_folds(cfg, cases)
    verdict = pass_leak_gate(cfg, workspace, folds, dataset)
    how = {"strategy": cfg.fold.strategy, "seed": cfg.seed, "val_fraction": cfg.fold.val_fraction}
    write_folds(workspace.kfold_json, folds, how=how)
    for line in describe(folds, cases):
        log.info("%s", line)
    return StageResult(
        inputs=[workspace.preprocess, *([Path(cfg.fold.file)] if cfg.fold.file else [])],
        outputs=[workspace.kfold_json],
        metrics={"prepare/num_folds": len(folds), "prepare/num_cases": len(cases)},
        tables=[workspace.kfold_json],
        tags={"leak_gate": verdict.text},
    )


def make_folds(cfg: Config, cases: Sequence[CaseRecord]) -> list[Fold]:
    """Divide the cases as the config asks."""
    val_fraction = cfg.fold.val_fraction
    if cfg.fold.strategy == "all":
        return all_train(cases, val_fraction=val_fraction, seed=cfg.seed)
    if cfg.fold.strategy == "picai":
        assert cfg.fold.file is not None
        return imported(cases, file=Path(cfg.fold.file), val_fraction=val_fraction, seed=cfg.seed)
    return kfold(cases, num_folds=cfg.fold.num_folds, val_fraction=val_fraction, seed=cfg.seed)


def describe(folds: Sequence[Fold], cases: Sequence[CaseRecord]) -> list[str]:
    """Return a table: cases, patients and median gland volume of each part of each fold."""
    by_id = {case.case_id: case for case in cases}
    lines = ["fold  part   cases  patients  median gland"]
    for index, fold in enumerate(folds):
        for part, case_ids in fold.parts().items():
            members = [by_id[case_id] for case_id in case_ids]
            volumes = sorted(case.gland_volume_ml for case in members)
            median = f"{volumes[len(volumes) // 2]:9.1f} mL" if volumes else "-".rjust(12)
            lines.append(f"{index:4d}  {part:<5} {len(members):6d} {len({c.patient_id for c in members}):9d}  {median}")
    return lines
