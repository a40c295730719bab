"""Groups of settings as checked dataclasses: ranges, rules, and parsing from plain values.

A group is a frozen dataclass below `Settings`: a sentence under each field, no default values, `Annotated` with a `Range` where
only some numbers are allowed. Values come from YAML. Only the standard library is imported.
"""

import dataclasses
import json
import operator
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from prostate_seg.common.errors import ConfigError
from prostate_seg.common.suggestions import unknown_key_message

Group = TypeVar("Group")

MISSING = "???"
"""Value in YAML of a setting that the user must give."""
WORDS_OF_BOOL = dict.fromkeys(("true", "yes", "y", "on"), True) | dict.fromkeys(("false", "no", "n", "off"), False)

PathText = Annotated[str, "path"]
"""Text of a path; in the command line it may begin with ~, which a shell expands only at the beginning of a word."""
Rule = tuple[str, bool, str]
"""Name of a setting inside its group, whether its value is allowed, and the rule for the message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Allowed values of a number: at least `ge`, above `gt`, at most `le`, below `lt`."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def contains(self, value: float) -> bool:
        """Return whether the value is in the range; NaN never is."""
        bounds = ((self.ge, operator.ge), (self.gt, operator.gt), (self.le, operator.le), (self.lt, operator.lt))
        return all(bound is None or holds(value, bound) for bound, holds in bounds)

    def __str__(self) -> str:
        if self.ge is not None and self.le is not None:
            return f"from {self.ge} to {self.le}"
        words = {"at least": self.ge, "above": self.gt, "at most": self.le, "below": self.lt}
        return " and ".join(f"{word} {bound}" for word, bound in words.items() if bound is not None)


@dataclass(frozen=True, slots=True)
class RisingPair:
    """Allowed values of a pair: two rising numbers between two bounds."""

    lowest: float
    highest: float

    def contains(self, value: tuple[float, ...]) -> bool:
        """Return whether the pair rises and lies between the bounds."""
        return len(value) == 2 and self.lowest <= value[0] < value[1] <= self.highest

    def __str__(self) -> str:
        return f"two rising numbers from {self.lowest} to {self.highest}"


class Settings:
    """Base class of a group of settings, which checks its values when it is constructed."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for name, allowed in ranges_of(type(self)).items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, str) and not allowed.contains(value):
                or_null = "null or " if NoneType in get_args(get_type_hints(type(self))[name]) else ""
                raise ConfigError(f"{name}: must be {or_null}{allowed}, is {_shown(value)}")
        for name, is_allowed, rule in self._rules():
            if not is_allowed:
                raise ConfigError(f"{name}: {rule}, is {_shown(getattr(self, name))}")

    def _rules(self) -> list[Rule]:
        """Return the rules that a `Range` cannot express, such as those between settings."""
        return []


def parse_group(
    kind: type[Group], values: Mapping[str, Any], *, key: str = "", known: Collection[str] | None = None
) -> Group:
    """Return a checked group, a dataclass whose fields may be groups, from plain values as YAML or JSON holds them.

    A ConfigError names the key below `key` that is unknown or missing, or has a wrong type or an impossible value; `known` has
    the keys to suggest, by default those of the group.
    """
    prefix, hints = f"{key}." if key else "", get_type_hints(kind)
    known = known or [prefix + name for name in setting_types(kind)]
    for name in map(str, values):
        if name not in hints:
            raise ConfigError(unknown_key_message(prefix + name, known))
    fields: dict[str, Any] = {}
    for name, hint in hints.items():
        setting, value = prefix + name, values.get(name, MISSING)
        rule, inner = type_in_words(hint), group_of(hint)
        if value == MISSING:
            raise ConfigError(
                f"{setting}: must be set to {rule.removeprefix('null or ')}; add {setting}=... to the command"
            )
        if inner is not None and isinstance(value, Mapping):
            fields[name] = parse_group(inner, value, key=setting, known=known)
            continue
        try:
            fields[name] = _converted(hint, value)
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{setting}: must be {rule}, is {_shown(value)}") from error
    try:
        return kind(**fields)
    except ConfigError as error:  # a rule of the group, which names the setting inside the group
        raise ConfigError(prefix + str(error)) from None


def _converted(hint: Any, value: Any) -> Any:
    """Return a plain value as a type of a field; text is read as a number or a truth value where one is needed."""
    options = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        for option in options:
            with suppress(ArithmeticError, KeyError, TypeError, ValueError):
                return _converted(option, value)
        raise TypeError(value)
    if get_origin(hint) is dict:
        return {str(key): _converted(options[1], one) for key, one in dict(value).items()}
    if hint is NoneType and value is None:
        return None
    if get_origin(hint) is Literal:
        return options[options.index(value)]
    if options:
        if not isinstance(value, list | tuple):
            raise TypeError(value)
        return get_origin(hint)(_converted(options[0], one) for one in value)
    if hint is bool and isinstance(value, str):
        return WORDS_OF_BOOL[value.lower()]
    if hint is bool and isinstance(value, int):
        return bool(value)
    if hint is str and isinstance(value, str | int | float):
        return str(value)
    if hint in (int, float) and isinstance(value, (str, int, hint)) and not isinstance(value, bool):
        return hint(value)
    raise TypeError(value)


def plain(value: Any) -> Any:
    """Return groups of settings as plain JSON and YAML types."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings as text by dotted key; lists and scalars that are no text as JSON."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value if isinstance(value, str) else json.dumps(value)
    return found


def setting_types(kind: type, *, include_extras: bool = False) -> dict[str, Any]:
    """Return the type of every key of a dataclass and of the groups inside it, dotted, groups included."""
    types = {}
    for name, hint in get_type_hints(kind, include_extras=include_extras).items():
        types[name] = hint
        below = setting_types(inner, include_extras=include_extras) if (inner := group_of(hint)) else {}
        types |= {f"{name}.{key}": one for key, one in below.items()}
    return types


def ranges_of(kind: type) -> dict[str, Any]:
    """Return the `Range` or `RisingPair` of those fields of a dataclass that have one."""
    hints = get_type_hints(kind, include_extras=True)
    extras = {name: hint.__metadata__[0] for name, hint in hints.items() if get_origin(hint) is Annotated}
    return {name: allowed for name, allowed in extras.items() if isinstance(allowed, Range | RisingPair)}


def group_of(hint: Any) -> type | None:
    """Return the dataclass of a field that is a group of settings, or None."""
    return next((cast(type, one) for one in (hint, *get_args(hint)) if dataclasses.is_dataclass(one)), None)


def type_in_words(hint: Any) -> str:
    """Return the values that a type accepts, for messages and documentation."""
    options = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        others = " or ".join(type_in_words(one) for one in reversed(options) if one is not NoneType)
        return f"null or {others}" if NoneType in options else others
    if get_origin(hint) is Literal:
        return ("one of " if len(options) > 1 else "") + ", ".join(options)
    if get_origin(hint) is dict:
        return f"names, each with {type_in_words(options[1])}"
    if options:
        return f"a list, each {type_in_words(options[0])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(hint, "a group of settings")


def _shown(value: Any) -> Any:
    return "null" if value is None else plain(value)
