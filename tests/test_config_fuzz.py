"""For any value of a setting the config parses, or is refused with a ConfigError that starts with a key of its group."""

import functools
import os
import re
from contextlib import suppress
from typing import Any

import pytest
from hydra.errors import HydraException
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from prostate_seg.cli import composition_message, hydra_words, is_raised_by_hydra
from prostate_seg.common.errors import ConfigError
from prostate_seg.common.settings import plain
from prostate_seg.config.schema import Config, parse, setting_types
from tests.conftest import composed
from tests.test_config import NEEDED, options

GROUPS = sorted(name for name in Config.__dataclass_fields__)
"""Groups, and the settings without a group: stage and seed."""

NUMBERS = st.one_of(
    st.integers(), st.integers(-2, 5), st.floats(), st.sampled_from([0, 1, -1, 0.5, 1e-9, 1e9, 2**31, 2**63, 1e308])
)
WORDS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", "null", "???", "${seed}", "${nothing}", "${oc.env:HOME}", "1e3", "[1,2]", "../x", "(", "(a)", "auto"]),
)  # fmt: skip
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
VALUES = st.recursive(
    PLAIN, lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(WORDS, inner, max_size=3)), max_leaves=6
)

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "6"))
"""Examples per group; `make hard-use` uses many more."""

FUZZ = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)


@functools.cache
def base(option: str) -> dict[str, Any]:
    """Return the config with one option of one group, as plain values."""
    return OmegaConf.to_container(composed(option, *NEEDED.get(option, [])), resolve=False)  # type: ignore[return-value]


def with_value(tree: Any, key: str, value: Any) -> Any:
    """Return a copy in which a dotted key has another value."""
    first, _, rest = key.partition(".")
    inner = tree.get(first) if isinstance(tree, dict) else None
    return {**(tree if isinstance(tree, dict) else {}), first: with_value(inner, rest, value) if rest else value}


def parse_or_message(values: dict[str, Any]) -> Config | str:
    """Return the config, or the message of the refusal, which OmegaConf has for text such as "${"."""
    try:
        return parse(DictConfig(values))
    except (ConfigError, GrammarParseError) as error:
        return composition_message(error)


@pytest.mark.parametrize("group", GROUPS)
@FUZZ.__class__(FUZZ, max_examples=EXAMPLES)
@given(data=st.data())
def test_any_value_of_any_key_parses_or_is_refused_by_name(group: str, data: st.DataObject) -> None:
    option = data.draw(st.sampled_from(options_of(group)))
    own = [key for key in setting_types() if key.split(".")[0] == group]
    values = base(option)
    for key in data.draw(st.lists(st.sampled_from(own), min_size=1, max_size=3)):
        values = with_value(values, key, data.draw(VALUES))
    outcome = parse_or_message(values)
    if isinstance(outcome, Config):
        assert parse(DictConfig(plain(outcome))) == outcome
        return
    named = re.split(r":|\[", outcome)[0]
    assert named.partition(".")[0].rstrip("0123456789") == group, outcome  # OmegaConf calls seed[0][""] seed0
    assert named in setting_types() or re.search("unknown key|[Ii]nterpolation", outcome), outcome


@pytest.mark.parametrize("group", GROUPS)
@FUZZ.__class__(FUZZ, max_examples=EXAMPLES // 2)
@given(name=st.text(min_size=1, max_size=12), value=VALUES)
def test_unknown_key_of_any_group_is_refused_by_name(group: str, name: str, value: Any) -> None:
    if group in ("seed", "stage"):
        return
    values = base("mlflow=off")
    if name in values[group]:
        return
    with pytest.raises(ConfigError):
        parse(DictConfig({**values, group: {**values[group], name: value}}))


@FUZZ.__class__(FUZZ, max_examples=4 * EXAMPLES)
@given(key=st.sampled_from(list(setting_types())), text=st.text(max_size=12))
def test_any_arguments_compose_and_parse_or_are_refused(key: str, text: str) -> None:
    refusals = (ConfigError, HydraException, OmegaConfBaseException)  # __main__ makes messages and exit code 2 of them
    with suppress(*refusals):
        try:
            parse(composed(*hydra_words([f"{key}={text}"])))
        except ValueError as error:
            if not isinstance(error, refusals) and not is_raised_by_hydra(error):
                raise


def options_of(group: str) -> list[str]:
    return [option for option in options() if option.split("=")[0] == group] or ["mlflow=off"]
