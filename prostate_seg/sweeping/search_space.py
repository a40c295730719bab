"""Search space of a study, in the syntax of Hydra's Optuna sweeper.

Adapter for the private interface of hydra_optuna_sweeper; tests/test_optuna_contract.py checks what is used of it.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl, create_params_from_overrides
from optuna.distributions import BaseDistribution

from prostate_seg.common.errors import ConfigError

SearchSpace = Mapping[str, BaseDistribution]


def search_space(
    stock: OptunaSweeperImpl, arguments: Sequence[str], loader: ConfigLoader
) -> tuple[SearchSpace, list[str]]:
    """Return the search space of hydra.sweeper.params and the command line, and the overrides that all trials share.

    Raises:
        ConfigError: If a value cannot be parsed, or no setting is searched.
    """
    words = expand_globs([*stock._parse_sweeper_params_config(), *arguments], loader)
    try:
        space, values, deletions = create_params_from_overrides(words)
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"hydra.sweeper.params: {error}") from error
    space = {name: distribution for name, distribution in space.items() if name not in values}
    if not space:
        raise ConfigError(
            "hydra.sweeper.params: must name a setting to search, such as 'train.learning_rate=interval(1e-4,1e-2)'"
        )
    return space, [*(f"{name}={value}" for name, value in values.items()), *deletions]


def num_trials_of(stock: OptunaSweeperImpl, space: SearchSpace) -> int:
    """Return n_trials; for a grid build its sampler, and return the number of its points if that is smaller.

    Raises:
        ConfigError: If a grid is to search an interval.
    """
    if not isinstance(stock.sampler, partial):  # only the grid sampler lacks its search space still
        return int(stock.n_trials)
    try:
        points = {name: stock._to_grid_sampler_choices(distribution) for name, distribution in space.items()}
    except ValueError as error:
        raise ConfigError(f"hydra/sweeper/sampler=grid: {error} Use choice(...) or range(...).") from error
    stock.sampler = stock.sampler(points)
    return min(int(stock.n_trials), math.prod(len(values) for values in points.values()))


def example_overrides(space: SearchSpace) -> list[str]:
    """Return overrides with one value of each setting, to check that the settings exist."""
    # Internally a choice is its index, and a number itself.
    return [f"{name}={values.to_external_repr(getattr(values, 'low', 0))}" for name, values in space.items()]


def expand_globs(words: Sequence[str], loader: ConfigLoader) -> list[str]:
    """Return overrides with glob(...) replaced by choice(...) of the group's options, which Optuna's sweeper cannot list."""
    parsed = OverridesParser.create(loader).parse_overrides(list(words))
    choices = {
        one.input_line: f"{one.get_key_element()}=choice({','.join(one.sweep_string_iterator())})"
        for one in parsed
        if one.value_type is ValueType.GLOB_CHOICE_SWEEP
    }
    return [choices.get(word, word) for word in words]
