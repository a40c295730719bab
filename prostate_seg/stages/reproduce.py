"""Stage reproduce: repeat a recorded stage from its own code and inputs, and compare the results."""

import logging

from prostate_seg.common.errors import ConfigError, InputError
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace
from prostate_seg.tracking.reproduction import reproduce

log = logging.getLogger(__name__)


def run(cfg: Config, workspace: Workspace) -> None:
    """Log a line per output and the verdict; raise an InputError if outputs differ and a metric is out of tolerance."""
    if cfg.reproduce.run is None:
        raise ConfigError("reproduce.run: must be the id of a run; the MLflow page and stage=find show them")
    result = reproduce(cfg.reproduce.run, cfg.mlflow, workspace=workspace)
    log.info("%s was run again with the code of %s", result.stage, result.code)
    for key, (old, new) in result.outputs.items():
        log.info("%-9s %s", "same" if old == new else "different", key)
    if all(old == new for old, new in result.outputs.values()):
        log.info("bit-identical: every output has the recorded hash")
        return
    for key, (old_value, new_value) in result.metrics.items():
        log.info("%-30s recorded %.6g, now %s", key, old_value, "absent" if new_value is None else f"{new_value:.6g}")
    tolerance = cfg.reproduce.tolerance
    if not all(new is not None and abs(new - old) <= tolerance * abs(old) for old, new in result.metrics.values()):
        raise InputError(
            f"not reproduced: outputs differ, and a metric by more than {tolerance:.2%} of its value\n"
            "stage=verify compares packages and inputs with those of the run."
        )
    log.info("reproduced: outputs differ, every metric agrees within %.2f%%", 100 * tolerance)
