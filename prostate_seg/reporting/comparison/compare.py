"""Comparison of evaluations on the same cases: by pairs, with signed-rank tests, or of settings with several seeds.

The intervals of pairs are of a bootstrap over patients; those of settings are over seeds, folds and patients, each of which
counts once.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import pandas as pd

from prostate_seg.common.errors import InputError, listed
from prostate_seg.data.cases import RESERVED
from prostate_seg.reporting.comparison.results import (
    ALL,
    COMPARED,
    DICE,
    LOWER_IS_BETTER,
    MAX_NUM_NAMED,
    ORACLE_CROP,
    Comparison,
    Repeats,
    Results,
    Row,
    compared_values,
    patient_counts,
    require_same_cases,
    shared_regions,
)
from prostate_seg.reporting.pages.report_tables import subgroups
from prostate_seg.segmentation.statistics import holm, paired_difference
from prostate_seg.segmentation.variance import NoiseFloor, noise_floor

SUBGROUP_METRICS = ("dice", "hd95_mm", "abs_volume_difference_percent")
"""Metrics also compared in every subgroup."""

FEW_PATIENTS = 20
"""Below this number percentile intervals are too narrow: in a simulation 92% coverage at 20 patients, 84% at 5."""

ONE_SEED = (
    "one training of each: the intervals are for these networks and not for their settings, whose seeds are not compared; "
    "for that, sweep over seed: -m stage=train,evaluate seed=1,2,3"
)
"""Limitation of every comparison without repeats."""


def compare(baseline: Results, others: Sequence[Results], *, num_bootstrap: int, seed: int) -> list[Comparison]:
    """Compare evaluations on the same cases with the baseline, with intervals from a bootstrap over patients.

    Raises:
        InputError: If cases, references, images, patients or crops differ, or there are fewer than two patients.
    """
    for other in others:
        require_same_cases(baseline, other)
    if baseline.table["patient_id"].nunique() < 2:
        raise InputError(f"{baseline.name}: must have two patients or more to estimate the variation between patients")
    compared = partial(_compare_region, baseline, num_bootstrap=num_bootstrap, seed=seed)
    tables = [[row for name in shared_regions(baseline, other) for row in compared(other, name)] for other in others]
    # Holm's adjustment covers the tests over all cases of all comparisons.
    tests = [row for rows in tables for row in rows if row["subgroup"] == ALL]
    for row, p_holm in zip(tests, holm([row["p_wilcoxon"] for row in tests]), strict=True):
        row["p_holm"] = p_holm
    return [
        Comparison(
            baseline=Repeats.of(baseline),
            other=Repeats.of(other),
            rows=rows,
            notes=_paired_notes(baseline, other, rows),
        )
        for other, rows in zip(others, tables, strict=True)
    ]


def _compare_region(baseline: Results, other: Results, region: str, *, num_bootstrap: int, seed: int) -> list[Row]:
    """Return a row per metric over all cases, then a row per metric and group of cases."""
    column = {"region": region} if len(shared_regions(baseline, other)) > 1 else {}
    tables = baseline.regions[region], other.regions[region]
    a, b = map(compared_values, tables)

    def row(subgroup: str, group: str, metric: str, cases: pd.Index) -> Row:
        paired = paired_difference(
            a.loc[cases, metric].to_numpy(),
            b.loc[cases, metric].to_numpy(),
            patients=tables[0].loc[cases, "patient_id"].tolist(),
            num_bootstrap=num_bootstrap,
            seed=seed,
        )
        better = "lower" if metric in LOWER_IS_BETTER else "higher"
        row = {**column, "subgroup": subgroup, "group": group, "metric": metric, "better": better}
        return {**row, **asdict(paired), **patient_counts(paired, metric), "p_holm": None}

    rows = [row(ALL, ALL, metric, a.index) for metric in COMPARED]
    # Attributes that only the other table has are subgroups too.
    added = tables[1].columns.difference(tables[0].columns, sort=False)
    for name, groups in subgroups(tables[0].join(tables[1][added])).items():
        for group, cases in sorted(groups.groupby(groups).groups.items()):
            rows += [row(name, str(group), metric, cases) for metric in SUBGROUP_METRICS]
    return rows


def _paired_notes(baseline: Results, other: Results, rows: Sequence[Row]) -> list[str]:
    a, b = baseline.table, other.table.loc[baseline.table.index]
    notes = [ORACLE_CROP] if (a["oracle_crop"] == "True").any() else []
    if a["patient_id"].nunique() < FEW_PATIENTS:
        notes.append(f"fewer than {FEW_PATIENTS} patients: the coverage of the intervals is below 95%")
    notes.append(ONE_SEED)
    if moved := int((a["fold"] != b["fold"]).sum()):
        notes.append(f"{moved} of {len(a)} cases were tested in another fold, by networks trained on other patients")
    for name in a.columns.intersection(b.columns).difference(sorted(RESERVED)):
        if num_differing := (a[name] != b[name]).sum():
            notes.append(f"{name} differs in {num_differing} of {len(a)} cases; the value of a is used")
    prefix = {name: f"{name}/" for name in baseline.zones}  # as in the names of metrics
    main = {prefix.get(row.get("region", ""), "") + row["metric"]: row for row in rows if row["subgroup"] == ALL}
    for name, row in main.items():
        if row["num_missing"]:
            notes.append(f"cases without {name} in a or b, left out: {row['num_missing']}")
    for reason in sorted({row["no_p"] for row in main.values() if row["no_p"]}):
        notes.append(f"no p, {reason}: {', '.join(name for name, row in main.items() if row['no_p'] == reason)}")
    if alone := sorted(baseline.zones.keys() ^ other.zones.keys()):
        notes.append(f"in one of the two only, and not compared: {', '.join(alone)}")
    return notes


def compare_repeats(baseline: Repeats, others: Sequence[Repeats], *, difference: float | None) -> list[Comparison]:
    """Compare settings with the baseline, over seeds, folds and patients; `difference` is that of the plan, None for none.

    Raises:
        InputError: If cases, references, images, patients, crops or folds differ, or no fold has two patients.
    """
    return [_compare_settings(baseline, other, difference=difference) for other in others]


def _compare_settings(baseline: Repeats, other: Repeats, *, difference: float | None) -> Comparison:
    first = baseline.results[0]
    for results in (*baseline.results[1:], *other.results):
        require_same_cases(first, results)
        _require_same_folds(first, results)
    regions, rows, floors = shared_regions(first, other.results[0]), [], {}
    for region in regions:
        for metric in COMPARED:
            sides = [_scores(one, region, metric) for one in (baseline, other)]
            missing = {case for side in sides for case in side.loc[side["value"].isna(), "case_id"]}
            a, b = (side[~side["case_id"].isin(missing)] for side in sides)
            if a.empty:
                continue
            try:
                floor = noise_floor(a, b, difference=difference if metric == DICE else None)
            except ValueError as error:
                raise InputError(f"the variance over patients cannot be estimated: {error}") from error
            rows.append(
                ({"region": region} if len(regions) > 1 else {}) | _row(metric, floor, num_missing=len(missing))
            )
            if metric == DICE:
                floors[region] = floor
    return Comparison(
        baseline=baseline, other=other, rows=rows, floors=floors, notes=_repeats_notes(baseline, other, rows)
    )


def _require_same_folds(first: Results, other: Results) -> None:
    moved = first.table.index[first.table["fold"] != other.table["fold"]].tolist()
    if moved:
        raise InputError(
            f"{other.name} and {first.name} must have the same folds; {len(moved)} of {len(first.table)} cases were tested in "
            f"another one: {listed(moved, most=MAX_NUM_NAMED)}\n"
            "Run stage=prepare once, then each setting: -m stage=train,evaluate seed=1,2,3"
        )


def _scores(side: Repeats, region: str, metric: str) -> pd.DataFrame:
    """Return the scores of one metric as rows of seed, case_id, fold, patient_id and value."""
    tables = [results.regions[region] for results in side.results]
    scores = [table[["fold", "patient_id"]].assign(value=compared_values(table)[metric]) for table in tables]
    return pd.concat(scores, keys=range(len(scores)), names=["seed"]).reset_index()


def _row(metric: str, floor: NoiseFloor, *, num_missing: int) -> Row:
    components = {"baseline": floor.sd_baseline, "other": floor.sd_other, "difference": floor.sd_difference}
    numbers = ("mean_baseline", "mean_other", "difference", "ci95_low", "ci95_high", "p_not_better")
    return {
        "metric": metric,
        "better": "lower" if metric in LOWER_IS_BETTER else "higher",
        "num_seeds_baseline": floor.num_seeds[0],
        "num_seeds_other": floor.num_seeds[1],
        "num_folds": floor.num_folds,
        "num_patients": floor.num_patients,
        "num_missing": num_missing,
        **{name: getattr(floor, name) for name in numbers},
        **patient_counts(floor, metric),
        **{f"sd_{side}_{name}": value for side, one in components.items() for name, value in asdict(one).items()},
    }


def _repeats_notes(baseline: Repeats, other: Repeats, rows: Sequence[Row]) -> list[str]:
    notes = [ORACLE_CROP] if (baseline.table["oracle_crop"] == "True").any() else []
    if alone := [letter for letter, side in (("a", baseline), ("b", other)) if len(side.by_seed) == 1]:
        notes.append(
            f"one seed of {' and '.join(alone)}: the variance between seeds cannot be known. The intervals are over "
            "patients, for these networks and not for the settings, and there is no P; repeat with other seeds: "
            "-m stage=train,evaluate seed=1,2,3"
        )
    if baseline.table["fold"].nunique() == 1:
        notes.append("one fold: the variance between training subsets is not known")
    if len(baseline.table) > baseline.table["patient_id"].nunique():
        notes.append("a patient with several studies counts once, with their mean")
    for row in rows:
        if row["num_missing"]:
            notes.append(f"cases without {row['metric']} in a network, left out: {row['num_missing']}")
    return notes
