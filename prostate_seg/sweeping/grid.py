"""Grids of settings: all combinations, which is what -m does by itself, or `+sweep=pairs`, first values with first ones."""

import logging
from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher

from prostate_seg.common.errors import ConfigError

log = logging.getLogger(__name__)


class GridSweeper(BasicSweeper):
    """Hydra's own sweeper; stages run one after the other, and a job that fails is named."""

    def setup(self, **parts: Any) -> None:
        """Make the launcher, and check what it returns before Hydra does, which would print a list of overrides."""
        super().setup(**parts)
        assert self.launcher is not None
        self.launcher = CheckedLauncher(self.launcher)

    @staticmethod
    def split_arguments(overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        """Return batches of jobs, each a list of overrides; of several stages one after the other until one fails."""
        return BasicSweeper.split_arguments(overrides, _batch_size(overrides, max_batch_size))


class PairSweeper(GridSweeper):
    """The same, but that values are paired rather than multiplied."""

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
        return list(BasicSweeper.split_overrides_to_chunks(rows, _batch_size(overrides, max_batch_size)))


class CheckedLauncher(Launcher):
    """A launcher whose failed jobs are named, and whose first failure is raised."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher

    def setup(self, **parts: Any) -> None:
        """Do nothing: the launcher is ready."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs of one batch.

        Raises:
            Exception: What the first failed job raised.
        """
        returns = self.launcher.launch(job_overrides, initial_job_idx=initial_job_idx)
        jobs = enumerate(zip(job_overrides, returns, strict=True), start=initial_job_idx)
        failed = [(number, words, job) for number, (words, job) in jobs if job.status is JobStatus.FAILED]
        if failed and len(returns) > 1:
            log.error("%d of %d jobs failed:", len(failed), len(returns))
            for number, words, job in failed:
                log.error("  #%d %s: %s", number, " ".join(words), str(job._return_value).split("\n")[0])
        for _, _, job in failed:
            raise job._return_value
        return returns


def _batch_size(overrides: Sequence[Override], max_batch_size: int | None) -> int | None:
    """Return 1 for a chain of stages: Hydra's launcher would run the next one after one has failed."""
    is_chain = any(one.is_sweep_override() and one.key_or_group == "stage" for one in overrides)
    return 1 if is_chain else max_batch_size
