"""Promotion rules: the requirements that a registered version must meet to become champion."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prostate_seg.common.errors import InputError
from prostate_seg.data.leak_gate import Check
from prostate_seg.reporting.comparison import ALL, Results, compare
from prostate_seg.reporting.settings import PromotionRules

PASSED_OUTCOMES = ("passed", "not run")
"""First words of the outcome of a leak check without findings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleResult:
    """Outcome of one rule."""

    rule: str
    is_passed: bool
    message: str
    """The number, the bound and, where it helps, the next step."""

    def __str__(self) -> str:
        return f"{'passed ' if self.is_passed else 'refused'}  {self.rule:<14} {self.message}"


def check_promotion(
    summary: Mapping[str, Any],
    results: Results,
    champion: Results | None,
    *,
    rules: PromotionRules,
    num_bootstrap: int,
    seed: int,
) -> list[RuleResult]:
    """Apply every promotion rule to a candidate.

    Args:
        summary: metrics.json of the candidate's evaluation.
        results: cases.csv of the candidate's evaluation.
        champion: cases.csv of the present champion's evaluation; None without a champion.
        rules: Bounds of the rules.
        num_bootstrap: Bootstrap samples behind the interval of the Dice gained over the champion.
        seed: Seed of the bootstrap.
    """
    pooled = summary["pooled"]
    num_cases, num_patients, num_failures = (pooled[f"num_{what}"] for what in ("cases", "patients", "failures"))
    mean, low, high = (pooled["dice"][name] for name in ("mean", "ci95_low", "ci95_high"))
    interval = "no interval" if low is None else f"{low:.3f} to {high:.3f}"
    is_oracle = bool(summary["oracle_crop"])
    return [
        _check_leaks(summary.get("leak_gate", {})),
        RuleResult(
            rule="oracle crop",
            is_passed=not is_oracle,
            message="windows were centred on the reference masks; train with preprocess.crop=center"
            if is_oracle
            else "windows do not depend on the reference masks",
        ),
        RuleResult(
            rule="test patients",
            is_passed=num_patients >= rules.min_test_patients,
            message=f"{num_patients} test patients, at least {rules.min_test_patients}",
        ),
        RuleResult(
            rule="Dice",
            is_passed=mean >= rules.min_dice,
            message=f"mean Dice {mean:.3f} ({interval}), at least {rules.min_dice:g}",
        ),
        RuleResult(
            rule="failures",
            is_passed=num_failures / num_cases <= rules.max_failure_fraction,
            message=f"{num_failures} of {num_cases} cases failed, at most {rules.max_failure_fraction:.1%}",
        ),
        _check_gain(results, champion, min_gain=rules.min_gain, num_bootstrap=num_bootstrap, seed=seed),
    ]


def _check_leaks(leak_gate: Mapping[str, Any]) -> RuleResult:
    checks: Mapping[str, str] = leak_gate.get("checks", {})
    if not checks:
        return RuleResult(rule="leaks", is_passed=False, message="there is no verdict: run stage=evaluate again")
    found = [
        f"{name}: {outcome}"
        for name, outcome in checks.items()
        if name != Check.oracle_crop.value
        and not outcome.startswith(PASSED_OUTCOMES)  # the oracle crop has its own rule
    ]
    overruled = leak_gate.get("overruled", [])
    passed = "the leak gate found none" + (f"; not duplicates: {', '.join(overruled)}" if overruled else "")
    return RuleResult(rule="leaks", is_passed=not found, message="; ".join(found) or passed)


def _check_gain(
    results: Results, champion: Results | None, *, min_gain: float, num_bootstrap: int, seed: int
) -> RuleResult:
    if champion is None:
        return RuleResult(rule="better", is_passed=True, message="there is no champion yet")
    try:
        (comparison,) = compare(champion, [results], num_bootstrap=num_bootstrap, seed=seed)
    except InputError as error:
        message = f"cannot be compared with the champion, {error}".replace("\n", "\n" + " " * 24)
        return RuleResult(rule="better", is_passed=False, message=message)
    dice = next(row.paired for row in comparison.rows if row.subgroup == ALL and row.metric == "dice")
    if dice.ci95_low is None:
        return RuleResult(rule="better", is_passed=False, message="there is no interval of the difference")
    message = (
        f"Dice {dice.difference:+.3f} on the same {dice.num_cases} cases of {dice.num_patients} patients, 95% interval "
        f"{dice.ci95_low:+.3f} to {dice.ci95_high:+.3f}, all above {min_gain:g}"
    )
    return RuleResult(rule="better", is_passed=dice.ci95_low > min_gain, message=message)
