"""The source files behind a stage: its module and all modules of the package that this imports, directly or not.

Imports are read from the text, so that no code runs. Importing a module runs the `__init__` of its folders too. Files of
other kinds, such as templates, belong to the `__init__` beside them.
"""

import ast
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def code_key(path: Path) -> str:
    """Return the key of a file of the package in records: its path below the project."""
    return path.relative_to(PACKAGE.parent).as_posix()


def source_files(stage: str) -> list[Path]:
    """Return the package's files that a stage consists of, sorted; the table of all stages is none of them."""
    table = PACKAGE / "stages" / "__init__.py"
    return files_behind(PACKAGE / "stages" / f"{stage}.py", is_left_out=lambda path: path == table)


def files_behind(module: Path, *, is_left_out: Callable[[Path], bool] = lambda _: False) -> list[Path]:
    """Return the package's files that a module needs, itself among them, sorted.

    A file for which `is_left_out` holds is not among them, nor is what that file alone needs.
    """
    found: set[Path] = set()
    waiting = [module]
    while waiting:
        file = waiting.pop()
        if file in found or is_left_out(file):
            continue
        found.add(file)
        if file.suffix == ".py":
            waiting += _imported_files(file)
        if file.name == "__init__.py":  # templates are in the folder of the code that fills them
            others = (path for path in file.parent.iterdir() if path.suffix not in (".py", ".typed"))
            waiting += filter(Path.is_file, others)
    return sorted(found)


def packages_behind(files: Iterable[Path]) -> list[str]:
    """Return the distributions that files import, pinned to the installed versions, as pip reads them, sorted.

    A distribution must have the name of its module, as every package that this project uses has.
    """
    modules = {name.split(".")[0] for file in files if file.suffix == ".py" for name in imported_names(file)}
    others = modules - sys.stdlib_module_names - {PACKAGE.name}
    return [f"{name}=={version(name).partition('+')[0]}" for name in sorted(others)]  # +cpu names an index, no version


def imported_names(file: Path) -> tuple[str, ...]:
    """Return the full names of the modules and attributes that a Python file imports anywhere."""
    return _names_imported_by(file.read_text(encoding="utf-8"))


def _imported_files(file: Path) -> Iterator[Path]:
    for name in imported_names(file):
        parts = name.split(".")
        if parts[0] != PACKAGE.name:
            continue
        for length in range(1, len(parts) + 1):
            path = PACKAGE.joinpath(*parts[1:length])
            candidates = (path / "__init__.py", path.with_suffix(".py"))
            yield from (candidate for candidate in candidates if candidate.is_file())


@cache  # every trial of a sweep reads the same files
def _names_imported_by(source: str) -> tuple[str, ...]:
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(names)
