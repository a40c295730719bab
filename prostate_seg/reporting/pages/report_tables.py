"""Data of the report and the model card, and the tables behind the report's plots, each of which becomes a CSV file.

Intervals are 95% percentile intervals from a bootstrap over patients.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from prostate_seg.data.cases import REFERENCE_BY, RESERVED
from prostate_seg.data.lineage import Ancestor
from prostate_seg.imaging.settings import WHOLE_GLAND
from prostate_seg.reporting.evaluation.tables import SUMMARY_METRICS
from prostate_seg.reporting.evaluation.trust import Trust, reliability_table, risk_coverage
from prostate_seg.segmentation.statistics import FAILURE_DICE, summarise

NUM_BINS = 10
"""Parts of equal length from apex to base; about one 3 mm slice each."""

AGREEMENT_SD = 1.96
"""Half width of the limits of agreement in standard deviations (Bland and Altman 1986)."""

DICE_COLUMNS = ("num_cases", "num_patients", "mean", "ci95_low", "ci95_high")

VOLUME_TERTILE = "volume_tertile"

TERTILES = ("lower third", "middle third", "upper third")

MAX_NUM_GROUPS = 10
"""A numeric attribute with more values is split into tertiles, any other attribute with more values is ignored."""

UNKNOWN = "unknown"
"""Group of the cases without a value of the attribute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """One evaluation with its provenance; what has a default may be missing from the workspace."""

    cases: pd.DataFrame
    """evaluation/cases.csv: one row per test case, for the whole gland."""
    slices: pd.DataFrame
    """evaluation/slices.csv: one row per slice with gland."""
    summary: Mapping[str, Any]
    """metrics.json."""
    is_external: bool
    """Whether the cases are from another folder than the networks' data set."""
    num_bootstrap: int
    seed: int
    """Seed of the bootstrap."""
    zones: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    """The same columns as `cases` for each zone, by name."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that decide a result, as recorded with the networks."""
    records: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """DS_VERSION.json: the newest finished run of each reported stage."""
    folds: Sequence[Mapping[str, Sequence[str]]] = ()
    """Case ids of train, val and test, per fold."""
    histories: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    """history.csv by fold."""
    kept_epochs: Mapping[str, int] = field(default_factory=dict)
    """Epoch whose weights were kept, by fold."""
    dataset: pd.DataFrame | None = None
    """preprocess/dataset.csv."""
    reference_quality: pd.DataFrame | None = None
    """preprocess/reference_quality.csv, as text."""
    preprocess_log: Mapping[str, Any] = field(default_factory=dict)
    """preprocess_log.json: findings and exclusions."""
    ancestors: Mapping[str, Sequence[Ancestor]] = field(default_factory=dict)
    """Networks that the network of each fold started from, the nearest first; empty for random weights."""
    stress: Mapping[str, Any] | None = None
    """stress.json of these networks."""
    stress_curves: pd.DataFrame | None = None
    """stress/curves.csv, with `stress`."""
    trust: Trust | None = None
    """Expected Dice and calibration; None for an evaluation of an older version."""

    @property
    def is_phantom(self) -> bool:
        """Whether the networks were trained on synthetic images."""
        return bool(self.settings.get("data", {}).get("source") == "phantom")

    @property
    def regions(self) -> dict[str, pd.DataFrame]:
        """Cases of each region, the whole gland first."""
        return {WHOLE_GLAND: self.cases, **self.zones}

    @property
    def failures(self) -> pd.DataFrame:
        """Cases with a Dice below `FAILURE_DICE`, worst first."""
        return failures_of(self.cases)

    @property
    def findings(self) -> list[Mapping[str, Any]]:
        """Findings of preprocessing, errors first."""
        return sorted(self.preprocess_log.get("findings", []), key=lambda finding: not finding["is_error"])

    @property
    def excluded(self) -> dict[str, str]:
        """Reason of each exclusion, by case id."""
        reasons = dict.fromkeys(self.preprocess_log.get("excluded_by_config", []), "listed under data.exclude")
        for case_id in self.preprocess_log.get("excluded_by_checks", []):
            errors = [one for one in self.findings if one["case_id"] == case_id and one["is_error"]]
            reasons[case_id] = "; ".join(f"{error['check']}: {error['message']}" for error in errors)
        return reasons

    @property
    def reference_makers(self) -> dict[str, int]:
        """Number of test cases by author of the reference mask; empty if it is not recorded."""
        if REFERENCE_BY not in self.cases:
            return {}
        counts = self.cases[REFERENCE_BY].replace("", UNKNOWN).value_counts()
        return {str(maker): int(count) for maker, count in counts.items()}

    @property
    def warnings(self) -> list[str]:
        """Limitations that a reader must see before the first number."""
        found = []
        if self.summary.get("oracle_crop"):
            found.append(
                "Oracle crop: the window of every case was centred on its reference mask, which is not available at "
                "inference. These numbers are optimistic."
            )
        if self.is_phantom and not self.is_external:
            found.append(
                "The images are synthetic phantoms: the numbers show that the software works and say nothing about "
                "patients."
            )
        else:
            makers = ", ".join(f"{maker} ({count} cases)" for maker, count in self.reference_makers.items())
            known = f"Reference masks by: {makers}." if makers else "The author of the reference masks is not recorded."
            found.append(
                f"{known} If a network made them, Dice measures agreement with that network, not with a reader."
            )
        return found


def failures_of(cases: pd.DataFrame) -> pd.DataFrame:
    """Return the cases with a Dice below `FAILURE_DICE`, worst first."""
    return cases[~(cases["dice"] >= FAILURE_DICE)].sort_values(["dice", "case_id"])


