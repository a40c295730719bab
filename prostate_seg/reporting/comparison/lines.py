"""A comparison as lines for a terminal: differences, the noise floor of repeated trainings, and limitations."""

from prostate_seg.common.tables import table_lines
from prostate_seg.imaging.settings import WHOLE_GLAND
from prostate_seg.reporting.comparison.results import ALL, Comparison, Row
from prostate_seg.segmentation.variance import POWER, NoiseFloor

SOURCES = {
    "seeds": "seeds: networks of one fold",
    "folds": "folds: training subsets",
    "patients": "patients",
    "residual": "residual: patient x network",
}
"""Fields of `Components`, with their description in the table."""


def comparison_lines(comparison: Comparison) -> list[str]:
    """Return the comparison as lines for a terminal."""
    baseline, other, floors = comparison.baseline, comparison.other, comparison.floors
    table = baseline.table
    seeds = [f", {side.seeds_text}" if floors else "" for side in (baseline, other)]
    folds = f" in {table['fold'].nunique()} folds" if floors else ""
    lines = [
        f"a  {baseline.name} (baseline){seeds[0]}",
        f"b  {other.name}{seeds[1]}",
        f"{len(table)} cases of {table['patient_id'].nunique()} patients{folds}; b/=/a: number of patients better in b, "
        "equal, better in a",
        *_difference_lines(comparison),
    ]
    if not floors:
        lines.append(
            "p: Wilcoxon signed-rank test over patients; p Holm: adjusted for all tests over all cases; subgroups are "
            "exploratory"
        )
    elif len(baseline.by_seed) > 1 and len(other.by_seed) > 1:
        lines.append(
            "95% CI: over seeds, folds and patients together; P: probability that the better one is not better"
        )
    for name, floor in floors.items():
        lines += _floor_lines(floor, of="" if name == WHOLE_GLAND else f" of {name}")
    return [*lines, *(f"note: {note}" for note in comparison.notes)]


def _difference_lines(comparison: Comparison) -> list[str]:
    """Return the table of the differences; zones and subgroups have a heading in its first column."""
    p_columns = {"p_not_better": "P"} if comparison.floors else {"p_wilcoxon": "p", "p_holm": "p Holm"}
    heads = ["", "better", "a", "b", "b - a", "95% CI of b - a", "b/=/a", *p_columns.values()]
    rows = []
    heading = (WHOLE_GLAND, ALL, ALL)
    for row in comparison.full_rows:
        region, subgroup, group = row["region"], row["subgroup"], row["group"]
        if region != heading[0]:
            rows.append([f"{region}:"])
        if subgroup != ALL and (region, subgroup, group) != heading:
            rows.append([f"{subgroup} = {group}:"])
        heading = (region, subgroup, group)
        rows.append([*_cells(row), *(_p_text(row[column]) for column in p_columns)])
    return table_lines(heads, rows, numbers={*heads} - {"", "better", "95% CI of b - a"})


def _cells(row: Row) -> list[str]:
    """Return the cells of a row without its p."""
    name = row["metric"] if row["subgroup"] == ALL else f"  {row['metric']}"
    means = [_number(row["mean_baseline"]), _number(row["mean_other"]), _number(row["difference"], "+.3f")]
    interval = "-" if row["ci95_low"] is None else f"{row['ci95_low']:+.3f} to {row['ci95_high']:+.3f}"
    patients = "/".join(str(row[f"num_patients_{what}"]) for what in ("better", "equal", "worse"))
    return [name, row["better"], *means, interval, patients]


def _floor_lines(floor: NoiseFloor, *, of: str) -> list[str]:
    """Return the standard deviations of Dice and the plan."""
    sides = (floor.sd_baseline, floor.sd_other, floor.sd_difference)
    lines = [f"{f'noise floor: SD of Dice{of}':<38}{'a':>9}{'b':>9}{'b - a':>9}"]
    for name, label in SOURCES.items():
        lines.append(f"  {label:<36}" + "".join(f"{_number(getattr(one, name), '.4f'):>9}" for one in sides))
    if (plan := floor.plan) is None:
        return lines
    needed = ", ".join(f"{seeds} seeds {_reach(patients)}" for seeds, patients in plan.patients_by_seeds.items())
    is_possible = plan.detectable is not None and plan.detectable <= 1
    return [
        *lines,
        f"to show a difference in Dice{of} of {plan.difference:g} with {POWER:.0%} power, at these variances and "
        f"{floor.num_folds} folds:",
        f"  patients needed: {needed}",
        f"  seeds needed per setting with {floor.num_patients} patients: {_reach(plan.num_seeds)}",
        f"  this comparison would show {f'{plan.detectable:.3f}' if is_possible else 'nothing'}",
    ]


def _reach(number: int | None) -> str:
    return "out of reach" if number is None else str(number)


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def _p_text(value: float | None) -> str:
    return "<0.0001" if value is not None and value < 0.0001 else _number(value, ".4f")
