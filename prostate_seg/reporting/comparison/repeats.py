"""Comparison of settings that were trained with several seeds: differences with intervals, and the noise floor of Dice.

A difference is other minus baseline; each patient counts once. Signed volume differences are compared by absolute value.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd

from prostate_seg.common.errors import InputError, listed
from prostate_seg.imaging.settings import WHOLE_GLAND
from prostate_seg.reporting.comparison.paired import (
    COMPARED,
    MAX_NUM_NAMED,
    ORACLE_CROP,
    TABLE_HEADING,
    Results,
    Row,
    better_direction,
    compared_values,
    end_of,
    note_lines,
    number_text,
    p_text,
    patient_counts,
    require_same_cases,
    row_text,
    shared_regions,
)
from prostate_seg.segmentation.variance import POWER, NoiseFloor, Plan, noise_floor

DICE = "dice"
"""Metric whose components and plan are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeats:
    """Results of one setting, by the seed of its networks."""

    name: str
    """Shown in tables and figures."""
    source: str
    """Run id or folder, with the setting if a sweep has several."""
    by_seed: Mapping[int | None, Results]
    """At least one; the seed of a single evaluation may be unknown, None."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Settings that differ from those of other trials of the sweep."""

    @property
    def results(self) -> list[Results]:
        """Return the results, in the order of the seeds."""
        return list(self.by_seed.values())

    @property
    def seeds_text(self) -> str:
        """Return the seeds for a line of a table."""
        return "one seed" if len(self.by_seed) == 1 else f"seeds {', '.join(map(str, self.by_seed))}"

    def as_dict(self) -> dict[str, Any]:
        """Return name, source and seeds for comparison.json."""
        return {"name": self.name, "source": self.source, "seeds": list(self.by_seed)}


@dataclass(frozen=True, slots=True, kw_only=True)
class RepeatsComparison:
    """Comparison of one setting with the baseline."""

    baseline: Repeats
    other: Repeats
    rows: list[Row]
    """A row per region and metric, the whole gland first."""
    floors: dict[str, NoiseFloor]
    """Noise floor of Dice, by region."""
    notes: list[str]
    """Limitations of the numbers."""

    def as_dict(self) -> dict[str, Any]:
        """Return an entry of comparison.json."""
        sides = {"baseline": self.baseline.as_dict(), "other": self.other.as_dict()}
        floors = {region: asdict(floor) for region, floor in self.floors.items()}
        return {**sides, "notes": self.notes, "rows": self.rows, "noise_floor": floors}


def compare_repeats(
    baseline: Repeats, others: Sequence[Repeats], *, difference: float | None
) -> list[RepeatsComparison]:
    """Compare settings with the baseline, over seeds, folds and patients; `difference` is that of the plan, None for none.

    Raises:
        InputError: If cases, references, images, patients, crops or folds differ, or no fold has two patients.
    """
    return [_compare_pair(baseline, other, difference=difference) for other in others]


def _compare_pair(baseline: Repeats, other: Repeats, *, difference: float | None) -> RepeatsComparison:
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
            floor = _noise_floor(a, b, difference=difference if metric == DICE else None)
            column = {"region": region} if len(regions) > 1 else {}
            rows.append(column | _row(metric, floor, num_missing=len(missing)))
            if metric == DICE:
                floors[region] = floor
    notes = _notes(baseline, other, rows)
    return RepeatsComparison(baseline=baseline, other=other, rows=rows, floors=floors, notes=notes)


def _require_same_folds(first: Results, other: Results) -> None:
    moved = first.table.index[first.table["fold"] != other.table["fold"]].tolist()
    if moved:
        raise InputError(
            f"{other.name} and {first.name} must have the same folds; {len(moved)} of {len(first.table)} cases were tested in "
            f"another one: {listed(moved, most=MAX_NUM_NAMED)}\n"
            "Run stage=prepare once, then each setting: -m stage=train,evaluate seed=1,2,3"
        )


def _scores(side: Repeats, region: str, metric: str) -> pd.DataFrame:
    """Return the scores of one metric as rows of seed, fold, case_id, patient_id and value."""
    tables = []
    for number, results in enumerate(side.results):
        table = results.regions[region]
        scores = table[["fold", "patient_id"]].assign(seed=number, value=compared_values(table)[metric])
        tables.append(scores.reset_index())
    return pd.concat(tables, ignore_index=True)


def _noise_floor(a: pd.DataFrame, b: pd.DataFrame, *, difference: float | None) -> NoiseFloor:
    try:
        return noise_floor(a, b, difference=difference)
    except ValueError as error:
        raise InputError(f"the variance over patients cannot be estimated: {error}") from error


