"""Comparison of two evaluations: requirements, better direction of each metric, subgroups, table and figure."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from prostate_seg.common.errors import InputError
from prostate_seg.reporting.comparison.compare import SUBGROUP_METRICS, compare
from prostate_seg.reporting.comparison.figures import (
    BETTER_COLOUR,
    UNCLEAR_COLOUR,
    WORSE_COLOUR,
    comparisons_figure,
)
from prostate_seg.reporting.comparison.lines import comparison_lines
from prostate_seg.reporting.comparison.results import ALL, COMPARED, Comparison, Results, Row, parse_results
from prostate_seg.reporting.comparison.unseen_groups import new_group_interval, summarise_unseen_groups
from prostate_seg.reporting.evaluation.tables import SUMMARY_METRICS
from prostate_seg.reporting.figures.plots import save_png

NUM_CASES = 24
IDS = [f"{10000 + number // 2}_{number % 2}" for number in range(NUM_CASES)]
"""Twelve patients with two studies each."""


def cases(**columns: object) -> pd.DataFrame:
    """A cases.csv with metrics of 0.5, except the given columns."""
    table = pd.DataFrame({"fold": ["fold0", "fold1"] * (NUM_CASES // 2), "case_id": IDS})
    table["patient_id"] = table["case_id"].str.partition("_")[0]
    table[list(SUMMARY_METRICS)] = 0.5
    table["volume_reference_ml"] = np.arange(NUM_CASES) + 20.0
    table["oracle_crop"] = False
    for kind in ("image_md5", "mask_md5"):
        table[kind] = [f"{kind}{number}" for number in range(NUM_CASES)]
    return table.assign(**columns)


def results(name: str, table: pd.DataFrame) -> Results:
    return parse_results(table.to_csv(index=False), name=name, source=name)


def compared(a: pd.DataFrame, b: pd.DataFrame) -> Comparison:
    (one,) = compare(results("first", a), [results("second", b)], num_bootstrap=200, seed=0)
    return one


def row_of(one: Comparison, metric: str, subgroup: str = ALL, group: str = ALL) -> Row:
    (row,) = [row for row in one.rows if (row["subgroup"], row["group"], row["metric"]) == (subgroup, group, metric)]
    return row


def patients_of(row: Row) -> tuple[int, int, int]:
    return row["num_patients_better"], row["num_patients_equal"], row["num_patients_worse"]


def refusal(a: pd.DataFrame, b: pd.DataFrame) -> str:
    with pytest.raises(InputError) as caught:
        compared(a, b)
    return str(caught.value)


def changed(column: str, row: int, value: object) -> pd.DataFrame:
    table = cases()
    table[column] = table[column].astype(object)
    table.loc[row, column] = value
    return table


# --- refusals ------------------------------------------------------------------------------------------------------


def test_other_test_cases_are_refused_with_the_ids_on_each_side() -> None:
    text = refusal(cases()[2:], cases()[:-13])
    assert text.startswith("second and first were not evaluated on the same data:\n")
    assert "  test cases of second only, 2: 10000_0, 10000_1\n" in text
    assert "  test cases of first only, 13: 10005_1, 10006_0," in text
    assert "10010_0 and 3 more\n" in text
    assert "10010_1" not in text


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("mask_md5", "x", "another reference (mask_md5)"),
        ("image_md5", "x", "another image (image_md5)"),
        ("patient_id", "x", "another patient (patient_id)"),
        ("oracle_crop", "True", "an oracle crop on one side only (oracle_crop)"),
        ("volume_reference_ml", 23.1, "another volume of the same reference (other data.whole_gland_labels?)"),
    ],
)
def test_a_case_that_differs_between_the_results_is_refused_with_its_name(
    column: str, value: object, words: str
) -> None:
    text = refusal(cases(), changed(column, 3, value))
    assert text.splitlines()[1:-1] == [f"  {words}, 1: 10001_1"]


def test_every_kind_of_difference_is_listed_at_once() -> None:
    other = changed("mask_md5", 3, "x").assign(oracle_crop=True)[1:]
    kinds = [line.split(":")[0] for line in refusal(cases(), other).splitlines()[1:-1]]
    assert kinds == [
        "  test cases of first only, 1",
        "  another reference (mask_md5), 1",
        "  an oracle crop on one side only (oracle_crop), 23",
    ]


def test_a_table_without_hashes_is_refused_as_one_of_an_older_version() -> None:
    text = refusal(cases(), cases().drop(columns=["mask_md5", "image_md5"]))
    assert text.startswith("second: its cases.csv has no mask_md5, image_md5: an older version wrote it")
    assert "stage=evaluate again" in text


def test_a_table_with_the_surface_dice_of_older_versions_is_refused() -> None:
    old = cases().rename(columns={"nsd_2mm": "surface_dice_2mm"})
    assert refusal(old, cases()).startswith("first: its cases.csv has no nsd_2mm: an older version wrote it")


def test_a_case_with_two_rows_is_refused() -> None:
    assert "has several of 10001_1" in refusal(cases(), pd.concat([cases(), cases()[3:4]]))


def test_a_single_patient_is_refused() -> None:
    assert "must have two patients or more" in refusal(cases()[:2], cases()[:2])


@pytest.mark.parametrize("text", ["much", "inf"])
def test_a_value_that_is_not_finite_is_refused(text: str) -> None:
    assert text in refusal(cases(), changed("dice", 0, text))


def test_text_that_is_not_a_table_is_refused() -> None:
    with pytest.raises(InputError, match="second: cases.csv cannot be read"):
        parse_results("", name="second", source="second")


# --- the numbers ---------------------------------------------------------------------------------------------------


def test_order_of_rows_and_of_columns_does_not_matter() -> None:
    a, b = cases(dice=np.linspace(0.5, 0.9, NUM_CASES)), cases(dice=np.linspace(0.6, 0.9, NUM_CASES))
    assert compared(a, b).rows == compared(a[::-1], b[b.columns[::-1]].sample(frac=1, random_state=0)).rows


def test_main_table_has_every_metric_with_its_thirds_and_no_other() -> None:
    one = compared(cases(), cases())
    assert [row["metric"] for row in one.rows if row["subgroup"] == ALL] == list(COMPARED)
    assert {"dice_apex", "dice_mid", "dice_base"} < set(COMPARED)
    assert len(COMPARED) == len(SUMMARY_METRICS)


def test_more_dice_and_less_distance_are_better() -> None:
    shift = np.repeat([0.1, -0.1, 0.0], NUM_CASES // 3)  # four patients each
    shift[0] = 0.3
    one = compared(cases(), cases(dice=0.5 + shift, hd95_mm=0.5 + shift))
    assert patients_of(row_of(one, "dice")) == (4, 4, 4)
    more = compared(cases(), cases(dice=0.6, hd95_mm=0.6))
    assert patients_of(row_of(more, "dice")) == (12, 0, 0)
    assert patients_of(row_of(more, "hd95_mm")) == (0, 0, 12)
    assert row_of(more, "hd95_mm")["difference"] == pytest.approx(0.1)


def test_volume_differences_are_compared_by_absolute_value() -> None:
    half = np.tile([8.0, -8.0], NUM_CASES // 2)  # right on average, wrong in every case
    one = compared(cases(volume_difference_ml=half), cases(volume_difference_ml=-3.0))
    row = row_of(one, "abs_volume_difference_ml")
    assert (row["mean_baseline"], row["mean_other"], row["difference"]) == (8.0, 3.0, -5.0)
    assert patients_of(row) == (12, 0, 0)


def test_p_is_adjusted_for_all_tests_of_all_runs_and_not_in_subgroups() -> None:
    better, worse = cases(dice=0.6), cases(dice=0.4, iou=0.4)
    first, second = compare(
        results("a", cases()), [results("b", better), results("c", worse)], num_bootstrap=100, seed=0
    )
    # Three tests have a p, 2 / 2^12 each: all twelve patients go in one direction.
    for one, metric in ((first, "dice"), (second, "dice"), (second, "iou")):
        assert row_of(one, metric)["p_wilcoxon"] == pytest.approx(2 / 2**12)
        assert row_of(one, metric)["p_holm"] == pytest.approx(3 * 2 / 2**12)
    assert all(row["p_holm"] is None for row in first.rows if row["subgroup"] != ALL)


def test_a_third_without_slices_drops_the_pair_and_is_noted() -> None:
    one = compared(changed("dice_apex", 3, math.nan), changed("dice_apex", 4, math.nan))
    assert row_of(one, "dice_apex")["num_missing"] == 2
    assert "cases without dice_apex in a or b, left out: 2" in one.notes


# --- subgroups -----------------------------------------------------------------------------------------------------

CENTRES = ["RUMC", "ZGT"] * 6
CENTRE_OF_CASE = np.repeat(CENTRES, 2)


def test_main_metrics_are_compared_in_every_subgroup() -> None:
    at_zgt = np.where(CENTRE_OF_CASE == "ZGT", 0.1, 0.0)
    one = compared(cases(centre=CENTRE_OF_CASE), cases(centre=CENTRE_OF_CASE, dice=0.5 + at_zgt))
    assert [row["metric"] for row in one.rows if row["group"] == "ZGT"] == list(SUBGROUP_METRICS)
    zgt, rumc = row_of(one, "dice", "centre", "ZGT"), row_of(one, "dice", "centre", "RUMC")
    assert (zgt["num_cases"], zgt["num_patients"]) == (12, 6)
    assert zgt["difference"] == pytest.approx(0.1)
    assert zgt["p_wilcoxon"] == pytest.approx(2 / 2**6)
    assert (rumc["difference"], rumc["p_wilcoxon"]) == (0.0, None)
    tertiles = {row["group"] for row in one.rows if row["subgroup"] == "volume_tertile"}
    assert tertiles == {"lower third", "middle third", "upper third"}
    older = compared(cases(**{ALL: CENTRE_OF_CASE}), cases())  # cases.csv may have this column no more
    assert [row["metric"] for row in older.rows if row["subgroup"] == ALL] == list(COMPARED)


def test_attribute_of_the_other_table_alone_is_a_subgroup_and_of_two_the_baselines_counts() -> None:
    alone = compared(cases(), cases(centre=CENTRE_OF_CASE))
    assert row_of(alone, "dice", "centre", "ZGT")["num_cases"] == 12
    moved = CENTRE_OF_CASE.copy()
    moved[0] = "ZGT"
    both = compared(cases(centre=CENTRE_OF_CASE), cases(centre=moved))
    assert row_of(both, "dice", "centre", "ZGT")["num_cases"] == 12
    assert "centre differs in 1 of 24 cases; the value of a is used" in both.notes


# --- table and figure ----------------------------------------------------------------------------------------------


def test_lines_mark_direction_sign_and_oracle_crop() -> None:
    long = "x" * 150
    a = results(long, cases(oracle_crop=True, centre=CENTRE_OF_CASE, hd95_mm=321.5))
    b = results("second", cases(oracle_crop=True, dice=0.4, hd95_mm=9.25, volume_difference_percent=-123.4, fold="x"))
    (one,) = compare(a, [b], num_bootstrap=100, seed=0)
    lines = comparison_lines(one)
    assert next(line for line in lines if line.startswith("dice ")).split() == [
        "dice", "higher", "0.500", "0.400", "-0.100", "-0.100", "to", "-0.100", "0/0/12", "0.0005", "0.0015",
    ]  # fmt: skip
    assert next(line for line in lines if line.startswith("hd95_mm")).split()[1:5] == [
        "lower", "321.500", "9.250", "-312.250",
    ]  # fmt: skip
    text = "\n".join(lines)
    assert "note: ORACLE CROP: windows were centred on the reference masks, in both" in text
    assert "note: fewer than 20 patients" in text
    assert "note: 24 of 24 cases were tested in another fold" in text
    assert "note: no p, no patient differs: iou, assd_mm," in text
    assert "nan" not in text.lower()


def test_a_result_compared_with_an_equal_one_is_zero_throughout_and_json() -> None:
    one = compared(cases(), cases())
    text = json.dumps(one.as_dict(), allow_nan=False)
    assert {row["difference"] for row in json.loads(text)["rows"]} == {0.0}
    assert {row["p_holm"] for row in json.loads(text)["rows"]} == {None}


def test_figure_has_filled_markers_for_significant_differences(tmp_path: Path) -> None:
    a = results("first", cases(centre=CENTRE_OF_CASE))
    b = results("$second_病$", cases(dice=0.6, hd95_mm=0.7))
    c = results("third", changed("dice_base", 0, math.nan).assign(dice_apex=math.nan))
    both = compare(a, [b, c], num_bootstrap=100, seed=0)
    figure = comparisons_figure(both)
    panels = figure.subfigs[0].axes
    points = [{line.get_color() for line in ax.get_lines() if line.get_marker() == "o"} for ax in panels[:3]]
    assert points == [{BETTER_COLOUR, UNCLEAR_COLOUR}, {WORSE_COLOUR, UNCLEAR_COLOUR}, {UNCLEAR_COLOUR}]
    for line in panels[0].get_lines():
        if line.get_marker() == "o":
            assert (line.get_markerfacecolor() == "white") == (line.get_color() == UNCLEAR_COLOUR)
    assert [ax.get_xlabel().splitlines()[1] for ax in panels[:3]] == ["b better →", "← b better", "← b better"]
    labels = [label.get_text() for label in panels[0].get_yticklabels()]
    assert labels[0] == "Dice (12)"
    assert labels[-2:] == ["centre: RUMC (6)", "centre: ZGT (6)"]
    assert [text.get_text() for text in panels[3].get_legend().get_texts()] == ["24 better in b"]
    few = comparisons_figure(
        compare(results("a", cases()[:10]), [results("b", cases(dice=0.6)[:10])], num_bootstrap=100, seed=0)
    )
    assert {line.get_color() for line in few.subfigs[0].axes[0].get_lines()} == {
        "black",
        UNCLEAR_COLOUR,
    }  # five patients
    save_png(tmp_path / "comparison.png", figure)
    assert imread(tmp_path / "comparison.png").std() > 0.05


# --- groups that no network had seen -------------------------------------------------------------------------------


def test_unseen_groups_are_set_beside_mixed_folds_of_the_same_cases() -> None:
    centre = np.repeat(["A", "B", "C"], NUM_CASES // 3)
    unseen = cases(centre=centre, dice=np.repeat([0.9, 0.8, 0.4], NUM_CASES // 3))
    mixed = cases(centre=centre, dice=np.repeat([0.9, 0.85, 0.8], NUM_CASES // 3))
    found = summarise_unseen_groups(
        results("unseen", unseen), column="centre", mixed=results("mixed", mixed), num_bootstrap=100, seed=0
    )
    rows = found.rows.set_index("group")
    assert rows.index.tolist() == ["A", "B", "C", ALL]
    assert rows["mean"].tolist() == pytest.approx([0.9, 0.8, 0.4, 0.7])
    assert rows["difference"].tolist() == pytest.approx([0, -0.05, -0.4, -0.15])
    assert rows["num_failures"].tolist() == [0, 0, 8, 8]
    assert (rows.loc["C", "difference_low"], rows.loc["C", "difference_high"]) == pytest.approx((-0.4, -0.4))
    assert found.mean == pytest.approx(0.7)
    named_all = results("unseen", unseen.replace({"centre": {"A": "all"}}))
    other = summarise_unseen_groups(named_all, column="centre", mixed=None, num_bootstrap=100, seed=0).rows
    assert list(zip(other["group"], other["num_cases"], strict=True)) == [("B", 8), ("C", 8), ("all", 8), (ALL, 24)]
    with pytest.raises(InputError, match="were not evaluated on the same data"):
        fewer = results("mixed", mixed.iloc[1:])
        summarise_unseen_groups(results("unseen", unseen), column="centre", mixed=fewer, num_bootstrap=100, seed=0)


def test_interval_of_a_new_group_needs_three_groups_and_contains_95_percent_of_new_ones() -> None:
    assert new_group_interval(np.array([0.8, 0.9])) is None
    rng = np.random.default_rng(0)
    drawn = rng.normal(0.5, 0.02, size=(2000, 5))
    inside = [low <= one[4] <= high for one in drawn for low, high in [new_group_interval(one[:4]) or (1, 0)]]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)  # three standard errors
