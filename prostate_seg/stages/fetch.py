"""Stage fetch: make the phantom data set, or bring a public one here: download, check, and keep its T2-weighted series."""

import logging
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from prostate_seg.common.errors import InputError, VolumeError
from prostate_seg.common.progress import progress
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, Workspace
from prostate_seg.data.public.download import checksum_of, download, gigabytes, require_checksum, shown_url
from prostate_seg.data.public.public_sets import PUBLIC_SETS, Archive, PublicSet
from prostate_seg.data.public.source_note import (
    FetchedArchive,
    SourceNote,
    describe,
    note_cases,
    read_note,
    write_note,
)
from prostate_seg.data.public.unpack import unpack
from prostate_seg.imaging.image_io import read_volume, write_volume
from prostate_seg.phantom.studies import write_phantom

log = logging.getLogger(__name__)

MEBIBYTE = 1 << 20


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Write images/, masks/ and cases.csv of the data folder; of public data LICENCE.txt and SOURCE.json too."""
    if cfg.data.source == "folder":
        raise InputError("data=folder: there is nothing to fetch, the data are yours; go on with stage=preprocess")
    with _alone(workspace):
        if cfg.data.source == "phantom":
            return _make_phantom(cfg, workspace)
        about = PUBLIC_SETS[cfg.data.source]
        for line in describe(about):
            log.info("%s", line)
        if about.archives:
            _fetch_archives(cfg, workspace, about)
        else:
            _import_folder(cfg, workspace, about)
    images, masks = _stems(workspace.data / "images"), _stems(workspace.data / "masks")
    note_cases(workspace.data, images, masks_by=about.masks_by)
    log.info("%d images and %d masks in %s; look at them with stage=inspect", len(images), len(masks), workspace.data)
    return StageResult(
        outputs=[workspace.data], metrics={"fetch/num_images": len(images), "fetch/num_masks": len(masks)}
    )


@contextmanager
def _alone(workspace: Workspace) -> Iterator[None]:
    """Keep a second fetch out of the same workspace."""
    workspace.cache.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(workspace.cache / "fetch.lock", timeout=0):
            yield
    except Timeout as error:
        raise InputError(
            f"another stage=fetch is at work in {workspace.root}; wait for it, or take another paths.root"
        ) from error


def _remove_leftovers(data: Path) -> None:
    """Remove half files of a fetch that was killed; they would count as data."""
    for path in [*data.glob(".tmp-*"), *data.glob("*/.tmp-*")]:
        shutil.rmtree(path, ignore_errors=True)


def _make_phantom(cfg: Config, workspace: Workspace) -> StageResult:
    settings = cfg.data.phantom
    assert settings is not None
    if (workspace.data / "images").exists() and not (workspace.data / "phantom.csv").is_file():
        raise InputError(
            f"{workspace.data} holds images that are not a phantom, and they are not overwritten\n"
            "Name another data.root or paths.root, or use them: data=folder data.root=" + str(workspace.data)
        )
    with progress("fetch", total=settings.num_patients + settings.num_second_studies) as advance:
        images = write_phantom(
            workspace.data, settings=settings, seed=cfg.seed, on_progress=lambda _done, _of: advance()
        )
    log.info("made %d phantom studies of %d patients in %s", len(images), settings.num_patients, workspace.data)
    return StageResult(outputs=[workspace.data])


def _fetch_archives(cfg: Config, workspace: Workspace, about: PublicSet) -> None:
    """Bring archive after archive here, unpack what is wanted and note it; what was noted before is not fetched again."""
    note = _own_note(cfg, workspace.data)
    wanted = _wanted(cfg, about, note)
    write_note(workspace.data, note, about)  # first, so that a stopped fetch knows its own images again
    for archive in wanted:
        done = note.archives.get(archive.name)
        if done is not None and _is_complete(workspace.data, archive, done):
            log.info("%s: its %d files are here", archive.name, len(done.files))
            continue
        with _file_of(cfg, workspace, archive) as path:
            identity = _identity(path, archive, done)
            with _file_progress(f"unpack {archive.name}") as on_file:
                files = unpack(path, workspace.data, rules=archive.rules, on_file=on_file)
            note = replace(note, archives={**note.archives, archive.name: replace(identity, files=files)})
            write_note(workspace.data, note, about)
        log.info("%s: %d files", archive.name, len(files))


def _own_note(cfg: Config, data: Path) -> SourceNote:
    """Return the note of an earlier fetch of the same data set, or a new one where the folder has no images yet."""
    note = read_note(data)
    if note is None and not (data / "images").exists():
        return SourceNote(source=cfg.data.source)
    if note is None or note.source != cfg.data.source:
        held = "images of unknown origin" if note is None else f"data={note.source}"
        raise InputError(
            f"{data} holds {held}, and data={cfg.data.source} is not mixed with it\n"
            "Name another paths.root or data.root."
        )
    _remove_leftovers(data)
    return note


def _wanted(cfg: Config, about: PublicSet, note: SourceNote) -> list[Archive]:
    """Return the archives that fetch.parts asks for, and those that every part needs."""
    asked = about.training_parts if cfg.fetch.parts is None else cfg.fetch.parts
    unknown = [part for part in asked if part not in about.parts]
    if unknown or not asked:
        raise InputError(f"fetch.parts: must be some of {', '.join(about.parts)}, is [{', '.join(asked)}]")
    extra = [one.part for one in about.archives if one.name in note.archives and one.part not in (None, *asked)]
    if extra:
        raise InputError(
            f"fetch.parts: {', '.join(str(part) for part in extra)} was fetched before and lies with the rest\n"
            "Name it too, or fetch into another paths.root or data.root."
        )
    return [archive for archive in about.archives if archive.part in (None, *asked)]


def _is_complete(data: Path, archive: Archive, done: FetchedArchive) -> bool:
    """Return whether all files of an archive are in place, and masks for images that came since, too."""
    if any(rule.with_image_only for rule in archive.rules) and not _stems(data / "images") <= _stems(data / "masks"):
        return False
    return all((data / name).is_file() for name in done.files)


def _stems(folder: Path) -> set[str]:
    return {path.name.partition(".")[0] for path in folder.glob("[!.]*")}


@contextmanager
def _file_of(cfg: Config, workspace: Workspace, archive: Archive) -> Iterator[Path]:
    """Yield the archive: from the folder fetch.origin, where it stays, or downloaded, and removed once it is unpacked."""
    origin = cfg.fetch.origin
    if origin is not None and not _is_address(origin):
        path = Path(origin) / archive.name
        if not path.is_file():
            raise InputError(f"{path} is absent: download it from {archive.url}, or leave fetch.origin away")
        _require_published(path, archive)
        yield path
        return
    target = workspace.cache / "downloads" / archive.name
    if not target.is_file():
        url = archive.url if origin is None else _mirrored(origin, archive.url)
        log.info("%s: from %s", archive.name, shown_url(url))
        with _byte_progress(archive.name) as on_bytes:
            download(url, target, on_bytes=on_bytes)
    try:
        _require_published(target, archive)
    except InputError:
        target.unlink()  # it would be refused again
        raise
    yield target
    target.unlink()


def _require_published(path: Path, archive: Archive) -> None:
    if archive.checksum is not None:
        require_checksum(path, archive.checksum)


def _identity(path: Path, archive: Archive, done: FetchedArchive | None) -> FetchedArchive:
    """Return what is noted of an archive; one whose checksum is not published must be that of the first download."""
    if archive.checksum is not None:
        return FetchedArchive(url=archive.url, checksum=archive.checksum, is_published=True)
    checksum = checksum_of(path, "md5")
    log.info("%s: no checksum is published; %s is noted, and later downloads are compared with it", path.name, checksum)
    if done is not None and done.checksum != checksum:
        raise InputError(
            f"{path.name}: must be the file of the first download, {done.checksum}, is {checksum}\n"
            "Its source has changed, and masks of two versions are not mixed: fetch into another paths.root or data.root."
        )
    return FetchedArchive(url=archive.url, checksum=checksum, is_published=False, revision=_revision(path))


def _revision(path: Path) -> str:
    """Return the commit that GitHub notes in the comment of a .zip archive, or nothing."""
    if not zipfile.is_zipfile(path):
        return ""
    with zipfile.ZipFile(path) as packed:
        return packed.comment.decode() if re.fullmatch(rb"[0-9a-f]{40}", packed.comment) else ""


def _is_address(origin: str) -> bool:
    return re.match(r"https?://", origin) is not None


def _mirrored(origin: str, url: str) -> str:
    """Return the address in a mirror: host and path behind its own, as `wget -x` stores them."""
    return f"{origin.rstrip('/')}/{url.partition('://')[2].partition('?')[0]}"


@contextmanager
def _byte_progress(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """Yield what a download tells its bytes; shown in MiB once the size is known."""
    with ExitStack() as stack:
        advance: Callable[[], None] | None = None
        shown = 0

        def on_bytes(have: int, total: int | None) -> None:
            nonlocal advance, shown
            if advance is None and total is not None:
                log.info("%s: %s of %s are here", name, gigabytes(have), gigabytes(total))
                advance = stack.enter_context(progress(f"{name} (MiB)", total=-(-total // MEBIBYTE)))
            while advance is not None and shown < have // MEBIBYTE:
                shown += 1
                advance()

        yield on_bytes


@contextmanager
def _file_progress(label: str) -> Iterator[Callable[[int], None]]:
    """Yield what unpacking tells its files: their number first, then 0 for each."""
    with ExitStack() as stack:
        advance: Callable[[], None] | None = None

        def on_file(total: int) -> None:
            nonlocal advance
            if advance is None:
                advance = stack.enter_context(progress(label, total=total))
            else:
                advance()

        yield on_file


def _import_folder(cfg: Config, workspace: Workspace, about: PublicSet) -> None:
    """Copy PROMISE12's CaseNN.mhd and CaseNN_segmentation.mhd, voxels included, to one file each."""
    if cfg.fetch.origin is None or not Path(cfg.fetch.origin).is_dir():
        raise InputError(
            f"data={cfg.data.source}: fetch.origin must be the folder with the unpacked training data, is "
            f"{cfg.fetch.origin or 'null'}\nDownload training_data.zip from {about.page} and unpack it."
        )
    if cfg.fetch.parts is not None:
        raise InputError(f"fetch.parts: must be null, as data={cfg.data.source} has no parts")
    note = _own_note(cfg, workspace.data)
    masks = {
        path.name.lower().removesuffix("_segmentation.mhd"): path
        for path in sorted(Path(cfg.fetch.origin).rglob("*_segmentation.mhd"))
    }
    images = {
        path.stem.lower(): path
        for path in sorted(Path(cfg.fetch.origin).rglob("*.mhd"))
        if not path.stem.lower().endswith("_segmentation")
    }
    pairs = [(images[key], masks[key]) for key in sorted(images.keys() & masks.keys())]
    if not pairs:
        raise InputError(
            f"{cfg.fetch.origin}: has no CaseNN.mhd with a CaseNN_segmentation.mhd; unpack training_data.zip there"
        )
    alone = sorted(path.name for key, path in {**masks, **images}.items() if key not in images.keys() & masks.keys())
    if alone:
        log.warning("warning: left out, as image or mask is missing: %s", ", ".join(alone))
    write_note(workspace.data, note, about)
    with progress("fetch", total=len(pairs)) as advance:
        for image, mask in pairs:
            for kind, path in (("images", image), ("masks", mask)):
                _copy_volume(path, workspace.data / kind / f"{image.stem}.mha")
            advance()


def _copy_volume(path: Path, target: Path) -> None:
    if target.is_file():
        return
    try:
        write_volume(target, read_volume(path))
    except VolumeError as error:
        raise InputError(f"{path}: {error}") from error
