"""Stress test: what each perturbation does to an image, curves of constructed tables, the stage, and the promotion rule."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from prostate_seg.common.errors import ConfigError, InputError
from prostate_seg.common.files import read_json
from prostate_seg.config.schema import Config, parse
from prostate_seg.config.workspace import Workspace, workspace_of
from prostate_seg.imaging.geometry import Geometry, Volume
from prostate_seg.reporting.evaluation.stress import (
    NONE,
    strength_of_drop,
    stress_curves,
    stress_figure,
    stress_lines,
    stress_summary,
    worst_moderate,
)
from prostate_seg.reporting.promotion import _check_stress
from prostate_seg.segmentation.perturbations import PERTURBATIONS
from prostate_seg.stages import report, stress
from prostate_seg.stages.stress import chosen_perturbations
from prostate_seg.steps.report_data import stress_of
from tests.conftest import composed
from tests.project_helpers import SMALL
from tests.stage_helpers import run_stages

SPACING_MM = (3.0, 1.0, 1.0)


def study() -> tuple[Volume, np.ndarray]:
    """A bright gland of 40 x 40 mm in the middle of a textured slice of 140 x 140 mm."""
    shape = (10, 140, 140)
    mask = np.zeros(shape, dtype=np.uint8)
    mask[2:8, 50:90, 50:90] = 1
    image = np.random.default_rng(0).normal(100, 10, shape).clip(1) + 100 * mask
    geometry = Geometry.from_xyz(shape[::-1], SPACING_MM[::-1], origin_mm=(0, 0, 0), direction=np.eye(3))
    return Volume(array=image.astype(np.float32), geometry=geometry), mask


def centre_of(volume: Volume) -> np.ndarray:
    return volume.geometry.to_world(np.array(volume.array.shape) / 2)


# --- perturbations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_perturbations_are_deterministic_and_grow_with_their_strength(name: str) -> None:
    image, mask = study()
    changes = []
    for strength in PERTURBATIONS[name].strengths:
        pair = PERTURBATIONS[name].apply(image, mask, strength, 7)
        again = PERTURBATIONS[name].apply(image, mask, strength, 7)
        if pair is None or again is None:
            assert (name, strength) == ("pixel_size", 1)  # the study has these pixels
            continue
        changed, labels = pair
        np.testing.assert_array_equal(changed.array, again[0].array)
        assert changed.array.shape == labels.shape == changed.geometry.shape_vox
        assert np.isfinite(changed.array).all()
        assert set(np.unique(labels)) == {0, 1}
        same_grid = changed.geometry == image.geometry
        if same_grid:
            changes.append(float(np.abs(changed.array - image.array).mean()))
        elif name == "shift":
            changes.append(float(np.linalg.norm(centre_of(changed) - centre_of(image))))
        else:
            changes.append(image.array.size - changed.array.size)
    assert 0 < changes[0] < changes[-1]
    # Averaging noise over 1.7 voxels can change it a little more than over 2.
    assert all(stronger > 0.95 * weaker for weaker, stronger in pairwise(changes))


def test_coil_brightens_behind_the_gland_and_little_in_front() -> None:
    image, mask = study()
    changed, _ = PERTURBATIONS["endorectal_coil"].apply(image, mask, 4.0, 0) or (image, mask)
    gain = (changed.array - image.array.min()) / (image.array - image.array.min() + 1e-6)
    assert gain[5, 100, 70] == pytest.approx(5.0, rel=0.01)  # 10 mm behind the gland
    assert gain[5, 5, 70] < 1.1


def test_shift_and_field_of_view_keep_the_gland_and_its_world_position() -> None:
    image, mask = study()
    for name, strength in (("shift", 20.0), ("shift", 40.0), ("field_of_view", 80.0)):
        changed, labels = PERTURBATIONS[name].apply(image, mask, strength, 0) or (image, mask)
        assert labels.sum() == mask.sum()
        for volume, label_map in ((image, mask), (changed, labels)):
            first = np.argwhere(label_map)[0]
            np.testing.assert_allclose(volume.geometry.to_world(first), (50, 50, 6))
    assert PERTURBATIONS["field_of_view"].apply(image, mask, 39.0, 0) is None
    moved, _ = PERTURBATIONS["shift"].apply(image, mask, 40.0, 0) or (image, mask)
    np.testing.assert_allclose(centre_of(moved) - centre_of(image), (40, 0, 0))
    assert moved.array.shape[2] == 140 - 50 + 30  # 50 voxels right of the gland are removed, 30 of air added


def test_coarser_voxels_need_finer_ones_and_rotation_square_pixels() -> None:
    image, mask = study()
    assert PERTURBATIONS["pixel_size"].apply(image, mask, 1.0, 0) is None
    oblong = replace(image, geometry=replace(image.geometry, spacing_mm=(3.0, 1.0, 2.0)))
    assert PERTURBATIONS["rotation"].apply(oblong, mask, 10.0, 0) is None


# --- tables ----------------------------------------------------------------------------------------------------------


def cases() -> pd.DataFrame:
    """Dice of three patients: 0.9 and 0.02, 0.04, 0.08 less; the third patient cannot have the first strength."""
    rows = []
    for number in range(3):
        ids = {"case_id": f"p{number}_1", "patient_id": f"p{number}", "fold": "fold0", "region": "whole_gland"}
        base = 0.9 - 0.1 * number
        rows.append(ids | {"perturbation": NONE, "dice": base})
        for level, (strength, drop) in enumerate(((10, 0.02), (20, 0.04), (25, 0.08))):
            if number == 2 and level == 0:
                continue
            place = {"perturbation": "shift", "unit": "mm", "level": level, "strength": strength}
            rows.append(ids | place | {"dice": base - drop})
    return pd.DataFrame(rows)


def test_drops_are_paired_by_case_and_in_the_order_of_strengths() -> None:
    curves = stress_curves(cases().iloc[::-1], num_bootstrap=50, seed=0)
    assert curves["strength"].tolist() == [10, 20, 25]
    assert curves["num_cases"].tolist() == [2, 3, 3]
    assert curves["drop"].tolist() == pytest.approx([0.02, 0.04, 0.08])
    assert curves["ci95_high"].tolist() == pytest.approx([0.02, 0.04, 0.08])
    shift = stress_summary(curves)["regions"]["whole_gland"]["shift"]
    assert shift["moderate"] == {"strength": 20, "drop": pytest.approx(0.04)}
    assert shift["tolerated_strength"] == pytest.approx(21.25)  # a quarter of the way from 0.04 to 0.08
    assert "21.2" in stress_lines(curves)[1]
    visible = [axes for axes in stress_figure(curves).axes if axes.get_visible()]
    assert [axes.get_title() for axes in visible] == ["shift"]


def test_perturbations_that_no_case_allows_are_refused() -> None:
    unchanged = cases()[lambda table: table["perturbation"] == NONE]
    with pytest.raises(InputError, match="none of 3 cases allows these: rotation needs square pixels"):
        stress_curves(unchanged, num_bootstrap=50, seed=0)


def test_strength_of_a_drop_is_the_first_one_at_once_and_none_if_it_is_never_reached() -> None:
    assert strength_of_drop([10, 20], [0.06, 0.1], drop=0.05) == 10
    assert strength_of_drop([120, 100], [0.0, 0.1], drop=0.05) == 110  # a smaller field of view is the stronger one
    assert strength_of_drop([10, 20], [0.01, 0.02], drop=0.05) is None


def test_promotion_asks_for_a_stress_test_only_with_a_bound() -> None:
    summary = stress_summary(stress_curves(cases(), num_bootstrap=50, seed=0))
    assert worst_moderate(summary) == ("shift", pytest.approx(0.04))
    assert _check_stress(None, max_drop=None) == []
    (missing,), (refused,), (passed,) = (
        _check_stress(stress, max_drop=bound) for stress, bound in ((None, 0.1), (summary, 0.03), (summary, 0.05))
    )
    assert not missing.is_passed
    assert "run stage=stress, then stage=register" in missing.message
    assert not refused.is_passed
    assert "Dice falls by 0.040 under moderate shift, at most 0.03" in refused.message
    assert passed.is_passed


def test_unknown_perturbation_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"stress.perturbations: must be null or names of bias_field, .*, is \[fog\]"):
        chosen_perturbations(["fog"])
    assert chosen_perturbations(["noise", "blur"]) == ["noise", "blur"]


def test_labels_of_an_external_folder_are_not_those_of_the_tested_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluation(cfg: Config, _: Workspace) -> None:
        assert cfg.evaluate.external_root is None
        raise InputError("checked")

    monkeypatch.setattr(stress.Evaluation, "of", evaluation)
    cfg = parse(composed("stage=stress", "target=zones", "evaluate.external_root=other"))
    with pytest.raises(InputError, match="checked"):
        stress.run(cfg, workspace_of(cfg))


# --- stage -----------------------------------------------------------------------------------------------------------


def test_stage_writes_curves_continues_after_a_stop_and_belongs_to_its_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [*SMALL, "stress.perturbations=[gamma,field_of_view]", "stress.max_cases=2"]
    done = run_stages(tmp_path, "stage=fetch,preprocess,prepare,train,evaluate,stress", *small)
    assert done.returncode == 0, done.stderr
    workspace = Workspace(root=tmp_path, data=tmp_path / "data", cache=tmp_path / ".cache")
    assert tmp_path / "stress" in report.run(parse(composed("stage=report", *small)), workspace).inputs
    table = pd.read_csv(tmp_path / "stress" / "cases.csv")
    assert set(table["perturbation"]) == {NONE, "gamma", "field_of_view"}
    assert table["case_id"].nunique() == 2
    evaluated = pd.read_csv(tmp_path / "evaluation" / "cases.csv").set_index("case_id")["dice"]
    unchanged = table[table["perturbation"] == NONE].set_index("case_id")["dice"]
    pd.testing.assert_series_equal(unchanged.sort_index(), evaluated[unchanged.index].sort_index())
    assert 'id="stress"' in (tmp_path / "report" / "report.html").read_text()
    assert "### Stress test" in (tmp_path / "report" / "model_card.md").read_text()

    before = (tmp_path / "stress" / "cases.csv").read_bytes()
    monkeypatch.setattr("prostate_seg.stages.stress.segment", lambda *_, **__: pytest.fail("is in the cache"))
    assert run_stages(tmp_path, "stage=stress", *small).returncode == 0
    assert (tmp_path / "stress" / "cases.csv").read_bytes() == before

    assert stress_of(workspace, tmp_path / "model") == read_json(tmp_path / "stress" / "stress.json")
    weights = tmp_path / "model" / "fold0" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert stress_of(workspace, tmp_path / "model") is None
