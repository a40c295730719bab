"""Identity of a sweep and of its trials, and the settings that it varies, from Hydra's config; imports nothing heavy."""

import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from prostate_seg.cli import no_option_message
from prostate_seg.common.address import resolved_uri, shown_address
from prostate_seg.common.errors import ConfigError
from prostate_seg.common.suggestions import unknown_key_message
from prostate_seg.config import schema as configuration


def is_multirun(hydra: DictConfig) -> bool:
    """Return whether the command runs several jobs."""
    return str(hydra.mode).endswith("MULTIRUN")


def is_study(hydra: DictConfig) -> bool:
    """Return whether jobs are the trials of an Optuna study."""
    return str(hydra.sweeper._target_).endswith(".StudySweeper")


def trial_number(hydra: DictConfig) -> int:
    """Return the trial number of a study's job, which is the name of its folder."""
    return int(hydra.sweep.subdir)


def sweep_path(config: DictConfig) -> Path:
    """Return the path that identifies a sweep: its folder, or storage and name of a study, which may span machines."""
    if not is_study(config.hydra):
        return Path(config.hydra.sweep.dir).absolute()
    return Path(shown_address(resolved_uri(config.hydra.sweeper.storage))) / config.hydra.sweeper.study_name


def require_training(stages: Sequence[str | None]) -> None:
    """Refuse a study of a stage without an objective.

    Raises:
        ConfigError: If a stage is not train.
    """
    if list(stages) != ["train"]:
        raise ConfigError(
            f"stage: must be train for sweep=optuna, is {','.join(map(str, stages))}\n"
            "stage=train has an objective, the val Dice; stage=evaluate has none, as test cases choose no setting."
        )


def swept_settings(config: DictConfig) -> dict[str, list[str | None]]:
    """Return the settings that a multirun varies, with their values; no values for an interval.

    Raises:
        ConfigError: If a setting or option does not exist, has no value to try, or has an interval outside a study.
    """
    words = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    words += list(config.hydra.overrides.task)
    swept: dict[str, list[str | None]] = {}
    loader = GlobalHydra.instance().config_loader()
    for override in OverridesParser.create(loader).parse_overrides(words):
        if not override.is_sweep_override():
            continue
        if override.is_interval_sweep() and not is_study(config.hydra):
            raise ConfigError(f"{override.input_line}: only a search draws from an interval; add +sweep=optuna")
        values = list(override.sweep_string_iterator()) if override.is_discrete_sweep() else []
        if not (values or override.is_interval_sweep()):
            raise ConfigError(f"{override.input_line}: has no value to try; glob(...) takes options of a group")
        key, options = override.key_or_group, loader.get_group_options(override.key_or_group)
        words_of_group = [value for value in values if options and re.fullmatch(r"[\w'\"]+", value) and value != "null"]
        if absent := [value for value in words_of_group if value.strip("'\"") not in options]:
            raise ConfigError(no_option_message(key, absent[0]))
        is_setting = not (options or override.is_value_path or override.is_hydra_override())
        if is_setting and key not in configuration.setting_types():
            raise ConfigError(unknown_key_message(key, configuration.setting_types()))
        swept[override.get_key_element()] = [str(value) for value in values]
    return swept
