"""Entry point: composes and checks the config, and calls one stage. The callback opens the run before it and closes it after.

Exit codes: 0 done; 1 refused input or failed stage; 2 invalid command line or config; 130 Ctrl-C; 143 SIGTERM.
Nothing heavy is imported here; the module of a stage imports its libraries.
"""

import io
import math
import os
import shlex
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import NoReturn, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from omegaconf import DictConfig

from prostate_seg import cli, stages
from prostate_seg.callback import JobFailed, StageTask
from prostate_seg.cli import config_folder, leave
from prostate_seg.common import torchrun
from prostate_seg.common.errors import ConfigError, InputError
from prostate_seg.common.settings import plain
from prostate_seg.common.signals import handle_stop_signals
from prostate_seg.config import schema as config
from prostate_seg.config.workspace import StageResult, workspace_of
from prostate_seg.operations.job import TYPED, SkippedRun
from prostate_seg.provenance.redaction import Redactor
from prostate_seg.sweeping.grid import GridSweeper, PairSweeper
from prostate_seg.sweeping.identity import is_multirun
from prostate_seg.sweeping.pruning import with_pruning
from prostate_seg.sweeping.sweeper import StudySweeper

EXECUTION_WHITELIST = [
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
    "logging.StreamHandler",
    "logging.FileHandler",
    "prostate_seg.callback.TrackingCallback",
    "prostate_seg.common.terminal.ConsoleHandler",
    "prostate_seg.sweeping.grid.GridSweeper",
    "prostate_seg.sweeping.grid.PairSweeper",
    "prostate_seg.sweeping.sweeper.StudySweeper",
]
"""The only `_target_`s and logging classes that a config may name."""


class StageLauncher(StageTask):
    """Hydra's task function, with the run that the callback opens for each job."""

    def run_stage(self, composed: DictConfig) -> Mapping[str, float]:
        """Run the stage that the config names and return the values that a sweep can optimise."""
        try:
            cfg = config.parse(composed)
            stages.require_stage(cfg.stage)
        except ConfigError as error:  # exit here: Hydra would print a line of its own before the message
            leave(error)
        run = self.open_run()
        if isinstance(run, SkippedRun):
            if torchrun.world_size() > 1:
                from prostate_seg.stages.train import release_workers  # imports torch

                release_workers()
            return run.result.objectives
        hydra_config = cast(DictConfig, HydraConfig.get())
        if is_multirun(hydra_config):  # the values of a job of a multirun are known only here
            redactor = Redactor(settings=plain(cfg))
            typed = [redactor.text(cli.typed_word(word)) for word in hydra_config.overrides.task]
            cli.require_inputs([str(cfg.stage)], cfg, typed)
        open_fold = with_pruning(run.open_fold, cfg, hydra_config)
        workspace = replace(workspace_of(cfg), open_fold=open_fold, run_id=run.run_id)
        result = stages.load_stage(cfg.stage)(cfg, workspace) or StageResult()
        if math.isnan(result.objectives.get("objective", 0.0)):
            raise InputError("the objective, mean val Dice over the folds, is NaN: check the val studies and the loss")
        run.finish(result)
        return result.objectives


def main() -> None:
    """Run the command line and exit with one of the codes above."""
    for sweeper in (GridSweeper, PairSweeper, StudySweeper):
        Plugins.instance().register(sweeper)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors, so that they get a message and an exit code here
    handle_stop_signals()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot encode must not stop a stage
            stream.reconfigure(errors="backslashreplace")
    try:
        if torchrun.rank() > 0:
            _follow()
        _run_command(sys.argv[1:])
    except (KeyboardInterrupt, Exception) as error:
        leave(error)


def _run_command(typed: list[str]) -> None:
    """Run a command with Hydra, and close its run if a signal interrupts it."""
    words = cli.hydra_words(typed)
    if cli.is_query(cli.parsed_arguments(typed)) and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader such as head may close the pipe
    if torchrun.world_size() > 1:
        cli.require_one_training(typed)
    os.environ[TYPED] = shlex.join(typed)
    sys.argv[1:] = words
    launcher = StageLauncher()
    failure: Exception | None = None
    try:
        hydra.main(config_path=str(config_folder()), config_name="config", execution_whitelist=EXECUTION_WHITELIST)(
            launcher.run_stage
        )()
    except JobFailed as failed:
        failure = failed.error
    except (KeyboardInterrupt, SystemExit) as error:
        launcher.close(error)  # a signal came between the end of the stage and on_job_end
        raise
    if failure is not None:
        raise failure  # outside the except block, so that the traceback is that of the stage


def _follow() -> NoReturn:
    """Train with rank 0 as another process of torchrun, and exit with it."""
    from prostate_seg.stages.train import run_worker  # imports torch

    # It writes nothing and has no run to close; a Python signal handler would wait for as long as torch waits for rank 0.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    run_worker()
    sys.exit(0)


if __name__ == "__main__":
    main()
