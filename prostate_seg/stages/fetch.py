"""Stage fetch: simulate the phantom data set, or download a public one, check it and keep its T2-weighted series."""

import logging
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from prostate_seg.common.errors import InputError, VolumeError
from prostate_seg.common.progress import progress
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, Workspace
from prostate_seg.data.public import source_note
from prostate_seg.data.public.download import checksum_of, download, require_checksum, shown_url
from prostate_seg.data.public.public_sets import PUBLIC_SETS, Archive, PublicSet
from prostate_seg.data.public.source_note import FetchedArchive, SourceNote
from prostate_seg.data.public.unpack import unpack
from prostate_seg.imaging.image_io import read_volume, write_volume
from prostate_seg.phantom.studies import write_phantom

log = logging.getLogger(__name__)

MEBIBYTE = 1 << 20


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Write images/, masks/ and cases.csv of the data folder; of public data LICENCE.txt and SOURCE.json too."""
    if cfg.data.source == "folder":
        raise InputError("data=folder: there is nothing to fetch, the data are yours; go on with stage=preprocess")
    workspace.cache.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(workspace.cache / "fetch.lock", timeout=0):
            return simulate(cfg, workspace) if cfg.data.source == "phantom" else fetch(cfg, workspace)
    except Timeout as error:
        raise InputError(
            f"another stage=fetch is at work in {workspace.root}; wait for it, or take another paths.root"
        ) from error


def simulate(cfg: Config, workspace: Workspace) -> StageResult:
    """Write the phantom data set."""
    settings = cfg.data.phantom
    assert settings is not None
    if (workspace.data / "images").exists() and not (workspace.data / "phantom.csv").is_file():
        raise InputError(
            f"{workspace.data} holds images that are not a phantom, and they are not overwritten\n"
            f"Name another data.root or paths.root, or use them: data=folder data.root={workspace.data}"
        )
    images = write_phantom(workspace.data, settings=settings, seed=cfg.seed, num_workers=cfg.machine.num_workers)
    log.info("made %d phantom studies of %d patients in %s", len(images), settings.num_patients, workspace.data)
    return StageResult(outputs=[workspace.data])


def fetch(cfg: Config, workspace: Workspace) -> StageResult:
    """Write a public data set, from its archives or from a folder that the user has unpacked."""
    about = PUBLIC_SETS[cfg.data.source]
    for line in source_note.describe(about):
        log.info("%s", line)
    (_fetch_archives if about.archives else _import_folder)(cfg, workspace, about)
    images, masks = _stems(workspace.data / "images"), _stems(workspace.data / "masks")
    source_note.add_case_rows(workspace.data, images, masks_by=about.masks_by)
    log.info("%d images and %d masks in %s; look at them with stage=inspect", len(images), len(masks), workspace.data)
    return StageResult(
        outputs=[workspace.data], metrics={"fetch/num_images": len(images), "fetch/num_masks": len(masks)}
    )


def _fetch_archives(cfg: Config, workspace: Workspace, about: PublicSet) -> None:
    """Fetch and unpack archive after archive; those that SOURCE.json already lists in full are skipped."""
    note = _own_note(cfg, workspace.data)
    wanted = _wanted(cfg, about, note)
    # first, so that a stopped fetch recognises its own images
    source_note.write_note(workspace.data, note, about, labels=cfg.data.labels)
    for archive in wanted:
        done = note.archives.get(archive.name)
        if done is not None and _is_complete(workspace.data, archive, done):
            log.info("%s: its %d files are here", archive.name, len(done.files))
            continue
        with _archive_file(cfg, workspace, archive) as path:
            fetched = _checked(path, archive, done)
            with progress(f"unpack {archive.name}") as advance:
                files = unpack(path, workspace.data, rules=archive.rules, advance=advance)
            note = replace(note, archives={**note.archives, archive.name: replace(fetched, files=files)})
            source_note.write_note(workspace.data, note, about, labels=cfg.data.labels)
        log.info("%s: %d files", archive.name, len(files))


def _own_note(cfg: Config, data: Path) -> SourceNote:
    """Return the SOURCE.json of an earlier fetch of the same data set, or a new one for a folder without images."""
    note = source_note.read_note(data)
    if note is None and not (data / "images").exists():
        return SourceNote(source=cfg.data.source)
    if note is None or note.source != cfg.data.source:
        held = "images of unknown origin" if note is None else f"data={note.source}"
        raise InputError(
            f"{data} holds {held}, and data={cfg.data.source} is not mixed with it\n"
            "Name another paths.root or data.root."
        )
    for path in [*data.glob(".tmp-*"), *data.glob("*/.tmp-*")]:  # half files of a killed fetch would count as data
        shutil.rmtree(path, ignore_errors=True)
    return note


def _wanted(cfg: Config, about: PublicSet, note: SourceNote) -> list[Archive]:
    """Return the archives of fetch.parts, and those that every part needs."""
    asked = about.training_parts if cfg.fetch.parts is None else cfg.fetch.parts
    if not asked or not set(asked) <= set(about.parts):
        raise InputError(f"fetch.parts: must be some of {', '.join(about.parts)}, is [{', '.join(asked)}]")
    extra = [one.part for one in about.archives if one.name in note.archives and one.part not in (None, *asked)]
    if extra:
        raise InputError(
            f"fetch.parts: {', '.join(map(str, extra))} was fetched before and lies with the rest\n"
            "Name it too, or fetch into another paths.root or data.root."
        )
    return [archive for archive in about.archives if archive.part in (None, *asked)]


def _is_complete(data: Path, archive: Archive, done: FetchedArchive) -> bool:
    """Return whether all files of an archive are in place, and the masks of images that were added since."""
    if any(rule.with_image_only for rule in archive.rules) and not _stems(data / "images") <= _stems(data / "masks"):
        return False
    return all((data / name).is_file() for name in done.files)


def _stems(folder: Path) -> set[str]:
    return {path.name.partition(".")[0] for path in folder.glob("[!.]*")}


@contextmanager
def _archive_file(cfg: Config, workspace: Workspace, archive: Archive) -> Iterator[Path]:
    """Yield the archive: from the folder fetch.origin, or downloaded and removed once it is unpacked."""
    origin = cfg.fetch.origin
    is_local = origin is not None and not re.match(r"https?://", origin)
    folder = Path(origin) if origin is not None and is_local else workspace.cache / "downloads"
    path = folder / archive.name
    if is_local and not path.is_file():
        raise InputError(f"{path} is absent: download it from {archive.url}, or leave out fetch.origin")
    if not path.is_file():
        url = archive.url
        if origin is not None:  # in a mirror host and path follow its own address, as `wget -x` stores them
            url = f"{origin.rstrip('/')}/{archive.url.partition('://')[2].partition('?')[0]}"
        log.info("%s: from %s", archive.name, shown_url(url))
        with progress(f"{archive.name} (MiB)") as advance:

            def on_bytes(have: int, total: int | None) -> None:
                if total is not None:
                    advance(have // MEBIBYTE, -(-total // MEBIBYTE))

            download(url, path, on_bytes=on_bytes)
    try:
        if archive.checksum is not None:
            require_checksum(path, archive.checksum)
    except InputError:
        if not is_local:
            path.unlink()  # it would be refused again
        raise
    yield path
    if not is_local:
        path.unlink()


def _checked(path: Path, archive: Archive, done: FetchedArchive | None) -> FetchedArchive:
    """Return the record of an archive; one without a published checksum must equal the first download."""
    if archive.checksum is not None:
        return FetchedArchive(url=archive.url, checksum=archive.checksum, is_published=True)
    checksum = checksum_of(path, "md5")
    log.info("%s: no checksum is published; %s is noted, and later downloads are compared with it", path.name, checksum)
    if done is not None and done.checksum != checksum:
        raise InputError(
            f"{path.name}: must be the file of the first download, {done.checksum}, is {checksum}\n"
            "Its source has changed, and masks of two versions are not mixed: fetch into another paths.root or data.root."
        )
    revision = ""
    if zipfile.is_zipfile(path):  # GitHub stores the commit in the archive's comment
        with zipfile.ZipFile(path) as packed:
            revision = packed.comment.decode() if re.fullmatch(rb"[0-9a-f]{40}", packed.comment) else ""
    return FetchedArchive(url=archive.url, checksum=checksum, is_published=False, revision=revision)


def _import_folder(cfg: Config, workspace: Workspace, about: PublicSet) -> None:
    """Copy PROMISE12's CaseNN.mhd and CaseNN_segmentation.mhd, voxels included, to one file each."""
    origin = cfg.fetch.origin
    if origin is None or not Path(origin).is_dir():
        raise InputError(
            f"data={cfg.data.source}: fetch.origin must be the folder with the unpacked training data, is "
            f"{origin or 'null'}\nDownload training_data.zip from {about.page} and unpack it."
        )
    if cfg.fetch.parts is not None:
        raise InputError(f"fetch.parts: must be null, as data={cfg.data.source} has no parts")
    note = _own_note(cfg, workspace.data)
    found = {path.stem.lower(): path for path in sorted(Path(origin).rglob("*.mhd"))}
    pairs = {f"{name}_segmentation": name for name in sorted(found) if f"{name}_segmentation" in found}
    if not pairs:
        raise InputError(f"{origin}: has no CaseNN.mhd with a CaseNN_segmentation.mhd; unpack training_data.zip there")
    if unpaired := sorted(found[name].name for name in found.keys() - pairs.keys() - set(pairs.values())):
        log.warning("warning: left out, as image or mask is missing: %s", ", ".join(unpaired))
    source_note.write_note(workspace.data, note, about, labels=cfg.data.labels)
    with progress("fetch", total=len(pairs)) as advance:
        for mask, image in pairs.items():
            for kind, path in (("images", found[image]), ("masks", found[mask])):
                target = workspace.data / kind / f"{found[image].stem}.mha"
                if target.is_file():
                    continue
                try:
                    write_volume(target, read_volume(path))
                except VolumeError as error:
                    raise InputError(f"{path}: {error}") from error
            advance()
