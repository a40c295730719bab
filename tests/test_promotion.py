"""Each promotion rule refuses on its own, with value, bound and next step."""

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from prostate_seg.reporting.comparison.results import Repeats, parse_results
from prostate_seg.reporting.evaluation.tables import SUMMARY_METRICS
from prostate_seg.reporting.promotion import EvaluatedVersion, RuleResult, check_promotion
from prostate_seg.reporting.settings import PromotionRules

PASSED = {"patient overlap": "passed", "identical voxels": "passed on 3 of 5 cases", "identical mask files": "not run"}


def evaluation(
    *dices: float, leaks: dict[str, str] | None = None, oracle_crop: bool = False, mask: str = "m", name: str = "v"
) -> EvaluatedVersion:
    """Return metrics.json and cases.csv of a version with these Dice values, one patient each."""
    rows = [
        {
            "fold": "fold0",
            "case_id": f"{number}_1",
            "patient_id": str(number),
            **dict.fromkeys(SUMMARY_METRICS, dice),
            "volume_reference_ml": 40.0,
            "oracle_crop": oracle_crop,
            "image_md5": f"i{number}",
            "mask_md5": f"{mask}{number}",
        }
        for number, dice in enumerate(dices)
    ]
    failed = sum(dice < 0.5 for dice in dices)
    mean = sum(dices) / len(dices)
    pooled = {"num_cases": len(dices), "num_patients": len(dices), "num_failures": failed}
    summary: dict[str, Any] = {
        "oracle_crop": oracle_crop,
        "leak_gate": {"verdict": "passed", "checks": PASSED if leaks is None else leaks},
        "pooled": {**pooled, "dice": {"mean": mean, "ci95_low": mean - 0.01, "ci95_high": mean + 0.01}},
    }
    text = pd.DataFrame(rows).to_csv(index=False)
    return EvaluatedVersion(summary=summary, results=parse_results(text, name=name, source=name))


GOOD = (0.9, 0.91, 0.92, 0.93, 0.94)


def outcomes(
    candidate: EvaluatedVersion,
    champion: EvaluatedVersion | None = None,
    *,
    max_failure_fraction: float = 0.2,
    min_gain: float = 0,
    max_p_not_better: float | None = None,
) -> list[RuleResult]:
    return check_promotion(
        candidate,
        champion,
        rules=PromotionRules(
            min_test_patients=5,
            min_dice=0.8,
            min_zone_dice={},
            max_failure_fraction=max_failure_fraction,
            min_gain=min_gain,
            max_stress_drop=None,
            max_p_not_better=max_p_not_better,
        ),
        num_bootstrap=200,
        seed=1,
    )


def refused(candidate: EvaluatedVersion, champion: EvaluatedVersion | None = None, **bounds: float) -> list[RuleResult]:
    found = outcomes(candidate, champion, **bounds)
    rules = ["leaks", "oracle crop", "test patients", "Dice", "failures", "better"]
    assert [outcome.rule for outcome in found] == rules
    return [outcome for outcome in found if not outcome.is_passed]


def test_a_good_first_version_passes_every_rule() -> None:
    assert refused(evaluation(*GOOD)) == []


def test_pairs_listed_as_not_duplicates_are_listed_with_the_verdict() -> None:
    candidate = evaluation(*GOOD, leaks={"near-identical images": "passed (1 pair overruled)"})
    gate = candidate.summary["leak_gate"] | {"overruled": ["a_1 and b_1 (correlation 0.66): two patients"]}
    leaks, *_ = outcomes(replace(candidate, summary={**candidate.summary, "leak_gate": gate}))
    assert leaks.is_passed
    assert leaks.message.endswith("not duplicates: a_1 and b_1 (correlation 0.66): two patients")


