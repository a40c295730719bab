"""The gate that a version passes before it becomes champion: one line per rule, with the number and the bound.

Nothing here reads files or knows the registry.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prostate_seg.common.errors import InputError
from prostate_seg.data.leak_gate import Check
from prostate_seg.reporting.comparison import ALL, Results, compare
from prostate_seg.reporting.settings import PromotionRules

NOT_FOUND = ("passed", "not run")
"""How the outcome of a leak check begins that found nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a version has shown on its test cases."""

    summary: Mapping[str, Any]
    """metrics.json of its evaluation."""
    results: Results
    """cases.csv of its evaluation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruling:
    """One rule and what became of it."""

    rule: str
    is_passed: bool
    words: str
    """The number, the bound and, where it helps, the next step."""

    def __str__(self) -> str:
        return f"{'passed ' if self.is_passed else 'refused'}  {self.rule:<14} {self.words}"


def judge(
    candidate: Evidence, champion: Evidence | None, *, rules: PromotionRules, num_bootstrap: int, seed: int
) -> list[Ruling]:
    """Apply every rule.

    Args:
        candidate: The version that would be champion.
        champion: The present one; None when there is none.
        rules: The bounds.
        num_bootstrap: Bootstrap samples behind the interval of the difference.
        seed: Seed of the draws.
    """
    pooled = candidate.summary["pooled"]
    failed = pooled["num_failures"] / pooled["num_cases"]
    dice = pooled["dice"]
    enough = f"{pooled['num_patients']} test patients, at least {rules.min_test_patients}"
    good = f"mean Dice {dice['mean']:.3f} ({_interval(dice)}), at least {rules.min_dice:g}"
    safe = f"{pooled['num_failures']} of {pooled['num_cases']} cases failed, at most {rules.max_failure_fraction:.1%}"
    return [
        _no_leaks(candidate.summary),
        _no_oracle_crop(candidate.summary),
        Ruling(rule="test patients", is_passed=pooled["num_patients"] >= rules.min_test_patients, words=enough),
        Ruling(rule="Dice", is_passed=dice["mean"] >= rules.min_dice, words=good),
        Ruling(rule="failures", is_passed=failed <= rules.max_failure_fraction, words=safe),
        _is_better(candidate, champion, rules=rules, num_bootstrap=num_bootstrap, seed=seed),
    ]


def _no_leaks(summary: Mapping[str, Any]) -> Ruling:
    checks: Mapping[str, str] = summary.get("leak_gate", {}).get("checks", {})
    found = [
        f"{name}: {outcome}"
        for name, outcome in checks.items()
        if name != Check.oracle_crop.value and not outcome.startswith(NOT_FOUND)
    ]
    if not checks:
        return Ruling(rule="leaks", is_passed=False, words="there is no verdict: run stage=evaluate again")
    overruled = summary["leak_gate"].get("overruled", [])
    passed = "the leak gate found none" + (f"; not duplicates: {', '.join(overruled)}" if overruled else "")
    return Ruling(rule="leaks", is_passed=not found, words="; ".join(found) or passed)


def _no_oracle_crop(summary: Mapping[str, Any]) -> Ruling:
    used = bool(summary["oracle_crop"])
    words = (
        "the reference placed the windows; train with preprocess.crop=center"
        if used
        else "windows without the reference"
    )
    return Ruling(rule="oracle crop", is_passed=not used, words=words)


def _is_better(
    candidate: Evidence, champion: Evidence | None, *, rules: PromotionRules, num_bootstrap: int, seed: int
) -> Ruling:
    rule = "better"
    if champion is None:
        return Ruling(rule=rule, is_passed=True, words="there is no champion yet")
    try:
        (paired,) = compare(champion.results, [candidate.results], num_bootstrap=num_bootstrap, seed=seed)
    except InputError as error:
        words = f"cannot be compared with the champion, {error}".replace("\n", "\n" + " " * 24)
        return Ruling(rule=rule, is_passed=False, words=words)
    dice = next(row.paired for row in paired.rows if row.subgroup == ALL and row.metric == "dice")
    low = dice.ci95_low
    words = (
        f"Dice {dice.difference:+.3f} on the same {dice.num_cases} cases of {dice.num_patients} patients, 95% interval "
        f"{low:+.3f} to {dice.ci95_high:+.3f}, all above {rules.min_gain:g}"
        if low is not None
        else "there is no interval of the difference"
    )
    return Ruling(rule=rule, is_passed=low is not None and low > rules.min_gain, words=words)


def _interval(dice: Mapping[str, Any]) -> str:
    low, high = dice["ci95_low"], dice["ci95_high"]
    return "no interval" if low is None else f"{low:.3f} to {high:.3f}"
