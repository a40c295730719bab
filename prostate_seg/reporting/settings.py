"""Settings of the promotion gate, part of the group `register`."""

from dataclasses import dataclass
from typing import Annotated

from prostate_seg.common.settings import Range, Rule, Settings


@dataclass(frozen=True, kw_only=True, slots=True)
class PromotionRules(Settings):
    """Requirements of a champion."""

    min_test_patients: Annotated[int, Range(ge=1)]
    """Minimum number of patients that a champion was tested on."""
    min_dice: Annotated[float, Range(ge=0, le=1)]
    """Minimum mean Dice of a champion over its test cases."""
    min_zone_dice: dict[str, float]
    """Minimum mean Dice of a champion's zones, by name; a zone without one may have any."""
    max_failure_fraction: Annotated[float, Range(ge=0, le=1)]
    """Maximum fraction of test cases whose Dice counts as a failure."""
    min_gain: Annotated[float, Range(ge=-1, le=1)]
    """Lower bound of the confidence interval of the Dice gained on the present champion; below 0 an equal model may follow."""
    max_p_not_better: Annotated[float | None, Range(gt=0, le=1)]
    """Maximum probability, over seeds, folds and patients, that it is not better than the champion; null makes no rule."""

    max_stress_drop: Annotated[float | None, Range(ge=0, le=1)]
    """Maximum fall of a champion's mean Dice under a moderate perturbation of stage=stress; null asks for no stress test."""

    def _rules(self) -> list[Rule]:
        are_fractions = all(0 <= dice <= 1 for dice in self.min_zone_dice.values())
        return [("min_zone_dice", are_fractions, "must be numbers from 0 to 1")]
