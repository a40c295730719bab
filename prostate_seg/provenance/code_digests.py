"""Digests of the source code that decides a stage's numbers, for `dvc repro`, stage=status and mlflow.skip_finished.

A digest is the md5 of a module's syntax tree without what changes no number: comments, formatting, docstrings and the sentences
of settings, annotations, log calls, texts of errors, labels of progress bars, and every other string of four words or more.
Modules that parse settings, word messages or draw with matplotlib are left out. In doubt a file counts: a stage that reruns
costs time, one that does not would keep a wrong number. As a program it writes the listings on which dvc.yaml's stages depend.
"""

import ast
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from prostate_seg.common.files import md5_of, md5_of_text, read_json, write_json, write_text
from prostate_seg.provenance.source_files import PACKAGE, code_key, files_behind, imported_names, source_files

CODE_LISTING = "code.txt"
"""Artifact of a run with the listing of its stage; the tag md5.code is the md5 of this file, as in dvc.lock."""
LISTINGS = Path(".cache/code")
"""Folder of the listings below the project, as dvc.yaml names it."""
NEUTRAL = frozenset(
    {"config", "provenance", "tracking", "stages/__init__.py"}
    | {f"common/{name}.py" for name in ("errors", "settings", "signals", "suggestions", "tables")}
)
"""Folders and files of the package that decide no number; the values of settings are parameters in dvc.yaml."""
NEUTRAL_FIELDS = frozenset({"annotation", "returns", "cause", "msg"})
"""Fields of a syntax tree: annotations, the cause of an error, the message of an assertion."""
LOGGERS = frozenset({"log", "logging", "warnings"})
LABELS = frozenset({"label", "message"})
"""Keyword arguments that are shown."""
WORD = re.compile(r"(?<!\S)[(\"']?[A-Za-z']{2,}[)\"'.,:;]*(?!\S)")
FEWEST_WORDS = 4
"""Strings with as many are sentences. Names of columns, headers and options, which code compares, have at most two words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCode:
    """Code of one stage; files are named by their path below the project."""

    package_md5: str
    """Hash of all files of the package, from which the two others follow."""
    files: dict[str, str]
    """md5 of each source file, sorted by name."""
    digests: dict[str, str]
    """Digest of each file that decides numbers."""


def stage_code(stage: str, *, cache_folder: Path) -> StageCode:
    """Return the code of a stage, from the cache if no file of the package has changed since it was written there."""
    path, package_md5 = cache_folder / "stage_code" / f"{stage}.json", package_hash()
    with suppress(OSError, ValueError, TypeError):  # absent, cut off, or of another version
        kept = StageCode(**read_json(path))
        if kept.package_md5 == package_md5:
            return kept
    files = {code_key(file): md5_of(file) for file in source_files(stage)}
    code = StageCode(package_md5=package_md5, files=files, digests=code_digests(stage))
    if package_hash() == package_md5:  # nobody edited the code meanwhile
        with suppress(OSError):  # a cache that cannot be written costs time only
            write_json(path, asdict(code))
    return code


def package_hash() -> str:
    """Return the md5 of the names and contents of the package's files, compiled ones aside."""
    files = sorted(path for path in PACKAGE.rglob("*") if path.suffix != ".pyc" and path.is_file())
    return md5_of_text("".join(f"{md5_of(path)}  {code_key(path)}\n" for path in files))


def code_digests(stage: str) -> dict[str, str]:
    """Return the digest of each source file that decides numbers of a stage, by its path below the project."""
    files = files_behind(PACKAGE / "stages" / f"{stage}.py", is_left_out=is_neutral)
    return {
        code_key(path): digest_of_source(path.read_text(encoding="utf-8")) if path.suffix == ".py" else md5_of(path)
        for path in files
    }


def code_listing(digests: Mapping[str, str]) -> str:
    """Return digests as text, a line per file in the form of md5sum."""
    return "".join(f"{digest}  {key}\n" for key, digest in digests.items())


def is_neutral(path: Path) -> bool:
    """Return whether a file of the package decides no number of any stage."""
    if path.suffix != ".py":
        return path.suffix in (".css", ".js")
    inside = path.relative_to(PACKAGE)
    if not NEUTRAL.isdisjoint(one.as_posix() for one in (inside, *inside.parents)):
        return True
    return any(name.split(".")[0] == "matplotlib" for name in imported_names(path))


@cache  # every trial of a sweep reads the same files
def digest_of_source(source: str) -> str:
    """Return the digest of Python code; it is the same in all versions of Python."""
    tree = _Normaliser().visit(ast.parse(source))
    while unused := _unused_statements(tree):
        tree.body = [statement for statement in tree.body if statement not in unused]
    return md5_of_text(_dump(tree))


class _Normaliser(ast.NodeTransformer):
    """Removes words and annotations from a syntax tree."""

    def visit(self, node: ast.AST) -> Any:
        for name in NEUTRAL_FIELDS.intersection(node._fields):
            setattr(node, name, None)
        return super().visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        is_log_call = isinstance(node.value, ast.Call) and _first_name(node.value.func) in LOGGERS
        is_docstring = isinstance(node.value, ast.Constant)
        return None if is_log_call or is_docstring else self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        if isinstance(node.exc, ast.Call):
            node.exc = node.exc.func
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        node.keywords = [word for word in node.keywords if word.arg not in LABELS or _text_of(word.value) is None]
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Constant(value="") if _is_sentence(node) else node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        if _is_sentence(node):
            return ast.Constant(value="")
        node.values = [part for part in node.values if _text_of(part) != ""]  # Python 3.12 adds empty ones
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if _first_name(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def _first_name(node: ast.expr) -> str:
    """Return `a` of an expression `a.b.c`."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _text_of(node: ast.expr) -> str | None:
    """Return the text of a string or f-string, with a blank for each value that is filled in; None for all else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else " " for part in node.values)
    return None


def _is_sentence(node: ast.Constant | ast.JoinedStr) -> bool:
    return len(WORD.findall(_text_of(node) or "")) >= FEWEST_WORDS


def _unused_statements(tree: ast.Module) -> list[ast.stmt]:
    """Return the imports and private functions that only removed words used, after dropping unused names of other imports."""
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    unused: list[ast.stmt] = []
    for statement in tree.body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            statement.names = [one for one in statement.names if (one.asname or one.name).split(".")[0] in used]
            unused += [] if statement.names else [statement]
        elif isinstance(statement, ast.FunctionDef) and statement.name.startswith("_") and statement.name not in used:
            unused.append(statement)
    return unused


def _dump(node: object) -> str:
    """Return a syntax tree as text; `ast.dump` and `ast.unparse` write other texts in each version of Python."""
    if isinstance(node, list):
        return f"[{','.join(map(_dump, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [
        f"{name}={_dump(value)}"
        for name, value in ast.iter_fields(node)
        if name not in ("ctx", "kind") and value is not None and value != []
    ]
    return f"{type(node).__name__}({','.join(fields)})"


def main() -> None:
    """Write the listings of the stages that the command line names; one whose text is the same is left as it is."""
    for stage in sys.argv[1:]:
        path, text = LISTINGS / f"{stage}.txt", code_listing(code_digests(stage))
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)


if __name__ == "__main__":
    main()
