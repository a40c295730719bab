"""metrics.json and the summary at the terminal, for cases with known metrics."""

from dataclasses import replace

import numpy as np
import pytest

from prostate_seg.reporting.evaluation.tables import (
    CaseResult,
    by_region,
    cases_table,
    flat_summary,
    slices_table,
    summarise_folds,
    summary_lines,
    summary_markdown,
)
from tests.data_helpers import case_result

SPACING_MM = (3.0, 1.0, 1.0)


def block_case(case_id: str, *, fold: str, shift_vox: int | None) -> CaseResult:
    """A 10 x 10 x 4 block, predicted with a shift along x, or missed."""
    reference = np.zeros((8, 40, 40), dtype=bool)
    reference[2:6, 10:20, 10:20] = True
    predicted = np.zeros_like(reference) if shift_vox is None else np.roll(reference, shift_vox, axis=2)
    return case_result(case_id, reference, predicted, fold=fold, spacing_mm=SPACING_MM)


CASES = [
    block_case("a_1", fold="fold0", shift_vox=0),  # Dice 1
    block_case("a_2", fold="fold0", shift_vox=5),  # Dice 0.5
    block_case("b_1", fold="fold1", shift_vox=None),  # missed
]


def test_folds_and_pool_count_cases_patients_failures_and_missed_glands() -> None:
    summary = summarise_folds(CASES, oracle_crop=False, num_bootstrap=200, seed=0)
    pooled = summary["pooled"]
    assert (pooled["num_cases"], pooled["num_patients"]) == (3, 2)
    assert (pooled["num_failures"], pooled["num_missed_glands"]) == (1, 1)
    assert pooled["dice"]["mean"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert summary["folds"]["fold0"]["dice"]["mean"] == pytest.approx(0.75)
    assert summary["folds"]["fold0"]["dice"]["ci95_low"] is None  # no interval for a single patient
    diagonal = np.linalg.norm((8 * 3, 40, 40))
    assert summary["folds"]["fold1"]["hd95_mm"]["mean"] == pytest.approx(diagonal)
    # Pooled IoU of fold 0: (400 + 200) pixels shared of (400 + 600).
    assert summary["folds"]["fold0"]["iou_gland_slices_pooled"] == pytest.approx(0.6)


def test_empty_zone_counts_as_a_missed_gland_does_and_its_slices_have_no_position() -> None:
    empty, block = np.zeros((8, 40, 40), dtype=bool), np.zeros((8, 40, 40), dtype=bool)
    block[2:6, 10:20, 10:20] = True
    pairs = {"a_1": (block, empty), "b_1": (empty, block), "c_1": (empty, empty)}
    zones = [
        replace(case_result(case_id, *pair, fold="fold0", spacing_mm=SPACING_MM), region="peripheral_zone")
        for case_id, pair in pairs.items()
    ]
    glands = [block_case(case_id, fold="fold0", shift_vox=0) for case_id in pairs]
    results = [*glands, *zones]
    summary = summarise_folds(results, oracle_crop=False, num_bootstrap=100, seed=0)
    assert summary["pooled"]["dice"]["mean"] == 1
    zone = summary["zones"]["peripheral_zone"]["pooled"]
    assert (zone["num_failures"], zone["num_missed_glands"]) == (2, 1)
    assert zone["dice"]["mean"] == pytest.approx(1 / 3)
    diagonal = float(np.linalg.norm((8 * 3, 40, 40)))
    assert zone["hd95_mm"]["mean"] == pytest.approx(2 / 3 * diagonal)
    slices = slices_table(results)
    assert slices[slices["case_id"] == "b_1"].set_index("region")["position"].isna().to_dict() == {
        "whole_gland": False,
        "peripheral_zone": True,
    }
    regions = by_region(cases_table(results, oracle_crop=False))
    assert list(regions) == ["whole_gland", "peripheral_zone"]
    assert regions["peripheral_zone"]["dice"].tolist() == [0, 0, 1]
    assert "region" not in cases_table(glands, oracle_crop=False)
    flat = flat_summary(summary)["test"]
    assert flat["peripheral_zone/dice"] == pytest.approx(1 / 3)
    assert "peripheral_zone: 2 failed, 1 missed" in summary_lines(summary)
    gland, row, last = summary_markdown(summary | {"leak_gate": {"verdict": "passed"}}).splitlines()
    assert gland.startswith("**whole_gland: Dice 1.000 (95% CI 1.000 to 1.000)**, HD95 0.000 (")
    assert row.startswith("**peripheral_zone: Dice 0.333 (")
    assert last == "3 cases of 3 patients in 1 folds, 0 failed, 0 glands missed. Leak gate: passed."


def test_flat_means_have_their_intervals_where_one_exists() -> None:
    flat = flat_summary(summarise_folds(CASES, oracle_crop=False, num_bootstrap=200, seed=0))["test"]
    assert flat["dice"] == pytest.approx(0.5)
    assert (flat["dice_ci95_low"], flat["dice_ci95_high"]) == (0.0, 0.75)  # the means of the two patients
    alone = flat_summary(summarise_folds(CASES[:2], oracle_crop=False, num_bootstrap=200, seed=0))["test"]
    assert "dice" in alone
    assert "dice_ci95_low" not in alone


def test_table_has_a_row_per_case_and_marks_the_oracle_crop() -> None:
    table = cases_table(CASES, oracle_crop=True)
    assert list(table["case_id"]) == ["a_1", "a_2", "b_1"]
    assert table["oracle_crop"].all()
    assert table["missed_gland"].tolist() == [False, False, True]


def test_lines_fit_a_terminal_and_mark_the_oracle_crop() -> None:
    lines = summary_lines(summarise_folds(CASES, oracle_crop=True, num_bootstrap=200, seed=0))
    assert "ORACLE CROP" in lines[0]
    assert "ORACLE CROP" in summary_markdown(summarise_folds(CASES, oracle_crop=True, num_bootstrap=200, seed=0))
    assert max(len(line) for line in lines) <= 120
    assert {len(line) for line in lines[1:-1]} == {71}  # every column ends where its header ends
    single = summary_lines(summarise_folds(CASES[:1], oracle_crop=False, num_bootstrap=200, seed=0))
    assert "ORACLE" not in single[0]
    assert any(line.startswith("dice ") and " - " in line for line in single)
