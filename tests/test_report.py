"""Report page and model card of constructed cases: tables, escaping, plots, gallery, and values that are not recorded."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import yaml

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import read_json, write_csv, write_json
from prostate_seg.config.schema import parse
from prostate_seg.config.workspace import workspace_of
from prostate_seg.reporting.comparison.unseen_groups import UnseenGroups
from prostate_seg.reporting.evaluation.tables import CaseResult, cases_table, slices_table, summarise_folds
from prostate_seg.reporting.evaluation.trust import (
    bounds,
    calibration_errors,
    calibration_table,
    expected_dice_table,
    features_in,
    fitted_expected_dice,
    read_trust,
)
from prostate_seg.reporting.figures.overlays import RegionMasks
from prostate_seg.reporting.pages.gallery import gallery_case, svg_contour, worst_median_best
from prostate_seg.reporting.pages.model_card import render_model_card
from prostate_seg.reporting.pages.report_page import page_plots, render_report
from prostate_seg.reporting.pages.report_tables import (
    ReportData,
    all_tables,
    dice_along_gland,
    limits_of_agreement,
    subgroup_dice,
    subgroups,
)
from prostate_seg.segmentation.inference.expected_dice import ExpectedDice
from prostate_seg.stages.report import load_unseen_groups
from tests.conftest import composed
from tests.data_helpers import case_result
from tests.test_calibration import over_confident
from tests.test_expected_dice import simulated

ATTACK = "<script>alert(1)</script>"
SPACING_MM = (3.0, 1.0, 2.0)


def block_case(case_id: str, *, fold: str, shift_vox: int, **attributes: str) -> CaseResult:
    """A block of 10 slices, predicted with a shift along x; a shift by its width of 20 is a failure."""
    reference = np.zeros((14, 40, 60), dtype=bool)
    reference[2:12, 10:30, 10:30] = True
    predicted = np.roll(reference, shift_vox, axis=2)
    return case_result(case_id, reference, predicted, fold=fold, spacing_mm=SPACING_MM, **attributes)


@pytest.fixture
def data() -> ReportData:
    cases = [
        block_case("p1_1", fold="fold0", shift_vox=0, centre="A"),
        block_case("p2_1", fold="fold0", shift_vox=5, centre="A"),
        block_case("p3_1", fold="fold1", shift_vox=20, centre=ATTACK),
    ]
    return ReportData(
        cases=cases_table(cases, oracle_crop=False),
        slices=slices_table(cases),
        summary=summarise_folds(cases, oracle_crop=False, num_bootstrap=100, seed=0),
        is_external=False,
        num_bootstrap=100,
        seed=0,
    )


def trusted(
    data: ReportData, folder: Path, *, num: int = 30, of_folds: Path | None = None, md5: str = "w"
) -> ReportData:
    """Return the data with an evaluation of simulated features, written to a folder as stage=evaluate does."""
    rows, dice = simulated(num, rng=np.random.default_rng(len(folder.name)))
    base = block_case("p1_1", fold="fold0", shift_vox=0)
    results = [
        replace(
            base,
            case=replace(base.case, case_id=f"{number:03d}_1", patient_id=f"{number:03d}"),
            metrics=replace(base.metrics, dice=float(value)),
            features=row,
        )
        for number, (row, value) in enumerate(zip(rows, dice, strict=True))
    ]
    table = expected_dice_table(results, coverage=0.9)
    voxels = {"whole_gland": over_confident(2.0, num=20_000)}
    counts = {"val": voxels if of_folds is None else {}, "test": voxels}
    fitted = fitted_expected_dice(table, coverage=0.9, oracle_crop=False)
    summary = {"networks_md5": md5, **fitted, "calibration": calibration_errors(counts)}
    write_csv(folder / "expected_dice.csv", table)
    write_csv(folder / "calibration.csv", calibration_table(counts))
    write_json(folder / "metrics.json", {"trust": summary})
    return replace(data, trust=read_trust(folder, read_json(folder / "metrics.json"), of_folds=of_folds))


def page(data: ReportData, gallery: Sequence[Mapping[str, object]] = ()) -> str:
    return render_report(data, tables=all_tables(data), gallery=gallery)


def card(data: ReportData) -> str:
    return render_model_card(data, subgroups=subgroup_dice(data))


def words(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def test_page_shows_what_to_expect_in_groups_that_no_network_had_seen(data: ReportData) -> None:
    rows = pd.DataFrame(
        [{"group": name, "num_cases": 1, "num_patients": 1, "num_failures": 0} for name in ("A", "all")]
    )
    intervals = dict.fromkeys(("ci95_low", "ci95_high", "difference_low", "difference_high"), 0.25)
    rows = rows.assign(mean=0.75, mean_mixed=0.875, difference=-0.125, **intervals)
    unseen = UnseenGroups(column="centre", rows=rows, mean=0.75, new_group=(0.5, 1.0))
    shown = words(render_report(data, tables=all_tables(data), gallery=(), unseen=unseen))
    assert "for a new centre like these, expect 0.500 to 1.000 (95% prediction interval of its mean)" in shown
    assert "A 1 1 0 0.750 0.250 to 0.250 0.875 \N{MINUS SIGN}0.125 0.250 to 0.250" in shown
    assert "What to expect elsewhere" not in words(page(data))


def test_mixed_folds_beside_an_external_evaluation_are_refused(data: ReportData, tmp_path: Path) -> None:
    cfg = parse(composed("stage=report", "report.mixed_folds=mixed", f"paths.root={tmp_path}"))
    with pytest.raises(InputError, match=r"and evaluate.external_root names other cases; is mixed\n"):
        load_unseen_groups(cfg, workspace_of(cfg), replace(data, is_external=True))


# --- numbers -------------------------------------------------------------------------------------------------------


def test_dice_along_the_gland_has_a_mean_per_tenth_and_beyond(data: ReportData) -> None:
    table = dice_along_gland(data)
    assert len(table) == 12
    assert table["num_slices"].tolist() == [0, *[3] * 10, 0]
    assert table["position"].tolist()[1:-1] == pytest.approx([0.05 + 0.1 * n for n in range(10)])
    assert table["mean"].dropna().tolist() == pytest.approx([(1 + 0.75 + 0) / 3] * 10)
    beyond = data.slices.assign(position=data.slices["position"] + 0.2)
    assert dice_along_gland(replace(data, slices=beyond))["num_slices"].iloc[-1] == 6


def test_subgroups_have_the_mean_of_their_cases(data: ReportData) -> None:
    table = subgroup_dice(data).set_index("group")
    assert table.loc["A", "mean"] == pytest.approx((1 + 0.75) / 2)
    assert table.loc[ATTACK, "num_cases"] == 1
    assert np.isnan(table.loc[ATTACK, "ci95_low"])  # no interval for a single patient


def test_limits_of_agreement_are_two_standard_deviations_around_the_bias() -> None:
    assert limits_of_agreement(pd.Series([-1.0, 1.0])) == pytest.approx((0, -1.96 * 2**0.5, 1.96 * 2**0.5))


def test_worst_median_and_best_are_named_once() -> None:
    def chosen(*dice: float) -> dict[str, int]:
        return worst_median_best(pd.DataFrame({"dice": dice}))

    assert chosen(0.5, 0.1, 0.9) == {"worst": 1, "median": 0, "best": 2}
    assert chosen(0.5, 0.1) == {"worst": 1, "median": 0}
    assert chosen(0.5) == {"worst": 0}


def attribute_table(**columns: list[object]) -> pd.DataFrame:
    return pd.DataFrame({"case_id": list("abcdef"), "volume_reference_ml": [60, 20, 30, 90, 40, 50], **columns})


def test_volume_tertiles_have_equal_size() -> None:
    groups = subgroups(attribute_table())
    assert list(groups) == ["volume_tertile"]
    assert groups["volume_tertile"].tolist() == [
        "upper third",
        "lower third",
        "lower third",
        "upper third",
        "middle third",
        "middle third",
    ]


def test_attributes_are_groups_and_an_empty_cell_is_unknown() -> None:
    groups = subgroups(attribute_table(centre=["A", "B", "", "A", None, "B"], constant=["x"] * 6))
    assert groups["centre"].tolist() == ["A", "B", "unknown", "A", "unknown", "B"]
    assert "constant" not in groups


def test_many_numbers_become_tertiles_and_many_other_values_are_ignored() -> None:
    many = pd.concat([attribute_table(age=[str(50 + i) for i in range(6)], note=list("uvwxyz"))] * 2, ignore_index=True)
    many["age"] = [str(age) for age in range(50, 61)] + [""]
    many["note"] = [f"n{i}" for i in range(12)]
    groups = subgroups(many)
    assert sorted(set(groups["age"])) == ["lower third", "middle third", "unknown", "upper third"]
    assert "note" not in groups


# --- the page ------------------------------------------------------------------------------------------------------


def test_expected_dice_has_its_coverage_curve_and_plots(data: ReportData, tmp_path: Path) -> None:
    shown = trusted(data, tmp_path / "evaluation")
    html, tables = page(shown), all_tables(shown)
    cases = tables["expected_dice"]
    num_covered = int((cases["dice"] >= cases["dice_lower_bound"]).sum())
    assert 20 <= num_covered <= 30
    assert f"here it holds for {num_covered} of 30" in words(html)
    ordered = cases.sort_values("expected_dice", ascending=False)["dice"]
    assert tables["risk_coverage"]["risk"].iloc[9] == pytest.approx(1 - ordered.head(10).mean())
    assert f"risk-coverage curve: {tables['risk_coverage']['risk'].mean():.4f}" in words(html)
    assert (tables["risk_coverage"]["risk"] >= tables["risk_coverage"]["best_risk"] - 1e-9).all()
    assert "another scanner, centre or protocol can break it" in html
    assert html.count("case below its bound") == (num_covered < 30)
    assert shown.trust is not None
    assert shown.trust.summary["calibration"]["whole_gland"]["temperature"] == pytest.approx(2, rel=0.05)
    assert "whole gland 0.1" in words(html)


def test_an_external_evaluation_measures_the_coverage_of_the_calibration_of_the_folds(
    data: ReportData, tmp_path: Path
) -> None:
    folds = trusted(data, tmp_path / "evaluation")
    external = trusted(data, tmp_path / "evaluation_external", num=40, of_folds=tmp_path / "evaluation")
    assert folds.trust is not None
    assert external.trust is not None
    calibration = ExpectedDice(**folds.trust.summary["expected_dice"])
    estimates = [calibration.estimate(row) for row in features_in(external.trust.cases)]
    assert external.trust.cases["dice_lower_bound"].tolist() == [one.lower_bound for one in estimates]
    found = bounds(external.trust.cases)
    text = words(page(external))
    assert "calibrated on the test cases of the cross-validation, of 30 patients" in text
    assert f"here it holds for {found['num_covered']} of {found['num_patients']}" in text
    assert external.trust.summary["calibration"]["whole_gland"]["temperature"] == pytest.approx(2, rel=0.05)
    others = trusted(data, tmp_path / "evaluation_external", of_folds=tmp_path / "evaluation", md5="other")
    assert others.trust is not None
    assert not others.trust.is_of_folds  # other networks
    assert others.trust.summary["calibration"]["whole_gland"]["temperature"] is None
    assert "Each case is estimated by a fit without its patient" in words(page(others))


def test_too_few_patients_and_an_older_evaluation_have_no_expected_dice(data: ReportData, tmp_path: Path) -> None:
    few = page(trusted(data, tmp_path / "evaluation", num=8))
    assert "Expected Dice is not available: a lower bound that holds for 90% of patients needs 9" in words(few)
    assert "Reliability diagram" in few
    barely = page(trusted(data, tmp_path / "evaluation", num=9))
    assert "without the patients of one group too few are left" in words(barely)
    assert read_trust(tmp_path / "evaluation", {}, of_folds=None) is None
    oracle = fitted_expected_dice(pd.DataFrame(), coverage=0.9, oracle_crop=True)
    assert "centred on the references (preprocess.crop=mask)" in oracle["no_expected_dice"]
    assert 'id="trust"' not in page(data)


def test_failed_cases_come_before_the_results(data: ReportData) -> None:
    html = page(data)
    assert data.failures["case_id"].tolist() == ["p3_1"]
    assert html.index("p3_1") < html.index('id="ran"') < html.index('id="results"')
    assert "1 case failed (Dice below 0.5)." in words(html)


def test_excluded_cases_come_first_with_their_reason(data: ReportData) -> None:
    finding = {"case_id": "p9_1", "check": "grids_differ", "is_error": True, "message": "another grid"}
    log = {"excluded_by_config": ["p8_1"], "excluded_by_checks": ["p9_1"], "findings": [finding]}
    text = words(page(replace(data, preprocess_log=log)))
    assert "p8_1 listed under data.exclude" in text
    assert "p9_1 grids_differ: another grid" in text
    assert "2 more cases were excluded" in text
    one = replace(data, preprocess_log={"excluded_by_config": ["p8_1"], "findings": []})
    assert "1 more case was excluded" in words(page(one))
    assert "**Excluded:** 1 case.\n" in card(one)


def test_text_from_data_is_escaped(data: ReportData) -> None:
    log = {"excluded_by_config": [ATTACK], "findings": []}
    gallery = [{"rank": ATTACK, "case_id": ATTACK, "metrics": data.cases.iloc[0].to_dict(), "missing": ATTACK}]
    evil = replace(
        data,
        cases=data.cases.replace("p3_1", ATTACK),
        preprocess_log=log,
        settings={"data": {"root": ATTACK}},
        reference_quality=pd.DataFrame(
            [dict.fromkeys(("case_id", "gland_volume_ml", "num_components", "holes_ml", "findings"), ATTACK)]
        ),
    )
    html = page(evil, gallery)
    assert ATTACK not in html
    assert html.count("<script") == 1
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 7


def test_leak_gate_is_shown_when_it_is_recorded(data: ReportData) -> None:
    assert "has no record of the leak gate" in page(data)
    gate = {"verdict": "passed", "checks": {"patient overlap": "passed", "near-duplicates": "not run: no images"}}
    text = words(page(replace(data, summary={**data.summary, "leak_gate": gate})))
    assert "Passed." in text
    assert "near-duplicates not run: no images" in text
    pair = "a_1 and b_1 (correlation 0.66): two patients"
    text = words(page(replace(data, summary={**data.summary, "leak_gate": gate | {"overruled": [pair]}})))
    assert f"Not duplicates, according to fold.not_duplicates: {pair}" in text


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({}, "The author of the reference masks is not recorded."),
        ({"settings": {"data": {"source": "phantom"}}}, "say nothing about patients"),
    ],
)
def test_limitations_come_before_the_first_number(data: ReportData, changes: dict[str, object], warning: str) -> None:
    changed: Callable[..., ReportData] = replace
    html = page(changed(data, **changes))
    assert warning in html[: html.index("<main>")]
    assert warning in card(changed(data, **changes))


def test_oracle_crop_and_authors_of_references_are_warnings(data: ReportData) -> None:
    made = replace(
        data, cases=data.cases.assign(reference_by="Bosma22b"), summary={**data.summary, "oracle_crop": True}
    )
    assert [text.split(":")[0] for text in made.warnings] == ["Oracle crop", "Reference masks by"]
    assert "Bosma22b (3 cases)" in made.warnings[1]


def test_page_loads_nothing_from_elsewhere(data: ReportData) -> None:
    html = page(data)
    assert "default-src 'none'" in html
    assert "<figure role" not in html  # a figure has the role of a figure: aria-allowed-role of axe-core
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", html.replace('xmlns:xlink="http', ""))


# --- plots ---------------------------------------------------------------------------------------------------------


def test_plots_have_text_page_colours_and_ids_of_their_own(data: ReportData) -> None:
    history = pd.DataFrame({"epoch": [1, 2], "train/loss": [1.0, 0.5], "val/dice": [np.nan, 0.8]})
    shown = replace(data, histories={"fold0": history}, kept_epochs={"fold0": 2})
    plots = page_plots(shown, all_tables(shown))
    assert set(plots) >= {"box_dice", "bland_altman", "train_loss", "val_dice", "dice_along_gland"}
    for svg in plots.values():
        ElementTree.fromstring(re.sub(r"<svg ", '<svg xmlns:xlink="x" ', svg, count=1))
        assert "<text" in svg
        assert "#000000" not in svg
        assert "#0072b2" not in svg
    ids = [name for svg in plots.values() for name in re.findall(r' id="([^"]+)"', svg)]
    assert len(ids) == len(set(ids))
    assert {name for svg in plots.values() for name in re.findall(r'(?:href="|url\()#([^")]+)', svg)} == set(ids)
    assert plots == page_plots(shown, all_tables(shown))  # the same bytes for the same numbers


# --- gallery -------------------------------------------------------------------------------------------------------


def test_contour_runs_along_half_voxels() -> None:
    mask = np.zeros((8, 8), dtype=bool)
    assert svg_contour(mask) == ""
    mask[2, 3] = True  # its centre is at 7, 5 half voxels
    corners = re.fullmatch(r"M(\d+) (\d+)l(.*)z", svg_contour(mask))
    assert corners is not None
    assert abs(int(corners[1]) - 7) + abs(int(corners[2]) - 5) == 1


def test_slices_go_from_below_the_apex_to_above_the_base_in_right_proportion() -> None:
    reference = np.zeros((14, 90, 90), dtype=bool)
    reference[4:8, 40:50, 40:50] = True
    gland = RegionMasks(name="whole_gland", predicted=reference & False, reference=reference)
    case = gallery_case(np.arange(14 * 90 * 90.0).reshape(14, 90, 90), [gland], spacing_mm=SPACING_MM)
    assert [one["label"].split("   ")[0] for one in case["slices"]] == [f"z = {z}" for z in range(3, 9)]
    assert case["shape_vox"] == (50, 30)  # 20 mm on each side of 10 voxels of 1 and of 2 mm
    assert case["slices"][1]["gland"]["reference"].startswith("M")
    assert case["slices"][1]["gland"]["predicted"] == ""
    assert case["slices"][1]["image_uri"].startswith("data:image/webp;base64,")


# --- model card ----------------------------------------------------------------------------------------------------


def test_card_has_front_matter_and_marks_what_is_not_recorded(data: ReportData) -> None:
    text = card(data)
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    metrics = yaml.safe_load(front)["model-index"][0]["results"][0]["metrics"]
    assert metrics[0] == {"type": "dice", "name": "Dice", "value": pytest.approx(0.5833)}
    assert "[fill in: who made the masks" in body
    assert "[fill in: network; the settings are not in the workspace" in body
    assert "| p3\\_1 | 0.000 |" in body
    assert "| Dice | 0.583 |" in body


def test_card_escapes_text_from_data(data: ReportData) -> None:
    evil = replace(data, cases=data.cases.replace("p3_1", "a|b `c` " + ATTACK + "\nd"))
    text = card(evil)
    assert "<script" not in text
    assert "a\\|b \\`c\\` &lt;script&gt;alert(1)&lt;/script&gt; d" in text
