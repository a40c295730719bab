"""`+sweep=optuna`: Hydra's Optuna sweeper with a study that can be stopped at any moment and gone on with.

Of the stock sweeper it keeps how search spaces and samplers are written; the stock loop forgets at a restart what has run.
Nothing heavy is imported before a sweep starts.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper
from omegaconf import DictConfig

from prostate_seg.common.address import resolved_uri, shown_address
from prostate_seg.common.errors import ConfigError
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import OpenFold
from prostate_seg.sweeping.cost_estimate import num_folds_of
from prostate_seg.sweeping.pruning import Standing

OBJECTIVES = ("objective", "seconds")
"""What a sweep can look for: mean val Dice, and the time of the training. Test cases are not among them."""
DIRECTIONS = ("maximize", "minimize")


class StudySweeper(OptunaSweeper):
    """Runs the trials that a study still lacks."""

    def __init__(self, *, objectives: DictConfig, pruner: DictConfig, **stock: Any) -> None:
        self.objectives = {str(name): str(direction) for name, direction in objectives.items()}
        _check(self.objectives)
        directions = list(self.objectives.values())
        super().__init__(direction=directions, max_failure_rate=1.0, custom_search_space=None, **stock)

    def sweep(self, arguments: list[str]) -> None:
        """Run them."""
        search = importlib.import_module("prostate_seg.sweeping.search").Search(self.sweeper, self.objectives)
        search.run(arguments)


def _check(objectives: dict[str, str]) -> None:
    if not objectives or not set(objectives) <= set(OBJECTIVES) or not set(objectives.values()) <= set(DIRECTIONS):
        shown = ", ".join(f"{name}: {direction}" for name, direction in objectives.items())
        raise ConfigError(
            f"hydra.sweeper.objectives: must be {' or '.join(OBJECTIVES)}, each with {' or '.join(DIRECTIONS)}, are {shown}"
        )


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


def is_study(hydra: DictConfig) -> bool:
    """Return whether jobs are the trials of a study."""
    return str(hydra.sweeper._target_).endswith(f".{StudySweeper.__name__}")


def trial_number(hydra: DictConfig) -> int:
    """Return the number of a job of a study: the name of its folder."""
    return int(hydra.sweep.subdir)


def sweep_place(config: DictConfig) -> Path:
    """Return what tells one sweep from others: its folder, or the study, which other machines know by its storage."""
    if not is_study(config.hydra):
        return Path(config.hydra.sweep.dir).absolute()
    return Path(shown_address(resolved_uri(config.hydra.sweeper.storage))) / config.hydra.sweeper.study_name


def watched_by_study(open_fold: OpenFold, cfg: Config, hydra: DictConfig) -> OpenFold:
    """Let the study hear how a trial stands; what is not a trial of a study stays as it is."""
    if not is_study(hydra):
        return open_fold
    is_hopeless = importlib.import_module("prostate_seg.sweeping.study").judge(
        hydra.sweeper.storage,
        hydra.sweeper.study_name,
        number=trial_number(hydra),
        pruner=instantiate(hydra.sweeper.pruner, _execution_whitelist_=("optuna.pruners.*",)),
    )
    standing = Standing(is_hopeless, num_folds=num_folds_of(cfg), max_epochs=cfg.train.max_epochs)
    return standing.watched(open_fold)
