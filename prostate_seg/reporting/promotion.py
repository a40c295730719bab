"""Promotion rules: the requirements that a registered version must meet to become champion."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from prostate_seg.common.errors import InputError
from prostate_seg.data.leak_gate import Check
from prostate_seg.reporting.comparison.compare import compare, compare_repeats
from prostate_seg.reporting.comparison.results import ALL, DICE, Repeats, Results
from prostate_seg.reporting.evaluation.stress import worst_moderate
from prostate_seg.reporting.evaluation.tables import zones_of
from prostate_seg.reporting.settings import PromotionRules

PASSED_OUTCOMES = ("passed", "not run")
"""First words of the outcome of a leak check without findings."""


class RuleResult(NamedTuple):
    """Outcome of one rule."""

    rule: str
    is_passed: bool
    message: str
    """The number, the bound and, where it helps, the next step."""

    def __str__(self) -> str:
        return f"{'passed ' if self.is_passed else 'refused'}  {self.rule:<14} {self.message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedVersion:
    """What is known of a registered version."""

    summary: Mapping[str, Any]
    """metrics.json of its evaluation."""
    results: Results
    """cases.csv of its evaluation."""
    stress: Mapping[str, Any] | None = None
    """stress.json of its networks."""
    repeats: Repeats | None = None
    """Sweep over seed that it was trained in."""


def check_promotion(
    candidate: EvaluatedVersion,
    champion: EvaluatedVersion | None,
    *,
    rules: PromotionRules,
    num_bootstrap: int,
    seed: int,
) -> list[RuleResult]:
    """Apply every promotion rule to a candidate; the bootstrap gives the interval of the Dice gained on the champion."""
    pooled, has_oracle = candidate.summary["pooled"], candidate.summary["oracle_crop"]
    num_cases, num_patients, num_failures = (pooled[f"num_{what}"] for what in ("cases", "patients", "failures"))
    mean, low, high = (pooled["dice"][name] for name in ("mean", "ci95_low", "ci95_high"))
    interval = "no interval" if low is None else f"{low:.3f} to {high:.3f}"
    centred = "windows were centred on the reference masks; train with preprocess.crop=center"
    crop = centred if has_oracle else "windows do not depend on the reference masks"
    patients = f"{num_patients} test patients, at least {rules.min_test_patients}"
    dice = f"mean Dice {mean:.3f} ({interval}), at least {rules.min_dice:g}"
    failures = f"{num_failures} of {num_cases} cases failed, at most {rules.max_failure_fraction:.1%}"
    return [
        _check_leaks(candidate.summary.get("leak_gate", {})),
        RuleResult("oracle crop", not has_oracle, crop),
        RuleResult("test patients", num_patients >= rules.min_test_patients, patients),
        RuleResult("Dice", mean >= rules.min_dice, dice),
        *_check_zones(candidate, champion, min_dice=rules.min_zone_dice),
        RuleResult("failures", num_failures / num_cases <= rules.max_failure_fraction, failures),
        *_check_stress(candidate.stress, max_drop=rules.max_stress_drop),
        _check_gain(candidate, champion, min_gain=rules.min_gain, num_bootstrap=num_bootstrap, seed=seed),
        *([] if champion is None else _check_seeds(candidate, champion, max_p=rules.max_p_not_better)),
    ]


def _check_zones(
    candidate: EvaluatedVersion, champion: EvaluatedVersion | None, *, min_dice: Mapping[str, float]
) -> list[RuleResult]:
    """Check the Dice of each zone, and that no zone of the champion is lost; no rule applies to the whole gland alone."""
    zones, outcomes = zones_of(candidate.summary), []
    for name, zone in zones.items():
        mean, least = zone["dice"]["mean"], min_dice.get(name, 0.0)
        outcomes.append(RuleResult(name, mean >= least, f"mean Dice {mean:.3f}, at least {least:g}"))
    if lost := sorted((champion.results.zones.keys() if champion else set()) - zones.keys()):
        message = f"the champion has {', '.join(lost)}, and this has not; train with the same target.regions"
        outcomes.append(RuleResult("zones", False, message))
    return outcomes


def _check_leaks(leak_gate: Mapping[str, Any]) -> RuleResult:
    checks: dict[str, str] = dict(leak_gate.get("checks", {}))
    if not checks:
        return RuleResult("leaks", False, "there is no verdict: run stage=evaluate again")
    checks.pop(Check.oracle_crop.value, None)  # has its own rule
    found = [f"{name}: {outcome}" for name, outcome in checks.items() if not outcome.startswith(PASSED_OUTCOMES)]
    overruled = leak_gate.get("overruled", [])
    passed = "the leak gate found none" + (f"; not duplicates: {', '.join(overruled)}" if overruled else "")
    return RuleResult("leaks", not found, "; ".join(found) or passed)


def _check_stress(stress: Mapping[str, Any] | None, *, max_drop: float | None) -> list[RuleResult]:
    """Check the largest drop at a moderate strength; no rule applies without a bound."""
    if max_drop is None:
        return []
    worst = None if stress is None else worst_moderate(stress)
    if worst is None:
        message = "these networks have no stress test: run stage=stress, then stage=register"
        return [RuleResult("stress", False, message)]
    name, drop = worst
    message = f"Dice falls by {drop:.3f} under moderate {name.replace('_', ' ')}, at most {max_drop:g}"
    return [RuleResult("stress", drop <= max_drop, message)]


def _check_gain(
    candidate: EvaluatedVersion, champion: EvaluatedVersion | None, *, min_gain: float, num_bootstrap: int, seed: int
) -> RuleResult:
    if champion is None:
        return RuleResult("better", True, "there is no champion yet")
    try:
        (comparison,) = compare(champion.results, [candidate.results], num_bootstrap=num_bootstrap, seed=seed)
    except InputError as error:
        return _not_comparable("better", error)
    dice = next(row for row in comparison.rows if row["subgroup"] == ALL and row["metric"] == "dice")
    if dice["ci95_low"] is None:
        return RuleResult("better", False, "there is no interval of the difference")
    message = (
        f"Dice {dice['difference']:+.3f} on the same {dice['num_cases']} cases of {dice['num_patients']} patients, "
        f"95% interval {dice['ci95_low']:+.3f} to {dice['ci95_high']:+.3f}, all above {min_gain:g}"
    )
    return RuleResult("better", dice["ci95_low"] > min_gain, message)


def _not_comparable(rule: str, error: InputError) -> RuleResult:
    message = f"cannot be compared with the champion, {error}".replace("\n", "\n" + " " * 24)
    return RuleResult(rule, False, message)


def _check_seeds(candidate: EvaluatedVersion, champion: EvaluatedVersion, *, max_p: float | None) -> list[RuleResult]:
    """Check the probability that a candidate is no better than the champion, over seeds; no rule without a bound."""
    if max_p is None:
        return []
    own, others = (one.repeats or Repeats.of(one.results) for one in (candidate, champion))
    known = f"{len(own.by_seed)} seed(s) of this, {len(others.by_seed)} of the champion"
    if min(len(own.by_seed), len(others.by_seed)) < 2:
        message = (
            f"the variance between seeds cannot be known: {known}; "
            "register an evaluation of a sweep over seed: -m stage=train,evaluate seed=1,2,3"
        )
        return [RuleResult("seeds", False, message)]
    try:
        (comparison,) = compare_repeats(others, [own], difference=None)
    except InputError as error:
        return [_not_comparable("seeds", error)]
    dice = next(row for row in comparison.rows if row["metric"] == DICE)
    p = dice["p_not_better"] if dice["difference"] > 0 else 1 - dice["p_not_better"]
    message = (
        f"Dice {dice['difference']:+.3f} over {len(own.by_seed)} seeds, {len(others.by_seed)} of the champion; "
        f"probability that it is not better {p:.3f}, at most {max_p:g}"
    )
    return [RuleResult("seeds", p <= max_p, message)]
