"""Write docs/reference.md with type, default and description of every setting: `make reference`.

A test checks that the page is current.
"""

import ast
import dataclasses
import inspect
import json
from itertools import pairwise
from pathlib import Path
from typing import Any, cast, get_type_hints

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from prostate_seg.cli import config_folder
from prostate_seg.common import settings
from prostate_seg.config.schema import Config

REFERENCE = Path(__file__).parents[1] / "docs" / "reference.md"

HEAD = """# Every setting

`make reference` generates this page from the settings classes of the package and the values in `configs/`.
`key=value` changes a setting, `group=option` selects an option of a group, and `python -m prostate_seg --cfg job` prints the
composed config. The defaults below are those of the default option of each group.
"""


def reference_text() -> str:
    """Return the page."""
    hints = get_type_hints(Config)
    defaults, chosen = _defaults()
    alone = [name for name, hint in hints.items() if not dataclasses.is_dataclass(hint)]
    sections = ["## Settings without a group\n\n" + _table(Config, "", defaults, only=alone)]
    sections += [
        _section(name, cast(type, hint), defaults[name], chosen=chosen.get(name, ""))
        for name, hint in hints.items()
        if name not in alone
    ]
    return "\n".join([HEAD, *sections])


def _section(name: str, kind: type, defaults: Any, *, chosen: str) -> str:
    return f"## {name}\n\n{inspect.getdoc(kind)}\n\n{_options(name, chosen)}{_table(kind, f'{name}.', defaults)}"


def _options(group: str, chosen: str) -> str:
    """Return a list of the group's options, each with the first line of its file; empty for a group with one option."""
    paths = sorted((config_folder() / group).glob("*.yaml"))
    if len(paths) < 2:
        return ""
    first = {
        path: next(line for line in path.read_text(encoding="utf-8").splitlines() if "@" not in line) for path in paths
    }
    marks = {path: " (default)" if path.stem == chosen else "" for path in paths}
    lines = [f"- `{group}={path.stem}`{marks[path]}: {first[path].removeprefix('# ')}\n" for path in paths]
    return "".join(lines) + "\n"


def _table(kind: type, prefix: str, defaults: Any, *, only: list[str] | None = None) -> str:
    rows = ["| key | type | default | description |", "|---|---|---|---|", *_rows(kind, prefix, defaults, only=only)]
    return "\n".join(rows) + "\n"


def _rows(kind: type, prefix: str, defaults: Any, *, only: list[str] | None) -> list[str]:
    rows, sentences = [], _sentences(kind)
    for name, hint in get_type_hints(kind).items():
        if only is not None and name not in only:
            continue
        inner = settings.group_of(hint)
        value = (defaults or {}).get(name)
        shown = "a group" if inner and value else f"`{_yaml(value)}`"
        allowed = settings.ranges_of(kind).get(name)
        values = settings.type_in_words(hint) + (f", {allowed}" if allowed else "")
        cells = [f"`{prefix}{name}`", values, shown, sentences[name]]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        rows += _rows(inner, f"{prefix}{name}.", value, only=None) if inner else []
    return rows


def _sentences(kind: type) -> dict[str, str]:
    """Return the docstring of each field of a dataclass."""
    found = {}
    classes = [ast.parse(inspect.getsource(one)).body[0] for one in kind.__mro__ if one is not object]
    for field, text in pairwise([node for found_class in classes for node in cast(ast.ClassDef, found_class).body]):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(field.target, ast.Name):
            found[field.target.id] = " ".join(str(cast(ast.Constant, text.value).value).split())
    return found


def _defaults() -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values without overrides, and the default option of each group."""
    with initialize_config_dir(config_dir=str(config_folder())):
        whole = compose("config", return_hydra_config=True)
    plain = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
    return cast(dict[str, Any], OmegaConf.to_container(plain, resolve=False)), dict(whole.hydra.runtime.choices)


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    REFERENCE.write_text(reference_text(), encoding="utf-8")
