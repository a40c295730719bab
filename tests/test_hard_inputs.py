"""Corrupted studies are refused with a message or give complete results; `make hard-use` tests a thousand."""

from functools import partial
from pathlib import Path

import pytest

from scripts.hard_use import inputs
from scripts.hard_use.mutants import FORMATS, Mutant, make_healthy, mutants

NUM_TRIED = 40
SEED = 7


@pytest.mark.slow
def test_corrupted_studies_are_refused_with_a_message_or_preprocessed_completely(tmp_path: Path) -> None:
    outcomes = []
    for mutant in mutants(tmp_path / "mutants", seed=SEED, count=NUM_TRIED):
        outcome, text = inputs.try_here(inputs.preprocess, mutant, tmp_path / "outputs" / str(mutant.number))
        assert outcome in ("accepted", "refused"), f"{mutant.number} {mutant.what}\n{text}"
        assert outcome == "accepted" or len(text) > 20, mutant.what
        outcomes.append(outcome)
    assert outcomes.count("refused") > NUM_TRIED / 2
    assert outcomes.count("accepted") > 2


@pytest.mark.slow
def test_corrupted_studies_are_refused_with_a_message_or_segmented(tmp_path: Path) -> None:
    action = partial(inputs.predict, model=inputs.make_networks(tmp_path / "networks"))
    outcomes = []
    for mutant in mutants(tmp_path / "mutants", seed=SEED, count=NUM_TRIED // 4):
        outcome, text = inputs.try_here(action, mutant, tmp_path / "outputs" / str(mutant.number))
        assert outcome in ("accepted", "refused"), f"{mutant.number} {mutant.what}\n{text}"
        outcomes.append(outcome)
    assert set(outcomes) == {"accepted", "refused"}


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_healthy_study_is_accepted_in_every_format(tmp_path: Path, suffix: str) -> None:
    make_healthy(tmp_path / "healthy")
    for kind in ("images", "masks"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    image = (tmp_path / f"healthy/images/1_1{suffix}").rename(
        tmp_path / "data/images" / ("1_1" if suffix == "dicom" else f"1_1{suffix}")
    )
    if suffix == ".mhd":
        (tmp_path / "healthy/images/1_1.raw").rename(tmp_path / "data/images/1_1.raw")
    mask = (tmp_path / "healthy/masks/1_1.nii.gz").rename(tmp_path / "data/masks/1_1.nii.gz")
    healthy = Mutant(number=0, what="healthy", image=image, mask=mask)
    assert inputs.try_here(inputs.preprocess, healthy, tmp_path / "out") == ("accepted", "")


def test_tracebacks_hangs_and_crashes_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = list(mutants(tmp_path / "mutants", seed=SEED, count=3))
    monkeypatch.setattr(inputs, "LONGEST_SECONDS", 2.0)
    verdicts = inputs.survey(faulty_action, made, outputs=tmp_path / "outputs")
    assert [verdict.outcome for verdict in verdicts] == ["traceback", "hang", "crash"]


def faulty_action(mutant: Mutant, out: Path) -> None:
    """Action that fails on three mutants and accepts a healthy study."""
    import os
    import time

    if mutant.what == "healthy":
        return
    if mutant.number == 0:
        raise KeyError("built in")
    if mutant.number == 1:
        time.sleep(60)
    os._exit(9)
