"""`+sweep=optuna`: Hydra's Optuna sweeper with a study that survives interruptions.

Search spaces and samplers are those of the stock sweeper; its loop would run all trials again after a restart. Nothing heavy
is imported before a sweep starts.
"""

from typing import Any

from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper
from omegaconf import DictConfig

from prostate_seg.common.errors import ConfigError

OBJECTIVES = ("objective", "seconds")
"""Objectives of a search: mean val Dice, and the time of the training. Test cases are not among them."""
DIRECTIONS = ("maximize", "minimize")


class StudySweeper(OptunaSweeper):
    """Runs the trials that a study still lacks."""

    def __init__(self, *, objectives: DictConfig, pruner: DictConfig, **stock: Any) -> None:
        self.objectives = {str(name): str(direction) for name, direction in objectives.items()}
        directions = list(self.objectives.values())
        if not directions or not set(self.objectives) <= set(OBJECTIVES) or not set(directions) <= set(DIRECTIONS):
            shown = ", ".join(f"{name}: {direction}" for name, direction in self.objectives.items())
            raise ConfigError(
                f"hydra.sweeper.objectives: must be {' or '.join(OBJECTIVES)}, "
                f"each with {' or '.join(DIRECTIONS)}, are {shown}"
            )
        super().__init__(direction=directions, max_failure_rate=1.0, custom_search_space=None, **stock)

    def sweep(self, arguments: list[str]) -> None:
        """Run the search."""
        from prostate_seg.sweeping.search import Search  # imports optuna

        Search(self.sweeper, self.objectives).run(arguments)
