"""Which files of the package a stage is made of: the stage's module and, from there, all that is imported.

The imports are read from the text, so that nothing is run; importing a module runs the `__init__` of its folders too. Files of
other kinds, such as templates, belong to the `__init__` that they lie beside.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def source_files(stage: str) -> list[Path]:
    """Return the package's files that decide what a stage does, sorted; the table of stages does not."""
    found: set[Path] = set()
    waiting = [PACKAGE / "stages" / f"{stage}.py"]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += _imported_files(file)
        if file.name == "__init__.py":  # templates lie in the folder of the code that fills them
            found |= {path for path in file.parent.iterdir() if path.is_file() and path.suffix != ".py"}
    return sorted(found - {PACKAGE / "stages" / "__init__.py"})


def _imported_files(file: Path) -> Iterator[Path]:
    for name in _imported_names(file):
        parts = name.split(".")
        if parts[0] != PACKAGE.name:
            continue
        for length in range(1, len(parts) + 1):
            place = PACKAGE.joinpath(*parts[1:length])
            candidates = (place / "__init__.py", place.with_suffix(".py"))
            yield from (candidate for candidate in candidates if candidate.is_file())


def _imported_names(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
