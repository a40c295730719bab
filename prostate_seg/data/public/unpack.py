"""Taking the wanted files out of an archive, each under a name of ours, so that none can land outside the data folder.

A file is there only as a whole, so that a stopped unpacking goes on with the files that are missing.
"""

import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from prostate_seg.common.errors import InputError, VolumeError
from prostate_seg.common.files import atomic_path
from prostate_seg.data.public.download import require_space
from prostate_seg.imaging.image_io import read_volume, write_volume

DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError)
"""What the readers raise on an archive that is none, or only a part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Which members of an archive are kept, and as what."""

    member: str
    """Regular expression for the end of the path in the archive; its group, if any, is the study's number."""
    target: str
    """Path in the data folder; {} stands for that number."""
    channel: int | None = None
    """Volume of a four-dimensional image that is kept; None keeps the file as it is."""
    with_image_only: bool = False
    """Whether a file is kept only where images/ has the study."""

    def target_of(self, name: str) -> str | None:
        """Return where a member goes; None for one that is not wanted."""
        found = re.search(rf"(?:^|/){self.member}$", name)
        return None if found is None else self.target.format(*found.groups())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Member:
    name: str
    num_bytes: int
    open: Callable[[], IO[bytes]]


def unpack(archive: Path, folder: Path, *, rules: Sequence[Rule], on_file: Callable[[int], None]) -> list[str]:
    """Write the wanted files of a .zip or .tar archive; those that are there already are left alone.

    Args:
        archive: The archive.
        folder: The data folder.
        rules: What is wanted.
        on_file: Called with the number of wanted files before the first, and with 0 after each.

    Returns:
        Paths in the data folder, sorted.

    Raises:
        InputError: If the archive is damaged, has nothing that is wanted, or would write outside of the folder, or the disk is
            too small.
    """
    try:
        with _members(archive) as members:
            for member in members:
                _require_inside(archive, member.name)
            wanted = list(_wanted(members, folder, rules))
            if not wanted:
                raise InputError(f"{archive}: has no file such as {rules[0].member}; its source has changed its layout")
            missing = [one for one in wanted if not _is_there(folder / one[1], one[0], one[2])]
            num_bytes = sum(member.num_bytes for member, _, _ in missing)
            require_space(folder, num_bytes, purpose=f"unpacking {archive.name}", setting="data.root")
            on_file(len(wanted))
            for _ in range(len(wanted) - len(missing)):
                on_file(0)
            for member, target, rule in missing:
                _write(member, folder / target, channel=rule.channel)
                on_file(0)
    except DAMAGED as error:
        raise InputError(
            f"{archive}: the archive is damaged or incomplete ({error})\nRemove it and run stage=fetch again."
        ) from error
    return sorted(target for _, target, _ in wanted)


def _wanted(members: Sequence[_Member], folder: Path, rules: Sequence[Rule]) -> Iterator[tuple[_Member, str, Rule]]:
    have = {path.name.partition(".")[0] for path in (folder / "images").glob("*")}
    for member in members:
        for rule in rules:
            target = rule.target_of(member.name)
            if target is not None and (not rule.with_image_only or Path(target).name.partition(".")[0] in have):
                yield member, target, rule


def _is_there(path: Path, member: _Member, rule: Rule) -> bool:
    return path.is_file() and (rule.channel is not None or path.stat().st_size == member.num_bytes)


def _write(member: _Member, target: Path, *, channel: int | None) -> None:
    if channel is None:
        with atomic_path(target) as temporary, member.open() as source, temporary.open("wb") as stream:
            shutil.copyfileobj(source, stream, 1 << 20)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=target.parent) as name:
        whole = Path(name) / PurePosixPath(member.name).name
        with member.open() as source, whole.open("wb") as stream:
            shutil.copyfileobj(source, stream, 1 << 20)
        try:
            volume = read_volume(whole, channel=channel)
        except VolumeError as error:
            raise InputError(f"{member.name}: {error}") from error
        write_volume(target, volume)


@contextmanager
def _members(archive: Path) -> Iterator[list[_Member]]:
    """Open an archive and list its regular files."""
    if archive.suffix == ".tar":
        with tarfile.open(archive) as tar:
            yield [
                _Member(name=info.name, num_bytes=info.size, open=lambda info=info: _stream(tar, info))  # type: ignore[misc]
                for info in tar.getmembers()
                if info.isfile()
            ]
    else:
        with zipfile.ZipFile(archive) as packed:
            yield [
                _Member(name=info.filename, num_bytes=info.file_size, open=lambda info=info: packed.open(info))  # type: ignore[misc]
                for info in packed.infolist()
                if not info.is_dir()
            ]


def _stream(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    stream = tar.extractfile(info)
    assert stream is not None  # a regular file has one
    return stream


def _require_inside(archive: Path, name: str) -> None:
    """Refuse an archive that tries to leave its folder: whoever made it did not make the data set."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name):
        raise InputError(
            f"{archive}: members must lie inside the archive's folder, and {name!r} does not; nothing was unpacked\n"
            "This is not the archive that it claims to be: remove it, and look where it came from."
        )
