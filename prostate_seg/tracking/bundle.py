"""The runs of a pipeline as one file, and back: a zip archive of what the spool would hold of them, and of their artifacts.

A bundle may come from anybody. Nothing in it is run or unpickled, its paths cannot leave the folder that it is unpacked into,
and it can make runs but change none that were not made of it.
"""

import json
import re
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mlflow.entities import Run

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import atomic_path
from prostate_seg.config.schema import MlflowConfig
from prostate_seg.operations.job import Outcome
from prostate_seg.provenance.redaction import Redactor
from prostate_seg.tracking.journal import FILES, RECORDS, Header, Record, Spool, plain
from prostate_seg.tracking.recorded_runs import find_run, open_tree
from prostate_seg.tracking.replication import IS_WHOLE
from prostate_seg.tracking.run_tree import COPIED_FROM, KEY, Level, RunTree
from prostate_seg.tracking.store import STORE_ERRORS, unusable
from prostate_seg.tracking.sync import deliver_all

REUSED_FROM, REUSED_ELSEWHERE = "reused_from", "bundle.reused_from"
"""Tags of a run that stands for one of another pipeline; the second where that one is in no bundle with it."""
NOT_PACKED = (KEY, IS_WHOLE, COPIED_FROM, "sweep.key", "cluster.key", "mlflow.parentRunId", "mlflow.runName")
"""Tags that would say of a copy what is true of the original only."""
PLACE = ("level", "pipeline", "stage", "fold", "sweep")
LARGEST_RECORDS = 2**30
"""Bytes of the list of records that are read; artifacts lie beside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpacked:
    """What became of the runs of a bundle."""

    what: str
    run_id: str
    """The pipeline's id in this store."""
    num_runs: int
    num_new: int
    num_refused: int


def pack(run_id: str, target: Path, settings: MlflowConfig, *, cache: Path, redactor: Redactor) -> int:
    """Write a pipeline, all runs below it and their artifacts into one file; return the number of runs.

    Raises:
        InputError: If there is no such pipeline, something in it still runs, or the store cannot be used.
    """
    tree = open_tree(settings, cache=cache)
    try:
        runs = _whole_tree(tree, find_run(tree, run_id))
        with tempfile.TemporaryDirectory() as name:
            header = Header(what=str(runs[0].info.run_name), address=tree.store.address, experiment=settings.experiment)
            spool = Spool.create(Path(name), header, name="bundle")
            _put_runs(tree, runs, spool, redactor)
            spool.release()
            with atomic_path(target) as temporary:
                _zip(spool.folder, temporary)
    except STORE_ERRORS as error:
        raise InputError(unusable(tree.store.address, error)) from error
    return len(runs)


def unpack(source: Path, settings: MlflowConfig, *, spool_root: Path, cache: Path) -> Unpacked:
    """Put the runs of a bundle into the store, but for those that it has.

    A store that goes away meanwhile has the rest sent by stage=sync.

    Raises:
        InputError: If the file is no bundle, or asks for what a bundle may not do, or the store cannot be used.
    """
    tree = open_tree(settings, cache=cache)
    with _opened(source) as archive:
        _require_inside(source, archive, spool_root)
        first, *records = _records(source, archive)
        copies: list[str] = []
        for record in records:
            fault = _fault(record, copies)
            if fault:
                raise InputError(f"{source}: is no bundle of this program: {fault}\nAsk whoever packed it for another.")
            copies += [record["run"]] if record["do"] == "copy" else []
        header = Header(what=str(first["what"]), address=tree.store.address, experiment=settings.experiment)
        spool = Spool.create(spool_root, header, name="bundle")
        for info in archive.infolist():
            if info.filename.startswith(f"{FILES}/") and not info.is_dir():
                _write_member(archive, info, spool.folder / info.filename)
    for record in records:
        spool.put(record)
    try:
        delivery = deliver_all(spool, lambda _: tree)
    finally:
        spool.release()
    if not spool.num_refused:
        spool.remove()
    return Unpacked(
        what=header.what,
        run_id=delivery.id_of(copies[0]),
        num_runs=len(copies),
        num_new=len(copies) - len(delivery.complete_before),
        num_refused=spool.num_refused,
    )


