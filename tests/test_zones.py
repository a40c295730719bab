"""target=zones in every stage, on data sets whose labels have different numbers."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from prostate_seg.common.errors import ConfigError
from prostate_seg.common.files import read_json, write_json
from prostate_seg.imaging.geometry import Geometry, Volume
from prostate_seg.imaging.image_io import read_volume, write_volume
from prostate_seg.segmentation.networks.storage import load_recipe
from tests.stage_helpers import run_stages

DECATHLON, PROSTATE158 = {"peripheral": 1, "transition": 2}, {"transition": 1, "peripheral": 2}
"""Numbers of the zones in two public data sets."""
TINY = [
    *("target=zones", "data.root=data", "fold.num_folds=2", "preprocess.spacing_mm=null", "preprocess.image_size=32"),
    *("model.channels=[4,8]", "model.strides=[[2,2]]", "train.max_epochs=6", "train.steps_per_epoch=30"),
    *("train.learning_rate=0.03", "train.ema_decay=0.5", "evaluate.num_bootstrap=100", "mlflow=off"),
]


def write_zones(
    folder: Path, numbers: dict[str, int], *, num_cases: int = 4, names: str = "p{}_1", seed: int = 0
) -> None:
    """Write studies of 34 mm: a bright transition zone in front of a brighter peripheral zone, in a dark image."""
    geometry = Geometry.from_xyz((34, 34, 8), (1, 1, 3), origin_mm=(0, 0, 0), direction=np.eye(3))
    for index in range(num_cases):
        labels = np.zeros(geometry.shape_vox, dtype=np.uint8)
        labels[1:7, 6 + index : 18, 6:28] = numbers["transition"]
        labels[1:7, 18 : 24 + index, 6:28] = numbers["peripheral"]
        signal = 100.0 + 400 * (labels == numbers["transition"]) + 800 * (labels == numbers["peripheral"])
        rng = np.random.default_rng(seed + index)
        background = np.kron(rng.uniform(0, 500, (4, 6, 6)), np.ones((2, 6, 6)))[:, :34, :34] * (labels == 0)
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


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a data set numbered as Prostate158, trained and evaluated."""
    folder = tmp_path_factory.mktemp("zones")
    write_zones(folder / "data", PROSTATE158)
    result = run_stages(folder, "stage=preprocess,prepare,train,evaluate", "data=prostate158", *TINY)
    assert result.returncode == 0, result.stderr
    assert "peripheral_zone: " in result.stdout
    return folder


def test_every_region_is_measured_in_every_case_and_the_gland_stands_for_the_run(evaluated: Path) -> None:
    cases = pd.read_csv(evaluated / "evaluation" / "cases.csv")
    assert cases["region"].tolist() == ["whole_gland", "peripheral_zone", "transition_zone"] * 4
    metrics, flat = (read_json(evaluated / "evaluation" / f"{name}.json") for name in ("metrics", "summary"))
    for region, rows in cases.groupby("region"):
        of_region = metrics if region == "whole_gland" else metrics["zones"][region]
        prefix = "" if region == "whole_gland" else f"{region}/"
        assert of_region["pooled"]["dice"]["mean"] == pytest.approx(rows["dice"].mean())
        assert flat["test"][f"{prefix}dice"] == pytest.approx(rows["dice"].mean())
        assert of_region["pooled"]["num_failures"] == (rows["dice"] < 0.5).sum()
        assert list(of_region["folds"]) == ["fold0", "fold1"]
    assert flat["test"]["dice"] > 0.8


def test_label_maps_have_the_values_of_the_data_set_and_zones_fill_the_gland(evaluated: Path) -> None:
    cases = pd.read_csv(evaluated / "evaluation" / "cases.csv").set_index(["case_id", "region"])
    for path in (evaluated / "evaluation" / "masks").rglob("*.nii.gz"):
        found = read_volume(path)
        name = path.name.removesuffix(".nii.gz")
        assert set(np.unique(found.array)) == {0, 1, 2}
        volumes = {region: cases.loc[(name, region), "volume_predicted_ml"] for region in cases.index.levels[1]}
        voxel_ml = found.geometry.voxel_volume_ml
        assert volumes["peripheral_zone"] == pytest.approx((found.array == 2).sum() * voxel_ml)
        assert volumes["transition_zone"] == pytest.approx((found.array == 1).sum() * voxel_ml)
        assert volumes["whole_gland"] == pytest.approx(volumes["peripheral_zone"] + volumes["transition_zone"])


