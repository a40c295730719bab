"""The launcher: compose the config, check it, call one stage. The callback opens the run before and closes it after.

Exit codes: 0 done; 1 refused input or failed stage; 2 bad command line or config; 130 Ctrl-C; 143 SIGTERM.
Nothing heavy is imported here; a stage brings its own libraries when it is dispatched.
"""

import importlib
import io
import math
import os
import re
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import NoReturn, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from prostate_seg import config, stages, torchrun
from prostate_seg.callback import active_run, close_left
from prostate_seg.errors import ConfigError, InputError
from prostate_seg.sweeping.pairs import PairSweeper
from prostate_seg.sweeping.sweeper import StudySweeper, watched_by_study
from prostate_seg.tracking.job import INTERRUPTED, Skipped, terminate
from prostate_seg.workspace import workspace_of

EXECUTION_WHITELIST = [
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
    "logging.StreamHandler",
    "logging.FileHandler",
    "prostate_seg.callback.TrackingCallback",
    "prostate_seg.sweeping.pairs.PairSweeper",
    "prostate_seg.sweeping.sweeper.StudySweeper",
]
"""The only `_target_`s and logging classes that a config may name."""

FAILED, BAD_COMMAND = 1, 2


def config_folder() -> Path:
    """Return configs/: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "configs"


@hydra.main(config_path=str(config_folder()), config_name="config", execution_whitelist=EXECUTION_WHITELIST)
def run_stage(composed: DictConfig) -> dict[str, float]:
    """Run the stage that the config names and return what a sweep can look for."""
    try:
        cfg = config.parse(composed)
        stages.require_stage(cfg.stage)
    except ConfigError as error:  # left at once: Hydra would put a line of its own before the text
        _leave(error, str(error), BAD_COMMAND)
    run = active_run()
    if isinstance(run, Skipped):
        if torchrun.num_processes() > 1:
            _training().dismiss()
        return run.result.sought
    open_fold = watched_by_study(run.open_fold, cfg, cast(DictConfig, HydraConfig.get()))
    workspace = replace(workspace_of(cfg), open_fold=open_fold, run_id=run.run_id)
    result = stages.load_stage(cfg.stage)(cfg, workspace)
    if result.objective is not None and math.isnan(result.objective):
        raise InputError("the objective, mean val Dice over the folds, is not a number: look at val studies and loss")
    run.finish(result)
    return result.sought


def main() -> None:
    """Run the command line and exit with one of the codes above."""
    for sweeper in (PairSweeper, StudySweeper):
        Plugins.instance().register(sweeper)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its exceptions on, so that they are worded and counted here.
    signal.signal(signal.SIGTERM, terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that this terminal cannot show stop no stage
    sys.argv[1:] = [_as_text(argument) for argument in sys.argv[1:]]
    sys.argv += _stop_chain_at_first_failure(sys.argv[1:])
    try:
        if torchrun.rank() > 0:
            _follow()
        _require_stage(sys.argv[1:])
        _require_multirun(sys.argv[1:])
        if torchrun.num_processes() > 1:
            torchrun.require_one_training(sys.argv[1:])
        _run_to_its_end()
    except KeyboardInterrupt as error:
        _leave(error, "interrupted", INTERRUPTED)
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        _leave(error, _config_message(error), BAD_COMMAND)
    except (InputError, OSError) as error:
        _leave(error, str(error), FAILED)
    except ValueError as error:
        if not _raised_by_hydra(error):
            raise
        _leave(error, str(error), BAD_COMMAND)


def _run_to_its_end() -> None:
    """Run the stage, and leave no run open whenever a signal comes."""
    try:
        run_stage()
    except (KeyboardInterrupt, SystemExit) as error:
        close_left(error)
        raise


def _follow() -> NoReturn:
    """Be a process that torchrun has started beside the first one: train with it and leave with it."""
    # It writes nothing and has no run to close; a handler of Python's would wait for as long as torch waits for the first one.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _training().follow()
    sys.exit(0)


def _training() -> ModuleType:
    """Import what imports torch."""
    return importlib.import_module("prostate_seg.stages.train")


def _require_stage(arguments: list[str]) -> None:
    """List the stages at once, before Hydra makes a folder for the run's log."""
    if not any(re.match(r"stage=|--|-sc$", argument) for argument in arguments):
        stages.load_stage(None)


def _require_multirun(arguments: list[str]) -> None:
    """Refuse a sweep that Hydra would run as a single job."""
    sweeps = [argument for argument in arguments if argument.startswith("+sweep=")]
    if sweeps and not any(re.match(r"-m$|--", argument) for argument in arguments):
        raise ConfigError(f"{sweeps[0]}: a sweep is many jobs; add -m to the command")


def _stop_chain_at_first_failure(arguments: list[str]) -> list[str]:
    """Return the override that makes `-m stage=a,b` run `b` only after `a` has succeeded."""
    chained = any(re.match(r"stage=.*,", argument) for argument in arguments)
    other_sweeper = any(re.match(r"\+?(hydra/)?sweep(er)?=", argument) for argument in arguments)
    return ["hydra.sweeper.max_batch_size=1"] if chained and not other_sweeper else []


def _as_text(argument: str) -> str:
    """Quote revisions, run ids and folders: Hydra would read 12e4567 as a number, and main~2 not at all."""
    listed = re.fullmatch(r"(compare\.runs)=\[([^\[\]'\"]+)\]", argument)
    if listed:
        quoted = [f"'{run.strip()}'" for run in listed.group(2).split(",")]
        return f"{listed.group(1)}=[{','.join(quoted)}]"
    named = re.fullmatch(
        r"((?:find|link)\.commit|(?:find|verify|reproduce|register|bundle)\.run)=([\w.\-/~^@{}]+)", argument
    )
    return f"{named.group(1)}='{named.group(2)}'" if named and named.group(2) != "null" else argument


def _config_message(error: Exception) -> str:
    """Word an error of composition: the key and, where one is close, what was probably meant."""
    text = str(error).strip()
    unknown = re.match(r"Could not override '([^']+)'", text)
    if unknown:
        return config.unknown_key_message(unknown.group(1))
    if "'params'" in text and "Could not" in text:
        return "params.yaml is absent in this folder: write it with stage=export and the overrides you want"
    no_option = re.search(r"Could not find '([^']+)/([^'/]+)'", text)
    if no_option:
        return _no_option_message(*no_option.groups())
    return f"{text}\n{error.__cause__}" if error.__cause__ and not isinstance(error, ConfigError) else text


def _no_option_message(group: str, option: str) -> str:
    known = sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))
    meant = config.closest(option, known)
    hint = f"; did you mean {group}={meant}?" if meant else ""
    return f"{group}: no option {option!r}; known are {', '.join(known)}{hint}"


def _raised_by_hydra(error: Exception) -> bool:
    """Return whether composing raised this: Hydra words some errors of the command line as plain ValueErrors."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(hydra.__file__).parent in Path(last.filename).parents


def _leave(error: BaseException, text: str, code: int) -> NoReturn:
    if os.environ.get("PROSTATE_SEG_DEBUG") == "1":
        traceback.print_exception(error)
    print(f"prostate_seg: {text}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
