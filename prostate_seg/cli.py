"""The command line: arguments as Hydra reads them, and the errors of composition in words.

A setting that takes text takes it as typed: a path with brackets, a regular expression or a revision needs no quotes beyond the
shell's. Hydra's quotes, functions, interpolations and, in a multirun, its commas keep their meaning.
"""

import argparse
import os
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import (
    get_args_parser,
)  # what hydra.main reads arguments with; tests/test_cli.py has its contract
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, OverrideParseException

from prostate_seg.common import torchrun
from prostate_seg.common.errors import ConfigError, InputError
from prostate_seg.common.suggestions import closest, probably_meant, unknown_key_message
from prostate_seg.config import schema as config
from prostate_seg.config.schema import Config
from prostate_seg.prerequisites import missing_inputs
from prostate_seg.stages import STAGES, require_stage

FAILED, BAD_COMMAND = 1, 2
"""Exit codes of a refused input or failed stage, and of a command or config that cannot be used."""

PATHS = frozenset(
    {"data.root", "fold.file", "evaluate.external_root", "paths.root", "paths.cache", "paths.spool", "paths.trained"}
    | {"fetch.origin", "audit.splits", "compare.runs", "predict.model", "predict.input", "predict.output"}
    | {"bundle.input", "bundle.output", "hydra.run.dir", "hydra.sweep.dir"}
)
"""Settings in which ~ is the home folder: a shell expands it only where a word begins."""
TEXT_OF_HYDRA = frozenset({"hydra.sweep.subdir", "hydra.sweeper.storage", "hydra.sweeper.study_name"})
WITH_COMMAS = frozenset({"data.patient_pattern", "register.reason"})
"""Text in which a comma is a comma, in a multirun too."""

_OVERRIDE = re.compile(r"(\+{0,2})([\w./@:$-]+)=(.*)", re.DOTALL)
_FUNCTION = re.compile(
    r"(choice|range|interval|glob|tag|sort|shuffle|int|float|str|bool|json_str|extend_list) ?\(.*\)", re.DOTALL
)
_ESCAPE = re.compile(r"\\[\\()\[\]{}:=, \t]")
"""Hydra's escapes of unquoted text."""


def config_folder() -> Path:
    """Return configs/: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "configs"


def hydra_words(typed: Sequence[str]) -> list[str]:
    """Return the arguments of the launcher as Hydra reads them.

    Raises:
        ConfigError: If they are no command; the text names the argument and the one that was probably meant.
    """
    arguments = _arguments(typed)
    is_question = any((arguments.help, arguments.hydra_help, arguments.cfg, arguments.info, arguments.shell_completion))
    if not arguments.overrides and not (is_question or arguments.experimental_rerun):
        require_stage(None)
    is_multirun = arguments.multirun or "hydra.mode=MULTIRUN" in arguments.overrides
    read = {word: hydra_word(word, is_multirun=is_multirun) for word in arguments.overrides}
    overrides = [_parsed(word) for word in read.values()]
    for override in overrides:
        if isinstance(override.value(), int | float) and (config_folder() / override.key_or_group).is_dir():
            raise ConfigError(no_option_message(override.key_or_group, override.get_value_string()))
    if not (is_multirun or is_question):
        _require_one_job(overrides)
    return [read.get(word, word) for word in typed]


def _arguments(typed: Sequence[str]) -> argparse.Namespace:
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        flag = re.search(r"unrecognized arguments: --?([\w.-]+)(?:=(\S*))?", message)
        meant = probably_meant(flag.group(1), config.known_keys()) if flag else []
        hint = f"\nSettings are written key=value: {meant[0]}={flag.group(2) or '...'}" if flag and meant else ""
        raise ConfigError(f"{message}{hint}")

    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_intermixed_args(typed)


def _require_one_job(overrides: Sequence[Override]) -> None:
    """Refuse a sweep without -m, which Hydra would run as one job or refuse in more words."""
    for override in overrides:
        word = str(override.input_line)
        if override.is_sweep_override():
            key = override.get_key_element()
            is_list = key in config.setting_types() and "list" in config.rule_of(key)
            hint = f", or write a list: {key}=[{override.get_value_string()}]" if is_list else ""
            raise ConfigError(f"{word}: several values are several jobs; add -m to the command{hint}")
        if override.get_key_element() == "+sweep":
            raise ConfigError(f"{word}: a sweep is many jobs; add -m to the command")


def hydra_word(word: str, *, is_multirun: bool) -> str:
    """Return an argument as Hydra reads it; one that Hydra reads as it was meant stays as it is."""
    match = _OVERRIDE.fullmatch(word)
    if match is None:
        return word
    prefix, key, value = match.groups()
    kind = config.setting_types().get(key)
    if key != "stage" and (kind in (str, str | None) or key in PATHS | TEXT_OF_HYDRA) and kind not in LISTS:
        return f"{prefix}{key}={_text(key, value, is_multirun=is_multirun)}"
    if kind in LISTS:
        return f"{prefix}{key}={_list(key, value, is_multirun=is_multirun)}"
    return word


LISTS = (list[str], list[str] | None)


def typed_word(word: str) -> str:
    """Return an override as it can be typed for a single job: without quotes that `hydra_word` would add again."""
    match = _OVERRIDE.fullmatch(word)
    if match is None or not _is_quoted(match.group(3)):
        return word
    shortest = f"{match.group(1)}{match.group(2)}={_value(match.group(3))}"
    return shortest if hydra_word(shortest, is_multirun=False) == word else word


def _text(key: str, value: str, *, is_multirun: bool) -> str:
    """Return the value of a setting that takes text, or in a multirun several."""
    is_known = _value(value) is not None
    if value.lower() in ("", "null") or (is_known and _is_hydras(key, value)):
        return value
    parts = [value]
    if is_multirun and key not in WITH_COMMAS and not (key in PATHS and Path(value).expanduser().exists()):
        choice = re.fullmatch(r"choice ?\((.*)\)", value, re.DOTALL)
        parts = _split(choice.group(1) if choice else value)
    return ",".join(_literal(key, part) for part in parts)


def _is_hydras(key: str, value: str) -> bool:
    """Return whether a value is a function of Hydra's, or has its escapes, which a regular expression has of its own."""
    has_escapes = bool(_ESCAPE.search(value)) and key != "data.patient_pattern" and not _is_quoted(value)
    return has_escapes or bool(_FUNCTION.fullmatch(value) and not value.startswith("choice"))