def all_tables(data: ReportData) -> dict[str, pd.DataFrame]:
    """Return every table by the name of its CSV file; with zones, those of several regions have a column `region`."""
    of_regions = {WHOLE_GLAND: data.summary, **data.summary.get("zones", {})}
    volumes = {region: bland_altman(cases) for region, cases in data.regions.items()}
    tables = {
        "results": _long({region: _results(summary) for region, summary in of_regions.items()}),
        "bland_altman": _long(volumes),
        "subgroups": subgroup_dice(data),
        "learning_curves": learning_curves(data.histories),
        "dice_along_gland": dice_along_gland(data),
    }
    if (trust := data.trust) is not None:
        tables |= {"expected_dice": trust.cases, "risk_coverage": risk_coverage(trust.cases)}
        tables["reliability"] = reliability_table(trust)
    return tables


def _long(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the tables of several regions below each other with a column `region`; one table as it is."""
    if len(tables) == 1:
        return tables[WHOLE_GLAND]
    return pd.concat([table.assign(region=region) for region, table in tables.items()], ignore_index=True)


def _results(summary: Mapping[str, Any]) -> pd.DataFrame:
    groups = {"pooled": summary["pooled"], **summary["folds"]}
    rows = [{"group": group, "metric": name, **groups[group][name]} for group in groups for name in SUMMARY_METRICS]
    return pd.DataFrame(rows)


def bland_altman(cases: pd.DataFrame) -> pd.DataFrame:
    """Return mean and difference (predicted minus reference) of both volumes of each case, in mL."""
    mean_ml = (cases["volume_reference_ml"] + cases["volume_predicted_ml"]) / 2
    return cases[["fold", "case_id"]].assign(mean_ml=mean_ml, difference_ml=cases["volume_difference_ml"])


def limits_of_agreement(differences_ml: pd.Series) -> tuple[float, float, float]:
    """Return bias, lower and upper limit of agreement; the limits are NaN for a single case."""
    bias, sd = float(differences_ml.mean()), float(differences_ml.std(ddof=1))
    return bias, bias - AGREEMENT_SD * sd, bias + AGREEMENT_SD * sd


def subgroup_dice(data: ReportData) -> pd.DataFrame:
    """Return mean Dice and interval of each group of each attribute, tertiles of gland volume first, for each region."""
    tables, grouped = {}, subgroups(data.cases)
    for region, cases in data.regions.items():
        rows = [
            {"attribute": attribute, "group": group, **_dice_summary(data, cases[groups == group])}
            for attribute, groups in grouped.items()
            for group in sorted(set(groups))
        ]
        tables[region] = pd.DataFrame(rows, columns=["attribute", "group", *DICE_COLUMNS])
    return _long(tables)


def learning_curves(histories: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return loss and val Dice by fold and epoch; val Dice is NaN in epochs without validation."""
    columns = {"epoch": "epoch", "train/loss": "train_loss", "val/dice": "val_dice"}
    parts = [history[list(columns)].rename(columns=columns).assign(fold=fold) for fold, history in histories.items()]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*columns.values(), "fold"])


def dice_along_gland(data: ReportData) -> pd.DataFrame:
    """Return mean Dice of slices by position from apex (0) to base (1), the middle of each part of the gland.

    The first and the last row have the slices outside either end, where every prediction is wrong.
    """
    edges = np.array([-np.inf, *np.linspace(0, 1, NUM_BINS + 1), np.inf])
    part = np.digitize(data.slices["position"], edges) - 1
    rows = [
        {
            "position": round((number - 0.5) / NUM_BINS, 3),
            "num_slices": int((part == number).sum()),
            **_dice_summary(data, data.slices[part == number]),
        }
        for number in range(NUM_BINS + 2)
    ]
    return pd.DataFrame(rows, columns=["position", "num_slices", *DICE_COLUMNS])


def _dice_summary(data: ReportData, rows: pd.DataFrame) -> dict[str, float | int | None]:
    dice, patients = rows["dice"].to_numpy(dtype=float), rows["patient_id"].tolist()
    summary = summarise(dice, patients=patients, num_bootstrap=data.num_bootstrap, seed=data.seed)
    return asdict(summary) | {"num_cases": int(rows["case_id"].nunique())}


def subgroups(cases: pd.DataFrame) -> dict[str, pd.Series]:
    """Return the group of each case by attribute; the tertile of gland volume comes first.

    The groups are text on the index of `cases`, a table such as evaluation/cases.csv; attributes with one value are left out.
    """
    groups = {VOLUME_TERTILE: _tertile(cases["volume_reference_ml"])}
    for name in cases.columns.difference(sorted(RESERVED), sort=False):
        values = cases[name].fillna("").astype(str).str.strip().replace("", UNKNOWN)
        if values.nunique() > MAX_NUM_GROUPS:
            numbers = pd.to_numeric(cases[name], errors="coerce")
            values = _tertile(numbers) if numbers.notna().any() else values
        groups[str(name)] = values
    return {name: values for name, values in groups.items() if 2 <= values.nunique() <= MAX_NUM_GROUPS}


def _tertile(values: pd.Series) -> pd.Series:
    """Return the tertile of each value by rank, so that the groups are of equal size as far as ties allow."""
    fraction = (values.rank(method="average") - 0.5) / max(int(values.notna().sum()), 1)
    names = pd.Series(np.array(TERTILES)[np.clip(fraction.fillna(0) * 3, 0, 2).astype(int)], index=values.index)
    return names.where(values.notna(), UNKNOWN)
