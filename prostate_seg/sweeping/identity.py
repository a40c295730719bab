"""Identity of a sweep and of its trials, from Hydra's config; imports nothing heavy."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from prostate_seg.common.address import resolved_uri, shown_address
from prostate_seg.common.errors import ConfigError


def is_study(hydra: DictConfig) -> bool:
    """Return whether jobs are the trials of an Optuna study."""
    return str(hydra.sweeper._target_).endswith(".StudySweeper")


def trial_number(hydra: DictConfig) -> int:
    """Return the trial number of a study's job, which is the name of its folder."""
    return int(hydra.sweep.subdir)


def sweep_place(config: DictConfig) -> Path:
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
