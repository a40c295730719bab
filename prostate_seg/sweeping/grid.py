"""Sweepers over listed values: all combinations (the default of -m), or pairs with `+sweep=pairs`.

Adapter for Hydra's internal BasicSweeper and JobReturn.
"""

import logging
from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher

from prostate_seg.common.errors import ConfigError

log = logging.getLogger(__name__)


def job_error(job: JobReturn) -> Any:
    """Return the exception of a failed job; its public property would raise it."""
    return job._return_value


class GridSweeper(BasicSweeper):
    """Hydra's basic sweeper; stages run one after the other, and failed jobs are named."""

    def setup(self, **parts: Any) -> None:
        """Wrap the launcher, so that failed jobs are logged by us; Hydra would print a list of overrides."""
        super().setup(**parts)
        assert self.launcher is not None
        self.launcher = CheckedLauncher(self.launcher)

    @staticmethod
    def split_arguments(overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        """Return batches of jobs, each a list of overrides.

        The stages of one combination run before those of the next: evaluation tests the networks that were just trained.
        """
        ordered = sorted(overrides, key=_is_chain)  # the last setting varies fastest
        return BasicSweeper.split_arguments(ordered, _batch_size(overrides, max_batch_size))


class PairSweeper(GridSweeper):
    """Pairs the values of the swept settings instead of combining them."""

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
    """A launcher that logs failed jobs by name and raises the first failure."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher

    def setup(self, **parts: Any) -> None:
        """Do nothing: the wrapped launcher is set up already."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs of one batch.

        Raises:
            Exception: The error of the first failed job.
        """
        returns = self.launcher.launch(job_overrides, initial_job_idx=initial_job_idx)
        jobs = enumerate(zip(job_overrides, returns, strict=True), start=initial_job_idx)
        failed = [(number, words, job_error(job)) for number, (words, job) in jobs if job.status is JobStatus.FAILED]
        if failed and len(returns) > 1:
            log.error("%d of %d jobs failed:", len(failed), len(returns))
            for number, words, error in failed:
                log.error("  #%d %s: %s", number, " ".join(words), str(error).split("\n")[0])
        for _, _, error in failed:
            raise error
        return returns


def _batch_size(overrides: Sequence[Override], max_batch_size: int | None) -> int | None:
    """Return 1 for a chain of stages: Hydra's launcher would run the next stage after one has failed."""
    return 1 if any(map(_is_chain, overrides)) else max_batch_size


def _is_chain(override: Override) -> bool:
    """Return whether an override lists several stages."""
    return override.is_sweep_override() and override.key_or_group == "stage"
