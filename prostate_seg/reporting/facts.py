"""What a report and a model card say, as plain values: collected once, then worded twice. Nothing here reads files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from prostate_seg.data.attributes import REFERENCE_BY
from prostate_seg.reporting.results import SUMMARISED
from prostate_seg.segmentation.statistics import FAILURE_DICE

Tree = Mapping[str, Any]
"""Nested plain values, as read from JSON or YAML."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """One evaluation and what is known of how it came about; only the evaluation itself is always there."""

    cases: pd.DataFrame
    """One row per test case, as evaluation/cases.csv."""
    slices: pd.DataFrame
    """One row per slice with gland, as evaluation/slices.csv."""
    summary: Tree
    """metrics.json."""
    is_external: bool
    """Whether the cases are of another folder than the networks' data set."""
    version: str
    """Version of this package."""
    num_bootstrap: int
    """Bootstrap samples behind each interval."""
    seed: int
    """Seed of the bootstrap."""
    settings: Tree = field(default_factory=dict)
    """The settings that decide a result, as recorded with the networks."""
    entries: Mapping[str, Tree] = field(default_factory=dict)
    """DS_VERSION.json: the newest finished run of each stage whose result is reported."""
    folds: Sequence[Mapping[str, Sequence[str]]] = ()
    """Case ids of train, val and test, per fold."""
    histories: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    """history.csv by fold."""
    kept_epochs: Mapping[str, int] = field(default_factory=dict)
    """The epoch whose weights were kept, by fold."""
    dataset: pd.DataFrame | None = None
    """preprocess/dataset.csv."""
    attribute_names: Sequence[str] = ()
    """Columns of `dataset` that come from cases.csv."""
    reference_quality: pd.DataFrame | None = None
    """preprocess/reference_quality.csv, as text."""
    preprocess_log: Tree = field(default_factory=dict)
    """preprocess_log.json: what was found and who was left out."""

    @property
    def pooled(self) -> Tree:
        """The summary over all cases."""
        pooled: Tree = self.summary["pooled"]
        return pooled

    @property
    def is_phantom(self) -> bool:
        """Whether the networks' data were drawn rather than scanned."""
        return bool(self.settings.get("data", {}).get("source") == "phantom")

    @property
    def failures(self) -> pd.DataFrame:
        """The cases below the Dice of a failure, worst first."""
        return self.cases[~(self.cases["dice"] >= FAILURE_DICE)].sort_values(["dice", "case_id"])

    @property
    def findings(self) -> list[Tree]:
        """What the checks of preprocessing found, errors first."""
        return sorted(self.preprocess_log.get("findings", []), key=lambda finding: not finding["is_error"])

    @property
    def excluded(self) -> dict[str, str]:
        """Why each case that was left out was left out, by case id."""
        reasons = dict.fromkeys(self.preprocess_log.get("excluded_by_config", []), "listed under data.exclude")
        for case_id in self.preprocess_log.get("excluded_by_checks", []):
            found = [one for one in self.findings if one["case_id"] == case_id and one["is_error"]]
            reasons[case_id] = "; ".join(f"{one['check']}: {one['message']}" for one in found)
        return reasons

    @property
    def reference_makers(self) -> dict[str, int]:
        """How many cases each maker of reference masks has; empty when it is not recorded."""
        if REFERENCE_BY not in self.cases:
            return {}
        named = self.cases[REFERENCE_BY].replace("", "unknown").value_counts()
        return {str(maker): int(count) for maker, count in named.items()}

    @property
    def fold_metrics(self) -> list[tuple[str, Tree]]:
        """Fold names with their summaries, in order."""
        return sorted(self.summary["folds"].items())

    @property
    def metrics(self) -> list[tuple[str, Tree]]:
        """Metric names with their pooled summaries, in the order of the tables."""
        return [(name, self.pooled[name]) for name in SUMMARISED if name in self.pooled]

    def warnings(self) -> list[str]:
        """Return what a reader must know before the first number."""
        found = []
        if self.summary.get("oracle_crop"):
            found.append(
                "Oracle crop: the window of every case was placed with its reference mask, which nobody has at inference. "
                "These numbers are too good."
            )
        if self.is_phantom and not self.is_external:
            found.append(
                "The images are a phantom, drawn and not scanned: the numbers show that the machinery works and say "
                "nothing about patients."
            )
        found += [] if self.is_phantom and not self.is_external else [self._reference_warning()]
        return found

    def _reference_warning(self) -> str:
        makers = ", ".join(f"{maker} ({count} cases)" for maker, count in self.reference_makers.items())
        known = f"Reference masks by: {makers}." if makers else "Who made the reference masks is not recorded."
        return f"{known} Where a network made them, Dice measures agreement with that network, not with a reader."