@pytest.mark.parametrize(
    ("candidate", "rule", "words"),
    [
        (evaluation(*GOOD, leaks={"patient overlap": "3 pairs"}), "leaks", "patient overlap: 3 pairs"),
        (evaluation(*GOOD, leaks={"studies of ancestors": "unknown: those of A"}), "leaks", "unknown: those of A"),
        (evaluation(*GOOD, leaks={}), "leaks", "there is no verdict"),
        (evaluation(*GOOD, oracle_crop=True), "oracle crop", "preprocess.crop=center"),
        (evaluation(*GOOD[:4]), "test patients", "4 test patients, at least 5"),
        (evaluation(0.7, 0.7, 0.7, 0.7, 0.7), "Dice", "mean Dice 0.700 (0.690 to 0.710), at least 0.8"),
        (evaluation(0.99, 0.99, 0.99, 0.99, 0.99, 0.4, 0.45), "failures", "2 of 7 cases failed, at most 20.0%"),
    ],
)
def test_each_rule_refuses_alone(candidate: EvaluatedVersion, rule: str, words: str) -> None:
    (outcome,) = refused(candidate)
    assert outcome.rule == rule
    assert words in outcome.message
    assert str(outcome).startswith("refused  ")


def test_oracle_crop_is_not_a_leak_and_has_its_own_rule() -> None:
    candidate = evaluation(*GOOD, leaks=PASSED | {"oracle crop": "5 cases"}, oracle_crop=True)
    assert [outcome.rule for outcome in refused(candidate)] == ["oracle crop"]


def test_only_a_significantly_better_version_replaces_the_champion() -> None:
    champion = evaluation(*GOOD)
    better = evaluation(*(dice + 0.03 for dice in GOOD))
    assert refused(better, champion) == []
    mixed = evaluation(0.95, 0.90, 0.93, 0.90, 0.96)
    (outcome,) = refused(mixed, champion)
    assert outcome.rule == "better"
    assert "on the same 5 cases of 5 patients, 95% interval -" in outcome.message
    assert refused(mixed, champion, max_failure_fraction=0, min_gain=-0.1) == []


def test_a_version_tested_on_other_references_is_refused() -> None:
    (outcome,) = refused(evaluation(*(dice + 0.03 for dice in GOOD), mask="other"), evaluation(*GOOD, name="old"))
    assert outcome.rule == "better"
    assert "cannot be compared with the champion" in outcome.message
    assert "another reference" in outcome.message


def repeated(gain: float, *, num_seeds: int = 3) -> Repeats:
    """Return repeats whose seeds differ by 0.001."""
    by_seed = {
        seed: evaluation(
            *(dice + gain + 0.001 * seed + 0.002 * (number == seed) for number, dice in enumerate(GOOD))
        ).results
        for seed in range(num_seeds)
    }
    return Repeats(name="v", source="v", by_seed=by_seed)


def seeds_rule(gain: float, **numbers: int) -> RuleResult:
    sides = [replace(evaluation(*GOOD), repeats=one) for one in (repeated(gain, **numbers), repeated(0))]
    rule = outcomes(*sides, max_p_not_better=0.05)[-1]
    assert rule.rule == "seeds"
    return rule


def test_repeats_must_be_better_with_the_wanted_probability() -> None:
    better = seeds_rule(0.03)
    assert better.is_passed
    assert better.message.startswith(
        "Dice +0.030 over 3 seeds, 3 of the champion; probability that it is not better 0.0"
    )
    for gain in (-0.03, 0.0):
        assert not seeds_rule(gain).is_passed
    assert "not better 1.000, at most 0.05" in seeds_rule(-0.03).message


def test_one_seed_is_refused_where_repeats_are_wanted_and_a_first_version_needs_none() -> None:
    alone = seeds_rule(0.03, num_seeds=1)
    assert not alone.is_passed
    assert "cannot be known: 1 seed(s) of this, 3 of the champion" in alone.message
    assert outcomes(evaluation(*GOOD), evaluation(*GOOD), max_p_not_better=0.05)[-1].rule == "seeds"
    assert outcomes(evaluation(*GOOD), max_p_not_better=0.05)[-1].rule == "better"
