"""Parsing of the command line, and messages for commands that cannot be run.

The value of a text setting is taken as typed: a path with brackets, a regular expression or a revision needs no quotes beyond
the shell's. Hydra's quotes, functions and interpolations, and the commas of a multirun, keep their meaning.
"""

import argparse
import os
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import hydra
from hydra._internal.utils import get_args_parser  # the parser of hydra.main; tests/test_cli.py has its contract
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from prostate_seg.common import torchrun
from prostate_seg.common.errors import ConfigError, InputError, listed
from prostate_seg.common.settings import PathText, setting_types, type_in_words
from prostate_seg.common.suggestions import closest, probably_meant, unknown_key_message
from prostate_seg.common.terminal import wrapped
from prostate_seg.config import schema as config
from prostate_seg.config.schema import Config
from prostate_seg.operations.job import INTERRUPTED
from prostate_seg.prerequisites import missing_inputs
from prostate_seg.stages import STAGES, require_stage

FAILED, BAD_COMMAND = 1, 2
"""Exit codes of a refused input or failed stage, and of an invalid command or config."""

PATHS = {"hydra.run.dir", "hydra.sweep.dir"} | {
    key for key, hint in setting_types(Config, include_extras=True).items() if PathText in (hint, *get_args(hint))
}
"""Settings with ~ for the home folder."""
TEXT_OF_HYDRA = frozenset({"hydra.sweep.subdir", "hydra.sweeper.storage", "hydra.sweeper.study_name"})
WITH_COMMAS = frozenset({"data.patient_pattern", "register.reason"})
"""Text settings in which a comma never separates the values of a multirun."""

_OVERRIDE = re.compile(r"(\+{0,2})([\w./@:$-]+)=(.*)", re.DOTALL)
_FUNCTION = re.compile(
    r"(choice|range|interval|glob|tag|sort|shuffle|int|float|str|bool|json_str|extend_list) ?\((.*)\)", re.DOTALL
)
_ESCAPE = re.compile(r"\\[\\()\[\]{}:=, \t]")
"""Hydra's escapes of unquoted text."""


def config_folder() -> Path:
    """Return configs/: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "configs"


def hydra_words(typed: Sequence[str]) -> list[str]:
    """Return the arguments of the launcher with the quotes that Hydra needs, or raise a ConfigError with a suggestion."""
    arguments = parsed_arguments(typed)
    if not (arguments.overrides or is_query(arguments) or arguments.experimental_rerun):
        require_stage(None)
    is_multirun = arguments.multirun
    read = {word: hydra_word(word, is_multirun=is_multirun) for word in arguments.overrides}
    overrides = [_parsed(word) for word in read.values()]
    for override in overrides:
        if isinstance(override.value(), int | float) and (config_folder() / override.key_or_group).is_dir():
            raise ConfigError(no_option_message(override.key_or_group, override.get_value_string()))
        if is_multirun or is_query(arguments):
            continue
        key = override.get_key_element()
        if override.is_sweep_override():  # without -m, Hydra would run one job, or refuse in more words
            is_list = "list" in _words_of(key)
            hint = f", or write a list: {key}=[{override.get_value_string()}]" if is_list else ""
            raise ConfigError(f"{override.input_line}: several values are several jobs; add -m to the command{hint}")
        if key == "+sweep":
            raise ConfigError(f"{override.input_line}: a sweep is many jobs; add -m to the command")
    return [read.get(word, word) for word in typed]


def parsed_arguments(typed: Sequence[str]) -> argparse.Namespace:
    """Return flags and overrides as Hydra parses them; raise a ConfigError for an unknown flag."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        flag = re.search(r"unrecognized arguments: --?([\w.-]+)(?:=(\S*))?", message)
        meant = probably_meant(flag.group(1), config.setting_types()) if flag else []
        hint = f"\nSettings are written key=value: {meant[0]}={flag.group(2) or '...'}" if flag and meant else ""
        raise ConfigError(f"{message}{hint}")

    parser.error = refuse  # type: ignore[method-assign]
    arguments = parser.parse_intermixed_args(typed)
    arguments.multirun = arguments.multirun or "hydra.mode=MULTIRUN" in arguments.overrides
    return arguments


