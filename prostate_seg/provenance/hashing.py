"""Hashes of files and folders as DVC writes them: the md5 of a file, and for a folder the md5 of its listing plus `.dir`.

They are DVC's own functions, so that a tag of a run equals the line in dvc.lock. A file that has not changed since it was
hashed, by size, time and inode, costs a stat: DVC's state database in the cache remembers it.
"""

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dvc_data.hashfile.hash import hash_file
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.meta import Meta
from dvc_data.hashfile.state import State
from dvc_data.hashfile.tree import Tree
from dvc_objects.fs.local import localfs

from prostate_seg.common.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Hashed:
    """The hash of a file or of a folder and the files in it."""

    md5: str
    """32 hexadecimal digits; of a folder with `.dir` at the end."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Of a folder: md5 by name relative to it."""
    newest_mtime: float = 0.0
    """When a file of it was last written, in seconds since 1970."""


def hash_paths(paths: Iterable[Path], *, cache: Path) -> dict[Path, Hashed]:
    """Hash files and folders, all cores at work.

    Args:
        paths: Files and folders that exist.
        cache: Folder in which the state database of hashes lies.

    Raises:
        InputError: If one of them cannot be read.
    """
    paths = list(paths)
    contents = {path: _files_of(path) for path in paths}
    infos = {str(file): _info(file) for files in contents.values() for file in files}
    known = _hash_files(infos, cache=cache)
    return {path: _hashed(path, files, infos, known) for path, files in contents.items()}


def _files_of(path: Path) -> list[Path]:
    path = path.absolute()
    if not path.is_dir():
        return [path]
    return [Path(root) / name for root, _, names in os.walk(path, followlinks=True) for name in names]


def _info(file: Path) -> dict[str, Any]:
    try:
        info: dict[str, Any] = localfs.info(str(file))
    except OSError as error:
        raise InputError(f"{file}: cannot be hashed, {error.strerror or error}") from error
    return info


def _hash_files(infos: Mapping[str, dict[str, Any]], *, cache: Path) -> dict[str, HashInfo]:
    """Return the hash of each file, from the state database where it has not changed."""
    cache.mkdir(parents=True, exist_ok=True)
    state = State(root_dir=str(cache.absolute()), tmp_dir=str(cache.absolute() / "hashes"))
    try:
        known = {path: found for path, _, found in state.get_many(list(infos), localfs, dict(infos)) if found}
        missing = [path for path in infos if path not in known]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashlib lets go of the interpreter
            fresh = list(pool.map(lambda path: _hash_file(path, infos[path]), missing))
        state.save_many(((path, found, infos[path]) for path, found in zip(missing, fresh, strict=True)), localfs)
    finally:
        state.close()
    return known | dict(zip(missing, fresh, strict=True))


def _hash_file(path: str, info: dict[str, Any]) -> HashInfo:
    try:
        return hash_file(path, localfs, "md5", info=info)[1]
    except OSError as error:
        raise InputError(f"{path}: cannot be hashed, {error.strerror or error}") from error


def _hashed(
    path: Path, files: list[Path], infos: Mapping[str, dict[str, Any]], known: Mapping[str, HashInfo]
) -> Hashed:
    newest = max((float(infos[str(file)]["mtime"]) for file in files), default=0.0)
    if not path.is_dir():
        return Hashed(md5=str(known[str(files[0])].value), newest_mtime=newest)
    tree, listing = Tree(), {}
    for file in files:
        parts = file.relative_to(path.absolute()).parts
        tree.add(parts, Meta(), known[str(file)])
        listing["/".join(parts)] = str(known[str(file)].value)
    tree.digest()
    return Hashed(md5=str(tree.oid), files=dict(sorted(listing.items())), newest_mtime=newest)