def _write_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    """Write a file of a bundle, whose name `_require_inside` has looked at."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(info) as packed, target.open("wb") as written:
        shutil.copyfileobj(packed, written)


def _whole_tree(tree: RunTree, pipeline: Run) -> list[Run]:
    """Return a pipeline and all below it, each after its parent."""
    if pipeline.data.tags.get("level") != Level.pipeline.value:
        above = pipeline.data.tags.get("pipeline")
        raise InputError(
            f"run {pipeline.info.run_id} ({pipeline.info.run_name}) is a part of the pipeline {above}\n"
            "Give bundle.run the id of the pipeline; the MLflow page shows it above its stages."
        )
    runs = [pipeline]
    for run in runs:  # grows while it is walked
        runs += tree.children(run.info.run_id)
    running = [str(run.info.run_name) for run in runs if run.info.status not in [outcome.value for outcome in Outcome]]
    if running:
        raise InputError(
            f"{', '.join(running)} of {pipeline.info.run_name} still runs: a bundle holds runs that have ended\n"
            "Wait for it; stage=doctor closes what killed processes left open."
        )
    return runs


def _put_runs(tree: RunTree, runs: Sequence[Run], spool: Spool, redactor: Redactor) -> None:
    """Put first what makes all runs, so that each can name any other, then what they hold."""
    keys = {str(run.info.run_id): run.data.tags.get(KEY, str(run.info.run_id)) for run in runs}
    for run in runs:
        tags = run.data.tags
        spool.put(
            {
                "do": "copy",
                "run": keys[run.info.run_id],
                "origin": run.info.run_id,
                "from": tree.store.address,
                "name": redactor.text(run.info.run_name),
                "place": {name: tags[name] for name in PLACE},
                "parent": None if run is runs[0] else keys[tags["mlflow.parentRunId"]],
                "start_ms": run.info.start_time,
            }
        )
    for run in runs:
        key = keys[run.info.run_id]
        source = tree.get(run.data.tags.get(REUSED_FROM, run.info.run_id)) or run
        tags = _packed_tags(run, is_alone=run.data.tags.get(REUSED_FROM) not in keys)
        log = {"params": redactor.tree(run.data.params), "tags": redactor.tree(tags), "metrics": _curves(tree, run)}
        spool.put({"do": "log", "run": key, **log})
        read = [] if run.inputs is None else run.inputs.dataset_inputs
        datasets = {one.dataset.name: one.dataset.digest for one in read}
        spool.put({"do": "inputs", "run": key, "datasets": datasets})
        folder = spool.files_folder()
        tree.client.download_artifacts(source.info.run_id, "", str(folder))
        if any(folder.iterdir()):
            _redact_files(folder, redactor)
            shown = folder.relative_to(spool.folder).as_posix()
            spool.put({"do": "files", "run": key, "folder": shown, "to": None})
        spool.put({"do": "end_copy", "run": key, "status": run.info.status, "end_ms": run.info.end_time})


def _packed_tags(run: Run, *, is_alone: bool) -> dict[str, str]:
    """Return a run's tags but those that are not true of a copy; one that stands for a run elsewhere stands for itself."""
    left_out = (*NOT_PACKED, *PLACE)
    tags = {
        key: value for key, value in run.data.tags.items() if key not in left_out and not key.startswith("process.")
    }
    if is_alone and REUSED_FROM in tags:
        tags[REUSED_ELSEWHERE] = tags.pop(REUSED_FROM)
    return tags


def _curves(tree: RunTree, run: Run) -> list[tuple[str, float | str, int, int]]:
    return [
        (name, plain(point.value), point.timestamp, point.step)
        for name in run.data.metrics
        for point in tree.client.get_metric_history(run.info.run_id, name)
    ]