def is_query(arguments: argparse.Namespace) -> bool:
    """Return whether a command only prints help, the config or information on Hydra."""
    return any((arguments.help, arguments.hydra_help, arguments.cfg, arguments.info, arguments.shell_completion))


def require_one_training(typed: Sequence[str]) -> None:
    """Refuse what the processes of torchrun cannot share: another stage than train, a multirun, or a query."""
    arguments = parsed_arguments(typed)
    if "stage=train" not in arguments.overrides or arguments.multirun or is_query(arguments):
        raise ConfigError(
            f"torchrun: its {torchrun.world_size()} processes share one stage=train, is {' '.join(typed)}\n"
            "Run every other command with python -m prostate_seg."
        )


def hydra_word(word: str, *, is_multirun: bool) -> str:
    """Return an argument with the quotes that Hydra needs; most need none."""
    match = _OVERRIDE.fullmatch(word)
    if match is None:
        return word
    prefix, key, value = match.groups()
    kind = config.setting_types().get(key)
    if not prefix and any("names, each" in _words_of(name) for name in (key, key.rpartition(".")[0])):
        return f"++{word}"  # names may be added
    is_list = kind in (list[str], list[str] | None)
    if is_list or (key != "stage" and (kind in (str, str | None) or key in PATHS | TEXT_OF_HYDRA)):
        return f"{prefix}{key}={_quoted_value(key, value, is_list=is_list, is_multirun=is_multirun)}"
    return word


def _words_of(key: str) -> str:
    return type_in_words(config.setting_types().get(key))


def typed_word(word: str) -> str:
    """Return an override as it can be typed for a single job: without quotes that `hydra_word` would add again."""
    match = _OVERRIDE.fullmatch(word)
    if match is None or not _is_quoted(match.group(3)):
        return word
    shortest = f"{match.group(1)}{match.group(2)}={_value(match.group(3))}"
    return shortest if hydra_word(shortest, is_multirun=False) == word else word


def _quoted_value(key: str, value: str, *, is_list: bool, is_multirun: bool) -> str:
    """Return the value of a setting that is text or a list of text, or the values in a multirun."""
    # A regular expression has backslashes of its own, which are no escapes of Hydra; items of a list are quoted one by one.
    has_escapes = bool(_ESCAPE.search(value)) and key != "data.patient_pattern" and not (is_list or _is_quoted(value))
    function = _FUNCTION.fullmatch(value)
    name, inside = function.groups() if function else ("", value)
    is_kept = has_escapes or name not in ("", "choice", "extend_list")
    if value.lower() in ("", "null") or (is_kept and _value(value) is not None):
        return value
    if is_list and name == "extend_list":
        return f"extend_list({_literals(key, inside)})"
    if is_multirun and key not in WITH_COMMAS and not (key in PATHS and _expanded(value).exists()):
        parts = _split(inside if name == "choice" else value)
        return ",".join(_quoted_value(key, part, is_list=is_list, is_multirun=False) for part in parts)
    if is_list and re.fullmatch(r"\[.*\]", value, re.DOTALL):
        return f"[{_literals(key, value[1:-1])}]"
    return _literal(key, value)


def _literals(key: str, items: str) -> str:
    return ",".join(_literal(key, item) for item in _split(items)) if items.strip() else ""


def _literal(key: str, text: str) -> str:
    """Return text as Hydra parses it unchanged; quoted only if necessary."""
    is_quoted = _is_quoted(text)
    meant = str(_value(text)) if is_quoted else text
    expanded = str(_expanded(meant)) if key in PATHS and meant.startswith("~") else meant
    if is_quoted:
        return text if expanded == meant else _quoted(expanded)
    return expanded if _value(expanded) == expanded else _quoted(expanded)


