"""Hashes of files and folders in DVC's form: md5 of a file; of a folder the md5 of its listing, with the suffix `.dir`.

They are computed by DVC's library, so that a tag of a run equals the line in dvc.lock. DVC's state database in the cache holds
the hash of each file by size, time and inode: an unchanged file costs a stat.
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
from prostate_seg.common.progress import num_cores


@dataclass(frozen=True, slots=True, kw_only=True)
class Hashed:
    """Hash of a file, or of a folder and its files."""

    md5: str
    """32 hexadecimal digits; for a folder followed by `.dir`."""
    files: Mapping[str, str] = field(default_factory=dict)
    """md5 of each file of a folder, by relative name."""
    newest_mtime: float = 0.0
    """Time of the last write to one of its files, in seconds since 1970."""


def hash_paths(paths: Iterable[Path], *, cache: Path) -> dict[Path, Hashed]:
    """Hash existing files and folders on all cores; the state database is in `cache`.

    Raises:
        InputError: If one of them cannot be read.
    """
    contents = {path: _files_in(path.absolute()) for path in paths}
    infos = {str(file): _info(file) for files in contents.values() for file in files}

    cache.mkdir(parents=True, exist_ok=True)
    state = State(root_dir=str(cache.absolute()), tmp_dir=str(cache.absolute() / "hashes"))
    try:
        known = {file: found for file, _, found in state.get_many(list(infos), localfs, dict(infos)) if found}
        unknown = [file for file in infos if file not in known]
        with ThreadPoolExecutor(num_cores()) as pool:  # hashlib releases the interpreter lock
            fresh = list(pool.map(lambda file: _hash_file(file, infos[file]), unknown))
        state.save_many(((file, found, infos[file]) for file, found in zip(unknown, fresh, strict=True)), localfs)
    finally:
        state.close()
    known |= dict(zip(unknown, fresh, strict=True))
    return {path: _hashed(path, files, infos, known) for path, files in contents.items()}


def _files_in(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return [Path(root, name) for root, _, names in os.walk(path, followlinks=True) for name in names]


def _info(file: Path) -> dict[str, Any]:
    try:
        info: dict[str, Any] = localfs.info(str(file))
    except OSError as error:
        raise InputError(f"{file}: cannot be hashed, {error.strerror or error}") from error
    return info


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
