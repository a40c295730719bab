"""Settings of the group `fold`."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from prostate_seg.common.settings import PathText, Range, Rule, Settings

SplitStrategy = Literal["kfold", "all", "picai", "groups"]

NOT_DUPLICATES = re.compile(
    r"\s*(?P<first>[^/]*[^/\s])\s*/\s*(?P<second>[^/\s][^/]*?)\s*:\s+(?P<reason>\S.*)", re.DOTALL
)
"""Format of a pair in fold.not_duplicates; a case id contains no slash."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldConfig(Settings):
    """Patients for training, validation and testing."""

    strategy: SplitStrategy
    """How patients are split: in num_folds folds, all for training, by the official folds of PI-CAI, or by groups."""
    num_folds: Annotated[int, Range(ge=1, le=100)]
    """Number of folds of kfold."""
    val_fraction: Annotated[float, Range(gt=0, lt=1)]
    """Fraction of the training patients of a fold that is held out for validation."""
    file: PathText | None
    """Split file of fold=picai: JSON whose folds[i].val lists the test case ids of fold i."""
    column: str | None
    """Column of cases.csv for fold=groups, such as centre; each of its values is tested by networks trained without it."""
    max_train_cases: Annotated[int | None, Range(ge=1)]
    """Training cases of each fold, drawn by seed so that a larger number contains a smaller one's; null takes all. Not val."""
    index: Annotated[int | None, Range(ge=0)]
    """The only fold to train and evaluate; null takes all folds."""
    not_duplicates: list[str]
    """Pairs of near-identical images that are no duplicates, each CASE/CASE: REASON; the leak gate accepts them."""

    def _rules(self) -> list[Rule]:
        has_test = self.num_folds >= 2 or self.strategy != "kfold"
        has_file = (self.file is not None) == (self.strategy == "picai")
        has_column = (self.column is not None) == (self.strategy == "groups")
        are_pairs = all(NOT_DUPLICATES.fullmatch(pair) for pair in self.not_duplicates)
        example = '["10001_1/10002_1: two patients according to the register"]'
        return [
            ("num_folds", has_test, "must be at least 2 for fold=kfold (fold=all trains on every case)"),
            ("file", has_file, "must name a file for fold=picai, and be null otherwise"),
            ("column", has_column, "must name a column of cases.csv for fold=groups, and be null otherwise"),
            ("not_duplicates", are_pairs, f"must be pairs with a reason, such as {example}"),
        ]