def test_an_external_data_set_is_measured_with_its_own_numbers(evaluated: Path, tmp_path: Path) -> None:
    other = tmp_path / "external"
    write_zones(other, DECATHLON, num_cases=3, names="q{}_1", seed=100)
    wanted = [f"evaluate.external_root={other}", "data=prostate158", *TINY]
    result = run_stages(evaluated, "stage=evaluate", *wanted)
    assert "external: target.regions: there must be a label of each name" in result.stderr
    assert "evaluate.external_labels={transition_zone" in result.stderr
    dice = {}
    for numbers in (DECATHLON, PROSTATE158):
        labels = ", ".join(f"{name}_zone: {number}" for name, number in numbers.items())
        result = run_stages(evaluated, "stage=evaluate", *wanted, f"evaluate.external_labels={{{labels}}}")
        assert result.returncode == 0, result.stderr
        flat = read_json(evaluated / "evaluation_external" / "summary.json")["test"]
        dice[numbers["peripheral"]] = [flat["dice"], flat["peripheral_zone/dice"], flat["transition_zone/dice"]]
    assert min(dice[1]) > 0.5
    assert dice[2][0] == dice[1][0]
    assert max(dice[2][1:]) < 0.2  # with the wrong numbers, each zone is compared with the other
    write_json(other / "dataset.json", {"labels": {"background": 0, "PZ": 1, "TZ": 2}})
    assert run_stages(evaluated, "stage=evaluate", *wanted).returncode == 0
    again = read_json(evaluated / "evaluation_external" / "summary.json")["test"]
    assert again["peripheral_zone/dice"] == dice[1][1]


def test_whole_gland_of_a_network_of_zones_is_compared_with_that_of_the_gland_alone(
    evaluated: Path, tmp_path: Path
) -> None:
    shutil.copytree(evaluated / "data", tmp_path / "data")
    alone = ["data=prostate158", *TINY, "target=whole_gland"]
    result = run_stages(tmp_path, "stage=preprocess,prepare,train,evaluate", *alone)
    assert result.returncode == 0, result.stderr
    assert "region" not in pd.read_csv(tmp_path / "evaluation" / "cases.csv")
    folders = f"compare.runs=[{evaluated}/evaluation,{tmp_path}/evaluation]"
    result = run_stages(tmp_path, "stage=compare", folders, *alone)
    assert result.returncode == 0, result.stderr
    assert "note: in one of the two only, and not compared: peripheral_zone, transition_zone" in result.stdout
    assert "region" not in pd.read_csv(tmp_path / "comparison" / "comparison.csv")


def test_zones_of_two_evaluations_are_compared_by_region(evaluated: Path, tmp_path: Path) -> None:
    for name, change in (("a", 0.0), ("b", 0.1)):
        cases = pd.read_csv(evaluated / "evaluation" / "cases.csv", dtype=str)
        is_zone = cases["region"] == "peripheral_zone"
        cases.loc[is_zone, "dice"] = (cases.loc[is_zone, "dice"].astype(float) * 0.5 + change).astype(str)
        (tmp_path / name).mkdir()
        cases.to_csv(tmp_path / name / "cases.csv", index=False)
    result = run_stages(tmp_path, "stage=compare", "compare.runs=[a,b]", *TINY)
    assert result.returncode == 0, result.stderr
    rows = pd.read_csv(tmp_path / "comparison" / "comparison.csv")
    dice = rows[(rows["metric"] == "dice") & (rows["subgroup"] == "all")].set_index("region")["difference"]
    assert dice.to_dict() == {"whole_gland": 0, "peripheral_zone": pytest.approx(0.1), "transition_zone": 0}
    assert "peripheral_zone:" in result.stdout
