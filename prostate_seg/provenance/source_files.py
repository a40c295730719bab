"""Which files of the package a stage is made of: the stage's module and, from there, all that is imported.

The imports are read from the text, so that nothing is run; importing a module runs the `__init__` of its folders too. Files of
other kinds, such as templates, belong to the `__init__` that they lie beside.
"""

import ast
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def source_files(stage: str) -> list[Path]:
    """Return the package's files that decide what a stage does, sorted; the table of stages does not."""
    return sorted(set(files_behind(PACKAGE / "stages" / f"{stage}.py")) - {PACKAGE / "stages" / "__init__.py"})


def files_behind(module: Path) -> list[Path]:
    """Return the package's files without which a module cannot run, itself among them, sorted."""
    found: set[Path] = set()
    waiting = [module]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += _imported_files(file)
        if file.name == "__init__.py":  # templates lie in the folder of the code that fills them
            found |= {path for path in file.parent.iterdir() if path.is_file() and path.suffix != ".py"}
    return sorted(found)


def packages_behind(files: Iterable[Path]) -> list[str]:
    """Return the distributions that files import, pinned to the installed versions, as pip reads them, sorted.

    A distribution is looked for by the name of its module, which is that of every package that this project uses.
    """
    modules = {name.split(".")[0] for file in files if file.suffix == ".py" for name in _imported_names(file)}
    others = modules - sys.stdlib_module_names - {PACKAGE.name}
    return [f"{name}=={version(name).partition('+')[0]}" for name in sorted(others)]  # +cpu names an index, no version


def _imported_files(file: Path) -> Iterator[Path]:
    for name in _imported_names(file):
        parts = name.split(".")
        if parts[0] != PACKAGE.name:
            continue
        for length in range(1, len(parts) + 1):
            place = PACKAGE.joinpath(*parts[1:length])
            candidates = (place / "__init__.py", place.with_suffix(".py"))
            yield from (candidate for candidate in candidates if candidate.is_file())


def _imported_names(file: Path) -> tuple[str, ...]:
    return _names_imported_by(file.read_text(encoding="utf-8"))


@cache
def _names_imported_by(source: str) -> tuple[str, ...]:
    """Return the names; kept, because every trial of a sweep asks for the same files."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(names)
