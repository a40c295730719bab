"""Tells a store what one folder of the spool holds, record by record and in order.

Every record may be told again without harm, because nobody knows whether a call that failed went through: a run is found by
its key before it is made, points of a curve that the store has are left out, and all else replaces itself.
"""

import json
import logging
import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from prostate_seg.common.address import shown_address
from prostate_seg.common.files import write_text
from prostate_seg.operations.job import Outcome
from prostate_seg.operations.process import now_text
from prostate_seg.provenance.ds_version import LOCAL_ID
from prostate_seg.tracking import placing, sweeps
from prostate_seg.tracking.journal import Record, Spool
from prostate_seg.tracking.run_tree import CLOSED_BY, COPIED_FROM, KEY, Level, Place, RunTree

log = logging.getLogger(__name__)

REFUSALS = ("INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST")
"""What a store answers that will never take a record; every other error may pass."""
IS_WHOLE = "bundle.is_whole"
"""Tag of a run that came in a bundle, once all of it is there."""
_ID = re.compile(r"\b(?:local-)?[0-9a-f]{32}\b")


class Delivery:
    """Tells one store what one folder holds. Any thread may deliver; they take turns."""

    def __init__(
        self, spool: Spool, connect: Callable[[], RunTree], *, again: bool = False, draw: sweeps.Draw = lambda *_: None
    ) -> None:
        """Prepare to deliver.

        Args:
            spool: The folder.
            connect: Opens the store, when it is first needed.
            again: Whether some of it may have been delivered before.
            draw: Draws figures of the trials of a sweep.
        """
        self.spool = spool
        self._connect = connect
        self._draw = draw
        self._opened: RunTree | None = None
        self._again = self._in_doubt = again
        self._turn = threading.Lock()
        self._curves: dict[tuple[str, str], set[tuple[str, int, float]]] = {}
        """Step with time, and step with value, of the points that the store has, by run and name; of those asked for."""
        self.complete_before: set[str] = set()
        """Runs of a bundle that the store had."""

    @property
    def tree(self) -> RunTree:
        """The store, opened."""
        if self._opened is None:
            self._opened = self._connect()
        return self._opened

    def deliver(self, number: int, record: Record) -> None:
        """Tell the store one record, unless it has taken it before, and note that it has.

        Raises:
            STORE_ERRORS, InputError: If the store cannot be reached, or fails.
        """
        with self._turn:
            if number <= self.spool.num_delivered:
                return
            try:
                ids, refused = self._tell(record), None
            except MlflowException as error:
                if error.error_code not in REFUSALS:
                    self._doubt()
                    raise
                ids, refused = {}, shown_address(str(error).splitlines()[0])
                log.warning("the tracking store refuses a record of %s: %s", self.spool.header.what, refused)
            except BaseException:
                self._doubt()
                raise
            self._in_doubt = self._again
            self.spool.note(number, ids=ids, refused=refused)
            if record["do"] == "files":
                shutil.rmtree(self._files_of(record), ignore_errors=True)

    def id_of(self, key: str) -> str:
        """Return the store's id of a run; the local one as long as there is no other."""
        return self.spool.ids.get(key, key)

    def beat(self, key: str) -> None:
        """Give a sign of life."""
        if self._opened is not None and key in self.spool.ids:
            self._opened.client.set_tag(self.id_of(key), "process.heartbeat", now_text())

    def with_ids(self, text: str) -> str:
        """Return a text with the store's ids in place of local ones, and in a copy of those of its origin."""
        return _ID.sub(lambda found: self._looked_up(found[0]), text)

    def _looked_up(self, key: str) -> str:
        if key in self.spool.ids or not LOCAL_ID.fullmatch(key):
            return self.spool.ids.get(key, key)
        run = self.tree.find(key)
        return key if run is None else str(run.info.run_id)

    def _doubt(self) -> None:
        """Ask what the store has before it is told anything again."""
        self._in_doubt = True
        self._curves.clear()

    def _tell(self, record: Record) -> Mapping[str, str]:
        """Make the calls of a record; return the ids of runs that it made."""
        if record.get("run") in self.complete_before:
            return {}
        ids: Mapping[str, str] | None = {
            "stage": self._open_stage,
            "fold": self._open_fold,
            "copy": self._copy_run,
            "end_copy": self._end_copy,
            "log": self._log,
            "files": self._send_files,
            "inputs": self._log_inputs,
            "end": self._end,
            "place": self._place,
            "multirun": self._begin_multirun,
            "complete": lambda record: sweeps.complete(self.tree, Path(record["place"])),
            "end_multirun": self._end_multirun,
        }[record["do"]](record)
        return ids or {}

    def _open_stage(self, record: Record) -> Mapping[str, str]:
        """Find or make the parents, and the run of a stage."""
        with self.tree.store.lock:
            opened = placing.open_stage(self.tree, record)
        run_id = str(opened.run.info.run_id)
        resumed = {_resumed(run_id): "yes"} if opened.is_resumed else {}
        return {record["run"]: run_id, record["pipeline_key"]: str(opened.pipeline.info.run_id), **resumed}

    def _begin_multirun(self, record: Record) -> None:
        """Make the run of a sweep, unless one of its trials was delivered before and has."""
        with self.tree.store.lock:
            if record["place"] is None or self.tree.sweep(sweeps.sweep_key(Path(record["place"]))) is None:
                sweeps.begin(self.tree, record)

    def _end_multirun(self, record: Record) -> None:
        sweeps.end(self.tree, Path(record["place"]), draw=self._draw)

    def _open_fold(self, record: Record) -> Mapping[str, str]:
        """Make the run of a fold, or go on in that of the same fold in a stage that was started before."""
        parent_id = self.id_of(record["parent"])
        begun = next(iter(self.tree.children(parent_id, fold=record["fold"])), None)
        if begun is None:
            tags = self.tree.client.get_run(parent_id).data.tags
            where = Place(
                level=Level.fold,
                pipeline=tags["pipeline"],
                stage=tags["stage"],
                fold=record["fold"],
                sweep=tags["sweep"],
            )
            name, key = f"fold{record['fold']}", record["run"]
            run = self.tree.create(name, where, parent_id=parent_id, start_ms=record["start_ms"], key=key)
            return {record["run"]: str(run.info.run_id)}
        run_id = str(begun.info.run_id)
        if begun.data.tags.get(KEY) == record["run"]:
            return {record["run"]: run_id}
        self.tree.take_over(begun)
        return {record["run"]: run_id, _resumed(run_id): "yes"}

    def _copy_run(self, record: Record) -> Mapping[str, str]:
        """Make the run of a bundle, unless the store has it; a copy that is complete, and the original, stay as they are."""
        key = record["run"]
        there = self.tree.find(key) or self.tree.get(key)
        if there is None:
            where = Place(**{**record["place"], "level": Level(record["place"]["level"])})
            parent_id = None if record["parent"] is None else self.id_of(record["parent"])
            origin = {COPIED_FROM: record["from"]}
            name, start_ms = record["name"], record["start_ms"]
            there = self.tree.create(name, where, parent_id=parent_id, tags=origin, start_ms=start_ms, key=key)
        elif COPIED_FROM not in there.data.tags or there.data.tags.get(IS_WHOLE) == "true":
            self.complete_before.add(key)
        return {key: str(there.info.run_id), record["origin"]: str(there.info.run_id)}

    def _end_copy(self, record: Record) -> None:
        self.tree.client.set_tag(self.id_of(record["run"]), IS_WHOLE, "true")
        self.tree.client.set_terminated(self.id_of(record["run"]), record["status"], record["end_ms"])

    def _log(self, record: Record) -> None:
        run_id = self.id_of(record["run"])
        points = [Metric(name, float(value), stamp, step) for name, value, stamp, step in record.get("metrics", ())]
        tags = {key: self.with_ids(value) for key, value in record.get("tags", {}).items()}
        self.tree.log(run_id, params=record.get("params"), tags=tags, points=self._missing(run_id, points))

    def _missing(self, run_id: str, points: Sequence[Metric]) -> Sequence[Metric]:
        """Leave out the points that the store has; it is asked only where it may have some."""
        is_resumed = _resumed(run_id) in self.spool.ids
        if not is_resumed and not self._in_doubt:
            return points
        left = []
        for point in points:
            curve = self._curve(run_id, point.key)
            is_there = ("time", point.step, point.timestamp) in curve
            if not is_there and not (is_resumed and ("value", point.step, point.value) in curve):
                left.append(point)
                curve |= _facts(point)
        return left

    def _curve(self, run_id: str, name: str) -> set[tuple[str, int, float]]:
        if (run_id, name) not in self._curves:
            history = self.tree.client.get_metric_history(run_id, name)
            self._curves[run_id, name] = {fact for point in history for fact in _facts(point)}
        return self._curves[run_id, name]

    def _send_files(self, record: Record) -> None:
        folder = self._files_of(record)
        if not folder.is_dir():
            raise MlflowException(f"{folder} is gone", INVALID_PARAMETER_VALUE)
        provenance = folder / "provenance.json"
        if provenance.is_file():
            write_text(provenance, self.with_ids(provenance.read_text(encoding="utf-8")))
        self.tree.client.log_artifacts(self.id_of(record["run"]), str(folder), record["to"])

    def _files_of(self, record: Record) -> Path:
        return self.spool.folder / record["folder"]  # an absolute one stays as it is

    def _log_inputs(self, record: Record) -> None:
        datasets = [_dataset(key, md5) for key, md5 in record["datasets"].items()]
        self.tree.client.log_inputs(self.id_of(record["run"]), datasets)

    def _end(self, record: Record) -> None:
        run_id = self.id_of(record["run"])
        self.tree.client.set_terminated(run_id, record["status"], record["end_ms"])
        if self._in_doubt and CLOSED_BY in self.tree.client.get_run(run_id).data.tags:
            self.tree.client.delete_tag(run_id, CLOSED_BY)  # meanwhile, for want of this record

    def _place(self, record: Record) -> None:
        upstream = json.loads(self.with_ids(json.dumps(record["upstream"])))
        run_id, pipeline_id = self.id_of(record["run"]), self.id_of(record["pipeline_key"])
        with self.tree.store.lock:
            placing.place(self.tree, {**record, "upstream": upstream}, run_id=run_id, pipeline_id=pipeline_id)
            ended_ms = record["end_ms"] if self._in_doubt else None
            self.tree.settle(pipeline_id, Outcome(record["status"]), ended_ms=ended_ms)


def _resumed(run_id: str) -> str:
    """Return what notes that another process began a run: training repeats the epochs after which it goes on."""
    return f"resumed {run_id}"


def _facts(point: Metric) -> set[tuple[str, int, float]]:
    return {("time", point.step, point.timestamp), ("value", point.step, point.value)}


def _dataset(key: str, md5: str) -> DatasetInput:
    dataset = Dataset(name=key, digest=md5, source_type="local", source=json.dumps({"path": key}))
    return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", "input")])
