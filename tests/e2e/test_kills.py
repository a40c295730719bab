"""Stages that are killed at any moment and repeated give the files of an uninterrupted run; `make hard-use` kills a hundred."""

import random
from pathlib import Path

import pytest

from scripts.hard_use.kills import interrupted, outputs_of, require_same, uninterrupted

pytestmark = pytest.mark.slow

STAGES = ("fetch", "preprocess", "prepare")
"""Stages that take seconds; test_resume.py kills trainings."""


@pytest.mark.usefixtures("prepared")  # starts the fork server, whose start is no part of the first stage
def test_stages_killed_at_random_moments_end_with_the_same_files(tmp_path: Path) -> None:
    whole = uninterrupted(tmp_path / "whole", recording=["mlflow=off"], stages=STAGES)
    num_kills, rng = 0, random.Random(3)
    for number in range(5):  # a stage may end before its kill if the machine was busier when it was timed
        one = interrupted(tmp_path / f"killed{number}", whole, num_kills=3, rng=rng, stages=STAGES)
        num_kills += one.num_kills
        if num_kills >= 2:
            return
    pytest.fail(f"{num_kills} stages were killed before they had ended")


def test_a_file_that_differs_or_is_missing_is_reported(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "weights").write_text(name)
    (tmp_path / "b" / "model" / "more").touch()
    with pytest.raises(AssertionError, match=r"differ from the uninterrupted run's: model/more, model/weights"):
        require_same(outputs_of(tmp_path / "a"), outputs_of(tmp_path / "b"))
