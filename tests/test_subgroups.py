"""Cases fall into groups by volume and by what cases.csv says of them."""

import pandas as pd

from prostate_seg.reporting.subgroups import subgroups


def table(**columns: list[object]) -> pd.DataFrame:
    return pd.DataFrame({"case_id": list("abcdef"), "volume_reference_ml": [60, 20, 30, 90, 40, 50], **columns})


def test_volumes_are_parted_into_three_of_two() -> None:
    groups = subgroups(table())
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
    groups = subgroups(table(centre=["A", "B", "", "A", None, "B"], constant=["x"] * 6))
    assert groups["centre"].tolist() == ["A", "B", "unknown", "A", "unknown", "B"]
    assert "constant" not in groups


def test_many_numbers_become_tertiles_and_many_words_are_passed_over() -> None:
    many = pd.concat([table(age=[str(50 + i) for i in range(6)], note=list("uvwxyz"))] * 2, ignore_index=True)
    many["age"] = [str(age) for age in range(50, 61)] + [""]
    many["note"] = [f"n{i}" for i in range(12)]
    groups = subgroups(many)
    assert sorted(set(groups["age"])) == ["lower third", "middle third", "unknown", "upper third"]
    assert "note" not in groups
