"""Leak gate on ancestors: the studies that initial weights were trained on are refused in val and test."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from prostate_seg.common.errors import InputError
from prostate_seg.data.folds import Fold
from prostate_seg.data.leak_gate import OVERRULE, Check, Fingerprint, NotDuplicates, listing
from prostate_seg.data.lineage import CHECK, UNKNOWN, Ancestor, find_ancestor_leaks, outcome, owners, read_lineage

log = logging.getLogger(__name__)

NEXT_STEP = (
    "Start from weights that have not seen them, move them to train in kfold.json, or list them under data.exclude and run "
    "the pipeline again from stage=preprocess."
)


def ancestors_in(folder: Path) -> tuple[Ancestor, ...]:
    """Return the ancestors of a trained network; one of unknown studies if it had initial weights and has lost its lineage."""
    lineage, config = read_lineage(folder), folder / "config.yaml"
    if lineage is not None:
        return lineage.ancestors
    # Earlier versions wrote no lineage, and knew no train.init.
    settings: dict[str, Any] = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    source = settings.get("train", {}).get("init")
    return () if source is None else (Ancestor(weights_md5="unknown", source=source, version=None, run_id=None),)


def pass_ancestor_gate(
    folds: Mapping[str, tuple[Fold, Sequence[Ancestor]]],
    verdict: Mapping[str, Any],
    *,
    fingerprints: Mapping[str, Fingerprint],
    not_duplicates: NotDuplicates,
) -> dict[str, Any]:
    """Return the verdict of the leak gate with the outcome of the check on ancestors, which no network without them has.

    Args:
        folds: Val and test cases of each fold, by its name, and the ancestors of the network that must not have seen them.
        verdict: `Verdict.as_dict()` of the gate on the folds.
        fingerprints: Of the val and test cases.
        not_duplicates: Accepted pairs, a case and an ancestor's study each.

    Raises:
        InputError: If a val or test case is a study that an ancestor was trained on.
    """
    overruled: list[str] = []
    for name, (fold, ancestors) in folds.items():
        subsets = {"val": fold.val, "test": fold.test}
        found = find_ancestor_leaks(ancestors, **subsets, fingerprints=fingerprints, not_duplicates=not_duplicates)
        if found.leaks:
            near = [OVERRULE] if found.found(Check.near_duplicate) else []
            raise InputError(
                f"{name}: its initial weights, or weights that those started from, were trained on its val or test cases:\n  "
                + "\n  ".join([listing(found.leaks), *owners(found.leaks, ancestors)])
                + "\n"
                + "\n".join([NEXT_STEP, *near])
            )
        overruled += [text for text in found.overruled.values() if text not in overruled]
    return with_ancestors(verdict, [one for _, ancestors in folds.values() for one in ancestors], overruled=overruled)


def with_ancestors(
    verdict: Mapping[str, Any], ancestors: Sequence[Ancestor], *, overruled: Sequence[str] = ()
) -> dict[str, Any]:
    """Return a verdict with the outcome of the check on ancestors; log what is not known, and what was overruled."""
    if not ancestors:
        return dict(verdict)
    for pair in overruled:
        log.warning("fold.not_duplicates lets near-identical images pass: %s", pair)
    text = outcome(ancestors, num_overruled=len(overruled))
    words = str(verdict["verdict"])
    if text.startswith(UNKNOWN):
        log.warning("the leak gate cannot know whether ancestors have seen val or test cases: %s", text)
        words = f"{UNKNOWN}: {CHECK}" if words.startswith("passed") else f"{words}; {UNKNOWN}: {CHECK}"
    checks = {**verdict["checks"], CHECK: text}
    return {**verdict, "verdict": words, "checks": checks, "overruled": [*verdict["overruled"], *overruled]}
