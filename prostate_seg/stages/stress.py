"""Stage stress: Dice of the networks on their test cases under graded perturbations of the original images.

The result of a case is kept in the cache, so that a stage that was stopped continues with the next case.
"""

import json
import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prostate_seg.common.errors import ConfigError, InputError
from prostate_seg.common.files import atomic_folder, md5_of, md5_of_text, read_json, write_csv, write_json
from prostate_seg.common.seeds import Stream, integer_seed, seed_sequence
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace
from prostate_seg.data.cases import Case
from prostate_seg.data.dataset import CaseRecord
from prostate_seg.data.folds import Fold
from prostate_seg.data.loading import LoadedCase
from prostate_seg.imaging.geometry import Volume
from prostate_seg.imaging.quality import whole_gland
from prostate_seg.imaging.settings import WHOLE_GLAND
from prostate_seg.reporting.evaluation.stress import NONE, stress_curves, stress_figure, stress_lines, stress_summary
from prostate_seg.reporting.figures.plots import save_png
from prostate_seg.segmentation import perturbations
from prostate_seg.segmentation.inference.inference import segment
from prostate_seg.segmentation.networks.storage import WEIGHTS
from prostate_seg.segmentation.overlap import dice
from prostate_seg.segmentation.perturbations import PERTURBATIONS
from prostate_seg.steps.evaluation import Evaluation, Md5s

log = logging.getLogger(__name__)

Row = dict[str, Any]
"""Row of cases.csv: case_id, patient_id, fold, perturbation, unit, level (0 for the weakest), strength, region, dice."""


def run(cfg: Config, workspace: Workspace) -> None:
    """Write stress/: cases.csv, curves.csv, stress.json and stress.png."""
    names = chosen_perturbations(cfg.stress.perturbations)
    cfg = replace(cfg, evaluate=replace(cfg.evaluate, external_root=None))  # its labels are not those of the test cases
    evaluation = Evaluation.of(cfg, workspace)
    chosen = chosen_cases(evaluation.folds, evaluation.dataset, max_cases=cfg.stress.max_cases)
    rows: list[Row] = []
    for index, fold in evaluation.folds.items():
        work = case_stress(evaluation, index, names=names)
        case_ids = [case_id for case_id in fold.test if case_id in chosen]
        rows += chain.from_iterable(evaluation.map_cases(work, case_ids, label=f"stress fold {index}"))
    table = pd.DataFrame(rows)
    curves = stress_curves(table, num_bootstrap=cfg.evaluate.num_bootstrap, seed=cfg.seed)
    networks = {f"fold{index}": md5_of(workspace.fold(index) / WEIGHTS) for index in evaluation.folds}
    with atomic_folder(workspace.stress) as folder:
        write_csv(folder / "cases.csv", table)
        write_csv(folder / "curves.csv", curves, float_format="%.6g")
        write_json(folder / "stress.json", stress_summary(curves) | {"networks": networks})
        save_png(folder / "stress.png", stress_figure(curves))
    for line in stress_lines(curves):
        log.info("%s", line)
    log.info("tables and figure are in %s", workspace.stress)


def chosen_perturbations(names: Sequence[str] | None) -> list[str]:
    """Return the names of the perturbations to apply; refuse an unknown one."""
    unknown = sorted({*(names or [])} - PERTURBATIONS.keys())
    if unknown or names == []:
        raise ConfigError(
            f"stress.perturbations: must be null or names of {', '.join(PERTURBATIONS)}, is [{','.join(names or [])}]"
        )
    return [name for name in PERTURBATIONS if names is None or name in names]


def chosen_cases(folds: dict[int, Fold], dataset: dict[str, CaseRecord], *, max_cases: int | None) -> set[str]:
    """Return the ids of test cases, of at most a number of them at equal steps through the order of gland volumes.

    Raises:
        InputError: If there are no test cases.
    """
    tested = [case_id for fold in folds.values() for case_id in fold.test]
    if not tested:
        raise InputError("there are no test cases: fold=all trains on all but val\nUse fold=kfold or fold=groups.")
    ordered = sorted(tested, key=lambda case_id: (dataset[case_id].gland_volume_ml, case_id))
    steps = np.linspace(0, len(ordered) - 1, num=min(max_cases or len(ordered), len(ordered)))
    return {ordered[int(step)] for step in steps}


def case_stress(
    evaluation: Evaluation, index: int, *, names: Sequence[str]
) -> Callable[[Case, LoadedCase, Md5s], list[Row]]:
    """Load the network of a fold, and return the function that applies perturbations to a case.

    It returns the Dice of each region without a perturbation, and under each strength of each that the case can have.
    """
    predictor, cache = evaluation.predictor_of([index]), evaluation.workspace.cache / "stress" / _key(evaluation, index)

    def region_dice(image: Volume, label_map: np.ndarray) -> list[Row]:
        found = segment(image, image.with_mask(label_map), predictor=predictor, with_features=False)
        pairs = evaluation.region_pairs(label_map, found.label_map)
        return [{"region": region, "dice": dice(*pair)} for region, pair in pairs.items()]

    def stress_case(case: Case, loaded: LoadedCase, md5s: Md5s) -> list[Row]:
        gland = whole_gland(loaded.mask.array, labels=evaluation.regions[WHOLE_GLAND])
        label_map = np.where(gland, loaded.mask.array, 0)
        stream = seed_sequence(Stream.perturbation, zlib.crc32(case.case_id.encode()), seed=evaluation.cfg.seed)
        file = cache / f"{'_'.join(md5s)}.json"
        done: dict[str, list[Row]] = read_json(file) if file.is_file() else {}
        if NONE not in done:
            done[NONE] = region_dice(loaded.image, label_map)
        for name in (name for name in names if name not in done):
            done[name] = []
            for level, strength in enumerate(PERTURBATIONS[name].strengths):
                pair = PERTURBATIONS[name].apply(loaded.image, label_map, strength, integer_seed(stream))
                place = {"unit": PERTURBATIONS[name].unit, "level": level, "strength": strength}
                done[name] += [place | row for row in ([] if pair is None else region_dice(*pair))]
            write_json(file, done)
        ids = {"case_id": case.case_id, "patient_id": case.patient_id, "fold": f"fold{index}"}
        return [ids | {"perturbation": name} | row for name in (NONE, *names) for row in done[name]]

    return stress_case


def _key(evaluation: Evaluation, index: int) -> str:
    """Return a hash of what decides the result of a case, besides its files."""
    cfg, network = evaluation.cfg, evaluation.workspace.fold(index)
    settings = [cfg.evaluate.threshold, cfg.evaluate.largest_component, cfg.evaluate.tta, cfg.train.precision, cfg.seed]
    code = md5_of(Path(str(perturbations.__file__)))
    return md5_of_text(json.dumps([md5_of(network), code, settings, evaluation.regions]))
