"""Stages called in this process, for tests that do not test the command line.

A new process imports torch and MONAI for 4 to 8 seconds of a core. No run is recorded here: callback, signals and
tracking are tested with real commands.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

from hydra import compose, initialize_config_dir

from prostate_seg import stages
from prostate_seg.cli import FAILED, config_folder
from prostate_seg.common.errors import InputError
from prostate_seg.config import schema as config
from prostate_seg.config.workspace import workspace_of


def run_stages(folder: Path, *arguments: str) -> CompletedProcess[str]:
    """Run `stage=a,b` with overrides in a folder, and return the result of an equivalent process.

    Returns:
        Exit code 0 or 1, log lines as stdout, error message as stderr.
    """
    (chain,) = (argument.removeprefix("stage=") for argument in arguments if argument.startswith("stage="))
    overrides = [argument for argument in arguments if argument != "-m" and not argument.startswith("stage=")]
    with contextlib.chdir(folder), _log_lines() as lines:
        for stage in chain.split(","):
            with initialize_config_dir(config_dir=str(config_folder())):
                cfg = config.parse(compose("config", overrides=[f"stage={stage}", *overrides]))
            try:
                stages.load_stage(stage)(cfg, workspace_of(cfg))
            except (InputError, OSError) as error:
                return CompletedProcess(arguments, FAILED, "\n".join(lines), f"prostate_seg: {error}")
    return CompletedProcess(arguments, 0, "\n".join(lines), "")


@contextlib.contextmanager
def _log_lines() -> Iterator[list[str]]:
    """Collect the messages of the package's loggers, INFO and above."""
    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("prostate_seg")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
