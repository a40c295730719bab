"""Every option of every group composes and parses; every rule refuses with key, rule and value."""

import time
from pathlib import Path

import pytest
import yaml
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError

from prostate_seg.cli import composition_message, config_folder
from prostate_seg.common.errors import ConfigError
from prostate_seg.common.settings import plain
from prostate_seg.config import schema as config
from tests.conftest import composed

NEEDED = {
    "data=folder": ["data.root=x"],
    "fold=picai": ["fold.file=x"],
    "fold=groups": ["fold.column=x"],
    "model=unet3d": [],
}


def options() -> list[str]:
    """Return all options except sweeps, which configure a multirun; tests/e2e/test_sweeps.py runs each."""
    paths = (path for path in config_folder().glob("*/*.yaml") if path.parent.name != "sweep")
    return sorted(f"{path.parent.name}={path.stem}" for path in paths)


@pytest.mark.parametrize("option", options())
def test_every_option_of_every_group_composes_and_parses(option: str) -> None:
    assert isinstance(config.parse(composed(option, *NEEDED.get(option, []))), config.Config)


@pytest.mark.parametrize(
    "path", sorted(config_folder().glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_every_option_states_in_its_first_line_when_to_choose_it(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# Choose ")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+train.epochz=3"], "train.epochz: unknown key; did you mean train.max_epochs?"),
        (["+zeed=3"], "zeed: unknown key; did you mean seed?"),
        (["+train.resume=never"], "train.resume: was renamed; use machine.resume"),
        (["+train.num_parallel_folds=2"], "train.num_parallel_folds: was renamed; use machine.num_parallel_folds"),
        (["+paths.spool=x"], "paths.spool: was renamed; use paths.journal"),
        (["mlflow.on_unreachable=spool"], "mlflow.on_unreachable: must be one of fail, journal, is spool"),
        (["+evaluate.flips=true"], "evaluate.flips: was renamed; use evaluate.tta"),
        (["train.max_epochs=many"], "train.max_epochs: must be a whole number, is many"),
        (["train.max_minutes=soon"], "train.max_minutes: must be null or a number, is soon"),
        (["train.zscore=maybe"], "train.zscore: must be true or false, is maybe"),
        (["train.loss=dise"], "train.loss: must be one of bce, dice, dice_ce, iou, focal_dice, is dise"),
        (["model.strides=[2,2]"], "model.strides: must be a list, each a list, each a whole number, is [2, 2]"),
        (["data=folder"], "data.root: must be set"),
        (["fold=picai"], "fold.file: must be set"),
        (["seed=-1"], "seed: must be from 0 to 4294967295, is -1"),
        (["train.max_epochs=0"], "train.max_epochs: must be from 1 to 100000, is 0"),
        (["train.max_minutes=0"], "train.max_minutes: must be null or above 0, is 0.0"),
        (["train.learning_rate=0"], "train.learning_rate: must be above 0 and at most 1, is 0.0"),
        (["train.weight_decay=-1"], "train.weight_decay: must be from 0 to 1, is -1.0"),
        (["train.warmup_fraction=1"], "train.warmup_fraction: must be at least 0 and below 1, is 1.0"),
        (["train.batch_size=0"], "train.batch_size: must be from 1 to 4096, is 0"),
        (["train.steps_per_epoch=0"], "train.steps_per_epoch: must be null or from 1 to 100000, is 0"),
        (["train.ema_decay=1"], "train.ema_decay: must be at least 0 and below 1, is 1.0"),
        (["preprocess.spacing_mm=[3,0.5]"], "preprocess.spacing_mm: must be null, auto or three lengths"),
        (["preprocess.spacing_mm=[3,0.5,0]"], "preprocess.spacing_mm: must be null, auto or three lengths"),
        (["preprocess.spacing_mm=automatic"], "preprocess.spacing_mm: must be null or auto or a list, each a number"),
        (["preprocess.image_size=large"], "preprocess.image_size: must be auto or a whole number, is large"),
        (["preprocess.image_size=8"], "preprocess.image_size: must be from 32 to 1024, is 8"),
        (["preprocess.intensity_percentiles=[99,1]"], "preprocess.intensity_percentiles: must be two rising numbers"),
        (["fold.num_folds=1"], "fold.num_folds: must be at least 2 for fold=kfold"),
        (["fold.num_folds=0", "fold.strategy=all"], "fold.num_folds: must be from 1 to 100, is 0"),
        (["fold.val_fraction=0"], "fold.val_fraction: must be above 0 and below 1, is 0.0"),
        (
            ["fold.not_duplicates=[a_1/b_1]"],
            'fold.not_duplicates: must be pairs with a reason, such as ["10001_1/10002_1: two',
        ),
        (["fold.not_duplicates=['a_1/b_1: ']"], "fold.not_duplicates: must be pairs with a reason"),
        (["fold.not_duplicates=['a_1: b_1 is another']"], "fold.not_duplicates: must be pairs with a reason"),
        (["fold.index=-1"], "fold.index: must be null or at least 0, is -1"),
        (["fold.file=x"], "fold.file: must name a file for fold=picai, and be null otherwise, is x"),
        (["fold.column=centre"], "fold.column: must name a column of cases.csv for fold=groups, and be null otherwise"),
        (["model.num_slices=2"], "model.num_slices: must be odd"),
        (["model.num_slices=0"], "model.num_slices: must be at least 1, is 0"),
        (["model.channels=[16]"], "model.channels: must be two or more numbers above 0"),
        (["model.strides=[[2,2]]"], "model.strides: must have one entry fewer than model.channels"),
        (["model=unet3d", "model.name=unet"], "model.num_slices: must be odd"),
        (["model=unet", "model.name=unet3d"], "model.strides: must have 3 numbers above 0 per level"),
        (["model.num_res_units=9"], "model.num_res_units: must be from 0 to 8, is 9"),
        (["model.dropout=1"], "model.dropout: must be at least 0 and below 1, is 1.0"),
        (["evaluate.threshold=1"], "evaluate.threshold: must be above 0 and below 1, is 1.0"),
        (["evaluate.num_bootstrap=1"], "evaluate.num_bootstrap: must be from 100 to 100000, is 1"),
        (["machine.num_parallel_folds=0"], "machine.num_parallel_folds: must be from 1 to 100, is 0"),
        (["machine.num_workers=0"], "machine.num_workers: must be null or at least 1, is 0"),
        (["data.patient_pattern=abc"], "data.patient_pattern: must be a regular expression with a group, is abc"),
        (["data.whole_gland_labels=[0]"], "data.whole_gland_labels: must be null or a list of labels above 0"),
        (["fetch.parts=fold0"], "fetch.parts: must be null or a list, each text, is fold0"),
        (["data.phantom=null"], "data.phantom: must be set for data=phantom"),
        (["data.phantom.num_patients=0"], "data.phantom.num_patients: must be from 1 to 9999, is 0"),
        (["data.phantom.num_second_studies=99"], "data.phantom.num_second_studies: must be from 0 to"),
        (["data.phantom.field_of_view_mm=10"], "data.phantom.field_of_view_mm: must be from 80 to 400, is 10.0"),
        (["data.phantom.num_slices_range=[24,18]"], "data.phantom.num_slices_range: must be two rising numbers"),
        (
            ["data.phantom.gland_volume_range_ml=[1,2]"],
            "data.phantom.gland_volume_range_ml: must be two rising numbers",
        ),
        (["data.phantom.difficulty=2"], "data.phantom.difficulty: must be from 0 to 1, is 2.0"),
    ],
)
def test_bad_value_is_refused_with_key_rule_and_value(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(composed(*overrides))
    assert str(caught.value).startswith(message)


def test_setting_of_an_absent_group_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigCompositionException) as caught:
        composed("data=folder", "data.root=x", "data.phantom.num_patients=3")
    assert composition_message(caught.value) == (
        "data.phantom.num_patients: cannot be set here, because data.phantom is null; choose the option that has it"
    )


def test_malformed_interpolation_of_a_file_is_refused_with_its_key() -> None:
    with pytest.raises(GrammarParseError) as caught:
        OmegaConf.create("audit: {splits: ['${']}")
    assert composition_message(caught.value) == "audit.splits[0]: no viable alternative at input '${'"


def test_refusal_takes_less_than_a_second() -> None:
    cfg = composed("+train.epochz=3")
    start = time.perf_counter()
    with pytest.raises(ConfigError):
        config.parse(cfg)
    assert time.perf_counter() - start < 1


def test_settings_classes_have_no_defaults() -> None:
    for group in config.Config.__dataclass_fields__.values():
        assert group.default is group.default_factory


def test_container_of_config_is_plain_and_parses_to_the_same() -> None:
    cfg = config.parse(composed("model=unet3d", "train.max_minutes=3"))
    container = yaml.safe_load(yaml.safe_dump(plain(cfg)))
    assert config.parse(DictConfig(container)) == cfg


def test_science_groups_contain_no_environment_variable_and_no_machine_setting() -> None:
    for group in config.SCIENCE_GROUPS:
        for path in (config_folder() / group).glob("*.yaml"):
            assert "${" not in path.read_text(), path
