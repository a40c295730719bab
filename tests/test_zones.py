"""target=zones in every stage, on data sets whose labels have different numbers."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from prostate_seg.common.errors import ConfigError
from prostate_seg.common.files import read_json, write_json
from prostate_seg.config.schema import parse
from prostate_seg.imaging.geometry import Geometry, Volume
from prostate_seg.imaging.image_io import read_volume, write_volume
from prostate_seg.phantom.studies import write_phantom
from prostate_seg.reporting.comparison.results import Results, parse_results
from prostate_seg.reporting.figures.overlays import Panel, RegionMasks, contact_sheet_figure, overlay_figure, picture_of
from prostate_seg.reporting.promotion import EvaluatedVersion, check_promotion
from prostate_seg.segmentation.inference import prediction
from prostate_seg.segmentation.inference.inference import Segmentation
from prostate_seg.segmentation.inference.settings import Usage
from prostate_seg.segmentation.networks.model_folder import load_model
from prostate_seg.segmentation.networks.pyfunc import ServedModel
from prostate_seg.segmentation.networks.storage import load_recipe
from tests.conftest import composed
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
    write_json(other / "SOURCE.json", {"labels": {"peripheral_zone": 1, "transition_zone": 2}})  # of stage=fetch
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


def test_prediction_writes_labels_volumes_and_overlays_of_the_zones(evaluated: Path, tmp_path: Path) -> None:
    arguments = ["predict.input=data/images", f"predict.output={tmp_path}", "data=prostate158", *TINY]
    result = run_stages(evaluated, "stage=predict", *arguments)
    assert result.returncode == 0, result.stderr
    table = pd.read_csv(tmp_path / "volumes.csv")
    assert list(table.columns)[:4] == ["name", "volume_ml", "peripheral_zone_ml", "transition_zone_ml"]
    total = table["peripheral_zone_ml"] + table["transition_zone_ml"]
    np.testing.assert_allclose(table["volume_ml"], total, atol=2e-3)
    for row in table.to_dict("records"):
        found, record = read_volume(tmp_path / row["mask"]), read_json(tmp_path / "records" / f"{row['name']}.json")
        volume_ml = (found.array == PROSTATE158["peripheral"]).sum() * found.geometry.voxel_volume_ml
        assert row["peripheral_zone_ml"] == pytest.approx(volume_ml, abs=1e-3)
        assert record["zones"]["peripheral_zone"] == {"labels": [2], "volume_ml": pytest.approx(volume_ml, abs=1e-3)}
        assert (tmp_path / "overlays" / f"{row['name']}.png").is_file()


def test_served_model_gives_label_map_and_zones(evaluated: Path) -> None:
    usage = Usage(threshold=0.5, largest_component=True, tta=False, precision="fp32")
    model = load_model(evaluated / "model", fold_index=None, usage=usage, device=torch.device("cpu"))
    answer = ServedModel(model).predict(pd.DataFrame({"path": [str(evaluated / "data" / "images" / "p0_1.nii.gz")]}))
    (row,) = answer.to_dict("records")
    zones = json.loads(row["zones"])
    assert row["error"] is None
    assert zones["peripheral_zone"]["labels"] == [2]
    assert sum(zone["volume_ml"] for zone in zones.values()) == pytest.approx(row["volume_ml"], abs=2e-3)


def test_networks_of_a_version_without_zones_are_those_of_the_gland(evaluated: Path, tmp_path: Path) -> None:
    arguments = ["data=prostate158", *TINY, "target=whole_gland", "train.max_epochs=1"]
    shutil.copytree(evaluated / "data", tmp_path / "data")
    assert run_stages(tmp_path, "stage=preprocess,prepare,train", *arguments).returncode == 0
    for path in (tmp_path / "model").rglob("recipe.json"):
        recipe = read_json(path)
        del recipe["preprocess"]["zones"]
        write_json(path, recipe)
    contract = read_json(tmp_path / "preprocess" / "contract.json")
    del contract["preprocess"]["zones"], contract["labels"]
    write_json(tmp_path / "preprocess" / "contract.json", contract)
    result = run_stages(tmp_path, "stage=evaluate", *arguments)
    assert result.returncode == 0, result.stderr
    wanted = [f"predict.input={tmp_path}/data/images/p0_1.nii.gz", "predict.output=out", *arguments]
    assert run_stages(tmp_path, "stage=predict", *wanted).returncode == 0
    table = pd.read_csv(tmp_path / "out" / "volumes.csv")
    assert not [name for name in table if name.endswith("zone_ml")]
    assert set(np.unique(read_volume(tmp_path / "out" / "masks" / "p0_1.nii.gz").array)) <= {0, 1}


def test_zone_that_is_not_found_is_a_warning(evaluated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = Usage(threshold=0.5, largest_component=True, tta=False, precision="fp32")
    model = load_model(evaluated / "model", fold_index=None, usage=usage, device=torch.device("cpu"))
    assert list(model.regions) == ["whole_gland", "peripheral_zone", "transition_zone"]
    whole = prediction.segment

    def without_peripheral_zone(*args: Any, **kwargs: Any) -> Segmentation:
        found = whole(*args, **kwargs)
        return replace(found, label_map=(found.label_map > 0).astype(np.uint8))

    monkeypatch.setattr(prediction, "segment", without_peripheral_zone)
    found = prediction.predict(read_volume(evaluated / "data" / "images" / "p0_1.nii.gz"), model=model)
    assert found.zones["peripheral_zone"]["volume_ml"] == 0
    assert "no peripheral zone was found" in found.warnings
    assert "no transition zone was found" not in found.warnings


def test_report_and_model_card_show_every_region(evaluated: Path) -> None:
    result = run_stages(evaluated, "stage=report", "data=prostate158", *TINY)
    assert result.returncode == 0, result.stderr
    page = (evaluated / "report" / "report.html").read_text()
    card = (evaluated / "report" / "model_card.md").read_text()
    metrics = read_json(evaluated / "evaluation" / "metrics.json")
    assert "Segmentation of the prostate and its zones" in page
    for zone, readers in (("peripheral_zone", "0.71 of a junior reader"), ("transition_zone", "0.88 between readers")):
        dice = f"{metrics['zones'][zone]['pooled']['dice']['mean']:.3f}"
        name = zone.replace("_", " ")
        assert re.search(f'<tr><th scope="row">{name}</th><td class="r">{dice}</td>.*{readers}', page)
        assert f"| {name} | {dice} |" in card
        assert f"- type: {zone}/dice" in card
    for initials, style in (("PZ", "zone-0"), ("TZ", "zone-1")):  # two cues: letters and colour
        assert re.search(f'<text class="side {style}"[^>]*>{initials}</text>', page)
        assert re.search(f'<path class="predicted {style}" d="M', page)
    assert "peripheral zone 2; transition zone 1; the whole gland is every label above 0" in card
    volumes = pd.read_csv(evaluated / "report" / "bland_altman.csv")
    assert volumes["region"].value_counts().to_dict() == dict.fromkeys(metrics["zones"], 4) | {"whole_gland": 4}
    results = pd.read_csv(evaluated / "report" / "results.csv").set_index(["region", "group", "metric"])
    expected = metrics["zones"]["peripheral_zone"]["folds"]["fold1"]["hd95_mm"]["mean"]
    assert results.loc[("peripheral_zone", "fold1", "hd95_mm"), "mean"] == pytest.approx(expected, rel=1e-5)


def test_gate_has_a_minimum_per_zone_and_keeps_the_zones_of_the_champion(evaluated: Path) -> None:
    summary = read_json(evaluated / "evaluation" / "metrics.json")
    results = parse_results((evaluated / "evaluation" / "cases.csv").read_text(), name="a", source="a")
    rules = parse(composed("++register.min_zone_dice={peripheral_zone: 0.999, transition_zone: 0.1}")).register

    def refused(summary: dict[str, Any], champion: Results | None = None) -> set[str]:
        candidate = EvaluatedVersion(summary=summary, results=results)
        former = None if champion is None else replace(candidate, results=champion)
        outcomes = check_promotion(candidate, former, rules=rules, num_bootstrap=100, seed=0)
        return {outcome.rule for outcome in outcomes if not outcome.is_passed}

    assert "peripheral_zone" in refused(summary)
    assert "transition_zone" not in refused(summary)
    alone = {name: value for name, value in summary.items() if name != "zones"}
    assert "zones" in refused(alone, results)
    assert not {"zones", "peripheral_zone", "transition_zone"} & refused(alone)
    assert "zones" not in refused(alone, replace(results, zones={}))


def test_overlay_names_zones_by_initials_and_distinguishes_reference_and_prediction() -> None:
    masks = np.zeros((2, 6, 40, 40), dtype=bool)
    masks[0, 1:5, 10:20, 10:30] = masks[1, 1:5, 20:30, 10:30] = True
    gland, image = masks.any(axis=0), np.random.default_rng(0).normal(100, 10, (6, 40, 40))
    zones = [
        RegionMasks(name=name, predicted=mask, reference=np.roll(mask, 1, axis=2))
        for name, mask in zip(("peripheral_zone", "transition_zone"), masks, strict=True)
    ]
    whole = RegionMasks(name="whole_gland", predicted=gland, reference=gland)
    plain, figure = (
        overlay_figure(image, [whole, *below], spacing_mm=(3.0, 1.0, 1.0), title="a") for below in ([], zones)
    )
    assert len(figure.axes) == 2 * len(plain.axes)
    below = figure.axes[3]
    assert {text.get_text() for text in below.texts} == {"PZ", "TZ"}
    styles = {(str(line.get_edgecolor()), str(line.get_linestyle())) for line in below.collections}
    assert len(styles) == 4  # two colours, each solid and dashed
    (legend,) = figure.legends
    assert {"PZ peripheral zone", "TZ transition zone"} <= {text.get_text() for text in legend.get_texts()}


def test_two_studies_of_prostate158_go_through_every_stage(shared_data: Path, tmp_path: Path) -> None:
    settings = parse(composed("data.phantom.num_patients=2", "data.phantom.num_second_studies=0")).data.phantom
    assert settings is not None
    write_phantom(tmp_path / "data", settings=replace(settings, field_of_view_mm=110.0), seed=1)
    (tmp_path / "data" / "cases.csv").unlink()
    for kind in ("images", "masks"):
        for path in (shared_data / "t2w" / kind).glob("p158*"):
            shutil.copyfile(path, tmp_path / "data" / kind / path.name)
    small = [*TINY, "preprocess.spacing_mm=[3,1.6,1.6]", "preprocess.image_size=64", "data=prostate158"]
    small += ["data.on_bad_case=fail", "train.max_epochs=2", "train.steps_per_epoch=10"]
    result = run_stages(tmp_path, "stage=inspect,preprocess,prepare,train,evaluate,report", *small)
    assert result.returncode == 0, result.stderr
    cases = pd.read_csv(tmp_path / "evaluation" / "cases.csv").set_index(["case_id", "region"])
    for case_id in ("p158020_1", "p158021_1"):
        labels = read_volume(shared_data / "t2w" / "masks" / f"{case_id}.nii.gz")
        for region, value in (("transition_zone", 1), ("peripheral_zone", 2)):
            expected_ml = (labels.array == value).sum() * labels.geometry.voxel_volume_ml
            assert cases.loc[(case_id, region), "volume_reference_ml"] == pytest.approx(expected_ml)
    arguments = [f"predict.input={shared_data}/t2w/images/p158020_1.nii.gz", "predict.output=out", *small]
    assert run_stages(tmp_path, "stage=predict", *arguments).returncode == 0
    assert set(np.unique(read_volume(tmp_path / "out" / "masks" / "p158020_1.nii.gz").array)) <= {0, 1, 2}


def test_contact_sheet_shows_the_zones(tmp_path: Path, cube_volume: Volume) -> None:
    gland = np.zeros(cube_volume.array.shape, dtype=bool)
    gland[5:15, 10:40, 10:50] = True
    zones = [gland & (np.arange(60) < 30), gland & (np.arange(60) >= 30)]
    panel = Panel(case_id="a", caption=[], picture=picture_of(cube_volume, [gland, *zones]), severity=0)
    figure = contact_sheet_figure([panel], title="a", zones=["peripheral_zone", "transition_zone"])
    assert len(figure.axes[0].collections) == 3
    assert len({str(line.get_linestyle()) for line in figure.axes[0].collections}) == 3
    assert "purple dashes: peripheral zone; green dots: transition zone" in figure.get_suptitle()
    write_zones(tmp_path / "data", DECATHLON)
    result = run_stages(tmp_path, "stage=inspect", "data=decathlon", *TINY)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "inspect" / "contact_sheet.png").is_file()