def _expanded(text: str) -> Path:
    """Return a path with the home folder in place of ~ or ~user; unchanged for an unknown user, so that it does not exist."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def _quoted(text: str) -> str:
    return QuotedString(text, Quote.double if "'" in text and '"' not in text else Quote.single).with_quotes()


def _is_quoted(value: str) -> bool:
    return value[:1] in ("'", '"') and value[-1:] == value[:1] and len(value) > 1 and isinstance(_value(value), str)


def _value(value: str) -> Any:
    """Return a value as Hydra parses it; None if it cannot."""
    try:
        override = OverridesParser.create().parse_override(f"key={value}")
        return override if override.is_sweep_override() else override.value()
    except HydraException:
        return None


def _split(text: str) -> list[str]:
    """Split at the commas outside quotes and brackets."""
    parts, start, depth, quote = [], 0, 0, ""
    for index, character in enumerate(text):
        if quote:
            quote = "" if character == quote and text[index - 1] != "\\" else quote
        elif character in "'\"" and not text[start:index].strip():
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    return [*parts, text[start:].strip()]


def _parsed(word: str) -> Override:
    """Parse one override, or raise a ConfigError with the rule of the setting or the quotes that it needs."""
    try:
        return OverridesParser.create().parse_overrides([word])[0]
    except OverrideParseException as error:
        reason = str(error).strip().splitlines()[1:-1]
        match = _OVERRIDE.fullmatch(word)
        if match is None:
            hint = f"; did you mean stage={word}?" if word in STAGES else ""
            message = f"{word}: an argument is written key=value, without spaces around ={hint}"
            raise ConfigError(message) from error
        prefix, key, value = match.groups()
        if (config_folder() / key).is_dir():
            raise ConfigError(no_option_message(key, value)) from error
        if key in config.setting_types():
            message = f"{key}: must be {type_in_words(config.setting_types()[key])}, is {value}"
        else:
            quoted = shlex.quote(f"{prefix}{key}={_quoted(value)}")
            message = f"{key}: {value} has characters of Hydra's own grammar; quote it: {quoted}"
        raise ConfigError("\n".join([message, *reason])) from error


def require_inputs(stages: Sequence[str], cfg: Config, typed: Sequence[str]) -> None:
    """Check that the inputs of stages exist, or are written by one of the stages before.

    Raises:
        ConfigError: If a required setting is null.
        InputError: If an input is absent; the message has one command that makes it and continues.
    """
    missing = missing_inputs(stages, cfg)
    if not missing:
        return
    shown = {stage: listed(paths, most=1) for stage, paths in missing.items()}
    width = max(map(len, shown.values()))
    listing = "\n".join(f"  {path:<{width}}  from stage={stage}" for stage, path in shown.items())
    other = "For trained networks, add predict.model=models:/NAME@ALIAS or predict.model=FOLDER. "
    is_without_model = "predict" in stages and cfg.predict.model is None
    raise InputError(
        f"stage={','.join(stages)} needs files that do not exist yet:\n{listing}\n"
        f"{other if is_without_model else ''}One command makes them and continues:\n"
        f"  {_command_with(stages, list(missing), typed)}"
    )


def _command_with(stages: Sequence[str], missing: Sequence[str], typed: Sequence[str]) -> str:
    """Return the typed command with the missing stages before its own; before a sweep they run once, as another command."""
    arguments = parsed_arguments(typed)
    flags = [word for word in typed if word not in arguments.overrides and word not in ("-m", "--multirun")]
    single, is_sweep = [], torchrun.world_size() > 1
    for word in arguments.overrides:
        if re.match(r"stage=|hydra\.mode=", word):
            continue
        is_swept = arguments.multirun and _parsed(hydra_word(word, is_multirun=True)).is_sweep_override()
        if is_swept or re.match(r"\+{0,2}(sweep=|hydra[./](sweep|launcher))", word):
            is_sweep = True
        else:
            single.append(word)
    chain = [stage for stage in STAGES if stage in missing or (stage in stages and not is_sweep)]
    if any(word.endswith("@champion") for word in single) and "register" in missing:
        single.append("register.promote=true")
    if len(chain) > 1:  # in a multirun, a comma of a single value needs quotes
        read = {word: hydra_word(word, is_multirun=False) for word in single}
        single = [word if hydra_word(word, is_multirun=True) == read[word] else read[word] for word in single]
    program = ["python", "-m", "prostate_seg"]
    first = [*program, *flags, *(["-m"] if len(chain) > 1 else []), f"stage={','.join(chain)}", *single]
    again = f" && {shlex.join([*program, *typed])}" if torchrun.world_size() == 1 else "  # and then torchrun again"
    return shlex.join(first) + (again if is_sweep else "")


def composition_message(error: Exception) -> str:
    """Return the message for an error of composition: the key, the rule and a suggestion."""
    text = str(error).strip()
    if isinstance(error, ConfigError):
        return text
    unknown = re.search(r"Could not (?:override|append to|delete)[^'\n]*'([^']+)'", text)
    if unknown:
        return unknown_key_message(unknown.group(1), config.setting_types())
    if "'params'" in text and "Could not" in text:
        return "params.yaml is absent in this folder: write it with stage=export and the overrides you want"
    no_option = re.search(r"Could not find '([^']+)/([^'/]+)'", text)
    if no_option:
        return no_option_message(*no_option.groups())
    lines = f"{text}\n{error.__cause__}".splitlines() if error.__cause__ else text.splitlines()
    message = "\n".join(
        line for line in lines if line and not re.match(r"\s+(full_key:|object_type=|reference_type=)", line)
    )
    key = re.search(r"full_key: (\S+)", "\n".join(lines))
    return f"{key[1]}: {message}" if key and key[1] not in message else message


def no_option_message(group: str, option: str) -> str:
    """Return the message for an option that a group does not have, with a suggestion."""
    try:
        stored = ConfigStore.instance().list(group)  # options of Hydra and its plugins
    except OSError:
        stored = []
    own = (config_folder() / group).glob("*.yaml")
    known = sorted({Path(name).stem for name in stored} | {path.stem for path in own})
    meant = closest(option, known)
    hint = f"; did you mean {group}={meant}?" if meant else ""
    hint = f"; did you mean fold.index={option}?" if group == "fold" and option.isdigit() else hint
    return f"{group}: no option {option!r}; known are {', '.join(known)}{hint}"


def is_raised_by_hydra(error: Exception) -> bool:
    """Return whether an error comes from composition: Hydra raises plain ValueErrors for some errors of the command line."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(hydra.__file__).parent in Path(last.filename).parents


def leave(error: BaseException) -> NoReturn:
    """Exit with the message and the code of an error, and with its traceback if PROSTATE_SEG_DEBUG=1; raise a defect again."""
    match error:
        case KeyboardInterrupt():
            text, code = "interrupted", INTERRUPTED
        case ConfigError() | HydraException() | OmegaConfBaseException():
            text, code = composition_message(error), BAD_COMMAND
        case InputError() | OSError():
            text, code = str(error), FAILED
        case ValueError() if is_raised_by_hydra(error):
            text, code = str(error), BAD_COMMAND
        case _:
            raise error
    if os.environ.get("PROSTATE_SEG_DEBUG") == "1":
        traceback.print_exception(error)
    write_error(text)
    sys.exit(code)


def write_error(text: str) -> None:
    """Write a message to standard error; at a terminal prose is wrapped, and commands stay on one line, to be copied."""
    sys.stderr.write(wrapped(f"prostate_seg: {text}", sys.stderr) + "\n")
