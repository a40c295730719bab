"""Comparison of settings with several seeds: requirements, rows, one seed, table and figure; trials of a sweep as settings."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from prostate_seg.common.errors import InputError
from prostate_seg.common.terminal import wrapped
from prostate_seg.config.schema import parse
from prostate_seg.reporting.comparison.compare import compare_repeats
from prostate_seg.reporting.comparison.figures import comparisons_figure
from prostate_seg.reporting.comparison.lines import comparison_lines
from prostate_seg.reporting.comparison.results import COMPARED, Comparison, Repeats
from prostate_seg.reporting.figures.plots import save_png
from prostate_seg.stages.compare import write_curve
from prostate_seg.steps.results import settings_of
from prostate_seg.tracking.recorded_runs import RecordedTrial
from tests.conftest import composed
from tests.test_comparison import IDS, NUM_CASES, cases, results

RNG = np.random.default_rng(0)
OF_PATIENTS = np.repeat(RNG.normal(0.85, 0.05, NUM_CASES // 2), 2)
FOLDS = np.array(["fold0", "fold1"])[np.repeat(np.arange(NUM_CASES // 2) % 2, 2)]


def setting(name: str, *, gain: float = 0.0, num_seeds: int = 3, **columns: object) -> Repeats:
    """Return a setting whose Dice is higher by `gain`, with noise of networks and of cases."""
    by_seed = {}
    for seed in range(1, num_seeds + 1):
        networks = np.where(FOLDS == "fold0", *RNG.normal(0, 0.005, 2))
        dice = OF_PATIENTS + gain + networks + RNG.normal(0, 0.005, NUM_CASES)
        table = cases(**{"fold": FOLDS, "dice": dice, "hd95_mm": 30 * (1 - dice)} | columns)
        by_seed[seed] = results(f"{name} seed {seed}", table)
    return Repeats(name=name, source=name, by_seed=by_seed)


def compared(a: Repeats, b: Repeats) -> Comparison:
    (one,) = compare_repeats(a, [b], difference=0.01)
    return one


def test_a_clear_gain_is_found_in_every_metric_with_its_direction() -> None:
    one = compared(setting("a"), setting("b", gain=0.05))
    rows = {row["metric"]: row for row in one.rows}
    assert list(rows) == list(COMPARED)
    dice, distance = rows["dice"], rows["hd95_mm"]
    assert dice["ci95_low"] > 0
    assert dice["p_not_better"] < 0.01
    assert (dice["num_patients_better"], dice["num_patients"], dice["num_folds"]) == (12, 12, 2)
    assert (distance["better"], distance["num_patients_better"]) == ("lower", 12)
    assert distance["ci95_high"] < 0
    assert rows["iou"]["difference"] == 0  # 0.5 in all cases
    floor = one.floors["whole_gland"]
    assert floor.plan is not None
    assert floor.plan.difference == 0.01
    assert dice["sd_other_patients"] == floor.sd_other.patients
    json.dumps(one.as_dict(), allow_nan=False)


def test_one_seed_on_a_side_has_no_probability_and_a_note() -> None:
    one = compared(setting("a"), setting("b", num_seeds=1))
    assert {row["p_not_better"] for row in one.rows} == {None}
    assert one.floors["whole_gland"].plan is None
    assert "one seed of b: the variance between seeds cannot be known" in one.notes[0]
    assert "not for the settings" in one.notes[0]
    text = "\n".join(comparison_lines(one))
    assert "to show a difference" not in text
    assert "probability" not in text


def test_other_folds_and_other_references_are_refused() -> None:
    moved = setting("b", fold=np.array(["fold0", "fold1"] * (NUM_CASES // 2)))
    with pytest.raises(InputError, match="must have the same folds; 12 of 24 cases") as caught:
        compared(setting("a"), moved)
    assert "Run stage=prepare once" in str(caught.value)
    other = setting("b", mask_md5="x")
    with pytest.raises(InputError, match="another reference"):
        compared(setting("a"), other)
    mixed = Repeats(name="m", source="m", by_seed={1: setting("a").by_seed[1], 2: other.by_seed[2]})
    with pytest.raises(InputError, match="another reference"):
        compared(mixed, setting("a"))


def test_folds_of_one_patient_each_are_refused() -> None:
    sides = [setting(name) for name in "ab"]
    few = [
        Repeats(
            name=one.name,
            source=one.name,
            by_seed={seed: results(one.name, cases(fold=FOLDS)[:4]) for seed in one.by_seed},
        )
        for one in sides
    ]
    with pytest.raises(InputError, match="variance over patients cannot be estimated: a fold of two patients or more"):
        compared(*few)


def test_lines_fit_a_terminal_and_have_components_and_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    one = compared(setting("x" * 150, oracle_crop=True), setting("second", gain=0.01, oracle_crop=True))
    lines = comparison_lines(one)
    with monkeypatch.context() as terminal:
        terminal.setattr("sys.stdout.isatty", lambda: True)
        shown = wrapped("\n".join(comparison_lines(one)), sys.stdout).splitlines()
    assert max(len(line) for line in shown if "xxx" not in line) <= 80
    text = "\n".join(lines)
    assert "second, seeds 1, 2, 3\n24 cases of 12 patients in 2 folds" in text
    assert "  seeds: networks of one fold " in text
    assert "to show a difference in Dice of 0.01 with 80% power, at these variances and 2 folds:\n" in text
    assert "note: ORACLE CROP" in text
    assert "note: a patient with several studies counts once" in text
    assert "nan" not in text
    figure = comparisons_figure([one, compared(setting("a"), setting("b", num_seeds=1))])
    titles = [ax.get_title() for ax in figure.subfigs[0].axes]
    assert titles[-2:] == ["mean Dice of each seed", "noise floor: SD of Dice"]
    save_png(tmp_path / "figure.png", figure)
    assert imread(tmp_path / "figure.png").std() > 0.05


# --- trials of a sweep ---------------------------------------------------------------------------------------------


def trial(
    seed: int, *, model: str = "unet", networks: str | None = None, table: pd.DataFrame | None = None
) -> RecordedTrial:
    text = (cases() if table is None else table).to_csv(index=False)
    md5 = networks or f"{model} {seed}"
    settings = {"model.name": model, "model.channels": "[8]"}
    return RecordedTrial(run_id="r", label=f"model={model}", settings=settings, seed=seed, networks_md5=md5, text=text)


def test_trials_are_grouped_by_setting_and_seed() -> None:
    trials = [trial(seed, model=model) for model in ("unet", "dynunet") for seed in (2, 1)]
    unet, dynunet = settings_of(trials, name="p sweep/s", source="id")
    assert (unet.name, dynunet.name) == ("p sweep/s model=unet", "p sweep/s model=dynunet")
    assert list(unet.by_seed) == [1, 2]
    assert unet.source != dynunet.source


def test_trials_of_single_folds_are_joined() -> None:
    halves = [cases()[cases()["fold"] == fold] for fold in ("fold0", "fold1")]
    trials = [trial(1, networks=f"{fold}", table=half) for fold, half in enumerate(halves)]
    (one,) = settings_of(trials, name="s", source="id")
    assert one.by_seed[1].table.index.tolist() == IDS
    with pytest.raises(InputError, match="must have one row per case"):
        settings_of([*trials, trials[0]], name="s", source="id")


def test_seeds_that_tested_the_same_networks_are_refused() -> None:
    with pytest.raises(InputError, match="seeds 1 and 2 tested the same networks .*, which are no repeats"):
        settings_of([trial(1, networks="m"), trial(2, networks="m")], name="s", source="id")


def test_a_sweep_over_training_cases_is_drawn_as_a_curve(tmp_path: Path) -> None:
    few, many = setting("few"), setting("many", gain=0.05)
    sides = [replace(one, settings={"fold.max_train_cases": str(n)}) for n, one in ((2, few), (8, many))]
    lines = write_curve(parse(composed("stage=compare", "compare.runs=[x]")), tmp_path, sides)
    assert "8 training cases instead of 2 change Dice by +0.0" in "\n".join(lines)
    rows = pd.read_csv(tmp_path / "adaptation_curve.csv")
    assert rows[["num_cases", "num_repeats"]].to_numpy().tolist() == [[2, 3], [8, 3]]
    assert imread(tmp_path / "adaptation_curve.png").std() > 0.05