def _list(key: str, value: str, *, is_multirun: bool) -> str:
    """Return the value of a setting that takes a list of text, or in a multirun several."""
    lists = _split(value) if is_multirun else [value]
    extension = re.fullmatch(r"extend_list ?\((.*)\)", value, re.DOTALL)
    if extension:
        return f"extend_list({','.join(_literal(key, part) for part in _split(extension.group(1)))})"
    if value.lower() == "null" or _FUNCTION.fullmatch(value):
        return value
    if not all(re.fullmatch(r"\[.*\]", one, re.DOTALL) for one in lists):
        return _literal(key, value)
    elements = ([_literal(key, part) for part in _split(one[1:-1])] if one[1:-1].strip() else [] for one in lists)
    return ",".join(f"[{','.join(parts)}]" for parts in elements)


def _literal(key: str, text: str) -> str:
    """Return one text such that Hydra reads it as it is; quoted only where it must be."""
    is_quoted = _is_quoted(text)
    meant = str(_value(text)) if is_quoted else text
    expanded = str(Path(meant).expanduser()) if key in PATHS and meant.startswith("~") else meant
    if is_quoted:
        return text if expanded == meant else _quoted(expanded)
    return expanded if _value(expanded) == expanded else _quoted(expanded)


def _quoted(text: str) -> str:
    return QuotedString(text, Quote.double if "'" in text and '"' not in text else Quote.single).with_quotes()


def _is_quoted(value: str) -> bool:
    return value[:1] in ("'", '"') and value[-1:] == value[:1] and len(value) > 1 and isinstance(_value(value), str)


def _value(value: str) -> Any:
    """Return what Hydra makes of a value; None where it cannot read it."""
    try:
        override = OverridesParser.create().parse_override(f"key={value}")
        return override if override.is_sweep_override() else override.value()
    except HydraException:
        return None


def _split(text: str) -> list[str]:
    """Split at the commas outside quotes and brackets."""
    parts, start, depth, quote = [], 0, 0, ""
    for place, character in enumerate(text):
        if quote:
            quote = "" if character == quote and text[place - 1] != "\\" else quote
        elif character in "'\"" and not text[start:place].strip():
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:place].strip())
            start = place + 1
    return [*parts, text[start:].strip()]


def _parsed(word: str) -> Override:
    """Parse one override.

    Raises:
        ConfigError: If Hydra cannot read it; the text has the quotes with which it can.
    """
    try:
        return OverridesParser.create().parse_overrides([word])[0]
    except OverrideParseException as error:
        raise ConfigError(_unreadable(word, str(error))) from error


def _unreadable(word: str, said: str) -> str:
    """Say of an argument that Hydra cannot read what it should be."""
    reason = said.strip().splitlines()[1:-1]
    match = _OVERRIDE.fullmatch(word)
    if match is None:
        hint = f"; did you mean stage={word}?" if word in STAGES else ""
        return f"{word}: an argument is written key=value, without spaces around ={hint}"
    key, value = match.group(2), match.group(3)
    if (config_folder() / key).is_dir():
        return no_option_message(key, value)
    if key in config.setting_types():
        return "\n".join([f"{key}: must be {config.rule_of(key)}, is {value}", *reason])
    quoted = shlex.quote(f"{match.group(1)}{key}={_quoted(value)}")
    return "\n".join([f"{key}: {value} has characters that Hydra reads as its own; quote it: {quoted}", *reason])


