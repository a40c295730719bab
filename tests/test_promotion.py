"""The gate refuses for each of its reasons alone, and says the number, the bound and what to do."""

from typing import Any

import pandas as pd
import pytest

from prostate_seg.reporting.comparison import parse_results
from prostate_seg.reporting.promotion import Evidence, Ruling, judge
from prostate_seg.reporting.results import SUMMARISED
from prostate_seg.reporting.settings import PromotionRules

RULES = PromotionRules(min_test_patients=5, min_dice=0.8, max_failure_fraction=0.2, min_gain=0.0)
PASSED = {"patient overlap": "passed", "identical voxels": "passed on 3 of 5 cases", "identical mask files": "not run"}


def shown(
    *dices: float, leaks: dict[str, str] | None = None, oracle_crop: bool = False, mask: str = "m", name: str = "v"
) -> Evidence:
    """Return what a version has shown that reached these Dices, one patient each."""
    rows = [
        {
            "fold": "fold0",
            "case_id": f"{number}_1",
            "patient_id": str(number),
            **dict.fromkeys(SUMMARISED, dice),
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
    return Evidence(summary=summary, results=parse_results(text, name=name, source=name))


GOOD = (0.9, 0.91, 0.92, 0.93, 0.94)


def refused(candidate: Evidence, champion: Evidence | None = None, rules: PromotionRules = RULES) -> list[Ruling]:
    rulings = judge(candidate, champion, rules=rules, num_bootstrap=200, seed=1)
    assert [ruling.rule for ruling in rulings] == [
        "leaks",
        "oracle crop",
        "test patients",
        "Dice",
        "failures",
        "better",
    ]
    return [ruling for ruling in rulings if not ruling.is_passed]


def test_a_good_first_version_passes_every_rule() -> None:
    assert refused(shown(*GOOD)) == []


def test_pairs_that_the_leak_gate_let_pass_are_named_beside_its_verdict() -> None:
    candidate = shown(*GOOD, leaks={"near-identical images": "passed (1 pair overruled)"})
    candidate.summary["leak_gate"]["overruled"] = ["a_1 and b_1 (correlation 0.66): two patients"]
    leaks, *_ = judge(candidate, None, rules=RULES, num_bootstrap=200, seed=1)
    assert leaks.is_passed
    assert leaks.words.endswith("not duplicates: a_1 and b_1 (correlation 0.66): two patients")


@pytest.mark.parametrize(
    ("candidate", "rule", "words"),
    [
        (shown(*GOOD, leaks={"patient overlap": "3 pairs"}), "leaks", "patient overlap: 3 pairs"),
        (shown(*GOOD, leaks={}), "leaks", "there is no verdict"),
        (shown(*GOOD, oracle_crop=True), "oracle crop", "preprocess.crop=center"),
        (shown(*GOOD[:4]), "test patients", "4 test patients, at least 5"),
        (shown(0.7, 0.7, 0.7, 0.7, 0.7), "Dice", "mean Dice 0.700 (0.690 to 0.710), at least 0.8"),
        (shown(0.99, 0.99, 0.99, 0.99, 0.99, 0.4, 0.45), "failures", "2 of 7 cases failed, at most 20.0%"),
    ],
)
def test_each_rule_refuses_alone(candidate: Evidence, rule: str, words: str) -> None:
    (ruling,) = refused(candidate)
    assert ruling.rule == rule
    assert words in ruling.words
    assert str(ruling).startswith("refused  ")


def test_oracle_crop_is_no_leak_but_has_its_own_rule() -> None:
    candidate = shown(*GOOD, leaks=PASSED | {"oracle crop": "5 cases"}, oracle_crop=True)
    assert [ruling.rule for ruling in refused(candidate)] == ["oracle crop"]


def test_a_champion_is_followed_by_what_is_better_beyond_chance_alone() -> None:
    champion = shown(*GOOD)
    better = shown(*(dice + 0.03 for dice in GOOD))
    assert refused(better, champion) == []
    mixed = shown(0.95, 0.90, 0.93, 0.90, 0.96)
    (ruling,) = refused(mixed, champion)
    assert ruling.rule == "better"
    assert "on the same 5 cases of 5 patients, 95% interval -" in ruling.words
    assert (
        refused(
            mixed, champion, PromotionRules(min_test_patients=5, min_dice=0.8, max_failure_fraction=0, min_gain=-0.1)
        )
        == []
    )


def test_a_version_tested_on_other_references_cannot_follow() -> None:
    (ruling,) = refused(shown(*(dice + 0.03 for dice in GOOD), mask="other"), shown(*GOOD, name="old"))
    assert ruling.rule == "better"
    assert "cannot be compared with the champion" in ruling.words
    assert "another reference" in ruling.words
