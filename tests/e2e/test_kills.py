"""Stages that are killed at any moment and repeated give the files of an uninterrupted run; `make hard-use` kills a hundred."""

import random
from pathlib import Path

import pytest

from scripts.hard_use.kills import interrupted, outputs_of, require_same, uninterrupted

pytestmark = pytest.mark.slow

STAGES = ("fetch", "preprocess", "prepare")
"""Stages that take seconds; test_resume.py kills trainings."""


def test_stages_killed_at_random_moments_end_with_the_same_files(tmp_path: Path) -> None:
    whole = uninterrupted(tmp_path / "whole", recording=["mlflow=off"], stages=STAGES)
    one = interrupted(tmp_path / "killed", whole, num_kills=3, rng=random.Random(3), stages=STAGES)
    assert one.num_kills >= 2


def test_a_file_that_differs_or_is_missing_is_reported(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "weights").write_text(name)
    (tmp_path / "b" / "model" / "more").touch()
    with pytest.raises(AssertionError, match=r"differ from the uninterrupted run's: model/more, model/weights"):
        require_same(outputs_of(tmp_path / "a"), outputs_of(tmp_path / "b"))