def require_inputs(stages: Sequence[str], cfg: Config, typed: Sequence[str]) -> None:
    """Check that what stages read exists, or is written by one before it.

    Raises:
        ConfigError: If a setting that a stage cannot do without is null.
        InputError: If something is absent; the text has one command that makes it and goes on.
    """
    missing = missing_inputs(stages, cfg)
    if not missing:
        return
    shown = {
        stage: f"{paths[0]}" + (f" and {len(paths) - 1} more" if paths[1:] else "") for stage, paths in missing.items()
    }
    width = max(map(len, shown.values()))
    lines = [f"  {path:<{width}}  from stage={stage}" for stage, path in shown.items()]
    raise InputError(
        "\n".join(
            [
                f"stage={','.join(stages)} needs files that do not exist yet:",
                *lines,
                "One command makes them and goes on:",
                f"  {_command_with(stages, list(missing), typed)}",
            ]
        )
    )


def _command_with(stages: Sequence[str], missing: Sequence[str], typed: Sequence[str]) -> str:
    """Return the typed command with the missing stages before its own; before a sweep they run once, by themselves."""
    arguments = _arguments(typed)
    flags = [word for word in typed if word not in arguments.overrides and word not in ("-m", "--multirun")]
    overrides = [word for word in arguments.overrides if not re.match(r"stage=|hydra\.mode=", word)]
    single = [word for word in overrides if not _belongs_to_sweep(word, is_multirun=arguments.multirun)]
    is_alone = torchrun.num_processes() == 1
    is_sweep = len(single) < len(overrides) or not is_alone
    chain = [stage for stage in STAGES if stage in missing or (stage in stages and not is_sweep)]
    if any(word.endswith("@champion") for word in single) and "register" in missing:
        single.append("register.promote=true")
    if len(chain) > 1:
        single = [_multirun_word(word) for word in single]
    program = ["python", "-m", "prostate_seg"]
    first = [*program, *flags, *(["-m"] if len(chain) > 1 else []), f"stage={','.join(chain)}", *single]
    again = f" && {shlex.join([*program, *typed])}" if is_alone else "  # and then torchrun again"
    return shlex.join(first) + (again if is_sweep else "")


def _belongs_to_sweep(word: str, *, is_multirun: bool) -> bool:
    """Return whether an override varies a setting, or says how the jobs of a sweep are run."""
    is_varied = is_multirun and _parsed(hydra_word(word, is_multirun=True)).is_sweep_override()
    return is_varied or bool(re.match(r"\+{0,2}(sweep=|hydra[./](sweep|launcher))", word))


def _multirun_word(word: str) -> str:
    """Return a word of a single job as it is typed for several: commas in quotes."""
    read = hydra_word(word, is_multirun=False)
    return word if hydra_word(word, is_multirun=True) == read else read


def composition_message(error: Exception) -> str:
    """Word an error of composition: the key and, where one is close, what was probably meant."""
    text = str(error).strip()
    if isinstance(error, ConfigError):
        return text
    unknown = re.search(r"Could not (?:override|append to|delete)[^'\n]*'([^']+)'", text)
    if unknown:
        return unknown_key_message(unknown.group(1), config.known_keys())
    if "'params'" in text and "Could not" in text:
        return "params.yaml is absent in this folder: write it with stage=export and the overrides you want"
    no_option = re.search(r"Could not find '([^']+)/([^'/]+)'", text)
    if no_option:
        return no_option_message(*no_option.groups())
    lines = f"{text}\n{error.__cause__}".splitlines() if error.__cause__ else text.splitlines()
    return "\n".join(line for line in lines if not re.match(r"\s+(full_key:|object_type=|reference_type=)", line))


def no_option_message(group: str, option: str) -> str:
    """Say that a group has no such option, and which one was probably meant."""
    known = _options(group)
    meant = closest(option, known)
    hint = f"; did you mean {group}={meant}?" if meant else ""
    hint = f"; did you mean fold.index={option}?" if group == "fold" and option.isdigit() else hint
    return f"{group}: no option {option!r}; known are {', '.join(known)}{hint}"


def _options(group: str) -> list[str]:
    """Return the options of a group: files in configs/, and those that Hydra and its plugins bring."""
    try:
        stored = ConfigStore.instance().list(group)
    except OSError:
        stored = []
    return sorted(
        {Path(name).stem for name in stored} | {path.stem for path in (config_folder() / group).glob("*.yaml")}
    )


def is_raised_by_hydra(error: Exception) -> bool:
    """Return whether composing raised this: Hydra words some errors of the command line as plain ValueErrors."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(hydra.__file__).parent in Path(last.filename).parents


def leave(error: BaseException, text: str, code: int) -> NoReturn:
    """Exit with a message, and with the traceback if PROSTATE_SEG_DEBUG=1."""
    if os.environ.get("PROSTATE_SEG_DEBUG") == "1":
        traceback.print_exception(error)
    sys.stderr.write(f"prostate_seg: {text}\n")
    sys.exit(code)
