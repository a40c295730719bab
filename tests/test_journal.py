"""The journal contains complete lines in order, also after a full disk or a killed process."""

import errno
import json
import multiprocessing
import os
from pathlib import Path

import pytest
from filelock import Timeout

from prostate_seg.common.errors import InputError
from prostate_seg.tracking.journal import (
    Header,
    Journal,
    merge_metrics,
    pending_journals,
    read_lines,
    remove_replicated,
)
from prostate_seg.tracking.records import LogData, MetricPoint

HEADER = Header(what="train of p", address="http://store", experiment="e", workspace="/w", cache="/w/.cache")


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal.create(tmp_path, HEADER, name="train")


def record(number: int, *, text: str = "") -> LogData:
    return LogData(run="r", tags={"number": str(number), "text": text})


def numbers(journal: Journal) -> list[int]:
    return [int(one.tags["number"]) for one in journal.records() if isinstance(one, LogData)]


def test_journal_round_trip(journal: Journal) -> None:
    for n in range(3):
        assert journal.append(record(n)) == n + 1
    journal.acknowledge(1, ids={"local-a": "b"})
    journal.acknowledge(2, refused="no")
    journal.release()
    again = Journal(journal.folder)
    assert again.header == HEADER
    assert numbers(again) == [0, 1, 2]
    assert (again.num_records, again.num_acknowledged, again.num_refused) == (3, 2, 1)
    assert again.ids == {"local-a": "b"}


def test_every_line_is_readable_json(journal: Journal) -> None:
    points = (MetricPoint("loss", float("nan"), 1, 1), MetricPoint("loss", float("-inf"), 2, 2))
    journal.append(LogData(run="r", tags={"name": "Größe"}, metrics=points))
    lines = (journal.folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    assert "Größe" in lines[1]
    assert all(json.loads(line, parse_constant=pytest.fail) for line in lines)
    (kept,) = journal.records()
    assert isinstance(kept, LogData)
    assert [str(point.value) for point in kept.metrics] == ["nan", "-inf"]


def test_records_of_the_first_version_can_be_read(journal: Journal) -> None:
    journal.release()
    with (journal.folder / "records.jsonl").open("a") as stream:
        stream.write('{"do": "log", "run": "local-a", "metrics": [["loss", "nan", 1, 1], ["loss", 0.5, 2, 2]]}\n')
        stream.write('{"do": "end", "run": "local-a", "status": "FINISHED", "end_ms": 5}\n')
    first, second = Journal(journal.folder).records()
    assert isinstance(first, LogData)
    assert [str(point.value) for point in first.metrics] == ["nan", "0.5"]
    assert second.do == "end"


def test_consecutive_metrics_of_one_run_are_sent_as_one_record() -> None:
    points = [MetricPoint("loss", float(step), step, step) for step in range(4)]
    entries = [(number, LogData(run="r", metrics=(point,))) for number, point in enumerate(points[:2], start=1)]
    entries += [(3, LogData(run="other", metrics=(points[2],))), (4, LogData(run="other", tags={"a": "b"}))]
    merged = list(merge_metrics(entries))
    assert [number for number, _ in merged] == [2, 3, 4]
    assert merged[0][1] == LogData(run="r", metrics=tuple(points[:2]))


def test_line_truncated_by_a_crash_is_dropped_and_the_next_one_is_complete(journal: Journal) -> None:
    journal.append(record(0))
    journal.release()
    with (journal.folder / "records.jsonl").open("a") as stream:
        stream.write('{"n": 1, "metr')
    again = Journal(journal.folder)
    again.append(record(2))
    assert numbers(again) == [0, 2]


def test_full_disk_leaves_complete_lines_and_loses_no_record(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    journal.append(record(0))
    write, num_free = os.write, iter((50, 1))  # the second record does not fit

    def full(file: int, data: bytes) -> int:
        if (num_bytes := next(num_free, 0)) == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[:num_bytes])

    with monkeypatch.context() as disk:
        disk.setattr(os, "write", full)
        journal.append(record(1))
        journal.append(record(2))
        assert journal.flush() is False
    assert numbers(journal) == [0]
    assert journal.flush() is True
    assert numbers(journal) == [0, 1, 2]


def append_for_ever(folder: str, ready: "multiprocessing.synchronize.Event") -> None:
    journal = Journal(Path(folder), wait_seconds=10)
    for n in range(10**9):
        journal.append(record(n, text="x" * 500))
        if n == 200:
            ready.set()


def test_killed_process_leaves_complete_records_and_no_lock(journal: Journal) -> None:
    journal.release()
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=append_for_ever, args=(str(journal.folder), ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(Timeout):
        Journal(journal.folder)
    assert [found.is_locked for found in pending_journals(journal.folder.parent)] == [True]
    process.kill()
    process.join(10)
    again = Journal(journal.folder)
    assert numbers(again) == list(range(again.num_records))
    assert again.num_records > 200


def test_acknowledged_journal_is_not_pending_and_is_removed(journal: Journal) -> None:
    root = journal.folder.parent
    journal.append(record(0))
    assert [found.num_records for found in pending_journals(root)] == [1]
    journal.acknowledge(1)
    assert pending_journals(root) == []
    remove_replicated(root)
    assert journal.folder.is_dir()  # its process is still running
    journal.release()
    remove_replicated(root)
    assert not journal.folder.exists()


def test_journal_without_records_is_not_removed(journal: Journal) -> None:
    journal.release()
    remove_replicated(journal.folder.parent)
    assert journal.folder.is_dir()


@pytest.mark.parametrize(
    "text", ["", "notes\n", '{"format": 2, "what": "x"}\n', '{"format": 1, "surprise": "x"}\n', "[]\n"]
)
def test_folder_that_is_not_a_journal_is_refused_with_a_message(tmp_path: Path, text: str) -> None:
    (tmp_path / "records.jsonl").write_text(text)
    with pytest.raises(InputError, match="is not what a stage writes; move the folder away"):
        Journal(tmp_path)


def test_acknowledgement_of_another_format_is_refused(journal: Journal) -> None:
    journal.append(record(0))
    journal.release()
    (journal.folder / "delivered.jsonl").write_text('{"number": 1}\n')
    with pytest.raises(InputError, match="is not what a stage writes; move the folder away"):
        Journal(journal.folder)
    assert [(found.num_records, found.is_locked) for found in pending_journals(journal.folder.parent)] == [(1, False)]


def test_journal_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file cannot be written: .*\n.*paths.journal"):
        Journal.create(tmp_path / "file", HEADER, name="train")


def test_lines_of_an_absent_file_are_none(tmp_path: Path) -> None:
    assert list(read_lines(tmp_path / "absent")) == []