def _row(metric: str, floor: NoiseFloor, *, num_missing: int) -> Row:
    components = {"baseline": floor.sd_baseline, "other": floor.sd_other, "difference": floor.sd_difference}
    return {
        "metric": metric,
        "better": better_direction(metric),
        "num_seeds_baseline": floor.num_seeds[0],
        "num_seeds_other": floor.num_seeds[1],
        "num_folds": floor.num_folds,
        "num_patients": floor.num_patients,
        "num_missing": num_missing,
        **{name: getattr(floor, name) for name in ("mean_baseline", "mean_other", "difference")},
        **{name: getattr(floor, name) for name in ("ci95_low", "ci95_high", "p_not_better")},
        **patient_counts(floor, metric),
        **{f"sd_{side}_{name}": value for side, one in components.items() for name, value in asdict(one).items()},
    }


def _notes(baseline: Repeats, other: Repeats, rows: Sequence[Row]) -> list[str]:
    table = baseline.results[0].table
    notes = [ORACLE_CROP] if (table["oracle_crop"] == "True").any() else []
    if alone := [letter for letter, side in (("a", baseline), ("b", other)) if len(side.by_seed) == 1]:
        notes.append(
            f"one seed of {' and '.join(alone)}: the variance between seeds cannot be known. The intervals are over "
            "patients, for these networks and not for the settings, and there is no P; repeat with other seeds: "
            "-m stage=train,evaluate seed=1,2,3"
        )
    if table["fold"].nunique() == 1:
        notes.append("one fold: the variance between training subsets is not known")
    if len(table) > table["patient_id"].nunique():
        notes.append("a patient with several studies counts once, with their mean")
    for row in rows:
        if row["num_missing"]:
            notes.append(f"cases without {row['metric']} in a network, left out: {row['num_missing']}")
    return notes


def repeats_lines(comparison: RepeatsComparison) -> list[str]:
    """Return the comparison as lines for a terminal."""
    baseline, other = comparison.baseline, comparison.other
    table = baseline.results[0].table
    lines = [
        f"a  {end_of(baseline.name, 70)} (baseline), {baseline.seeds_text}",
        f"b  {end_of(other.name, 70)}, {other.seeds_text}",
        f"{len(table)} cases of {table['patient_id'].nunique()} patients in {table['fold'].nunique()} folds; b/=/a: number of "
        "patients better in b, equal, better in a",
        f"{TABLE_HEADING}{'P':>9}",
    ]
    region = WHOLE_GLAND
    for row in comparison.rows:
        if row.get("region", WHOLE_GLAND) != region:
            region = row["region"]
            lines.append(f"{region}:")
        lines.append(row_text(row, name=row["metric"]) + p_text(row["p_not_better"]))
    if all(len(side.by_seed) > 1 for side in (baseline, other)):
        lines.append(
            "95% CI: over seeds, folds and patients together; P: probability that the better one is not better"
        )
    for name, floor in comparison.floors.items():
        lines += _floor_lines(floor, of="" if name == WHOLE_GLAND else f" of {name}")
    return lines + note_lines(comparison.notes)


SOURCES = {
    "seeds": "seeds: networks of one fold",
    "folds": "folds: training subsets",
    "patients": "patients",
    "residual": "residual: patient x network",
}
"""Fields of `Components`, with their description in the table."""


def _floor_lines(floor: NoiseFloor, *, of: str) -> list[str]:
    """Return the standard deviations of Dice and the plan."""
    sides = (floor.sd_baseline, floor.sd_other, floor.sd_difference)
    lines = [f"{f'noise floor: SD of Dice{of}':<38}{'a':>9}{'b':>9}{'b - a':>9}"]
    for name, label in SOURCES.items():
        lines.append(f"  {label:<36}" + "".join(number_text(getattr(one, name), ".4f") for one in sides))
    return lines if floor.plan is None else [*lines, *_plan_lines(floor, floor.plan, of=of)]


def _plan_lines(floor: NoiseFloor, plan: Plan, *, of: str) -> list[str]:
    needed = ", ".join(f"{seeds} seeds {_reach(patients)}" for seeds, patients in plan.patients_by_seeds.items())
    is_possible = plan.detectable is not None and plan.detectable <= 1
    shown = f"{plan.detectable:.3f}" if is_possible else "nothing"
    return [
        f"to show a difference in Dice{of} of {plan.difference:g} with {POWER:.0%} power, at these variances and "
        f"{floor.num_folds} folds:",
        f"  patients needed: {needed}",
        f"  seeds needed per setting with {floor.num_patients} patients: {_reach(plan.num_seeds)}",
        f"  this comparison would show {shown}",
    ]


def _reach(number: int | None) -> str:
    return "out of reach" if number is None else str(number)
