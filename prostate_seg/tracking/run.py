"""The one seam between a stage and what is recorded of it.

`open_run` surrounds a stage: it starts the record, gives the stage its hooks and closes the record with the status
FINISHED, FAILED or KILLED, whatever ends the stage. For now the record is the log.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from prostate_seg.config import Config
from prostate_seg.workspace import StageResult

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Run:
    """The record of one stage."""

    stage: str
    result: StageResult | None = None

    def on_epoch_end(self, fold_index: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one epoch of one fold."""
        shown = " ".join(f"{name}={value:.4g}" for name, value in metrics.items())
        log.debug("fold %d epoch %d %s", fold_index, epoch, shown)

    def finish(self, result: StageResult) -> None:
        """Take what the stage read, wrote and measured."""
        self.result = result


@contextmanager
def open_run(cfg: Config) -> Iterator[Run]:
    """Record the stage that runs inside the block."""
    assert cfg.stage is not None
    start = time.perf_counter()
    status = "FAILED"
    try:
        yield Run(stage=cfg.stage)
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        log.info("%s %s after %.1f s", cfg.stage, status, time.perf_counter() - start)
