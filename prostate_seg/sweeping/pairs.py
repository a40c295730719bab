"""`+sweep=pairs`: the first values of all swept settings together, then the second ones, and so on."""

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override

from prostate_seg.errors import ConfigError


class PairSweeper(BasicSweeper):
    """Hydra's own sweeper, but that values are paired rather than multiplied."""

    @staticmethod
    def split_arguments(overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        """Return batches of jobs, each a list of overrides.

        Raises:
            ConfigError: If settings have different numbers of values.
        """
        columns = {}
        for override in overrides:
            jobs = BasicSweeper.split_arguments([override], None)[0]
            columns[override.get_key_element()] = [word for job in jobs for word in job]
        swept = {key: len(column) for key, column in columns.items() if len(column) > 1}
        num_jobs = max(swept.values(), default=1)
        if set(swept.values()) - {num_jobs}:
            counts = ", ".join(f"{key} {count}" for key, count in swept.items())
            raise ConfigError(
                f"sweep=pairs: all swept settings must have as many values, have: {counts}\n"
                "Give each as many, or leave out +sweep=pairs to try all combinations."
            )
        rows = [[column[min(row, len(column) - 1)] for column in columns.values()] for row in range(num_jobs)]
        return list(BasicSweeper.split_overrides_to_chunks(rows, max_batch_size))
