"""target=zones in every stage, on data sets whose labels have different numbers."""

from pathlib import Path

import numpy as np
import pytest

from prostate_seg.common.errors import ConfigError
from prostate_seg.common.files import read_json
from prostate_seg.imaging.geometry import Geometry, Volume
from prostate_seg.imaging.image_io import read_volume, write_volume
from prostate_seg.segmentation.networks.storage import load_recipe
from tests.stage_helpers import run_stages

DECATHLON, PROSTATE158 = {"peripheral": 1, "transition": 2}, {"transition": 1, "peripheral": 2}
"""Numbers of the zones in two public data sets."""
TINY = [
    *("target=zones", "data.root=data", "fold.num_folds=2", "preprocess.spacing_mm=null", "preprocess.image_size=32"),
    *("model.channels=[4,8]", "model.strides=[[2,2]]", "train.max_epochs=4", "train.steps_per_epoch=15"),
    *("train.learning_rate=0.03", "train.ema_decay=0.5", "evaluate.num_bootstrap=100", "mlflow=off"),
]


def write_zones(folder: Path, numbers: dict[str, int], *, num_cases: int = 4, names: str = "p{}_1") -> None:
    """Write studies of 34 mm: a bright transition zone in front of a brighter peripheral zone, in a dark image."""
    geometry = Geometry.from_xyz((34, 34, 8), (1, 1, 3), origin_mm=(0, 0, 0), direction=np.eye(3))
    for index in range(num_cases):
        labels = np.zeros(geometry.shape_vox, dtype=np.uint8)
        labels[1:7, 6 + index : 18, 6:28] = numbers["transition"]
        labels[1:7, 18 : 24 + index, 6:28] = numbers["peripheral"]
        signal = 100.0 + 400 * (labels == numbers["transition"]) + 800 * (labels == numbers["peripheral"])
        rng = np.random.default_rng(index)
        background = np.kron(rng.uniform(0, 900, (4, 6, 6)), np.ones((2, 6, 6)))[:, :34, :34] * (labels == 0)
        image = (signal + background + rng.normal(0, 30, signal.shape)).astype(np.int16)
        for kind, array in (("images", image), ("masks", labels)):
            write_volume(folder / kind / f"{names.format(index)}.nii.gz", Volume(array=array, geometry=geometry))


def test_two_data_sets_with_swapped_numbers_give_the_same_masks_on_the_networks_grid(tmp_path: Path) -> None:
    made = {}
    for source, numbers in (("decathlon", DECATHLON), ("prostate158", PROSTATE158)):
        folder = tmp_path / source
        write_zones(folder / "data", numbers)
        result = run_stages(folder, "stage=preprocess", f"data={source}", *TINY)
        assert result.returncode == 0, result.stderr
        assert f"zones: peripheral_zone is label {numbers['peripheral']}, transition_zone is" in result.stdout
        contract = read_json(folder / "preprocess" / "contract.json")
        assert contract["preprocess"]["zones"]["peripheral_zone"] == [numbers["peripheral"]]
        assert contract["labels"]["transition_zone"] == numbers["transition"]
        made[source] = read_volume(folder / "preprocess" / "masks" / "p0_1.nii.gz").array
    np.testing.assert_array_equal(made["decathlon"], made["prostate158"])
    assert set(np.unique(made["decathlon"])) == {0, 0b011, 0b101}  # gland, peripheral zone, transition zone


def test_a_zone_that_no_mask_has_and_a_label_without_a_name_are_refused(tmp_path: Path) -> None:
    write_zones(tmp_path / "data", {"transition": 1, "peripheral": 1})
    result = run_stages(tmp_path, "stage=preprocess", "data=decathlon", *TINY)
    assert "some mask must have transition_zone, label 2, and all 4 masks together have 1" in result.stderr
    write_zones(tmp_path / "data", {"transition": 2, "peripheral": 3})
    result = run_stages(tmp_path, "stage=preprocess", "data=decathlon", *TINY)
    assert "unnamed_label: zones need a name for every label, and the mask has 3 beside 1, 2" in result.stderr
    result = run_stages(tmp_path, "stage=preprocess", "data=folder", *TINY)
    assert "the data set has: none" in result.stderr


def test_names_of_a_data_set_are_recorded_for_the_stages_without_it(tmp_path: Path) -> None:
    write_zones(tmp_path / "data", DECATHLON)
    (tmp_path / "data" / "dataset.json").write_text('{"labels": {"background": 0, "PZ": 1, "TZ": 2}}')
    result = run_stages(tmp_path, "stage=preprocess,prepare", "data=folder", *TINY)
    assert result.returncode == 0, result.stderr
    (tmp_path / "data" / "dataset.json").unlink()
    result = run_stages(tmp_path, "stage=train", "data=folder", *TINY)
    assert result.returncode == 0, result.stderr
    recipe = load_recipe(tmp_path / "model" / "fold0")
    assert recipe.preprocess.regions == {"whole_gland": (1, 2), "peripheral_zone": (1,), "transition_zone": (2,)}
    other = run_stages(
        tmp_path, "stage=train", "data=folder", *TINY, "data.labels={transition_zone: 1, peripheral_zone: 2}"
    )
    assert "zones: is {'peripheral_zone': [1], 'transition_zone': [2]}, wanted" in other.stderr


@pytest.mark.parametrize(
    ("regions", "rule"),
    [
        ("{whole_gland: [a]}", "must have whole_gland: null"),
        ("{Zone: [a]}", "must have names of small letters"),
        ("{zone: []}", "must give the names of labels for each zone"),
        ("{zone: null}", "must give the names of labels for each zone"),
        ("{" + ", ".join(f"z{index}: [a]" for index in range(8)) + "}", "must be at most 8"),
        ("{zone: 3}", "must be names, each with null or a list"),
    ],
)
def test_impossible_regions_are_refused(regions: str, rule: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"target.regions: {rule}"):
        run_stages(tmp_path, "stage=preprocess", f"+target.regions={regions}")