def _redact_files(folder: Path, redactor: Redactor) -> None:
    """Take secrets out of every file that is text."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        path.write_bytes(_redacted(text, redactor, is_json=path.suffix == ".json").encode())


def _redacted(text: str, redactor: Redactor, *, is_json: bool) -> str:
    """Return a text without secrets; JSON stays JSON, because its values are looked at one by one."""
    try:
        return json.dumps(redactor.tree(json.loads(text)), indent=1) if is_json else redactor.text(text)
    except json.JSONDecodeError:
        return redactor.text(text)


def _zip(folder: Path, target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            if name == RECORDS or name.startswith(f"{FILES}/"):
                archive.write(path, name)


def _opened(source: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(source)
    except FileNotFoundError as error:
        raise InputError(f"{source}: there is no such file") from error
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{source}: cannot be read as a bundle ({error}); copy it again") from error


def _require_inside(source: Path, archive: zipfile.ZipFile, spool_root: Path) -> None:
    """Refuse an archive that would write outside of its folder, or more than the disk holds."""
    for info in archive.infolist():
        parts = PurePosixPath(info.filename).parts
        is_plain = info.filename == RECORDS or (len(parts) > 2 and parts[0] == FILES and not info.is_dir())
        is_link = stat.S_ISLNK(info.external_attr >> 16)
        if not is_plain or is_link or ".." in parts or "\\" in info.orig_filename or "\0" in info.orig_filename:
            raise InputError(f"{source}: holds {info.filename!r}, which a bundle may not; nothing was unpacked")
    size = sum(info.file_size for info in archive.infolist())
    there = next(folder for folder in (spool_root.absolute(), *spool_root.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if size > free:
        raise InputError(f"{source}: unpacks to {size / 2**30:.1f} GiB, and {there} has {free / 2**30:.1f} GiB free")


def _records(source: Path, archive: zipfile.ZipFile) -> list[dict[str, Any]]:
    try:
        if archive.getinfo(RECORDS).file_size > LARGEST_RECORDS:
            raise ValueError(f"{RECORDS} is larger than {LARGEST_RECORDS / 2**30:.0f} GiB")
        lines = [json.loads(line) for line in archive.read(RECORDS).splitlines()]
        if not all(isinstance(line, dict) for line in lines):
            raise ValueError("a line is no record")
        if lines[0].get("format") != 1 or not isinstance(lines[0].get("what"), str):
            raise ValueError("its first line is another one")
        if not any(line.get("do") == "copy" for line in lines):
            raise ValueError("it holds no run")
    except (KeyError, IndexError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{source}: is no bundle of this program, or damaged ({error})") from error
    return lines


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_key(value: object) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"[\w\- ]{1,200}", value))


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_texts(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_point(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 4:
        return False
    is_value = isinstance(value[1], float) or _is_number(value[1]) or value[1] in ("nan", "inf", "-inf")
    return _is_text(value[0]) and is_value and _is_number(value[2]) and _is_number(value[3])


def _is_place(value: object) -> bool:
    if not _is_texts(value) or not isinstance(value, dict) or set(value) != set(PLACE):
        return False
    return value["level"] in [level.value for level in Level]


def _is_folder(value: object) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(rf"{FILES}/\w+", value))


SHAPES: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {
    "copy": {
        "origin": lambda value: bool(re.fullmatch(r"[0-9a-f]{32}", str(value))),
        "from": _is_text,
        "name": _is_text,
        "place": _is_place,
        "parent": lambda value: value is None or _is_key(value),
        "start_ms": _is_number,
    },
    "log": {
        "params": _is_texts,
        "tags": lambda value: _is_texts(value) and not any(_is_ours(key) for key in value),
        "metrics": lambda value: isinstance(value, list) and all(map(_is_point, value)),
    },
    "inputs": {"datasets": _is_texts},
    "files": {"folder": _is_folder, "to": lambda value: value is None},
    "end_copy": {
        "status": lambda value: value in [outcome.value for outcome in Outcome],
        "end_ms": lambda value: value is None or _is_number(value),
    },
}
"""Of each record that a bundle may hold, what its values must be; every one names its run too."""


def _is_ours(tag: str) -> bool:
    return tag in NOT_PACKED or tag in PLACE or tag.startswith("process.")


def _fault(record: Record, copies: Collection[str]) -> str:
    """Say what is wrong with a record after those that make these runs; empty when nothing is."""
    shape = SHAPES.get(str(record.get("do")))
    if shape is None:
        return f"a record asks for {record.get('do')!r}"
    if set(record) != {"do", "run", *shape} or not _is_key(record["run"]):
        return f"a record {record['do']!r} is not about a run"
    other = record["parent"] if record["do"] == "copy" else record["run"]
    if other is not None and other not in copies:
        return f"a record {record['do']!r} is about {str(other)[:80]!r}, a run that it did not bring"
    wrong = [name for name, holds in shape.items() if not holds(record[name])]
    return f"{wrong[0]} of a record {record['do']!r} is {str(record[wrong[0]])[:80]!r}" if wrong else ""
