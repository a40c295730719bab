"""Extraction of the wanted files from an archive, under names that cannot leave the data folder.

Each file is written atomically, so that an interrupted extraction continues with the missing files.
"""

import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from prostate_seg.common.errors import InputError, VolumeError
from prostate_seg.common.files import atomic_path, is_inside
from prostate_seg.data.public.download import require_space
from prostate_seg.imaging.image_io import read_volume, write_volume

DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError)
"""Exceptions of the readers for damaged or incomplete archives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Members of an archive that are kept, and their target."""

    member: str
    """Regular expression for the end of the path in the archive; its group, if any, is the study's number."""
    target: str
    """Path in the data folder; {} stands for that number."""
    channel: int | None = None
    """Volume of a four-dimensional image that is kept; None keeps the file as it is."""
    with_image_only: bool = False
    """Whether a file is kept only if images/ has the study."""


class _Member(NamedTuple):
    name: str
    num_bytes: int
    open: Callable[[], IO[bytes]]


def unpack(archive: Path, folder: Path, *, rules: Sequence[Rule], advance: Callable[[int, int], None]) -> list[str]:
    """Extract the wanted files of a .zip or .tar archive to a data folder, and return their paths there, sorted.

    Existing files are kept. `advance` is called with the numbers of files in place and of all before the first, and after each.

    Raises:
        InputError: If the archive is damaged, has no wanted file, or would write outside of the folder, or the disk is too
            small.
    """
    try:
        with _members(archive) as members:
            if outside := next((member.name for member in members if not is_inside(member.name)), None):
                raise InputError(
                    f"{archive}: members must lie inside the archive's folder, and {outside!r} does not; nothing was unpacked\n"
                    "This is not the archive that it claims to be: remove it, and check its source."
                )
            wanted = list(_wanted(members, folder, rules))
            if not wanted:
                raise InputError(
                    f"{archive}: has no file such as {rules[0].member}; its source has changed its layout; report it "
                    "to the project"
                )
            missing = [
                (member, target, rule)
                for member, target, rule in wanted
                if not (folder / target).is_file()
                or (rule.channel is None and (folder / target).stat().st_size != member.num_bytes)
            ]
            num_bytes = sum(member.num_bytes for member, _, _ in missing)
            require_space(folder, num_bytes, purpose=f"unpacking {archive.name}", setting="data.root")
            num_kept = len(wanted) - len(missing)
            advance(num_kept, len(wanted))
            for number, (member, target, rule) in enumerate(missing, start=num_kept + 1):
                _write(member, folder / target, channel=rule.channel)
                advance(number, len(wanted))
    except DAMAGED as error:
        raise InputError(
            f"{archive}: the archive is damaged or incomplete ({error})\nRemove it and run stage=fetch again."
        ) from error
    return sorted(target for _, target, _ in wanted)


def _wanted(members: Sequence[_Member], folder: Path, rules: Sequence[Rule]) -> Iterator[tuple[_Member, str, Rule]]:
    have = {path.name.partition(".")[0] for path in (folder / "images").glob("*")}
    for member in members:
        for rule in rules:
            found = re.search(rf"(?:^|/){rule.member}$", member.name)
            if found is not None:
                target = rule.target.format(*found.groups())
                if not rule.with_image_only or Path(target).name.partition(".")[0] in have:
                    yield member, target, rule


def _write(member: _Member, target: Path, *, channel: int | None) -> None:
    with atomic_path(target) as temporary:
        stored = temporary if channel is None else temporary.with_name(f"whole_{PurePosixPath(member.name).name}")
        with member.open() as source, stored.open("wb") as stream:
            shutil.copyfileobj(source, stream, 1 << 20)
        if channel is not None:
            try:
                volume = read_volume(stored, channel=channel)
            except VolumeError as error:
                raise InputError(f"{member.name}: {error}") from error
            write_volume(temporary, volume)


@contextmanager
def _members(archive: Path) -> Iterator[list[_Member]]:
    """Open an archive and list its regular files."""
    if archive.suffix == ".tar":
        with tarfile.open(archive) as tar:
            files = [info for info in tar.getmembers() if info.isfile()]  # extractfile returns a stream for these
            yield [_Member(info.name, info.size, partial(tar.extractfile, info)) for info in files]  # type: ignore[arg-type]
    else:
        with zipfile.ZipFile(archive) as packed:
            entries = [info for info in packed.infolist() if not info.is_dir()]
            yield [_Member(info.filename, info.file_size, partial(packed.open, info)) for info in entries]
