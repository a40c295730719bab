"""dvc.yaml has the source files, settings and inputs of each stage in the code; params.yaml round-trips all settings."""

from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from prostate_seg.cli import config_folder
from prostate_seg.common.errors import ConfigError, InputError
from prostate_seg.config.schema import SCIENCE_GROUPS, STAGE_SETTINGS, Config, parse, science_of
from prostate_seg.provenance.code_digests import LISTINGS
from prostate_seg.stages.export import params_text, read_params
from tests.conftest import ROOT, composed

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())
STAGES = [name for name in PIPELINE["stages"] if name not in ("check_data", "code")]
OPTIONS = [
    f"{path.parent.name}={path.stem}"
    for group in (*SCIENCE_GROUPS, "experiment")
    for path in sorted((ROOT / "configs" / group).glob("*.yaml"))
]
NEEDED = {
    "data=folder": ["data.root=/data"],
    "fold=picai": ["fold.file=folds.json"],
    "fold=groups": ["fold.column=centre"],
}


def parsed(*overrides: str) -> Config:
    return parse(composed(*overrides))


def test_stages_depend_on_the_listings_of_their_code() -> None:
    code = PIPELINE["stages"]["code"]
    assert code["cmd"] == f"python -m prostate_seg.provenance.code_digests {' '.join(STAGES)}"
    assert code["deps"] == ["prostate_seg"]
    assert code["outs"] == [(LISTINGS / f"{name}.txt").as_posix() for name in STAGES]
    for name in STAGES:
        assert f".cache/code/{name}.txt" in PIPELINE["stages"][name]["deps"]


@pytest.mark.parametrize("stage", STAGES)
def test_settings_of_a_stage_are_those_that_decide_it(stage: str) -> None:
    assert tuple(PIPELINE["stages"][stage]["params"]) == STAGE_SETTINGS[stage]


def test_results_persist_and_commands_take_their_settings_from_params() -> None:
    for name in STAGES:
        stage = PIPELINE["stages"][name]
        assert stage["cmd"] == f"python -m prostate_seg --config-name from_params stage={name}"
        assert all(list(out.values()) == [{"persist": True}] for out in stage["outs"])


def test_params_yaml_in_git_is_what_the_default_composition_exports() -> None:
    exported = params_text(science_of(parsed()), command="python -m prostate_seg stage=export")
    assert (ROOT / "params.yaml").read_text() == exported, "run: python -m prostate_seg stage=export"


@pytest.mark.parametrize("option", OPTIONS)
def test_exported_settings_round_trip(option: str, tmp_path: Path) -> None:
    overrides = [option, *NEEDED.get(option, [])]
    text = params_text(science_of(parsed(*overrides)), command="x")
    (tmp_path / "params.yaml").write_text(text)
    back = parse(composed(name="from_params", folder=tmp_path))
    assert science_of(back) == science_of(parsed(*overrides))
    assert parse(OmegaConf.merge(composed(*overrides), OmegaConf.load(tmp_path / "params.yaml"))) == parsed(*overrides)


def test_params_contain_sorted_science_settings_with_a_header() -> None:
    text = params_text(science_of(parsed("experiment=quickstart")), command="python -m prostate_seg stage=export")
    settings = yaml.safe_load(text)
    assert list(settings) == sorted([*SCIENCE_GROUPS, "seed"])
    assert text.startswith("#")
    assert "python -m prostate_seg stage=export" in text
    assert isinstance(settings["train"]["learning_rate"], float)
    assert isinstance(settings["preprocess"]["spacing_mm"][0], float)


@pytest.mark.parametrize("text", ["- a list", "{unclosed", "text", "date: 2026-01-01"])
def test_params_that_are_no_mapping_of_settings_are_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(
        InputError, match=r"must be a mapping of settings in YAML(.|\n)*Write it again with stage=export"
    ):
        read_params()


def test_dvc_composes_the_exported_settings() -> None:
    with initialize_config_dir(config_dir=str(config_folder())):
        by_dvc = compose("science", overrides=["experiment=quickstart"])
    OmegaConf.resolve(by_dvc)
    ours = parsed("experiment=quickstart")
    assert parse(OmegaConf.merge(composed(), by_dvc)) == ours
    assert sorted(str(key) for key in by_dvc) == sorted([*SCIENCE_GROUPS, "seed"])


def test_environment_values_are_not_exported() -> None:
    with pytest.raises(ConfigError, match="data.root: must be a plain value to be exported"):
        parsed("stage=export", "data.root=${oc.env:HOME}")
    assert parsed("stage=train", "data=folder", "data.root=${oc.env:HOME}").data.root


def test_no_config_is_named_dvc_yaml() -> None:
    assert list((ROOT / "configs").rglob("dvc.yaml")) == []
