"""Packs the runs of a pipeline into one file, and unpacks it: a zip archive of a journal with their data and artifacts.

A bundle may come from anybody. Nothing in it is executed or unpickled, its paths cannot leave the folder that it is unpacked
into, and it can create runs but change none that it did not create.
"""

import json
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mlflow.entities import Run
from pydantic import ValidationError

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import atomic_path, is_inside
from prostate_seg.config.schema import MlflowConfig
from prostate_seg.operations.job import Outcome
from prostate_seg.provenance.redaction import Redactor
from prostate_seg.tracking import records
from prostate_seg.tracking.journal import FILES, RECORDS, Header, Journal
from prostate_seg.tracking.recorded_runs import find_run, open_tree
from prostate_seg.tracking.records import BundleRecord, Level, MetricPoint, TreePosition
from prostate_seg.tracking.replication import IS_COMPLETE
from prostate_seg.tracking.store.run_tree import COPIED_FROM, KEY, PARENT, REUSED_FROM, RunTree, position_of, source_of
from prostate_seg.tracking.sync import replicate_all

REUSED_ELSEWHERE = "bundle.reused_from"
"""Tag in place of REUSED_FROM if the run that it names is not in the bundle."""
RESERVED_TAGS = (KEY, IS_COMPLETE, COPIED_FROM, "sweep.key", "cluster.key", PARENT, "mlflow.runName")
"""Tags that are true of the original only."""
MAX_RECORDS_BYTES = 2**30
"""Largest list of records that is read; artifacts are files beside it."""
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)
"""Errors of zipfile for damaged bytes; RuntimeError if they ask for a password or an unknown compression."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpacked:
    """Result of unpacking a bundle."""

    what: str
    run_id: str
    """Id of the pipeline in this store."""
    num_runs: int
    num_new: int
    num_refused: int


def pack(run_id: str, target: Path, settings: MlflowConfig, *, cache: Path, redactor: Redactor) -> int:
    """Write a pipeline, all runs below it and their artifacts to one file; return the number of runs.

    Raises:
        InputError: If there is no such pipeline, a run in it is RUNNING, or the store or the file cannot be used.
    """
    tree = open_tree(settings, cache=cache)
    with tempfile.TemporaryDirectory() as name:
        with tree.store.explained_errors():
            runs = _runs_of_pipeline(tree, find_run(tree, run_id))
            header = Header(what=str(runs[0].info.run_name), address=tree.store.address, experiment=settings.experiment)
            journal = Journal.create(Path(name), header, name="bundle")
            _append_runs(tree, runs, journal, redactor)
        if not journal.flush():
            raise InputError(f"{name} is full: free some space there, or set TMPDIR to another folder")
        journal.release()
        try:
            _write_archive(target, journal.folder)
        except OSError as error:
            raise InputError(
                f"bundle.output: {target} cannot be written ({error.strerror})\nGive the path of a file on a disk with space."
            ) from error
    return len(runs)


def _write_archive(target: Path, folder: Path) -> None:
    """Write the records and files of a journal to a zip archive."""
    files = sorted(path for path in (folder / FILES).rglob("*") if path.is_file())
    with atomic_path(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in [folder / RECORDS, *files]:
            archive.write(path, path.relative_to(folder).as_posix())


def unpack(source: Path, settings: MlflowConfig, *, journal_root: Path, cache: Path) -> Unpacked:
    """Create the runs of a bundle in the store, except those that it has; stage=sync completes an interrupted unpacking.

    Raises:
        InputError: If the file is no bundle, contains what a bundle may not, or the store cannot be used.
    """
    tree = open_tree(settings, cache=cache)
    with _opened(source) as archive:
        _check_members(source, archive, journal_root)
        what, bundle_records = _read_records(source, archive)
        header = Header(what=what, address=tree.store.address, experiment=settings.experiment)
        journal = Journal.create(journal_root, header, name="bundle")
        try:
            for info in archive.infolist():
                if info.filename.startswith(f"{FILES}/"):
                    target = journal.folder / info.filename  # its name was checked
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(info) as packed, target.open("wb") as written:
                        shutil.copyfileobj(packed, written)
        except BaseException:
            journal.remove()  # nothing else removes a journal without records
            raise
    for record in bundle_records:
        journal.append(record)
    try:
        replicator = replicate_all(journal, lambda _: tree)
    finally:
        journal.release()
    if not journal.num_refused:
        journal.remove()
    copies = [record.run for record in bundle_records if isinstance(record, records.CopyRun)]
    return Unpacked(
        what=what,
        run_id=replicator.id_of(copies[0]),
        num_runs=len(copies),
        num_new=len(copies) - len(replicator.already_complete),
        num_refused=journal.num_refused,
    )


def _runs_of_pipeline(tree: RunTree, pipeline: Run) -> list[Run]:
    """Return a pipeline and all runs below it, each after its parent."""
    if pipeline.data.tags.get("level") != Level.pipeline:
        above = pipeline.data.tags.get("pipeline")
        raise InputError(
            f"run {pipeline.info.run_id} ({pipeline.info.run_name}) is a part of the pipeline {above}\n"
            "Give bundle.run the id of the pipeline; the MLflow page shows it above its stages."
        )
    runs = [pipeline]
    for run in runs:  # grows while it is walked
        runs += tree.children(run.info.run_id)
    running = [str(run.info.run_name) for run in runs if run.info.status not in list(Outcome)]
    if running:
        raise InputError(
            f"{', '.join(running)} of {pipeline.info.run_name} still runs: a bundle holds runs that have ended\n"
            "Wait for it; stage=doctor closes what killed processes left open."
        )
    return runs


def _append_runs(tree: RunTree, runs: Sequence[Run], journal: Journal, redactor: Redactor) -> None:
    """Append first the records that create all runs, so that each can refer to any other, then their data."""
    keys = {str(run.info.run_id): run.data.tags.get(KEY, str(run.info.run_id)) for run in runs}
    for run in runs:
        copy = records.CopyRun(
            run=keys[run.info.run_id],
            origin=run.info.run_id,
            source=tree.store.address,
            name=redactor.text(run.info.run_name),
            position=position_of(run),
            parent=None if run is runs[0] else keys[run.data.tags[PARENT]],
            start_ms=run.info.start_time,
        )
        journal.append(copy)
    for run in runs:
        _append_data(tree, run, keys, journal, redactor)


def _append_data(tree: RunTree, run: Run, keys: Mapping[str, str], journal: Journal, redactor: Redactor) -> None:
    """Append params, tags, curves, inputs and artifacts of a run, and its end; `keys` has those of all runs by id."""
    key = keys[run.info.run_id]
    tags = {name: value for name, value in run.data.tags.items() if not _is_reserved(name)}
    if REUSED_FROM in tags and tags[REUSED_FROM] not in keys:
        tags[REUSED_ELSEWHERE] = tags.pop(REUSED_FROM)
    points = tuple(
        MetricPoint(name, point.value, point.timestamp, point.step)
        for name in run.data.metrics
        for point in tree.client.get_metric_history(run.info.run_id, name)
    )
    params = redactor.tree(run.data.params)
    journal.append(records.LogData(run=key, params=params, tags=redactor.tree(tags), metrics=points))
    datasets = [] if run.inputs is None else run.inputs.dataset_inputs
    journal.append(records.LogInputs(run=key, datasets={one.dataset.name: one.dataset.digest for one in datasets}))
    folder = journal.files_folder()
    source = tree.get(source_of(run)) or run
    tree.client.download_artifacts(source.info.run_id, "", str(folder))
    if any(folder.iterdir()):
        _redact_files(folder, redactor)
        journal.append(records.LogFiles(run=key, folder=folder.relative_to(journal.folder).as_posix()))
    journal.append(records.EndCopy(run=key, status=Outcome(run.info.status), end_ms=run.info.end_time))


def _redact_files(folder: Path, redactor: Redactor) -> None:
    """Redact every text file; JSON value by value, so that it stays JSON."""
    for path in filter(Path.is_file, folder.rglob("*")):
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        try:
            is_json = path.suffix == ".json"
            text = json.dumps(redactor.tree(json.loads(text)), indent=1) if is_json else redactor.text(text)
        except json.JSONDecodeError:
            text = redactor.text(text)
        path.write_bytes(text.encode())


@contextmanager
def _opened(source: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(source) as archive:
            yield archive
    except FileNotFoundError as error:
        raise InputError(f"{source}: there is no such file") from error
    except DAMAGED as error:
        raise InputError(f"{source}: cannot be read as a bundle ({error}); copy it again") from error
    except OSError as error:
        raise InputError(
            f"{source}: cannot be unpacked ({error})\nCheck who may read it, and who may write to paths.journal."
        ) from error


def _check_members(source: Path, archive: zipfile.ZipFile, journal_root: Path) -> None:
    """Refuse an archive that would write outside of its folder, or more than the disk holds."""
    for info in archive.infolist():
        parts = PurePosixPath(info.filename).parts
        is_plain = info.filename == RECORDS or (len(parts) > 2 and parts[0] == FILES and not info.is_dir())
        is_link = stat.S_ISLNK(info.external_attr >> 16)
        name = info.orig_filename
        if not (is_plain and is_inside(name)) or is_link or "\\" in name or "\0" in name:
            raise InputError(f"{source}: holds {info.filename!r}, which a bundle may not; nothing was unpacked")
    size = sum(info.file_size for info in archive.infolist())
    root = journal_root.absolute()
    existing = next(folder for folder in (root, *root.parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if size > free:
        raise InputError(
            f"{source}: unpacks to {size / 2**30:.1f} GiB, and {existing} has {free / 2**30:.1f} GiB free\n"
            "Free some space, or set paths.journal to another folder."
        )


def _read_records(source: Path, archive: zipfile.ZipFile) -> tuple[str, list[BundleRecord]]:
    """Return the description and the records of a bundle; refuse one that changes a run which it did not create."""
    try:
        if archive.getinfo(RECORDS).file_size > MAX_RECORDS_BYTES:
            raise ValueError(f"{RECORDS} is larger than {MAX_RECORDS_BYTES / 2**30:.0f} GiB")
        first, *lines = archive.read(RECORDS).splitlines()
        header = Header.model_validate_json(first)
        found = [records.BUNDLE_RECORD.validate_json(line) for line in lines]
        created: set[str] = set()
        for record in found:
            _check_record(record, created)
            created |= {record.run} if isinstance(record, records.CopyRun) else set()
        if not created:
            raise ValueError("it holds no run")
    except ValidationError as error:
        raise InputError(f"{source}: is no bundle of this program: {_shown(error)}\nHave it packed again.") from error
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{source}: is no bundle of this program, or damaged ({error})\nHave it packed again."
        ) from error
    return header.what, found


def _check_record(record: BundleRecord, created: set[str]) -> None:
    """Check what the type of a record does not: it concerns a run of the bundle, sets no reserved tag, leaves no folder."""
    run = record.parent if isinstance(record, records.CopyRun) else record.run
    if run is not None and run not in created:
        raise ValueError(f"a record {record.do!r} is about {run[:80]!r}, a run that it did not bring")
    if isinstance(record, records.LogData):
        reserved = [tag for tag in record.tags if _is_reserved(tag)]
        if reserved:
            raise ValueError(f"tags of a record 'log' hold {reserved[0]!r}")
    if isinstance(record, records.LogFiles):
        if not re.fullmatch(rf"{FILES}/\w+", record.folder):
            raise ValueError(f"folder of a record 'files' is {record.folder[:80]!r}")
        if record.to is not None:
            raise ValueError(f"to of a record 'files' is {record.to[:80]!r}")


def _is_reserved(tag: str) -> bool:
    return tag in RESERVED_TAGS or tag in TreePosition.model_fields or tag.startswith("process.")


def _shown(error: ValidationError) -> str:
    """Return the first fault of a record: which field of which record has which value."""
    fault = error.errors()[0]
    match fault["loc"]:
        case (kind, field, *_):
            return f"{field} of a record {kind!r} is {str(fault['input'])[:80]!r}"
        case (field,):
            return f"{field} of its first line is {str(fault['input'])[:80]!r}"
    return f"type of a record is {fault['input'].get('do')!r}" if isinstance(fault["input"], dict) else fault["msg"]
